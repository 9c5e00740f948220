"""POST /tokenize and /detokenize, as vLLM has them. Knows the shapes; nothing runs in the engine.

What is long is encoded, decoded and written in a thread: other streams go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.docs import post
from server.errors import invalid
from server.prompts import MAX_CHARS_PER_TOKEN
from server.render import encode
from server.routes.common import check_model, conversation, read_question
from server.schema.tokens import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from server.service import Service

# Texts may be longer than the context, so that they can be measured.
MAX_CHARS = 4 * 2**20
_CHARS_PER_ID = 4


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["tokens"])

    @post(routes, "/tokenize", TokenizeRequest, TokenizeReply, "The token ids of a text or a conversation")
    async def tokenize(http: Request) -> Response:
        """Also of one that is longer than the context."""
        request, headers = await read_question(service, http, TokenizeRequest)
        check_model(service, request.model)
        ids = await _ids(service, request)
        strings = bool(request.return_token_strs)
        work = len(ids) * (_CHARS_PER_ID if strings else 1)
        body = await service.prompts.run(work, lambda: _tokenized(service, ids, strings))
        return Response(body, 200, headers, "application/json")

    @post(routes, "/detokenize", DetokenizeRequest, DetokenizeReply, "The text of token ids")
    async def detokenize(http: Request) -> Response:
        """Special tokens are part of the text."""
        request, headers = await read_question(service, http, DetokenizeRequest)
        check_model(service, request.model)
        ids = request.tokens
        _check_ids(ids, service.info.vocab_size)

        def decode() -> bytes:
            return encode({"prompt": service.tokenizer.decode(ids, skip_special_tokens=False)})

        body = await service.prompts.run(len(ids) * _CHARS_PER_ID, decode)
        return Response(body, 200, headers, "application/json")

    return routes


async def _ids(service: Service, request: TokenizeRequest) -> Sequence[int]:
    if request.messages is not None:
        most = max(service.info.max_model_len, MAX_CHARS // MAX_CHARS_PER_TOKEN)
        prompt = await conversation(service, request.messages, request, locate=False, most_tokens=most)
        return prompt.ids
    text, special = request.prompt or "", request.add_special_tokens is not False
    most_chars = max(MAX_CHARS, service.info.max_model_len * MAX_CHARS_PER_TOKEN)
    if len(text) > most_chars:
        raise invalid(f"prompt: has {len(text)} characters; at most {most_chars}.", "prompt")
    return await service.prompts.run(
        len(text), lambda: service.tokenizer.encode(text, add_special_tokens=special)
    )


def _tokenized(service: Service, ids: Sequence[int], strings: bool) -> bytes:
    text_of = service.tokenizer.token_text
    return encode(
        {
            "count": len(ids),
            "max_model_len": service.info.max_model_len,
            "tokens": ids,
            "token_strs": [text_of(token_id) for token_id in ids] if strings else None,
        }
    )


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise invalid(f"tokens: a token id is not in the vocabulary (0 to {vocab_size - 1}).", "tokens")
