"""Offline use: a model, prompts in, texts out. No server, no event loop, no second process.

from engine.llm import LLM
from engine.types import SamplingParams

llm = LLM("./my-model")
[output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print(output.choices[0].text)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine import builtin, hub
from engine.build import build
from engine.config import EngineOptions
from engine.embedding import VALUE_DTYPE, Pooling
from engine.errors import InvalidRequest, RequestFailed
from engine.text.chat import ChatTemplate
from engine.text.choice import Choice
from engine.text.files import read_text_files, sampling_defaults
from engine.text.tokenizer import Tokenizer
from engine.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob, TokenOutput

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice, whole."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
        choices: `params.n` of them, in order.
    """

    prompt_ids: tuple[int, ...]
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    choices: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """What became of one prompt.

    Attributes:
        cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
        embedding: fp32, of length 1: the dot product of two is their cosine.
    """

    prompt_ids: tuple[int, ...]
    cached_tokens: int
    embedding: NDArray[np.float32]


class LLM:
    """A loaded model. Its prefix cache lives as long as it does.

    Args:
        model: a folder or hub id in Hugging Face form, or a GGUF file; the built-in demo model if left out.
        options: fields of EngineOptions, such as dtype="float32" or max_model_len=4096.

    Raises:
        ConfigError: it cannot work; the message says why in one line.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        folder = hub.find_model(model or str(builtin.path()), weights=True)
        # A batch is as long as its caller likes: a queue's bound is for those who share a server.
        options.setdefault("max_queued_requests", 2**31 - 1)
        self._core, self.info = build(EngineOptions(model=str(folder), **options))
        files = read_text_files(folder)
        self.tokenizer = Tokenizer(files)
        self._template = ChatTemplate.from_files(files, self.tokenizer)
        self._default_params = SamplingParams(**sampling_defaults(files))  # type: ignore[arg-type]
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generates for one prompt (text or token ids) or many, batched as the server would.

        Args:
            params: for all prompts, or one for each. The default is what the model's generation_config.json
                says, or temperature 1, up to the model's context.
            progress: show a bar of finished prompts on stderr.

        Raises:
            RequestError: a prompt or a parameter is at fault; nothing was generated.
            RequestFailed: a request broke while it ran.
        """
        batch = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or self._default_params] * len(batch)
        if len(params) != len(batch):
            raise InvalidRequest(f"{len(batch)} prompts, but {len(params)} sampling parameters.", "params")
        return [job.result() for job in self._do(batch, params, progress)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        progress: bool = False,
    ) -> list[EmbeddingOutput]:
        """Turns one prompt (text or token ids) or many into vectors of length 1, pooled as the model says.

        Args:
            dimensions: only the vectors' first so many values, scaled to length 1 again.

        Raises:
            RequestError: a prompt or `dimensions` is at fault, or the model gives no embeddings.
            RequestFailed: a request broke while it ran.
        """
        batch = _as_list(prompts)
        params = SamplingParams(max_tokens=0, pooling=Pooling(self.info.embeddings.kind, dimensions))
        return [job.embedding() for job in self._do(batch, [params] * len(batch), progress)]

    def _do(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: bool
    ) -> Iterable[_Job]:
        """All of them to their ends, in the order of the prompts."""
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        jobs = {
            f"llm-{next(self._ids)}": _Job(self.tokenizer, ids, wanted)
            for ids, wanted in zip(encoded, params, strict=True)
        }
        self._submit(jobs)
        self._run(jobs, tqdm(total=len(jobs), disable=not progress, unit="prompt"))
        return jobs.values()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        **template_variables: Any,
    ) -> RequestOutput:
        """Answers a conversation through the model's chat template.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; use generate.", "messages")
        prompt_ids = self._template.render(messages, **template_variables)
        return self.generate([prompt_ids], params)[0]

    def _submit(self, jobs: Mapping[str, _Job]) -> None:
        """All or none: one bad prompt takes the others back out of the queue."""
        try:
            for request_id, job in jobs.items():
                self._core.add(request_id, job.prompt_ids, job.params)
        except Exception:
            for request_id in jobs:
                self._core.abort(request_id)
            self._core.step()
            raise

    def _run(self, jobs: Mapping[str, _Job], bar: tqdm[None]) -> None:
        with bar:
            while self._core.has_work:
                for output in self._core.step():
                    job = jobs[output.request_id]
                    if job.take(output):
                        self._core.abort(output.request_id, output.index)
                    if output.finish_reason is not None and job.done:
                        bar.update()


class _Job:
    """One prompt under way."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self._choices = [Choice(i, tokenizer, prompt_ids, params) for i in range(params.n)]

    @property
    def done(self) -> bool:
        return all(choice.ended for choice in self._choices)

    def take(self, output: TokenOutput) -> bool:
        """Takes one output; returns whether a stop string has just ended the choice here."""
        choice = self._choices[output.index]
        if choice.ended:
            return False
        choice.push(output)
        return choice.stopped_here

    def _events(self) -> list[TokenEvent]:
        events = [choice.take() for choice in self._choices]
        failed = next((event.error for event in events if event.error is not None), None)
        if failed is not None:
            raise RequestFailed(failed)
        return events

    def embedding(self) -> EmbeddingOutput:
        [event] = self._events()
        vector = np.frombuffer(event.embedding or b"", dtype=VALUE_DTYPE).astype(np.float32)
        return EmbeddingOutput(tuple(self.prompt_ids), event.cached_tokens, vector)

    def result(self) -> RequestOutput:
        events = self._events()
        return RequestOutput(
            tuple(self.prompt_ids),
            events[0].cached_tokens,
            events[0].prompt_logprobs,
            tuple(
                Completion(
                    e.text, e.token_ids, e.logprobs, e.finish_reason or FinishReason.ABORT, e.stop_reason
                )
                for e in events
            ),
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a string or a list of ints; everything else is a list of prompts."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
