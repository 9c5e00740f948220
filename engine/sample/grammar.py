"""Grammars compiled to token masks by llguidance, which is imported here and nowhere else.

    Grammar -> source for llguidance -> LLMatcher, walked as far as it is forced -> kept -> a copy per choice

Knows what llguidance accepts; not requests, rows or logits. Compiling runs without the interpreter lock,
within limits on sizes and fuel, and no single step of a matcher may take long: whoever sends a grammar that
is too complex is told so, and nobody else waits for it. Masks are made without the lock as well.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.grammar import Grammar, GrammarKind, Matcher
from engine.sample.refusals import reason, refused
from engine.sample.sources import WHITESPACE, Source, source
from engine.sample.vocabulary import Vocabulary
from engine.text.tokenizer import Tokenizer

try:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
except ImportError:  # the engine works without; only grammars are refused
    INSTALLED = False
else:
    INSTALLED = True

KEPT_GRAMMARS = 64
# Tokens that a grammar forces from its start on, tried while compiling: some faults show only then.
TRIED_TOKENS = 8
# From so many tokens in the vocabulary and so many cores on, masks are written on several threads.
SHARED_TOKENS, SHARED_CORES = 32_000, 4

TOO_COMPLEX = "the grammar is too complex to follow"
NOTHING_FITS = "no text fits the grammar"


class CompiledGrammars:
    """The Grammars of one model. Keeps the most recently used ones.

    Args:
        load: makes the model's tokenizer, whose byte table says what each token is. Called for the first
            grammar, by whoever compiles it: a large one takes a second or two.
        vocab_size: of the model, which may be larger than the tokenizer's or smaller.
        eos_token_ids: the model's ends of turn, allowed where the grammar may end.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._load: Callable[[], _Tokens] = lambda: _Tokens(
            Vocabulary(load(), vocab_size, tuple(eos_token_ids))
        )
        self._loading = threading.Lock()
        self._loaded: _Tokens | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, TokenMatcher] = OrderedDict()  # at their beginnings

    def ready(self, grammar: Grammar) -> bool:
        return grammar in self._kept

    def start(self, grammar: Grammar) -> TokenMatcher:
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._kept[grammar] = found
                while len(self._kept) > KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
        return found.copy()

    def fill(self, matchers: Sequence[Matcher], words_KW: NDArray[np.uint32]) -> list[str | None]:
        return self._tokens().masks.fill(cast(Sequence[TokenMatcher], matchers), words_KW)

    def _compile(self, grammar: Grammar) -> TokenMatcher:
        if not INSTALLED:
            raise refused("this server lacks the package llguidance")
        try:
            tokens = self._tokens()
        except ModelError:
            raise refused("the model has no tokenizer") from None
        written = _read(source(grammar, tokens.vocabulary.control))
        matcher = LLMatcher(tokens.tokenizer, written, log_level=0, limits=_limits())
        if matcher.is_error():
            raise refused(reason(matcher.get_error()))
        # Special tokens that a grammar of our own making names are meant; in anybody's Lark they are not.
        allowed_W = tokens.vocabulary.ordinary_W if grammar.kind is GrammarKind.LARK else None
        start = TokenMatcher(matcher, tokens.vocabulary.num_words, allowed_W)
        problem = _try(start.copy(), tokens.masks)
        if problem is not None:
            raise refused(problem)
        return start

    def _tokens(self) -> _Tokens:
        """Loaded once; others who need it meanwhile wait."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


class TokenMatcher:
    """See engine.grammar.Matcher. Not thread-safe.

    Attributes:
        inner: llguidance's own.
        allowed_W: what may be drawn at all; None: everything.
    """

    __slots__ = ("allowed_W", "ended", "inner", "num_words")

    def __init__(self, inner: LLMatcher, num_words: int, allowed_W: NDArray[np.uint32] | None) -> None:
        self.inner = inner
        self.num_words = num_words
        self.allowed_W = allowed_W
        self.ended = False

    def copy(self) -> TokenMatcher:
        """Another one, at the same place."""
        return TokenMatcher(self.inner.deep_copy(), self.num_words, self.allowed_W)

    def take(self, token_id: int) -> None:
        inner = self.inner
        inner.consume_token(token_id)
        self.ended = inner.is_stopped() and not inner.is_error()

    def at_an_end(self) -> str | None:
        """What it means that nothing but an end may follow: no need to draw one, or a problem."""
        inner = self.inner
        if inner.is_error():
            return NOTHING_FITS if "NoExtension" in inner.get_error() else TOO_COMPLEX
        self.ended = inner.is_accepting()
        return None if self.ended else NOTHING_FITS


class _Tokens:
    """A model's tokens, and what llguidance made of them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        speller: Any = vocabulary.speller
        self.vocabulary = vocabulary
        self.tokenizer = LLTokenizer(speller, eos_token=vocabulary.eos)
        self.masks = _Masks(vocabulary.goes_on_W)


class _Masks:
    """Writes masks of several matchers.

    With a small vocabulary or few cores, one after another: to hand 16 of them to llguidance's threads takes
    0.1 ms, as long as to write them for 4,000 tokens. A large vocabulary takes 2 ms, which cores share.
    """

    def __init__(self, goes_on_W: NDArray[np.uint32]) -> None:
        self._goes_on_W = goes_on_W
        shared = len(goes_on_W) * 32 >= SHARED_TOKENS and len(os.sched_getaffinity(0)) >= SHARED_CORES
        self._executor = LLExecutor() if shared else None

    def fill(self, matchers: Sequence[TokenMatcher], words_KW: NDArray[np.uint32]) -> list[str | None]:
        self._write(matchers, words_KW)
        for k, matcher in enumerate(matchers):
            if matcher.allowed_W is not None:
                words_KW[k] &= matcher.allowed_W
        goes_on_K: list[bool] = np.any(words_KW & self._goes_on_W, axis=1).tolist()
        return [
            None if goes_on else matcher.at_an_end()
            for matcher, goes_on in zip(matchers, goes_on_K, strict=True)
        ]

    def _write(self, matchers: Sequence[TokenMatcher], words_KW: NDArray[np.uint32]) -> None:
        count, words = words_KW.shape
        address, row_bytes = words_KW.ctypes.data, 4 * words
        if self._executor is not None and count > 1:
            rows = [(matcher.inner, k) for k, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, address, row_bytes, count)
            return
        for k, matcher in enumerate(matchers):
            matcher.inner.unsafe_compute_mask_ptr(address + k * row_bytes, row_bytes)


def _read(source: Source) -> str:
    """llguidance's own form of a grammar."""
    if source.notation == "regex":
        return LLMatcher.grammar_from_regex(source.text)
    if source.notation == "lark":
        return LLMatcher.grammar_from_lark(source.text)
    try:
        return LLMatcher.grammar_from_json_schema(source.text, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise refused(reason(str(error))) from error


def _limits() -> LLParserLimits:
    """A matcher's memory is what bounds the number of states; what its steps may take, the rest."""
    return LLParserLimits(max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False)


def _try(matcher: TokenMatcher, masks: _Masks) -> str | None:
    """Follows a grammar while it leaves no choice; returns what is wrong with it."""
    words_W = np.zeros(matcher.num_words, dtype=np.uint32)
    for _ in range(TRIED_TOKENS):
        [problem] = masks.fill([matcher], words_W[None])
        if problem is not None:
            return problem
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))
        if matcher.ended or len(allowed) != 1:
            return None
        matcher.take(int(allowed[0]))
    return None
