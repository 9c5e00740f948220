"""The way all generation routes go: body -> request -> prompts -> engine -> reply or stream.

Knows the order and what to note on the way; each route brings its own schema, prompts and shapes.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.types import SamplingParams
from server import request_lines
from server.generation import Generation
from server.metrics import RequestMetrics
from server.middleware.auth import tenant_of
from server.prompts import Prompt
from server.render import Choice, ExplainedChunks, Frames, Head
from server.routes.common import check_model, check_ready, explain_asked, explainer, read_body
from server.schema.common import RequestT, parse
from server.service import Service
from server.streaming import EventStream, collect
from server.token_ids import TokenIdChunks
from server.trail import trail_of
from server.unknown import check

Reports = Sequence[Mapping[str, Any]]


class Api(ABC, Generic[RequestT]):
    """One generation API."""

    name: ClassVar[str]  # in metrics
    id_prefix: ClassVar[str]
    schema: type[RequestT]
    prompt_ids_per_choice: ClassVar = False  # where replies say them

    def __init__(self, service: Service) -> None:
        self.service = service

    async def read(self, http: Request) -> RequestT:
        """The request, from its body."""
        return parse(self.schema, await read_body(self.service, http))

    @abstractmethod
    async def prompts(self, request: RequestT, explain: bool) -> Sequence[Prompt]: ...

    @abstractmethod
    def params(self, request: RequestT) -> SamplingParams: ...

    def held(self, request: RequestT, params: SamplingParams, prompts: Sequence[Prompt]) -> SamplingParams:
        """With what only the prompts say of the grammar."""
        return params

    @abstractmethod
    def chunks(self, request: RequestT, head: Head, generation: Generation) -> Frames: ...

    def choices(self, request: RequestT, generation: Generation) -> Sequence[Choice]:
        """What a whole reply is collected in."""
        return [Choice(index) for index in range(len(generation.prompts) * generation.params.n)]

    @abstractmethod
    def reply(
        self,
        request: RequestT,
        head: Head,
        generation: Generation,
        choices: Sequence[Choice],
        cache: Reports | None,
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
            check_ready(self.service)
            request = await self.read(http)
            trail.stream = bool(request.stream)
            headers = self._check_fields(request)
            trail.generation = generation = await self._submit(request, http, record)
            if self.service.settings.log_prompts:
                request_lines.prompts(generation, self.service.tokenizer)
            if not request.stream:
                choices = self.choices(request, generation)
                await collect(self.service, generation, http.receive, choices)
        except BaseException as exc:
            record.failed(exc)
            trail.failed(exc)
            raise
        head = Head(generation.id, int(time.time()), self.service.model_name, self.service.fingerprint)
        if request.stream:
            return EventStream(self.service, generation, self._stream(request, head, generation), headers)
        cache = self._reports(generation)
        return Response(
            self.reply(request, head, generation, choices, cache), 200, headers, "application/json"
        )

    async def _submit(self, request: RequestT, http: Request, record: RequestMetrics) -> Generation:
        check_model(self.service, request.model)
        explain = explain_asked(http.headers, request.explain_cache)
        params = self.params(request)
        params.check_vocabulary(self.service.info.vocab_size)
        prompts = await self.prompts(request, explain)
        params = self.held(request, params, prompts)
        if params.grammar is not None:
            await self._compile(params.grammar, request.grammar_field)
        request_id = self.id_prefix + secrets.token_hex(12)
        scope = tenant_of(http.scope).scope(request.cache_salt)
        generation = Generation(
            self.service.client, request_id, prompts, params, record, scope, explain=explain
        )
        generation.submit()
        return generation

    async def _compile(self, grammar: Grammar, field: str) -> None:
        """Before anything is queued: what is no grammar is refused, and one that is hard delays nobody."""
        try:
            await self.service.client.compile_grammar(grammar)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, field) from error

    def _reports(self, generation: Generation) -> Reports | None:
        if not generation.explains:
            return None
        return explainer(self.service).reports(generation.prompts, generation.reports)

    def _stream(self, request: RequestT, head: Head, generation: Generation) -> Frames:
        chunks = self.chunks(request, head, generation)
        if request.return_token_ids:
            prompts, n = [prompt.ids for prompt in generation.prompts], generation.params.n
            chunks = TokenIdChunks(chunks, prompts, n, per_choice=self.prompt_ids_per_choice)
        if not generation.explains:
            return chunks
        explain = explainer(self.service)

        def report(position: int) -> Mapping[str, Any] | None:
            found = generation.reports[position]
            return None if found is None else explain.report(position, generation.prompts[position], found)

        return ExplainedChunks(chunks, generation.params.n, report)

    def _check_fields(self, request: RequestT) -> dict[str, str]:
        """Counts unknown fields; the reply's header that names them."""
        self.service.metrics.unknown_fields[self.name] += len(request.unknown_fields)
        return check(request, strict=self.service.settings.strict)
