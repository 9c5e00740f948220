"""Which of a rendered prompt's tokens are which message's.

A template may put anything around a message, and strip, move or drop what is in it. So the conversation is
rendered once more with two marks in each message, characters that occur nowhere in it; what stands between a
message's marks is its own text. The marked text and the prompt's tokens are then laid side by side, white
space left out, because templates and tokenizers differ in that alone. Where they differ in more, nothing is
said rather than something wrong.

Knows templates and tokenizers by their interface only.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

# Some tokenizers compose characters.
_FORMS: tuple[Callable[[str], str], ...] = (str, partial(unicodedata.normalize, "NFC"))
# Private-use characters that the templates' own marks are not taken from.
_CANDIDATES = range(0xE000, 0xF8FF)

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class MessageSpan:
    """One message's content: tokens start to end of the prompt. Empty where the message is."""

    role: str
    start: int
    end: int


def find(
    ids: Sequence[int],
    messages: Messages,
    render_text: Callable[[Messages], str],
    token_bytes: Callable[[int], bytes],
) -> tuple[MessageSpan, ...] | None:
    """The messages' spans, or None where they cannot be told.

    Args:
        render_text: the template, to text with control tokens by name.
    """
    marks = _free_marks(messages)
    if marks is None:
        return None
    pieces = _pieces(render_text([_marked(message, *marks) for message in messages]), *marks)
    contents = [_content(message).strip() for message in messages]
    if pieces is None or not _are(pieces, [content for content in contents if content]):
        return None
    places = _visible_places(ids, token_bytes)
    for form in _FORMS:
        shown = [form("".join(piece.split())) for piece in pieces]
        if places is not None and "".join(shown) == places.text:
            return _spans(messages, contents, list(accumulate(map(len, shown))), places)
    return None


def _spans(
    messages: Messages, contents: Sequence[str], ends: Sequence[int], places: _Places
) -> tuple[MessageSpan, ...]:
    """From where each piece ends, in visible characters, and the tokens of each of these."""
    spans, at = [], 0
    for message, content in zip(messages, contents, strict=True):
        start, end = (0, 0)
        if content:
            start, end = places.token(ends[at]), places.token(ends[at + 1] - 1, last_byte=True) + 1
            at += 2
        spans.append(MessageSpan(message["role"], start, end))
    return tuple(spans)


def _content(message: Mapping[str, Any]) -> str:
    """A message may have none."""
    return message.get("content") or ""


def _free_marks(messages: Messages) -> tuple[str, str] | None:
    used = set().union(*map(_content, messages))
    free = (chr(code) for code in _CANDIDATES if chr(code) not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        return None


def _marked(message: Mapping[str, Any], before: str, after: str) -> Mapping[str, Any]:
    """Marks inside of the white space, which templates strip."""
    text = _content(message)
    core = text.strip()
    if not core:
        return message
    start = text.index(core)
    return {**message, "content": text[:start] + before + core + after + text[start + len(core) :]}


def _pieces(marked: str, before: str, after: str) -> list[str] | None:
    """Text around and in messages by turns; None where a mark is lost or out of order."""
    parts = re.split(f"([{before}{after}])", marked)
    if parts[1::2] != [before, after] * (len(parts) // 4) or len(parts) % 4 != 1:
        return None
    return parts[::2]


def _are(pieces: Sequence[str], contents: Sequence[str]) -> bool:
    """Whether the marked pieces are the messages, in their order."""
    inside = pieces[1::2]
    return len(inside) == len(contents) and all(
        _visible(piece) == _visible(content) for piece, content in zip(inside, contents, strict=True)
    )


def _visible(text: str) -> str:
    return "".join(text.split())


class _Places:
    """Where a prompt's visible characters are.

    Args:
        pieces: the bytes of its tokens.

    Raises:
        UnicodeDecodeError: they are not text.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        whole = b"".join(pieces).decode("utf-8")
        words = re.split(r"(\s+)", whole)
        self.text = "".join(words[::2])
        self._words = words[::2]
        # Before each word: visible characters, and bytes.
        self._visible = list(accumulate(map(len, self._words), initial=0))
        self._bytes = list(accumulate((len(word.encode()) for word in words), initial=0))[::2]
        self._tokens = list(accumulate(map(len, pieces), initial=0))

    def token(self, at: int, *, last_byte: bool = False) -> int:
        """The token in which visible character `at` begins, or the one in which it ends."""
        word = bisect_right(self._visible, at) - 1
        within = self._words[word][: at - self._visible[word] + last_byte]
        place = self._bytes[word] + len(within.encode()) - last_byte
        return bisect_right(self._tokens, place) - 1


def _visible_places(ids: Sequence[int], token_bytes: Callable[[int], bytes]) -> _Places | None:
    try:
        return _Places([token_bytes(token_id) for token_id in ids])
    except UnicodeDecodeError:
        return None
