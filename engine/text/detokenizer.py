"""Token ids to text, one token at a time, never showing part of a character.

Two ways, the same promise:

- `ByteDetokenizer`: a token is a fixed run of bytes (byte-level BPE, SentencePiece), and an incremental
  UTF-8 decoder keeps what is incomplete. Most models; O(1) per token, well under a microsecond.
- `WindowDetokenizer`: a token's text depends on its neighbours (WordPiece, suffix markers). It decodes a
  window of recent tokens with and without the new one and emits the difference.

`push` takes a token and returns the text that is now complete, often "" inside a character; `finish` returns
what is left: U+FFFD for a character that was never completed.

Text that follows a prompt keeps its leading space; only the start of a sequence loses it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer, strip_spaces

# A window longer than this is cut even in the middle of a character that never completes.
_MAX_WINDOW_TOKENS = 16
_REPLACEMENT = "\ufffd"


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int] = (),
    *,
    skip_special_tokens: bool = True,
    shown: Sequence[int] = (),
) -> ByteDetokenizer | WindowDetokenizer:
    """A detokenizer for text that follows `prompt_ids`. `shown`: special tokens not to skip."""
    special = tokenizer.special_ids
    hidden = special if skip_special_tokens else frozenset[int]()
    if shown:
        hidden = hidden.difference(shown)
    if tokenizer.byte_table is None:
        # Enough of the prompt for the first token to have a neighbour.
        before = [tokenizer.token_string(token_id) for token_id in prompt_ids[-4:] if token_id not in special]
        return WindowDetokenizer(tokenizer, before, hidden)
    at_start = tokenizer.strip_left > 0 and all(token_id in special for token_id in prompt_ids)
    return ByteDetokenizer(tokenizer.byte_table, hidden, tokenizer.strip_left if at_start else 0)


class ByteDetokenizer:
    """See the module. Ids beyond the table (a padded vocabulary) have no text."""

    __slots__ = ("_decode", "_hidden", "_strip", "_table")

    def __init__(self, table: list[bytes], hidden: frozenset[int], strip: int) -> None:
        self._table = table
        self._hidden = hidden
        self._strip = strip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or token_id >= len(self._table):
            return ""
        text = self._decode(self._table[token_id])
        return self._stripped(text) if self._strip and text else text

    def finish(self) -> str:
        return self._decode(b"", True)

    def _stripped(self, text: str) -> str:
        kept = strip_spaces(text, self._strip)
        self._strip = 0 if kept else self._strip - len(text)
        return kept


class WindowDetokenizer:
    """Keeps the tokens whose text the next one may still change.

        strings:  |-- context --|-- pending --|
                  shown already   not yet

    Text is shown when decode(context + pending) grows beyond decode(context) and ends in a whole character.
    """

    __slots__ = ("_context", "_hidden", "_pending", "_shown", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context: list[str], hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._context = context
        self._pending: list[str] = []
        self._shown = self._decode(context)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or token_id >= self._tokenizer.vocab_size:
            return ""
        self._pending.append(self._tokenizer.token_string(token_id))
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_WINDOW_TOKENS:
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._decode(self._context + self._pending)) if self._pending else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._context, self._pending = self._pending, []
            self._shown = self._decode(self._context)
        return new

    def _decode(self, strings: list[str]) -> str:
        return self._tokenizer.decode_strings(strings) if strings else ""
