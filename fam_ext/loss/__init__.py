"""FAMLoss and RelativeFlatness: one call of a loss, from the captured layers to the sum of their terms."""
