"""A GGUF file's vocabulary as tokenizer.json, tokenizer_config.json and generation_config.json.

Two kinds of vocabulary: "gpt2" has merges and names the rule that cuts text into words; "llama" is a
SentencePiece BPE, whose merges are found again from the scores of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from engine.gguf.container import GGUF

Json = dict[str, Any]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_WORDS.format(digits=r"\p{N}{1,3}"),)
_QWEN2 = (_WORDS.format(digits=r"\p{N}"),)
# By `tokenizer.ggml.pre`: the expressions that cut text into words, one after the other.
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_SPACE = "▁"


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TextParts(NamedTuple):
    """The three files."""

    tokenizer: Json
    config: Json
    generation: Json


class _Vocabulary:
    """The tokens, and what the metadata says of them."""

    def __init__(self, file: GGUF) -> None:
        self._file = file
        self.tokens: list[str] = self.list("tokens", str, [])
        self.kinds: list[int] = self.list("token_type", int, [Kind.NORMAL] * len(self.tokens))
        self.scores: list[float] = self.list("scores", float, [0.0] * len(self.tokens))
        if not self.tokens or not len(self.tokens) == len(self.kinds) == len(self.scores):
            raise file.error("tokenizer.ggml.tokens, token_type and scores must be lists of one length.")
        self.ids = {t: i for i, t in enumerate(self.tokens) if self.kinds[i] != Kind.UNUSED}

    def text(self, key: str, default: str = "") -> str:
        return self._file.get(f"tokenizer.ggml.{key}", str) or default

    def switch(self, key: str, default: bool) -> bool:
        return bool(self._file.get(f"tokenizer.ggml.{key}", bool, default))

    def list(self, key: str, of: type, default: list[Any]) -> list[Any]:
        found = self._file.get(f"tokenizer.ggml.{key}", list) or default
        if not all(isinstance(value, of) for value in found):
            raise self._file.error(f"tokenizer.ggml.{key} is not a list of {of.__name__}.")
        return found

    def named(self, name: str) -> str | None:
        """The text of the BOS token, and so on."""
        token_id = self._file.get(f"tokenizer.ggml.{name}_token_id", int)
        known = token_id is not None and 0 <= token_id < len(self.tokens)
        return self.tokens[token_id or 0] if known else None


def read_text(file: GGUF) -> TextParts:
    """
    Raises:
        ModelError: a kind of vocabulary, or a rule for words, that is not known.
    """
    vocabulary = _Vocabulary(file)
    kind, pre = vocabulary.text("model"), vocabulary.text("pre", "default")
    if kind == "llama":
        parts = _sentencepiece(vocabulary)
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        parts = _byte_level(vocabulary, pre)
    else:
        what = f"tokenizer.ggml.pre {pre!r}" if kind == "gpt2" else f"tokenizer.ggml.model {kind!r}"
        known = f"gpt2 with {', '.join(PRE_TOKENIZERS)}, and llama"
        raise file.error(f"{what} is not supported; known: {known}. Serve the original checkpoint.")
    starts = vocabulary.switch("add_bos_token", kind == "llama" or PRE_TOKENIZERS[pre] is _LLAMA3)
    tokenizer = {
        "version": "1.0",
        "added_tokens": list(_added(vocabulary)),
        "post_processor": _around(vocabulary, starts, vocabulary.switch("add_eos_token", False)),
        **parts,
    }
    return TextParts(tokenizer, _tokenizer_config(file, vocabulary), _generation(file))


def _byte_level(vocabulary: _Vocabulary, pre: str) -> Json:
    words = PRE_TOKENIZERS[pre]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words
    ]
    merges = [merge.split(" ", 1) for merge in vocabulary.list("merges", str, [])]
    return {
        # llama.cpp leaves this out; Qwen's own tokenizer has it.
        "normalizer": {"type": "NFC"} if words is _QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_]},
        "decoder": bytes_,
        "model": {
            "type": "BPE", "vocab": vocabulary.ids, "merges": merges, "ignore_merges": words is _LLAMA3
        },
    }  # fmt: skip


def _sentencepiece(vocabulary: _Vocabulary) -> Json:
    prefixed = vocabulary.switch("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prepend = [{"type": "Prepend", "prepend": _SPACE}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": prepend * prefixed + [spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip * prefixed],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary.ids,
            "merges": _merges(vocabulary),
            "unk_token": vocabulary.named("unknown") or vocabulary.tokens[0],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the pieces of the best score first."""
    found: list[tuple[float, int, str, str]] = []
    for piece, token_id in vocabulary.ids.items():
        if vocabulary.kinds[token_id] != Kind.NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary.ids and right in vocabulary.ids:
                found.append((-vocabulary.scores[token_id], token_id, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _added(vocabulary: _Vocabulary) -> Iterator[Json]:
    """Tokens that are found in text before it is cut into words."""
    for token, token_id in vocabulary.ids.items():
        kind = vocabulary.kinds[token_id]
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            yield {"id": token_id, "content": token, "special": kind != Kind.USER_DEFINED}


def _around(vocabulary: _Vocabulary, starts: bool, ends: bool) -> Json | None:
    """The tokens that every text gets before and after it."""
    before = [token for token in [vocabulary.named("bos")] if starts and token]
    after = [token for token in [vocabulary.named("eos")] if ends and token]
    if not before + after:
        return None

    def template(*sequences: str) -> list[Json]:
        pieces = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        special = [
            [{"SpecialToken": {"id": token, "type_id": 0}} for token in side] for side in (before, after)
        ]
        return [*special[0], *pieces, *special[1]]

    tokens = {t: {"id": t, "ids": [vocabulary.ids[t]], "tokens": [t]} for t in before + after}
    return {
        "type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"),
        "special_tokens": tokens,
    }  # fmt: skip


def _tokenizer_config(file: GGUF, vocabulary: _Vocabulary) -> Json:
    named = {theirs: vocabulary.named(name) for name, theirs in _NAMED.items()}
    templates = {
        name: file.metadata.get(f"tokenizer.chat_template.{name}")
        for name in file.get("tokenizer.chat_templates", list, []) or []
    }
    templates["default"] = file.metadata.get("tokenizer.chat_template")
    return {**named, "chat_template": templates}


def _generation(file: GGUF) -> Json:
    """How the model's authors would sample."""
    found = {theirs: file.metadata.get(f"general.sampling.{name}") for name, theirs in _SAMPLING.items()}
    return {k: v for k, v in found.items() if v is not None}
