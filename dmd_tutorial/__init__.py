"""Distribution matching distillation, piece by piece."""

__version__ = "0.1.0"
