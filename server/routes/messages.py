"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, by way of the chat API's."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.docs import post
from server.generation import Generation
from server.render import Choice, Fields, Frames
from server.render_messages import MessageStream, reply
from server.render_pieces import PiecesChoice
from server.routes.common import json_reply, read_body, read_question
from server.routes.translated import TranslatedApi
from server.schema.chat import ChatRequest
from server.schema.common import parse
from server.schema.messages import CountTokensReply, CountTokensRequest, MessagesReply, MessagesRequest
from server.service import Service
from server.translate import from_messages, naming

NAMES = {
    "stop": "stop_sequences",
    "continue_final_message": "messages",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}


class MessagesApi(TranslatedApi):
    name = "messages"
    id_prefix = "msg_"
    names = NAMES

    async def read(self, http: Request) -> ChatRequest:
        request = parse(MessagesRequest, await read_body(self.service, http))
        return from_messages(request, self.service.notations)

    def chunks(self, request: ChatRequest, generation: Generation) -> Frames:
        (reader,) = self.readers(request, generation)
        return MessageStream(self.head(generation), generation, reader)

    def reply(self, request: ChatRequest, generation: Generation, choices: Sequence[Choice]) -> Fields:
        (choice,) = choices
        assert isinstance(choice, PiecesChoice)
        return reply(self.head(generation), generation, choice)

    async def count(self, http: Request) -> Response:
        """Answers without running the prompt."""
        request, headers = await read_question(self.service, http, CountTokensRequest)
        with naming(NAMES):
            chat = from_messages(request, self.service.notations)
        return json_reply({"input_tokens": await self.prompt_tokens(chat)}, headers)


def router(service: Service) -> APIRouter:
    api = MessagesApi(service)
    routes = APIRouter(tags=["generation"])

    @post(
        routes,
        "/v1/messages",
        MessagesRequest,
        MessagesReply,
        "Continue a conversation, as Anthropic's API does",
    )
    async def messages(request: Request) -> Response:
        return await api.handle(request)

    @post(
        routes,
        "/v1/messages/count_tokens",
        CountTokensRequest,
        CountTokensReply,
        "How many tokens a conversation has",
    )
    async def count_tokens(request: Request) -> Response:
        return await api.count(request)

    return routes
