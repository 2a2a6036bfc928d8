"""The version of the package, for Python and for the build alike."""

__version__ = "0.2.0"
