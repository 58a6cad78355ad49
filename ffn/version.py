"""The version of the package; `pip` reads it from here as well."""

__version__ = "0.1.0"
