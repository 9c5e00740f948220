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
from server.parsing.parser import OutputParser
from server.prompts import Prompt
from server.render import ChatChunks, Choice, Fields, Frames, reply
from server.render_parsed import ParsedChoice, ParsedChunks
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

    def _parsers(self, request: ChatRequest, generation: Generation) -> list[OutputParser]:
        """One for each choice; none where replies are text and nothing else."""
        if request.constrained and not request.may_call:
            return []
        notations, tokenizer = self.service.notations, self.service.tokenizer
        opened, options = self._opened(generation.prompts), call_options(notations, request)
        made = [
            notations.parser(options, tokenizer.control, opened=opened) for _ in range(generation.params.n)
        ]
        return [parser for parser in made if parser is not None]

    def chunks(self, request: ChatRequest, generation: Generation) -> Frames:
        parsers = self._parsers(request, generation)

        def usage() -> dict[str, Any]:
            return _usage(generation, sum(parser.reasoning_tokens for parser in parsers))

        common = self.head(generation), usage, request.usage_in_stream, self.service.tokenizer
        if not parsers:
            return ChatChunks(*common, generation.params.n)
        show = request.include_reasoning is not False
        return ParsedChunks(*common, parsers, show_reasoning=show, named=_named(request))

    def choices(self, request: ChatRequest, generation: Generation) -> Sequence[Choice]:
        parsers = self._parsers(request, generation)
        show = request.include_reasoning is not False
        return [
            ParsedChoice(index, parser, show_reasoning=show, named=_named(request))
            for index, parser in enumerate(parsers)
        ] or super().choices(request, generation)

    def reply(self, request: ChatRequest, generation: Generation, choices: Sequence[Choice]) -> Fields:
        wanted = bool(request.logprobs)
        rendered = [choice.chat(self.service.tokenizer, wanted) for choice in choices]
        usage = _usage(generation, sum(choice.reasoning_tokens for choice in choices))
        more: dict[str, Any] = {}
        if request.prompt_logprobs is not None:
            found = choices[0].prompt_logprobs
            more["prompt_logprobs"] = prompt_entries(self.service.tokenizer, found, request.prompt_logprobs)
        if request.return_token_ids:
            more["prompt_token_ids"] = generation.prompts[0].ids
            for fields, choice in zip(rendered, choices, strict=True):
                fields["token_ids"] = choice.token_ids
        return reply(self.head(generation), "chat.completion", rendered, usage, more)


def _named(request: ChatRequest) -> bool:
    return request.tool_choice is not None and request.tool_choice.function


def _usage(generation: Generation, reasoning_tokens: int) -> dict[str, Any]:
    return {**generation.usage, "completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}


def router(service: Service) -> APIRouter:
    api = ChatApi(service)
    routes = APIRouter(tags=["generation"])

    @post(routes, "/v1/chat/completions", ChatRequest, ChatReply, "Continue a conversation")
    async def chat_completions(request: Request) -> Response:
        return await api.handle(request)

    return routes
