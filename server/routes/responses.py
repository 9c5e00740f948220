"""/v1/responses: OpenAI's Responses API, by way of the chat API's; and the responses that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.docs import describe_query, post
from server.errors import ApiError, invalid, shorten
from server.generation import Generation
from server.middleware.auth import tenant_of
from server.render import Choice, Fields, Frames, encode
from server.render_pieces import PiecesChoice
from server.render_responses import ResponseStream, Sheet, whole
from server.response_items import from_input
from server.response_store import ResponseStore, Stored
from server.routes.common import json_reply, read_body, whole_number
from server.routes.translated import TranslatedApi
from server.schema.chat import ChatRequest
from server.schema.common import parse
from server.schema.responses import DeletedResponse, InputItems, InputTokens, ResponseObject, ResponsesRequest
from server.service import Service
from server.translate import Translated
from server.translate_responses import NAMES, Context, from_responses

MAX_PAGE = 100
DEFAULT_PAGE = 20
# Above this a conversation is read in a thread, so that it does not hold up other streams.
THREAD_BYTES = 2**18


class ResponsesApi(TranslatedApi):
    name = "responses"
    id_prefix = "resp_"
    names = NAMES

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.store = ResponseStore()
        # Streams that nobody writes any more are no longer here.
        self._live: WeakValueDictionary[tuple[str, str], ResponseStream] = WeakValueDictionary()

    async def read(self, http: Request) -> ChatRequest:
        request = parse(ResponsesRequest, await read_body(self.service, http))
        tenant = tenant_of(http.scope).name
        earlier = await self._conversation(tenant, request.previous_response_id)
        return from_responses(request, earlier, [from_input(item) for item in request.input], tenant)

    async def _conversation(self, tenant: str, response_id: str | None) -> list[Fields]:
        if response_id is None:
            return []
        if (tenant, response_id) in self._live:
            raise invalid("previous_response_id: that response is still being made.", "previous_response_id")
        chain = self.store.chain(tenant, response_id)
        if chain is None:
            raise invalid(
                f"previous_response_id: there is no response {shorten(response_id)!r}, or one before it is "
                "no longer kept; send the whole conversation as input.",
                "previous_response_id",
                "previous_response_not_found",
            )
        if sum(stored.size for stored in chain) > THREAD_BYTES:
            return await asyncio.to_thread(_items_of, chain)
        return _items_of(chain)

    async def count(self, http: Request) -> Response:
        """Answers without running the prompt."""
        request = await self.read(http)
        headers = self._check_fields(request)
        tokens = await self.prompt_tokens(request)
        return json_reply({"object": "response.input_tokens", "input_tokens": tokens}, headers)

    def chunks(self, request: ChatRequest, generation: Generation) -> Frames:
        source, context = _told(request)
        (reader,) = self.readers(request, generation)
        key = (context.tenant, generation.id)

        def finished(response: Fields) -> None:
            if self._live.pop(key, None) is not None:
                self._keep(source, context, response)

        sheet = Sheet(self.head(generation), generation, source, reader)
        stream = ResponseStream(sheet, generation, reader, finished)
        if source.store is not False:
            self._live[key] = stream
        return stream

    def reply(self, request: ChatRequest, generation: Generation, choices: Sequence[Choice]) -> Fields:
        source, context = _told(request)
        (choice,) = choices
        assert isinstance(choice, PiecesChoice)
        response = whole(Sheet(self.head(generation), generation, source, choice.reader), choice)
        if source.store is not False:
            self._keep(source, context, response)
        return response

    def _keep(self, source: ResponsesRequest, context: Context, response: Fields) -> None:
        stored = Stored(
            encode(response),
            encode(context.inputs),
            encode(response["output"]),
            source.previous_response_id,
        )
        self.store.put(context.tenant, response["id"], stored)

    # --- of responses that were made before ---

    def retrieve(self, http: Request, response_id: str) -> Response:
        if http.query_params.get("stream", "false") not in ("false", "0"):
            raise invalid("stream: a response that is kept cannot be streamed again.", "stream")
        live = self._live.get((tenant_of(http.scope).name, response_id))
        if live is not None:
            return json_reply(live.current())
        return Response(self._stored(http, response_id).body, media_type="application/json")

    def delete(self, http: Request, response_id: str) -> Response:
        tenant = tenant_of(http.scope).name
        live = self._live.pop((tenant, response_id), None)
        if live is not None:
            live.generation.abort()
        elif not self.store.remove(tenant, response_id):
            raise _unknown(response_id)
        return json_reply({"id": response_id, "object": "response", "deleted": True})

    def cancel(self, http: Request, response_id: str) -> Response:
        live = self._live.get((tenant_of(http.scope).name, response_id))
        if live is None:
            self._stored(http, response_id)
            raise invalid("This response has ended; only one that is being made can be cancelled.")
        live.generation.abort()
        return json_reply({**live.current(), "status": "cancelled"})

    async def input_items(self, http: Request, response_id: str) -> Response:
        """All that the model was given, in pages."""
        tenant, query = tenant_of(http.scope).name, http.query_params
        limit = whole_number("limit", query.get("limit"), 1, MAX_PAGE, DEFAULT_PAGE)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order must be asc or desc.", "order")
        stored = self._stored(http, response_id)
        found = [*await self._conversation(tenant, stored.previous), *_items(stored.inputs)]
        if order == "desc":
            found.reverse()
        after = query.get("after")
        if after:
            ids = [item["id"] for item in found]
            if after not in ids:
                raise invalid("after: there is no such item.", "after")
            found = found[ids.index(after) + 1 :]
        page = found[:limit]
        return json_reply(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else "",
                "last_id": page[-1]["id"] if page else "",
                "has_more": len(found) > len(page),
            }
        )

    def _stored(self, http: Request, response_id: str) -> Stored:
        """Raises 404 for another tenant's, too."""
        stored = self.store.get(tenant_of(http.scope).name, response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored


def _told(request: ChatRequest) -> tuple[ResponsesRequest, Context]:
    assert isinstance(request, Translated)
    return request.source, request.context


def _items(stored: bytes) -> list[Fields]:
    found: list[Any] = msgspec.json.decode(stored)
    return found


def _items_of(chain: Sequence[Stored]) -> list[Fields]:
    return [item for stored in chain for item in _items(stored.inputs) + _items(stored.outputs)]


def _unknown(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"There is no response {shorten(response_id)!r}, or it is no longer kept.",
        param="response_id",
        code="response_not_found",
    )


def router(service: Service) -> APIRouter:
    api = ResponsesApi(service)
    routes = APIRouter(tags=["generation"])

    @post(routes, "/v1/responses", ResponsesRequest, ResponseObject, "Continue a conversation, and keep it")
    async def create(request: Request) -> Response:
        return await api.handle(request)

    @post(
        routes,
        "/v1/responses/input_tokens",
        ResponsesRequest,
        InputTokens,
        "How many tokens a conversation has",
    )
    async def input_tokens(request: Request) -> Response:
        """Takes what /v1/responses takes, and runs nothing."""
        return await api.count(request)

    @routes.get(
        "/v1/responses/{response_id}",
        response_model=ResponseObject,
        summary="A response that was kept",
        openapi_extra=describe_query(
            stream=({"enum": ["false", "0"], "default": "false"}, "Not again: what is kept comes whole.")
        ),
    )
    async def retrieve(request: Request, response_id: str) -> Response:
        return api.retrieve(request, response_id)

    @routes.delete("/v1/responses/{response_id}", response_model=DeletedResponse, summary="Forget a response")
    async def delete(request: Request, response_id: str) -> Response:
        """One that is being made ends."""
        return api.delete(request, response_id)

    @routes.post(
        "/v1/responses/{response_id}/cancel", response_model=ResponseObject, summary="End a response"
    )
    async def cancel(request: Request, response_id: str) -> Response:
        """One that is being streamed; what there is of it is kept. Needs no body."""
        return api.cancel(request, response_id)

    @routes.get(
        "/v1/responses/{response_id}/input_items",
        response_model=InputItems,
        summary="What a response was given",
        openapi_extra=describe_query(
            limit=(
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
                "Most items in the reply.",
            ),
            order=({"enum": ["asc", "desc"], "default": "desc"}, "The newest item last or first."),
            after=({"type": "string", "default": ""}, "The id of the last item of the page before."),
        ),
    )
    async def input_items(request: Request, response_id: str) -> Response:
        return await api.input_items(request, response_id)

    return routes
