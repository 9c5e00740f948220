"""What generation and probing have in common: the body, the model's name, the prompts.

Knows which fields say what the prompt is; does not know what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from server.chat import template_messages
from server.errors import ApiError, invalid, shorten
from server.explain import Explainer
from server.jsonbody import read_json
from server.prompts import Prompt
from server.schema.chat import ChatMessage, Conversation
from server.service import Service
from server.tools import template_variables

MIN_BODY_VALUES = 250_000
EXPLAIN_HEADER = "x-quire-explain-cache"
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


async def read_body(service: Service, http: Request) -> dict[str, Any]:
    # Prompts are the only long lists; twice the longest leaves room for everything else.
    max_values = max(MIN_BODY_VALUES, 2 * service.info.max_model_len)
    return await read_json(http.headers, http.receive, service.settings.max_body_bytes, max_values)


def check_model(service: Service, model: str | None) -> None:
    """Raises 404 for another model than the served one."""
    if model is not None and model != service.model_name:
        raise ApiError(
            404,
            f"The model '{shorten(model)}' does not exist; this server has '{service.model_name}'.",
            param="model",
            code="model_not_found",
        )


async def conversation(
    service: Service,
    messages: Sequence[ChatMessage],
    request: Conversation,
    *,
    locate: bool,
) -> Prompt:
    """A conversation as the model's template writes it. `locate`: and which tokens are whose."""
    return await service.prompts.from_messages(
        template_messages(messages, short_ids=service.notations.tools == "mistral"),
        service.info.max_model_len,
        add_generation_prompt=request.add_generation_prompt is not False,
        variables=template_variables(service.notations, request),
        locate=locate,
    )


async def plain(
    service: Service, prompts: Sequence[str | list[int]], add_special_tokens: bool | None
) -> list[Prompt]:
    """Texts and lists of ids."""
    info, special = service.info, add_special_tokens is not False
    return [
        await service.prompts.from_text(prompt, special, info.max_model_len)
        if isinstance(prompt, str)
        else service.prompts.from_ids(prompt, info.vocab_size, info.max_model_len)
        for prompt in prompts
    ]


def explainer(service: Service) -> Explainer:
    return Explainer(service.tokenizer, service.info.block_size)


def explain_asked(headers: Headers, field: bool | None) -> bool:
    """By the field or by the header.

    Raises:
        ApiError: 400, the header is neither true nor false.
    """
    sent = headers.getlist(EXPLAIN_HEADER)
    words = [_SWITCH.get(value.strip().lower()) for value in sent]
    if len(words) > 1 or None in words:
        raise invalid(f"The header {EXPLAIN_HEADER} must be true or false.", EXPLAIN_HEADER)
    return bool(field) or True in words
