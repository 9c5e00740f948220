"""The way of APIs that are served in the words of the chat API: only what is read and written differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import QuireError
from server.errors import ApiError, to_api_error
from server.generation import Generation
from server.render import Choice
from server.render_pieces import PiecesChoice, Reader
from server.routes.chat import ChatApi
from server.schema.chat import ChatRequest
from server.schema.common import WireModel
from server.translate import Translated, renamed
from server.unknown import check


class TranslatedApi(ChatApi):
    """One such API. `names`: of chat's fields, where this API has others."""

    names: ClassVar[Mapping[str, str]] = {}

    async def handle(self, http: Request) -> Response:
        try:
            return await super().handle(http)
        except QuireError as exc:
            raise renamed(to_api_error(exc), self.names) from exc
        except ApiError as exc:
            raise renamed(exc, self.names) from None

    def _check_fields(self, request: ChatRequest) -> dict[str, str]:
        assert isinstance(request, Translated)
        source: WireModel = request.source
        self.service.metrics.unknown_fields[self.name] += len(source.unknown_fields)
        return check(source, strict=self.service.settings.strict)

    def reader(self, request: ChatRequest, generation: Generation) -> Reader:
        return Reader(next(iter(self._parsers(request, generation)), None))

    def choices(self, request: ChatRequest, generation: Generation) -> Sequence[Choice]:
        return [PiecesChoice(self.reader(request, generation))]
