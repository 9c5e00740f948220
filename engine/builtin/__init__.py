"""The small model that ships with Quire. A demo: it only knows Quire."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of its checkpoint, in Hugging Face form."""
    return Path(__file__).parent / "model"
