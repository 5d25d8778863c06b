"""Distribution matching distillation, piece by piece: the package behind the book.

Every room is a file, and each imports only from rooms below it. One interface runs through
all of them: ``denoised = D(x, sigma, label=None)``.
"""

__version__ = "0.1.0"
