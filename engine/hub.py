"""Finding a checkpoint: a local folder or GGUF file, or a hub repository downloaded or cached.

The only file that knows the hub. It fetches configs, tokenizer files and safetensors, never pickles or code.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from engine.errors import ModelError
from engine.gguf.container import SUFFIX, is_gguf

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
# Other copies of the same weights, in the trainers' own formats.
OTHER_FORMATS = ["original/*", "consolidated*", "onnx/*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(model: str, *, weights: bool) -> Path:
    """The local folder of a checkpoint, or its file where it is one in GGUF.

    Args:
        model: a folder, a GGUF file, or a hub id, possibly with a revision: `name/repository@revision`.
        weights: whether the weights are needed too, not only the configs and the tokenizer.

    Raises:
        ModelError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    path = Path(model)
    if model and os.path.isdir(path):
        return _only_gguf(path) or path
    if model and os.path.isfile(path):
        if is_gguf(path):
            return path
        raise ModelError(f"{path.name} is a file; give the folder that holds config.json, or a GGUF file.")
    repository, _, revision = model.partition("@")
    if not HUB_ID.fullmatch(repository):
        raise ModelError(f"Model {model!r}: there is no such folder, and it is not a hub id.")
    return _download(repository, revision or None, SMALL_FILES + WEIGHT_FILES * weights)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ModelError(f"{folder.name} holds {len(files)} GGUF files; name the one to serve: {names}.")
    return files[0]


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS
        )
    # The library raises a dozen unrelated types (its own, requests', httpx', OSError) for "not to be had".
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:200]
        raise ModelError(
            f"Model {repository!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}: {first_line})"
        ) from error
    return Path(folder)
