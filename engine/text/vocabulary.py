"""What each token id stands for: its string, its bytes, and whether it controls the model.

Reads a tokenizer.json as data. It does not encode or decode; tokenizer.py and detokenizer.py do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# <|...|>, also with the full-width bars some models use: nobody writes that as prose.
_BARRED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


def added_tokens(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], named: Iterable[str]
) -> list[dict[str, Any]]:
    """The added tokens by id: tokenizer.json's, overridden and completed by tokenizer_config.json's.

    A named token (BOS, EOS ...) that only the model's vocabulary knows is special as well.
    """
    entries = {entry["id"]: dict(entry) for entry in tokenizer.get("added_tokens") or []}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        token_id = int(key)
        entries[token_id] = entries.get(token_id, {}) | dict(entry) | {"id": token_id}
    known = {entry["content"] for entry in entries.values()}
    for token_id, token in enumerate(token_strings(tokenizer["model"], ())):
        if token in named and token not in known:
            entries[token_id] = {"id": token_id, "content": token, "special": True}
    return [_complete(entries[token_id]) for token_id in sorted(entries)]


def _complete(entry: dict[str, Any]) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    known = {name: entry.get(name, default) for name, default in defaults.items()}
    return {"id": entry["id"], "content": entry["content"], **known}


def token_strings(model: Mapping[str, Any], added: Iterable[Mapping[str, Any]]) -> list[str]:
    """Token id -> token as tokenizer.json writes it; "" where an id is not used."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        pairs = {int(token_id): token for token, token_id in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: (token, score), the id is the position
        pairs = {token_id: entry[0] for token_id, entry in enumerate(vocab)}
    else:
        raise ModelError("tokenizer.json has no vocabulary. Download it again.")
    pairs |= {entry["id"]: entry["content"] for entry in added}
    strings = [""] * (max(pairs, default=-1) + 1)
    for token_id, token in pairs.items():
        strings[token_id] = token
    return strings


def control_ids(
    added: Iterable[Mapping[str, Any]], named: Iterable[str], templates: Iterable[str]
) -> dict[str, int]:
    """The tokens that steer the model, as text -> id: what a user's text must never become.

    These are the special ones, those that look like <|this|>, and any other added token that a chat
    template writes (Qwen's <think> and <tool_call> are not marked special). Other added tokens are
    ordinary text with an id of their own: runs of spaces and newlines, HTML tags.
    """
    named, sources = set(named), tuple(templates)
    found = {}
    for entry in added:
        text = entry["content"]
        if not text or (text.isspace() and not entry["special"]):
            continue
        written = not text.isalnum() and any(text in source for source in sources)
        if entry["special"] or text in named or _BARRED.fullmatch(text) or written:
            found[text] = entry["id"]
    return found


ByteTable = list[bytes]


def byte_table(
    strings: list[str], added: Iterable[Mapping[str, Any]], decoder: Mapping[str, Any] | None
) -> tuple[ByteTable, int] | None:
    """Token id -> the bytes it adds to the text, and how many leading spaces a text's start loses.

    None where no such table exists because the decoder looks at a token's neighbours.
    """
    rule = _byte_rule(decoder)
    if rule is None:
        return None
    to_bytes, strip = rule
    table = [to_bytes(token) if token else b"" for token in strings]
    for entry in added:
        literal = entry["content"]
        table[entry["id"]] = literal.encode() if _is_byte_level(decoder) else to_bytes(literal)
    return table, strip


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    return [step["type"] for step in _steps(decoder)] == ["ByteLevel"]


def _byte_rule(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], int] | None:
    """How a token becomes bytes when its neighbours do not matter."""
    if decoder is None:
        return (lambda token: b" " + token.encode()), 1  # without a decoder tokens are joined by spaces
    if _is_byte_level(decoder):
        return _byte_level, 0
    replaced: list[tuple[str, str]] = []
    fallback, strip = False, 0
    for step in _steps(decoder):
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            fallback = True
        elif kind == "Metaspace":
            replaced.append((step["replacement"], " "))
            strip = 0 if step.get("prepend_scheme", "always") == "never" else 1
        elif kind == "Strip" and step["content"] == " " and not step["stop"]:
            strip = step["start"]
        elif kind != "Fuse":
            return None
    return (lambda token: _piece(token, replaced, fallback)), strip


def _piece(token: str, replaced: list[tuple[str, str]], fallback: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token) if fallback else None
    if byte:
        return bytes([int(byte[1], 16)])
    for old, new in replaced:
        token = token.replace(old, new)
    return token.encode()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
