"""Which requests to send: prompts, lengths and arrival times, all from one seed. It sends nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from server.bench.options import BenchOptions

# Common words, one token each in most vocabularies once preceded by a space.
_TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city name team
minute idea body back parent face level office door health person art war history party result
change morning reason research girl guy moment air teacher force education
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How prompts are written, as found by probing the server.

    Attributes:
        max_token_id: prompts are random ids up to this one; None writes words.
        tokens_per_word, extra_tokens: words cost this much, and each prompt this much more (a template).
    """

    max_token_id: int | None = None
    tokens_per_word: float = 1.0
    extra_tokens: float = 0.0


class Workload:
    """The requests of one run; the same seed gives the same ones."""

    def __init__(self, options: BenchOptions, model: str, form: PromptForm) -> None:
        self._options = options
        self._model = model
        self._form = form

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self._options.api == "chat" else "/v1/completions"

    def bodies(self, count: int, stream: str = "measured") -> Iterator[bytes]:
        """`count` request bodies. Another `stream` name gives other prompts and another shared prefix."""
        rng = random.Random(f"{self._options.seed}/{stream}")
        prefix = self._pieces(rng, self._options.shared_prefix_len)
        for _ in range(count):
            input_len = rng.randint(*self._options.input_len)
            max_tokens = rng.randint(*self._options.output_len)
            yield self.body(prefix + self._pieces(rng, input_len), max_tokens)

    def arrivals_s(self, count: int) -> Iterator[float]:
        """Seconds after the start, exponential gaps of mean 1 / rate; the first arrives at 0."""
        assert self._options.rate is not None
        rng = random.Random(f"{self._options.seed}/arrivals")
        now_s = 0.0
        for _ in range(count):
            yield now_s
            now_s += rng.expovariate(self._options.rate)

    def body(self, pieces: list[Any], max_tokens: int) -> bytes:
        """The JSON of one request; `pieces` are token ids or words."""
        request: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": self._options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._options.ignore_eos:
            request["ignore_eos"] = True
        prompt = pieces if self._form.max_token_id is not None else " ".join(pieces)
        if self._options.api == "chat":
            request["messages"] = [{"role": "user", "content": prompt}]
        else:
            request["prompt"] = prompt
        return msgspec.json.encode(request)

    def _pieces(self, rng: random.Random, num_tokens: int) -> list[Any]:
        last_id = self._form.max_token_id
        if last_id is not None:
            return [rng.randint(last_id // 2, last_id) for _ in range(num_tokens)]
        if num_tokens == 0:
            return []
        words = round((num_tokens - self._form.extra_tokens) / self._form.tokens_per_word)
        return rng.choices(WORDS, k=max(1, words))
