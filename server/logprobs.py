"""Log probabilities in OpenAI's two shapes: the chat one (with bytes) and the legacy one (with offsets).

Knows token texts and the shapes; does not know requests or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.types import TokenLogprob
from server.prompts import Tokenizer

# JSON has no minus infinity; this is what clients have learnt to read as "impossible".
FLOOR = -9999.0


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = [
        {
            **_chat_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": max(logprob, FLOOR),
        "bytes": list(raw),
    }


def prompt_entries(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], most: int
) -> list[dict[str, Any] | None]:
    """A prompt's, in vLLM's shape: by token id, the token's own among the likeliest `most`."""
    return [None if entry is None else _by_id(tokenizer, entry, most) for entry in logprobs]


def _by_id(tokenizer: Tokenizer, entry: TokenLogprob, most: int) -> dict[str, Any]:
    """`rank` is null where the token is not among those that were looked at."""
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top[:most], 1)}
    return {
        str(token_id): {
            "logprob": max(logprob, FLOOR),
            "rank": ranks.get(token_id),
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob in {entry.token_id: entry.logprob, **dict(entry.top[:most])}.items()
    }


class LegacyLogprobs:
    """The parallel lists of one completion choice, grown token by token.

    `tokens[i]` is always a key of `top_logprobs[i]`: evaluation harnesses look it up there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def lists(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """The lists for the next tokens; a None has no probability (the first of a prompt)."""
        tokens = [self._name(token_id) for token_id in token_ids]
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else max(entry.logprob, FLOOR) for entry in logprobs],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in logprobs],
            "text_offset": [self._next_offset(token) for token in tokens],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), max(logprob, FLOOR))
        return top

    def _next_offset(self, token: str) -> int:
        offset = self._offset
        self._offset += 0 if token.startswith("bytes:") else len(token)
        return offset

    def _name(self, token_id: int) -> str:
        """The token's text, or `bytes:\\xe2` for a part of a character, so that tokens stay distinct."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
