"""The version of d2ext, importable without PyTorch."""

__version__ = "0.2.0"
