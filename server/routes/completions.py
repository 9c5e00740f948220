"""POST /v1/completions. Knows the legacy API's shapes; the way through is generate.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.types import SamplingParams
from server.docs import post
from server.generation import Generation
from server.logprobs import prompt_entries
from server.prompts import Prompt
from server.render import Choice, Chunks, CompletionChunks, Echo, Fields, reply
from server.routes.common import kept_tokens, plain
from server.routes.generate import GenerationApi
from server.schema.common import to_sampling_params
from server.schema.completions import CompletionRequest
from server.schema.replies import CompletionReply
from server.service import Service


class CompletionApi(GenerationApi[CompletionRequest]):
    name = "completions"
    id_prefix = "cmpl-"
    schema = CompletionRequest
    prompt_ids_per_choice = True

    async def prompts(self, request: CompletionRequest, explain: bool) -> Sequence[Prompt]:
        most = kept_tokens(self.service, request.truncate_prompt_tokens, request.token_limit)
        return await plain(self.service, request.prompt, request.add_special_tokens, most)

    def params(self, request: CompletionRequest) -> SamplingParams:
        of_prompt = request.logprobs if request.echo else None
        return to_sampling_params(
            request,
            self.service.sampling_defaults,
            max_tokens=request.token_limit,
            banned_sequences=self.service.prompts.spellings(request.bad_words or ()),
            logprobs=request.logprobs,
            prompt_logprobs=of_prompt if request.prompt_logprobs is None else request.prompt_logprobs,
        )

    def chunks(self, request: CompletionRequest, generation: Generation) -> Chunks:
        common = self.common(request, generation, lambda: generation.usage)
        return CompletionChunks(common, self._echoes(request, generation))

    def reply(self, request: CompletionRequest, generation: Generation, choices: Sequence[Choice]) -> Fields:
        wanted = request.logprobs is not None
        echoes = self._echoes(request, generation)
        rendered = [
            choice.completion(self.service.tokenizer, wanted, echoes[choice.index]) for choice in choices
        ]
        for fields, choice in zip(rendered, choices, strict=True):
            fields.update(self._additions(request, generation, choice))
        return reply(self.head(generation), "text_completion", rendered, generation.usage)

    def _additions(
        self, request: CompletionRequest, generation: Generation, choice: Choice
    ) -> dict[str, Any]:
        """What vLLM's clients may ask for of each choice."""
        fields: dict[str, Any] = {}
        if request.prompt_logprobs is not None:
            found, most = choice.prompt_logprobs, request.prompt_logprobs
            fields["prompt_logprobs"] = prompt_entries(self.service.tokenizer, found, most)
        if request.return_token_ids:
            fields["prompt_token_ids"] = generation.prompts[choice.index // generation.params.n].ids
            fields["token_ids"] = choice.token_ids
        return fields

    def _echoes(self, request: CompletionRequest, generation: Generation) -> list[Echo | None]:
        """What each choice begins with."""
        n = generation.params.n
        if not request.echo:
            return [None] * (len(generation.prompts) * n)
        return [self._echo(prompt) for prompt in generation.prompts for _ in range(n)]

    def _echo(self, prompt: Prompt) -> Echo:
        text = self.service.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
        return Echo(text, prompt.ids)


def router(service: Service) -> APIRouter:
    api = CompletionApi(service)
    routes = APIRouter(tags=["generation"])

    @post(routes, "/v1/completions", CompletionRequest, CompletionReply, "Continue a text")
    async def completions(request: Request) -> Response:
        return await api.handle(request)

    return routes
