"""POST /v1/chat/completions. Knows the chat API's shapes; the way through is generate.py's."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.types import SamplingParams
from server.docs import describe_body
from server.generation import Generation
from server.prompts import Prompt
from server.render import ChatChunks, Choice, Chunks, Head, reply
from server.routes.common import conversation
from server.routes.generate import Api, Reports
from server.schema.chat import ChatRequest
from server.schema.common import to_sampling_params
from server.schema.replies import ChatReply
from server.service import Service


class ChatApi(Api[ChatRequest]):
    name = "chat"
    id_prefix = "chatcmpl-"
    schema = ChatRequest

    async def prompts(self, request: ChatRequest, explain: bool) -> Sequence[Prompt]:
        return [
            await conversation(
                self.service,
                request.messages,
                request.add_generation_prompt,
                request.chat_template_kwargs,
                locate=explain,
            )
        ]

    def params(self, request: ChatRequest) -> SamplingParams:
        return to_sampling_params(
            request,
            self.service.sampling_defaults,
            max_tokens=request.token_limit,
            logprobs=request.alternatives,
        )

    def chunks(self, request: ChatRequest, head: Head, generation: Generation) -> Chunks:
        return ChatChunks(head, lambda: generation.usage, request.usage_in_stream, self.service.tokenizer)

    def reply(
        self,
        request: ChatRequest,
        head: Head,
        generation: Generation,
        choices: Sequence[Choice],
        cache: Reports | None,
    ) -> bytes:
        wanted = bool(request.logprobs)
        rendered = [choice.chat(self.service.tokenizer, wanted) for choice in choices]
        return reply(head, "chat.completion", rendered, generation.usage, cache)


def router(service: Service) -> APIRouter:
    api = ChatApi(service)
    routes = APIRouter(tags=["generation"])

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        summary="Continue a conversation",
        openapi_extra=describe_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        return await api.handle(request)

    return routes
