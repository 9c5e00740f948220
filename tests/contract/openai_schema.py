"""Validators made from OpenAI's own API description.

`openai-openapi.json` is the part of it that our endpoints refer to (OpenAI API description 2.3.0, MIT
licence, https://github.com/openai/openai-openapi), without prose. To renew it from the full file:

    python -m tests.contract.openai_schema path/to/openapi.json
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

COPY = Path(__file__).with_name("openai-openapi.json")
ROOTS = (
    "CreateChatCompletionRequest",
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionRequest",
    "CreateCompletionResponse",
    "CreateEmbeddingRequest",
    "CreateEmbeddingResponse",
    "ListModelsResponse",
    "Model",
    "ErrorResponse",
    "CreateResponse",
    "Response",
    "ResponseItemList",
    "ResponseStreamEvent",
)
# Of these only the alternatives that our endpoints can have: the others are half of the whole description.
_EVENTS = (
    *("Created", "InProgress", "Completed", "Incomplete", "Failed", "Error"),
    *("OutputItemAdded", "OutputItemDone", "ContentPartAdded", "ContentPartDone", "TextDelta", "TextDone"),
    *("ReasoningTextDelta", "ReasoningTextDone"),
    *("FunctionCallArgumentsDelta", "FunctionCallArgumentsDone"),
)
_ITEMS = ("OutputMessage", "FunctionToolCall", "ReasoningItem")
ALTERNATIVES = {
    "ResponseStreamEvent": tuple(f"Response{event}Event" for event in _EVENTS),
    "OutputItem": _ITEMS,
    "Item": ("InputMessage", *_ITEMS, "FunctionCallOutputItemParam"),
    "InputItem": ("EasyInputMessage", "Item"),
    "InputContent": ("InputTextContent",),
    "ItemResource": (
        *("InputMessageResource", "OutputMessage", "FunctionToolCallResource"),
        *("FunctionToolCallOutputResource", "ReasoningItem"),
    ),
    "FunctionAndCustomToolCallOutput": ("InputTextContent",),
    "Tool": ("FunctionTool",),
    "ToolChoiceParam": ("ToolChoiceOptions", "ToolChoiceAllowed", "ToolChoiceFunction"),
    "Annotation": ("UrlCitationBody",),
}
_PROSE = ("description", "example", "x-oaiMeta", "x-oaiTypeLabel", "x-oaiExpandable")


def trim(document: dict[str, Any]) -> dict[str, Any]:
    """The schemas that ROOTS reach."""
    schemas = document["components"]["schemas"]
    kept: dict[str, Any] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = _with_alternatives(name, _without_prose(schemas[name]))
            waiting += _references(kept[name])
    return {
        "source": {"title": "OpenAI API", "version": document["info"]["version"], "license": "MIT"},
        "components": {"schemas": dict(sorted(kept.items()))},
    }


def _without_prose(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_prose(item) for item in node]
    if not isinstance(node, dict):
        return node
    # A property may be named "description": only text of that name is prose.
    return {
        key: _without_prose(value)
        for key, value in node.items()
        if key not in _PROSE or (key == "description" and isinstance(value, dict))
    }


def _with_alternatives(name: str, schema: Any) -> Any:
    wanted = ALTERNATIVES.get(name)
    if wanted is None:
        return schema
    (key,) = {"oneOf", "anyOf"} & set(schema)
    found = [option for option in schema[key] if option["$ref"].rsplit("/", 1)[1] in wanted]
    assert len(found) == len(wanted), name
    return {**{other: value for other, value in schema.items() if other != "discriminator"}, key: found}


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _references(item)]
    if not isinstance(node, dict):
        return []
    found = [name for value in node.values() for name in _references(value)]
    if isinstance(node.get("$ref"), str):
        found.append(node["$ref"].rsplit("/", 1)[1])
    return found


def _nullable(node: Any) -> Any:
    """`nullable: true` (OpenAPI 3.0's word, which JSON Schema does not know) -> a null alternative."""
    if isinstance(node, list):
        return [_nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [inner, {"type": "null"}]} if node.get("nullable") is True else inner


def _as_sent(schemas: dict[str, Any]) -> None:
    """Where OpenAI's server and its own description differ, the server is followed: clients are built on it.

    In completions, chunks before the last have a null finish_reason and, with include_usage, a null usage,
    as chat chunks do; the first token of an echoed prompt has a null log probability and null alternatives.
    In base64 an embedding is text.
    """
    vector = schemas["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string"}]}
    reply = schemas["CreateCompletionResponse"]["properties"]
    reply["usage"] = {"anyOf": [reply["usage"], {"type": "null"}]}
    choice = reply["choices"]["items"]["properties"]
    choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}
    lists = choice["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        lists[name]["items"] = {"anyOf": [lists[name]["items"], {"type": "null"}]}


@cache
def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = _nullable(json.loads(COPY.read_text())["components"]["schemas"])
    _as_sent(schemas)
    return schemas


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": _schemas()}}
    )


def check(name: str, value: Any) -> None:
    """Raises jsonschema.ValidationError unless `value` is what OpenAI calls a `name`."""
    _validator(name).validate(value)


def request_fields(name: str) -> set[str]:
    """The parameters of an official request."""
    return set(_fields(_schemas()[name]))


def _fields(schema: dict[str, Any]) -> list[str]:
    if "$ref" in schema:
        return _fields(_schemas()[schema["$ref"].rsplit("/", 1)[1]])
    return [
        *schema.get("properties", {}),
        *(field for part in schema.get("allOf", ()) for field in _fields(part)),
    ]


if __name__ == "__main__":
    COPY.write_text(json.dumps(trim(json.loads(Path(sys.argv[1]).read_text())), indent=1) + "\n")
