"""Print what the named extras of pyproject.toml need here, one requirement a line: extras.py test lint ..."""

import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for extra in sys.argv[1:]:
    for text in project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            requirement.marker = None
            print(requirement)
