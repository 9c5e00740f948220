"""The small demo model that ships with Quire.

Knows: where its files are. Does not know: how to read or run them. Made by `make builtin-model`.
"""

from pathlib import Path


def path() -> Path:
    """The model directory, in Hugging Face form, with its card as README.md."""
    return Path(__file__).parent / "model"
