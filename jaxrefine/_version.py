"""The version of the package, the only place that it stands in."""

__version__ = "0.1.0"
