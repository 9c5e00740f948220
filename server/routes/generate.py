"""The way both generation routes go: body -> request -> prompts -> engine -> reply or stream.

Knows the order and what to note on the way; each route brings its own schema, prompts and shapes.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic

from starlette.requests import Request
from starlette.responses import Response

from engine.types import SamplingParams
from server import request_lines
from server.errors import ApiError, shorten
from server.generation import Generation
from server.jsonbody import read_json
from server.metrics import RequestMetrics
from server.prompts import Prompt
from server.render import Choice, Chunks, Head
from server.schema.common import RequestT, parse
from server.service import Service
from server.streaming import EventStream, collect
from server.trail import trail_of

MAX_WARNINGS = 8
MIN_BODY_VALUES = 250_000


class Api(ABC, Generic[RequestT]):
    """One generation API."""

    name: ClassVar[str]  # in metrics
    id_prefix: ClassVar[str]
    schema: type[RequestT]

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    async def prompts(self, request: RequestT) -> Sequence[Prompt]: ...

    @abstractmethod
    def params(self, request: RequestT) -> SamplingParams: ...

    @abstractmethod
    def chunks(self, request: RequestT, head: Head, generation: Generation) -> Chunks: ...

    @abstractmethod
    def reply(
        self, request: RequestT, head: Head, generation: Generation, choices: Sequence[Choice]
    ) -> bytes: ...

    async def handle(self, http: Request) -> Response:
        """Answers one request.

        Raises:
            ApiError, QuireError: to be written by the app's handlers.
        """
        record = self.service.metrics.begin(self.name)
        trail = trail_of(http.scope)
        trail.api = self.name
        try:
            refusal = self.service.why_not_ready()
            if refusal is not None:
                raise refusal
            body = await self._read(http)
            request = parse(self.schema, body)
            trail.stream = bool(request.stream)
            trail.generation = generation = await self._submit(request, record)
            if self.service.settings.log_prompts:
                request_lines.prompts(generation, self.service.tokenizer)
            if not request.stream:
                choices = await collect(self.service, generation, http.receive)
        except BaseException as exc:
            record.failed(exc)
            trail.failed(exc)
            raise
        head = Head(generation.id, int(time.time()), self.service.model_name, self.service.fingerprint)
        headers = self._warnings(request)
        if request.stream:
            return EventStream(self.service, generation, self.chunks(request, head, generation), headers)
        return Response(self.reply(request, head, generation, choices), 200, headers, "application/json")

    async def _read(self, http: Request) -> dict[str, Any]:
        # Prompts are the only long lists; twice the longest leaves room for everything else.
        max_values = max(MIN_BODY_VALUES, 2 * self.service.info.max_model_len)
        return await read_json(http.headers, http.receive, self.service.settings.max_body_bytes, max_values)

    async def _submit(self, request: RequestT, record: RequestMetrics) -> Generation:
        self._check_model(request.model)
        params = self.params(request)
        params.check_vocabulary(self.service.info.vocab_size)
        prompts = await self.prompts(request)
        request_id = self.id_prefix + secrets.token_hex(12)
        generation = Generation(self.service.client, request_id, prompts, params, record)
        generation.submit()
        return generation

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.service.model_name:
            raise ApiError(
                404,
                f"The model '{shorten(model)}' does not exist; this server has '{self.service.model_name}'.",
                param="model",
                code="model_not_found",
            )

    def _warnings(self, request: RequestT) -> dict[str, str]:
        unknown = request.unknown_fields
        if not unknown:
            return {}
        self.service.metrics.unknown_fields[self.name] += len(unknown)
        names = [shorten(name, 40).replace(",", " ") for name in unknown[:MAX_WARNINGS]]
        more = len(unknown) - len(names)
        return {
            "x-quire-warnings": "ignored fields: " + ", ".join(names) + (f" and {more} more" if more else "")
        }
