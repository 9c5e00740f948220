"""A model's tokens as llguidance wants them: what each says, and how the model would itself write a text.

Knows the tokenizer's bytes; not grammars, and not llguidance.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest, ModelError
from engine.text.tokenizer import Tokenizer

# Texts that grammars force, kept with the ids that spell them: the names of a schema come again and again.
KEPT_TEXTS = 4096


class Vocabulary:
    """The model's tokens for llguidance, and the words of a mask.

    llguidance wants an end-of-sequence token; a model without one gets an id that its logits do not reach.

    Attributes:
        speller: what llguidance makes its own tokenizer of, with `eos`.
        control: the model's control tokens.
        ordinary_W: all tokens but the special ones; ends are in it.
        goes_on_W: all tokens but ends, as far as the logits go.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if tokenizer.byte_table is None:
            raise ModelError("The tokenizer has no fixed text for each token.")
        self.control = tokenizer.control
        size = max(vocab_size, tokenizer.vocab_size)
        self.eos = list(eos_token_ids) or [size]
        self._size = max(size, max(self.eos) + 1)
        self.num_words = -(-self._size // 32)
        special = sorted(tokenizer.special_ids | set(tokenizer.control.values()) | set(self.eos))
        ends_W = self._words(self.eos)
        beyond_W = self._words(range(vocab_size, self._size))
        self.goes_on_W = ~(ends_W | beyond_W)
        self.ordinary_W = ~self._words(special) | ends_W
        self.speller = Speller(tokenizer, self._tokens(tokenizer, special), special, self.eos[0])

    def _words(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def _tokens(self, tokenizer: Tokenizer, special: Sequence[int]) -> list[bytes]:
        """The bytes of each token; llguidance takes special ones by name, where a grammar names them."""
        table = [*(tokenizer.byte_table or ()), *[b""] * (self._size - tokenizer.vocab_size)]
        for token_id in special:
            table[token_id] = tokenizer.token_string(token_id).encode() or f"<|end {token_id}|>".encode()
        return table


# Some tokenizers put a space before a text that begins with a letter; nobody writes this character.
_LEAD = "\x02"


class Speller:
    """What llguidance asks of a tokenizer: how it would itself write a text that the grammar forces."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_id
        self._lead = tokenizer.encode(_LEAD, add_special_tokens=False)
        self._kept = functools.lru_cache(KEPT_TEXTS)(self._spell)

    def __call__(self, text: str) -> list[int]:
        """Ids that spell the text, as the model's own encoding does in the middle of one."""
        return self._kept(text)

    def _spell(self, text: str) -> list[int]:
        data = text.encode()
        for lead in ([], self._lead):
            ids = self._encode(_LEAD + text if lead else text)
            if ids[: len(lead)] == lead and self._spelled(ids[len(lead) :]) == data:
                return ids[len(lead) :]
        return self._greedy(data)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except InvalidRequest:
            return []

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._tokenizer.token_bytes, ids))

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token, again and again, as far as there are any."""
        ids, start = [], 0
        longest = max(map(len, self._by_bytes), default=1)
        while start < len(data):
            ends = range(min(len(data), start + longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[data[start:end]])
            start = end
        return ids
