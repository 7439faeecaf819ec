"""The version of the package, for setup and for whatever writes it into a result."""

__version__ = "0.1.0"
