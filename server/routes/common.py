"""What generation and probing have in common: the body, the model's name, the prompts.

Knows which fields say what the prompt is; does not know what is done with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from server.chat import template_messages
from server.errors import ApiError, invalid, shorten
from server.explain import Explainer
from server.jsonbody import read_json
from server.prompts import Prompt
from server.render import encode
from server.schema.chat import ChatMessage, Conversation
from server.schema.common import WireT, parse
from server.service import Service
from server.tools import template_variables
from server.unknown import check

MIN_BODY_VALUES = 250_000
MAX_DIGITS = 10
EXPLAIN_HEADER = "x-quire-explain-cache"
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def check_ready(service: Service) -> None:
    """Raises ApiError, 503, where nothing can be served now."""
    refusal = service.why_not_ready()
    if refusal is not None:
        raise refusal


async def read_question(service: Service, http: Request, schema: type[WireT]) -> tuple[WireT, dict[str, str]]:
    """What is asked where nothing is generated, and the reply's header about its fields.

    Raises:
        ApiError: 503, not ready; 400, not what the schema says.
    """
    check_ready(service)
    request = parse(schema, await read_body(service, http))
    return request, check(request, strict=service.settings.strict)


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
    most_tokens: int | None = None,
) -> Prompt:
    """A conversation as the model's template writes it.

    Args:
        locate: and which tokens are whose.
        most_tokens: above which a text is refused unread; left out: the context.
    """
    _check_continued(messages, request)
    return await service.prompts.from_messages(
        template_messages(messages, short_ids=service.notations.tools == "mistral"),
        most_tokens or service.info.max_model_len,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        variables=template_variables(service.notations, request),
        locate=locate,
    )


def _check_continued(messages: Sequence[ChatMessage], request: Conversation) -> None:
    if not request.continue_final_message:
        return
    if request.add_generation_prompt and "add_generation_prompt" in request.model_fields_set:
        raise invalid(
            "add_generation_prompt: cannot be true together with continue_final_message.",
            "add_generation_prompt",
        )
    if messages[-1].content is None or messages[-1].tool_calls:
        raise invalid(
            "continue_final_message: the last message has no text to go on from.", "continue_final_message"
        )


async def plain(
    service: Service,
    prompts: Sequence[str | list[int]],
    add_special_tokens: bool | None,
    most: int | None = None,
) -> list[Prompt]:
    """Texts and lists of ids. `most`: keep the last so many tokens of each."""
    info, special = service.info, add_special_tokens is not False

    def make(prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return service.prompts.from_text(prompt, special, info.max_model_len).shortened(most)
        ids = prompt[-most:] if most else prompt
        return service.prompts.from_ids(ids, info.vocab_size, info.max_model_len)

    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await service.prompts.run(chars, lambda: [make(prompt) for prompt in prompts])


def kept_tokens(service: Service, asked: int | None, max_tokens: int | None) -> int | None:
    """How many of a prompt's last tokens are kept: `truncate_prompt_tokens`, settled; None: all.

    Args:
        asked: -1 is what leaves room for `max_tokens`, and for one token where they are left open.

    Raises:
        ApiError: 400, more than the context.
    """
    context = service.info.max_model_len
    if asked is not None and asked > context:
        raise invalid(
            f"truncate_prompt_tokens: {asked} is more than this model's context of {context}.",
            "truncate_prompt_tokens",
        )
    return max(1, context - (1 if max_tokens is None else max_tokens)) if asked == -1 else asked


def whole_number(name: str, text: str | None, low: int, high: int, default: int = 0) -> int:
    """A field of the address."""
    if text is None:
        return default
    plain = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
    if not plain or not low <= int(text) <= high:
        raise invalid(f"{name} must be a whole number from {low} to {high}, got '{shorten(text)}'.", name)
    return int(text)


def json_reply(fields: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(fields), 200, headers, "application/json")


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
