"""/v1/cache: what the cache has, why a prompt would miss, and how to empty it.

Knows the shapes; the engine answers. Anybody may probe, for the caller's own tenant; the rest shows what all
tenants do and is the admin's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import ContextTooLong
from engine.views import BlockView
from server.docs import describe_query, post
from server.errors import ApiError, invalid, shorten
from server.history import block_counts
from server.live import EventFeed
from server.middleware.auth import admin_only, tenant_of
from server.prompts import Prompt
from server.routes.common import (
    check_model,
    check_ready,
    conversation,
    explainer,
    json_reply,
    kept_tokens,
    plain,
    read_question,
    whole_number,
)
from server.schema.cache import STATES, BlockReply, CacheReply, ProbeReply, ProbeRequest, ResetReply
from server.schema.common import INT32_MAX
from server.service import Service

DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
_BLOCK_ID = {"type": "integer", "minimum": 0, "maximum": INT32_MAX}
_BLOCK_FIELDS = tuple(field.name for field in fields(BlockView))


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    routes.include_router(_open(service))
    routes.include_router(_admin(service))
    return routes


def _open(service: Service) -> APIRouter:
    routes = APIRouter(tags=["cache"])

    @post(
        routes,
        "/v1/cache/probe",
        ProbeRequest,
        ProbeReply,
        "What of a prompt would be reused, and why not more",
    )
    async def probe(http: Request) -> Response:
        """Answers without running the prompt; nothing changes and nothing is counted."""
        request, headers = await read_question(service, http, ProbeRequest)
        check_model(service, request.model)
        prompts = await _prompts(service, request)
        scope = tenant_of(http.scope).scope(request.cache_salt)
        reports = [await service.client.probe_cache(prompt.ids, scope) for prompt in prompts]
        explained = explainer(service).reports(prompts, reports)
        reply = {"object": "cache.probe", "model": service.model_name, "cache": explained}
        return json_reply(reply, headers)

    return routes


async def _prompts(service: Service, request: ProbeRequest) -> list[Prompt]:
    most = kept_tokens(service, request.truncate_prompt_tokens, None)
    if request.messages is None:
        prompts = await plain(service, request.prompt or (), request.add_special_tokens, most)
    else:
        prompts = [(await conversation(service, request.messages, request, locate=True)).shortened(most)]
    context = service.info.max_model_len
    for prompt in prompts:
        if len(prompt.ids) > context:
            raise ContextTooLong(
                f"The prompt has {len(prompt.ids)} tokens; this model's context has {context}.",
                "prompt" if request.messages is None else "messages",
            )
    return prompts


def _admin(service: Service) -> APIRouter:
    # Here and nowhere else: a route that is added to this router is closed to ordinary keys.
    routes = APIRouter(tags=["cache"], dependencies=[Depends(admin_only)])

    @routes.get(
        "/v1/cache",
        response_model=CacheReply,
        summary="The pool, block by block",
        openapi_extra=describe_query(
            first_block=({**_BLOCK_ID, "minimum": 1, "default": 1}, "The first block of the page."),
            limit=(
                {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
                "Most blocks in the reply.",
            ),
            state=({"enum": ["", *STATES], "default": ""}, "Only blocks in this state."),
        ),
    )
    async def cache(http: Request) -> Response:
        """In the order of their numbers, up to `limit` at a time; go on from `next_block`."""
        check_ready(service)
        query = http.query_params
        state = query.get("state", "")
        if state and state not in STATES:
            raise invalid(f"state must be one of {', '.join(STATES)}, got '{shorten(state)}'.", "state")
        first_block = whole_number("first_block", query.get("first_block"), 1, INT32_MAX, 1)
        limit = whole_number("limit", query.get("limit"), 1, MAX_LIMIT, DEFAULT_LIMIT)
        page = await service.client.cache_page(first_block, limit, state)
        snapshot = service.client.snapshot()
        return json_reply(
            {
                "object": "cache",
                "block_size": service.info.block_size,
                "num_blocks": service.info.num_blocks - 1,  # block 0 holds nothing
                "blocks": block_counts(snapshot),
                "tokens_held": snapshot.tokens_held,
                "data": [_block(service, view) for view in page.blocks],
                "next_block": page.next_block,
            }
        )

    @routes.get("/v1/cache/blocks/{block_id}", response_model=BlockReply, summary="One block")
    async def block(block_id: Annotated[str, WithJsonSchema(_BLOCK_ID)]) -> Response:
        """Its tokens and their text are only shown where no API keys are configured."""
        check_ready(service)
        number = whole_number("block_id", block_id, 0, INT32_MAX)
        detail = await service.client.cache_block(number)
        if detail is None:
            raise ApiError(404, f"The pool has no block {number}.", param="block_id", code="block_not_found")
        ids = None if service.tenants.keys_configured else detail.token_ids
        return json_reply(
            {
                "object": "cache.block",
                "block": _block(service, detail.block),
                "children": detail.children,
                "token_ids": ids,
                "text": None if ids is None else service.tokenizer.decode(ids, skip_special_tokens=False),
            }
        )

    @routes.post("/v1/cache/reset", response_model=ResetReply, summary="Forget what is cached")
    async def reset(http: Request) -> Response:
        """Blocks in use stay with their requests. Needs no body."""
        _check_same_site(http)
        check_ready(service)
        return json_reply({"object": "cache.reset", "blocks_emptied": await service.client.reset_cache()})

    @routes.get("/v1/cache/events", response_class=Response, summary="The pool as it changes")
    async def events() -> Response:
        """Server-sent events for the live page: `hello`, then `pool` and `sample`."""
        check_ready(service)
        return EventFeed(service, service.feed)

    return routes


def _check_same_site(http: Request) -> None:
    """No page from elsewhere may send this with a visitor's browser to a server that asks for no key."""
    if http.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, "Another site's page may not empty the cache.", code="cross_site_request")


def _block(service: Service, view: BlockView) -> dict[str, Any]:
    """Requests by the ids that callers know, while they live."""
    public_id = service.client.public_id
    return {
        **{name: getattr(view, name) for name in _BLOCK_FIELDS},  # asdict takes 30 times as long
        "owner": public_id(view.owner) if view.owner else "",
        "holders": list(filter(None, map(public_id, view.holders))),
        "age_s": round(view.age_s, 3),
        "idle_s": None if view.idle_s is None else round(view.idle_s, 3),
    }
