"""Where a model's tokenizer and chat template are: beside local weights, or in the hub's cache.

Knows folders and hub ids; does not know what is in the files. The engine process finds the weights itself.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError

_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


def text_folder(model: str) -> Path:
    """The local folder of a model's small files; a hub id is fetched if it is not cached.

    Raises:
        ModelError: neither a folder nor to be had from the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelError(f"Model {model!r}: there is no such folder.")
    repository, _, revision = model.partition("@")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_TEXT_FILES))
    # The library raises many unrelated types (its own, its HTTP client's, OSError) for "not to be had".
    except Exception as exc:
        raise ModelError(
            f"Model {model!r} is no local folder and could not be had from the hub ({type(exc).__name__}). "
            "Check the name, the network, or HF_HUB_OFFLINE."
        ) from exc
