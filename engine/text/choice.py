"""One choice of one request: the engine's token outputs in, events with text out.

Knows text and how a choice ends. Does not know who waits for the events.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.text.detokenizer import make_detokenizer
from engine.text.stops import StopChecker
from engine.text.tokenizer import Tokenizer
from engine.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob, TokenOutput
from engine.views import CacheReport


class Choice:
    """Collects what arrives between two looks of its caller into one event.

    Attributes:
        index: which of the request's choices.
        ended: no more outputs are taken.
        stopped_here: a stop string ended it, which the engine does not know yet.
    """

    __slots__ = (
        "_cache", "_cached_tokens", "_detokenize", "_embedding", "_error", "_finish_reason", "_flush",
        "_generated", "_include_stop", "_logprobs", "_min_tokens", "_prompt_logprobs", "_queued_s", "_seen",
        "_stop_reason", "_stops", "_text", "_token_ids", "ended", "index", "stopped_here",
    )  # fmt: skip

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.index = index
        detokenizer = make_detokenizer(
            tokenizer,
            prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            shown=params.shown_token_ids,
        )
        self._detokenize = detokenizer.push
        self._flush = detokenizer.finish
        self._include_stop = params.include_stop_str_in_output
        self._stops = StopChecker(params.stop, include=self._include_stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._generated = 0
        self._seen = False
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._cached_tokens = 0
        self._queued_s: float | None = None
        self._embedding: bytes | None = None
        self.ended = False
        self.stopped_here = False
        self._clear()

    def _clear(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._cache: CacheReport | None = None

    def push(self, output: TokenOutput) -> bool:
        """Takes one output; returns whether there is something the caller should see now."""
        token_id = output.token_id
        if token_id is not None:
            self._token_ids.append(token_id)
            if output.logprob is not None:
                self._logprobs.append(output.logprob)
            self._generated += 1
            # The token that ended the choice is not part of its text.
            if output.finish_reason is not FinishReason.STOP or self._include_stop:
                self._add_text(self._detokenize(token_id))
        if not self._seen:
            self._first(output)
            return True
        if output.finish_reason is not None and not self.ended:
            self._end(output)
        return bool(self._text) or self.ended

    def _first(self, output: TokenOutput) -> None:
        """The first output says what was cached; it is shown even without text: time to first token."""
        self._seen = True
        self._cached_tokens = output.cached_tokens
        self._prompt_logprobs = output.prompt_logprobs
        self._cache = output.cache
        self._queued_s = output.queued_s
        if output.finish_reason is not None and not self.ended:
            self._end(output)

    def _add_text(self, text: str) -> None:
        if self._stops is not None:
            text = self._stops.push(text, armed=self._generated >= self._min_tokens)
            if self._stops.matched is not None:
                self._finish_reason = FinishReason.STOP
                self._stop_reason = self._stops.matched
                self.ended = self.stopped_here = True
        if text:
            self._text.append(text)

    def _end(self, output: TokenOutput) -> None:
        self._add_text(self._flush())
        if self.ended:  # what was flushed completed a stop string; the engine's side has ended anyway
            self.stopped_here = False
            return
        if self._stops is not None:
            self._text.append(self._stops.finish())
        self.ended = True
        self._finish_reason = output.finish_reason
        self._stop_reason = output.stop_reason
        self._error = output.error
        self._embedding = output.embedding

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends it from this side: an abort, or a fault in here."""
        self.ended = True
        self._finish_reason = reason
        self._error = error

    def take(self) -> TokenEvent:
        """Everything since the last event."""
        event = TokenEvent(
            self.index,
            "".join(self._text),
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._finish_reason,
            self._stop_reason,
            self._cached_tokens,
            self._prompt_logprobs,
            self._error,
            self._cache,
            self._queued_s,
            self._embedding,
        )
        self._clear()
        return event
