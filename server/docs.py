"""The API's description: /openapi.json, and /docs as one page that needs no network.

Knows pydantic's JSON schemas and FastAPI's routes; does not know what handlers do. Request bodies are
described from the very models that check them, so the description cannot drift from what is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.outcomes import REF, STREAMS, describe_outcomes
from server.schema.cache import ProbeRequest
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.embeddings import EmbeddingRequest
from server.schema.errors import AnthropicErrorReply, ErrorReply
from server.schema.messages import CountTokensRequest, MessagesRequest
from server.schema.responses import ResponsesRequest
from server.schema.tokens import DetokenizeRequest, TokenizeRequest

Handler = Callable[[Request], Awaitable[Response]]

_BODIES: tuple[type[BaseModel], ...] = (
    *(ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountTokensRequest, ProbeRequest),
    *(EmbeddingRequest, TokenizeRequest, DetokenizeRequest, ErrorReply, AnthropicErrorReply),
)
_EXAMPLES = {
    "/v1/chat/completions": '{"messages": [{"role": "user", "content": "Hello!"}]}',
    "/v1/completions": '{"prompt": "Once upon a time", "max_tokens": 32}',
    "/v1/responses": '{"input": "Hello!"}',
    "/v1/messages": '{"max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]}',
    "/v1/messages/count_tokens": '{"messages": [{"role": "user", "content": "Hello!"}]}',
    "/v1/embeddings": '{"input": ["Hello!", "Good evening."]}',
    "/tokenize": '{"prompt": "Hello!", "return_token_strs": true}',
    "/detokenize": '{"tokens": [72, 101]}',
    "/v1/cache/probe": '{"messages": [{"role": "user", "content": "Hello!"}]}',
}
# How to ask those that take no body, where it is not simply their address.
_CURL = {
    "/v1/cache": "'{url}?state=cached&limit=100'",
    "/v1/cache/blocks/{block_id}": "{root}/v1/cache/blocks/1",
    "/v1/cache/reset": "-X POST {url}",
    "/v1/cache/events": "-N {url}",
    "/v1/models/{model}": "",
    "/v1/responses/{response_id}": "",
    "/v1/responses/{response_id}/cancel": "",
    "/v1/responses/{response_id}/input_items": "",
}


def post(
    routes: APIRouter, path: str, body: type[BaseModel], reply: type[BaseModel], summary: str
) -> Callable[[Handler], Handler]:
    """A route that parses its own body, which FastAPI cannot see; described by both models."""
    schema = {"$ref": REF.format(model=body.__name__)}
    described = {"required": True, "content": {"application/json": {"schema": schema}}}
    return routes.post(path, response_model=reply, summary=summary, openapi_extra={"requestBody": described})


def describe_query(**fields: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """For a route that reads its own query: name -> schema and meaning of each field."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
            for name, (schema, text) in fields.items()
        ]
    }


def openapi(app: FastAPI) -> dict[str, Any]:
    """The whole description, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (*_BODIES, *STREAMS.values()):
            schema = model.model_json_schema(ref_template=REF)
            for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
                # The framework leaves out defaults that are null.
                if schemas.setdefault(name, part) not in (part, jsonable_encoder(part, exclude_none=True)):
                    raise AssertionError(f"two models are called {name}; a description has one of each name")
                schemas[name] = part
        for path, operation in _operations(document):
            describe_outcomes(path, operation)
        app.openapi_schema = document
    return app.openapi_schema


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def page(document: Mapping[str, Any], base_url: str) -> str:
    """/docs: every operation with its fields, as plain HTML."""
    sections = "".join(
        _section(path, method, operation, document, base_url)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    info = document["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
        f"<meta name=viewport content='width=device-width,initial-scale=1'><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"<p>{escape(info.get('description', ''))}</p>"
        f"<p>The same for machines: <a href=openapi.json>openapi.json</a></p>{sections}"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;"
    "border-top:1px solid #8884;padding:.3rem .6rem}code,pre{font:13px ui-monospace,monospace}"
    "pre{background:#8882;padding:.8rem;overflow:auto}small{opacity:.6}h2 b{color:#0a7}"
    ":root{color-scheme:light dark}"
)


def _section(
    path: str, method: str, operation: Mapping[str, Any], document: Mapping[str, Any], base_url: str
) -> str:
    title = f"<h2><b>{method.upper()}</b> {escape(path)}</h2><p>{escape(operation.get('summary', ''))}. "
    text = escape(operation.get("description", ""))
    if "requestBody" not in operation:
        return (
            f"{title}{text}</p>{_how(path, base_url)}{_table('parameter', operation.get('parameters', ()))}"
        )
    ref = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][ref.rsplit("/", 1)[1]]
    curl = f"curl {base_url}{path} -H 'Content-Type: application/json' \\\n  -d '{_EXAMPLES.get(path, '{}')}'"
    required = schema.get("required", ())
    fields = [
        {**field, "name": name, "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]
    return f"{title}{text}</p><pre>{escape(curl)}</pre>{_table('field', fields)}"


def _how(path: str, base_url: str) -> str:
    words = _CURL.get(path, "{url}")
    if not words:
        return ""
    return f"<pre>{escape('curl ' + words.format(url=base_url + path, root=base_url))}</pre>"


def _table(what: str, fields: Iterable[Mapping[str, Any]]) -> str:
    """Fields as OpenAPI describes an address's parameters."""
    rows = "".join(
        f"<tr><td><code>{escape(field['name'])}</code><td>{escape(_kind(field['schema']))}"
        f"<td>{'required' if field['required'] else _default(field['schema'])}"
        f"<td>{escape(field.get('description', ''))}"
        for field in fields
    )
    return f"<table><tr><th>{what}<th>type<th>default<th>meaning{rows}</table>" if rows else ""


def _default(field: Mapping[str, Any]) -> str:
    return "" if field.get("default") is None else f"<code>{escape(json.dumps(field['default']))}</code>"


def _kind(field: Mapping[str, Any]) -> str:
    """A type with its limits, in a few words."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[1]
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"] if value is not None) or "null"
    kind = str(field.get("type", "any"))
    low = field.get("minimum", field.get("exclusiveMinimum"))
    if low is None or "maximum" not in field:
        return kind
    return f"{kind}, {'above ' if 'exclusiveMinimum' in field else ''}{low} to {field['maximum']}"
