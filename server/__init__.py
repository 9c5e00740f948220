"""The HTTP front end. It knows requests and text; it has never heard of tensors."""

__version__ = "0.1.0"
