"""A stream that says its token ids, for `return_token_ids`. Knows chunks as JSON, not what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.types import TokenEvent
from server.render import Frames, encode

_LEAD, _END = b"data: ", b"\n\n"
_decode = msgspec.json.Decoder().decode


class TokenIdChunks:
    """Frames with `token_ids` in each choice, and the prompt's ids in the first of each prompt.

    A frame has the ids of all tokens since the frame before, also of those that showed no text.

    Args:
        chunks: the stream without ids.
        prompts: each prompt's ids. n: choices per prompt.
        per_choice: the prompt's ids are in each choice, as in completions; else beside the choices, once.
    """

    def __init__(self, chunks: Frames, prompts: Sequence[Sequence[int]], n: int, *, per_choice: bool) -> None:
        self._chunks = chunks
        self._prompts = prompts
        self._n = n
        self._per_choice = per_choice
        self._waiting: dict[int, list[int]] = {}
        self._told: set[int] = set()
        self.end = chunks.end
        self.failed = chunks.failed
        self.keep_alive = chunks.keep_alive

    def begin(self) -> bytes:
        return self._with_ids(self._chunks.begin(), [])

    def event(self, choice: int, event: TokenEvent) -> bytes:
        waiting = self._waiting.setdefault(choice, [])
        waiting += event.token_ids
        frames = self._chunks.event(choice, event)
        if not frames:
            return b""
        del self._waiting[choice]
        return self._with_ids(frames, waiting)

    def _with_ids(self, frames: bytes, token_ids: Sequence[int]) -> bytes:
        """The ids are those of the last frame."""
        chunks = [_decode(frame.removeprefix(_LEAD)) for frame in frames.split(_END) if frame]
        for at, chunk in enumerate(chunks, 1):
            (choice,) = chunk["choices"]
            choice["token_ids"] = token_ids if at == len(chunks) else []
            self._tell_prompt(choice["index"], chunk)
        return b"".join(_LEAD + encode(chunk) + _END for chunk in chunks)

    def _tell_prompt(self, choice: int, chunk: dict[str, Any]) -> None:
        who = choice if self._per_choice else 0
        if who in self._told:
            return
        self._told.add(who)
        place: dict[str, Any] = chunk["choices"][0] if self._per_choice else chunk
        place["prompt_token_ids"] = self._prompts[choice // self._n]
