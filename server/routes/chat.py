"""POST /v1/chat/completions. Knows the chat API's shapes; the way through is generate.py's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.types import SamplingParams
from server.docs import post
from server.generation import Generation
from server.logprobs import prompt_entries
from server.prompts import Prompt
from server.render import ChatChunks, Choice, Fields, Frames, reply
from server.render_parsed import ParsedChoice, ParsedChunks, Shown
from server.render_pieces import Reader
from server.routes.common import conversation, kept_tokens
from server.routes.generate import GenerationApi
from server.schema.chat import ChatRequest
from server.schema.common import to_sampling_params
from server.schema.replies import ChatReply
from server.service import Service
from server.tools import TAIL_TOKENS, call_options, grammar


class ChatApi(GenerationApi[ChatRequest]):
    name = "chat"
    id_prefix = "chatcmpl-"
    schema = ChatRequest

    async def prompts(self, request: ChatRequest, explain: bool) -> Sequence[Prompt]:
        most = kept_tokens(self.service, request.truncate_prompt_tokens, request.token_limit)
        prompt = await conversation(self.service, request.messages, request, locate=explain)
        return [prompt.shortened(most)]

    def params(self, request: ChatRequest) -> SamplingParams:
        return to_sampling_params(
            request,
            self.service.sampling_defaults,
            max_tokens=request.token_limit,
            banned_sequences=self.service.prompts.spellings(request.bad_words or ()),
            logprobs=request.alternatives,
            prompt_logprobs=request.prompt_logprobs,
            shown_token_ids=self._shown_markers(request),
        )

    def held(self, request: ChatRequest, params: SamplingParams, prompts: Sequence[Prompt]) -> SamplingParams:
        held = grammar(self.service.notations, request, opened=self._opened(prompts))
        return params if held is None else replace(params, grammar=held)

    def _opened(self, prompts: Sequence[Prompt]) -> bool:
        """Whether the prompt has begun the thoughts."""
        tail = self.service.tokenizer.decode(prompts[0].ids[-TAIL_TOKENS:], skip_special_tokens=False)
        return self.service.notations.opened_by(tail)

    def _shown_markers(self, request: ChatRequest) -> tuple[int, ...]:
        notations, tokenizer = self.service.notations, self.service.tokenizer
        with_tools = call_options(notations, request) is not None
        return notations.hidden_markers(tokenizer.control, tokenizer.special_ids, tools=with_tools)

    def readers(self, request: ChatRequest, generation: Generation) -> list[Reader]:
        """One for each choice; all are plain, or none."""
        n = generation.params.n
        if request.constrained and not request.may_call:
            return [Reader(None) for _ in range(n)]
        notations, control = self.service.notations, self.service.tokenizer.control
        opened, options = self._opened(generation.prompts), call_options(notations, request)
        return [Reader(notations.parser(options, control, opened=opened)) for _ in range(n)]

    def chunks(self, request: ChatRequest, generation: Generation) -> Frames:
        readers = self.readers(request, generation)

        def usage() -> Fields:
            return _usage(generation, readers)

        common = self.common(request, generation, usage)
        if readers[0].is_plain:
            return ChatChunks(common, len(readers))
        return ParsedChunks(common, readers, _shown(request))

    def choices(self, request: ChatRequest, generation: Generation) -> Sequence[Choice]:
        readers = self.readers(request, generation)
        if readers[0].is_plain:
            return super().choices(request, generation)
        return [ParsedChoice(reader, index, _shown(request)) for index, reader in enumerate(readers)]

    def reply(self, request: ChatRequest, generation: Generation, choices: Sequence[Choice]) -> Fields:
        wanted = bool(request.logprobs)
        rendered = [choice.chat(self.service.tokenizer, wanted) for choice in choices]
        usage = _usage(generation, choices)
        more: dict[str, Any] = {}
        if request.prompt_logprobs is not None:
            found = choices[0].prompt_logprobs
            more["prompt_logprobs"] = prompt_entries(self.service.tokenizer, found, request.prompt_logprobs)
        if request.return_token_ids:
            more["prompt_token_ids"] = generation.prompts[0].ids
            for fields, choice in zip(rendered, choices, strict=True):
                fields["token_ids"] = choice.token_ids
        return reply(self.head(generation), "chat.completion", rendered, usage, more)


def _shown(request: ChatRequest) -> Shown:
    named = request.tool_choice is not None and request.tool_choice.function
    return Shown(request.include_reasoning is not False, not named)


def _usage(generation: Generation, choices: Sequence[Choice] | Sequence[Reader]) -> Fields:
    reasoning_tokens = sum(choice.reasoning_tokens for choice in choices)
    return {**generation.usage, "completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}


def router(service: Service) -> APIRouter:
    api = ChatApi(service)
    routes = APIRouter(tags=["generation"])

    @post(routes, "/v1/chat/completions", ChatRequest, ChatReply, "Continue a conversation")
    async def chat_completions(request: Request) -> Response:
        return await api.handle(request)

    return routes
