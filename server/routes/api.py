"""The way of every request that runs in the engine: body -> request -> prompts -> engine -> answer.

Knows the order and what to note on the way; each API brings its own schema, prompts and answers.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic

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
from server.render import Fields
from server.routes.common import check_model, check_ready, explain_asked, explainer, json_reply, read_body
from server.schema.common import AskT, WireModel, parse
from server.service import Service
from server.trail import trail_of
from server.translate import naming
from server.unknown import check


class Api(ABC, Generic[AskT]):
    """One API. `names`: of fields, where it is served in another's words, and has other names."""

    name: ClassVar[str]  # in metrics
    id_prefix: ClassVar[str]
    names: ClassVar[Mapping[str, str] | None] = None
    schema: type[AskT]

    def __init__(self, service: Service) -> None:
        self.service = service

    async def read(self, http: Request) -> AskT:
        """The request, from its body."""
        return parse(self.schema, await read_body(self.service, http))

    @abstractmethod
    async def prompts(self, request: AskT, explain: bool) -> Sequence[Prompt]: ...

    @abstractmethod
    def params(self, request: AskT) -> SamplingParams: ...

    def held(self, request: AskT, params: SamplingParams, prompts: Sequence[Prompt]) -> SamplingParams:
        """With what only the prompts say of the grammar."""
        return params

    @abstractmethod
    async def answer(
        self, request: AskT, generation: Generation, http: Request, headers: dict[str, str]
    ) -> Response: ...

    async def handle(self, http: Request) -> Response:
        """Answers one request.

        Raises:
            ApiError, QuireError: to be written by the app's handlers.
        """
        with naming(self.names):
            return await self._handle(http)

    async def _handle(self, http: Request) -> Response:
        record = self.service.metrics.begin(self.name)
        trail = trail_of(http.scope)
        trail.api = self.name
        try:
            check_ready(self.service)
            request = await self.read(http)
            trail.stream = request.streams
            headers = self._check_fields(request)
            trail.generation = generation = await self._submit(request, http, record)
            if self.service.settings.log_prompts:
                request_lines.prompts(generation, self.service.tokenizer)
            return await self.answer(request, generation, http, headers)
        except BaseException as exc:
            record.failed(exc)
            trail.failed(exc)
            raise

    async def _submit(self, request: AskT, http: Request, record: RequestMetrics) -> Generation:
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

    def whole(self, generation: Generation, fields: Fields, headers: dict[str, str]) -> Response:
        """A reply that is not streamed, with what was reused of each prompt, where that was asked."""
        if generation.explains:
            reports = explainer(self.service).reports(generation.prompts, generation.reports)
            fields = {**fields, "cache": reports}
        return json_reply(fields, headers)

    def sent(self, request: AskT) -> WireModel:
        """The request as the caller wrote it."""
        return request

    def _check_fields(self, request: AskT) -> dict[str, str]:
        """Counts unknown fields; the reply's header that names them."""
        sent = self.sent(request)
        self.service.metrics.unknown_fields[self.name] += len(sent.unknown_fields)
        return check(sent, strict=self.service.settings.strict)
