"""Print what the named extras of the installed package need here, one requirement a line: extras.py test lint ..."""

import importlib.metadata
import sys

from pip._vendor.packaging.requirements import Requirement

for text in importlib.metadata.requires("fam_ext") or []:
    requirement = Requirement(text)
    marker = requirement.marker
    if marker is not None and any(marker.evaluate({"extra": extra}) for extra in sys.argv[1:]):
        requirement.marker = None
        print(requirement)
