"""Other libraries: helpers that put fam_ext into them. None of them is a dependency."""
