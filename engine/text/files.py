"""The text side of a checkpoint directory: what its JSON files and templates say, unread by anyone else.

Knows file names and where each setting may hide. Does not know what a token or a template means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.gguf.container import is_gguf, read_gguf
from engine.gguf.text import read_text

DEFAULT_TEMPLATE = "default"
# Names under which a tokenizer keeps a token for its own use; templates see them as variables.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLING_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Everything read once, at start-up.

    Attributes:
        tokenizer: tokenizer.json.
        config: tokenizer_config.json, or empty.
        named_tokens: bos_token, eos_token ... -> the token's text.
        generation: generation_config.json, or empty.
        templates: chat templates by name; the usual one is called "default".
    """

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    named_tokens: dict[str, str]
    generation: dict[str, Any]
    templates: dict[str, str]


def read_text_files(model: str | Path) -> TextFiles:
    """Reads the text side of a checkpoint: a folder, or a GGUF file.

    Raises:
        ModelError: a file is missing or unreadable, with what to do about it.
    """
    folder = Path(model)
    if is_gguf(folder):
        return _from_gguf(folder)
    tokenizer = _read_json(folder / "tokenizer.json")
    if tokenizer is None:
        raise ModelError(
            "The model has no tokenizer.json. Make one with transformers: "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)."
        )
    config = _read_json(folder / "tokenizer_config.json") or {}
    special = _read_json(folder / "special_tokens_map.json") or {}
    return TextFiles(
        tokenizer=tokenizer,
        config=config,
        named_tokens=_named_tokens(special) | _named_tokens(config),
        generation=_read_json(folder / "generation_config.json") or {},
        templates=_templates(folder, config),
    )


def _from_gguf(file: Path) -> TextFiles:
    text = read_text(read_gguf(file))
    return TextFiles(
        tokenizer=text.tokenizer,
        config=text.config,
        named_tokens=_named_tokens(text.config),
        generation=text.generation,
        templates=_templates_in(text.config.get("chat_template")),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} cannot be read ({type(error).__name__}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} does not hold a JSON object. Download it again.")
    return content


def _named_tokens(source: Mapping[str, Any]) -> dict[str, str]:
    """Each named token is a string, or an object with the string in `content`."""
    found = {}
    for name in NAMED_TOKENS:
        value = source.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates, the later source overriding the earlier: in the config, as JSON, as files."""
    templates = _templates_in(config.get("chat_template"))
    templates |= _templates_in((_read_json(folder / "chat_template.json") or {}).get("chat_template"))
    try:
        main = folder / "chat_template.jinja"
        if main.is_file():
            templates[DEFAULT_TEMPLATE] = main.read_text(encoding="utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError("A chat template file cannot be read as UTF-8 text.") from error
    return templates


def _templates_in(value: object) -> dict[str, str]:
    """One template is a string; several are a list of {name, template}, or an object."""
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict)]
        value = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}
    return {}


def sampling_defaults(files: TextFiles) -> dict[str, float]:
    """What the model's authors would sample with: fields of SamplingParams, from generation_config.json.

    An explicit `"do_sample": false` is greedy. Values out of range are left out: they are the checkpoint's
    fault, not that of a request which did not mention them.
    """
    generation = files.generation
    found: dict[str, float] = {}
    for name, (low, high) in _SAMPLING_RANGES.items():
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            found[name] = value
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
