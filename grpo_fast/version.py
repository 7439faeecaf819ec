"""The version of the package, for setup.py and for result files."""

__version__ = "0.2.0"
