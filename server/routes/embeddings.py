"""POST /v1/embeddings. Knows the shapes; the way through is api.py's, the vectors are the engine's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import ClassVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.embedding import VALUE_BYTES, Pooling, values
from engine.types import SamplingParams, TokenEvent
from server.docs import post
from server.generation import Generation
from server.prompts import Prompt
from server.render import Fields, encode
from server.routes.api import Api
from server.routes.common import kept_tokens, plain
from server.schema.embeddings import EmbeddingReply, EmbeddingRequest
from server.service import Service
from server.streaming import collect


class Vector:
    """The embedding of one input, once it has come."""

    def __init__(self) -> None:
        self.data = b""

    def add(self, event: TokenEvent) -> None:
        self.data = event.embedding or self.data


class EmbeddingApi(Api[EmbeddingRequest]):
    name = "embeddings"
    id_prefix = "embd-"
    schema = EmbeddingRequest
    names: ClassVar = {"prompt": "input"}

    async def prompts(self, request: EmbeddingRequest, explain: bool) -> Sequence[Prompt]:
        most = kept_tokens(self.service, request.truncate_prompt_tokens, 0)
        return await plain(self.service, request.input, request.add_special_tokens, most)

    def params(self, request: EmbeddingRequest) -> SamplingParams:
        pooling = Pooling(self.service.info.embeddings.kind, request.dimensions)
        self.service.info.embeddings.check(pooling)  # before anything is tokenised
        return SamplingParams(max_tokens=0, pooling=pooling, priority=request.priority or 0)

    async def answer(
        self, request: EmbeddingRequest, generation: Generation, http: Request, headers: dict[str, str]
    ) -> Response:
        vectors = [Vector() for _ in generation.prompts]
        await collect(self.service, generation, http.receive, vectors)
        data, in_base64 = [vector.data for vector in vectors], request.encoding_format == "base64"
        work = sum(map(len, data)) // VALUE_BYTES
        written = await self.service.prompts.run(work, lambda: [_written(raw, in_base64) for raw in data])
        return self.whole(generation, self._reply(generation, written), headers)

    def _reply(self, generation: Generation, written: Sequence[msgspec.Raw]) -> Fields:
        return {
            "id": generation.id,
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": value}
                for index, value in enumerate(written)
            ],
            "model": self.service.model_name,
            "usage": {
                "prompt_tokens": generation.prompt_tokens,
                "total_tokens": generation.prompt_tokens,
                "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
            },
        }


def _written(data: bytes, in_base64: bool) -> msgspec.Raw:
    """One vector as JSON. One at a time, so that no thread holds the others up for long."""
    return msgspec.Raw(b'"' + base64.b64encode(data) + b'"' if in_base64 else encode(values(data)))


def router(service: Service) -> APIRouter:
    api = EmbeddingApi(service)
    routes = APIRouter(tags=["embeddings"])

    @post(routes, "/v1/embeddings", EmbeddingRequest, EmbeddingReply, "Turn texts into vectors")
    async def embeddings(request: Request) -> Response:
        """One vector of length 1 for each input."""
        return await api.handle(request)

    return routes
