"""Tools, which of them to call, and the calls of earlier turns, as the chat API writes them.

Knows shapes only: what this server or its model cannot do is said by server.tools.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.schema.common import WireModel, field_error

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_ID_CHARS = 256
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_MODES = ("none", "auto", "required")


class Function(WireModel):
    """What a model may call."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="A JSON schema of the arguments; left out: there are none."
    )
    strict: bool | None = Field(False, description="true: the arguments always keep to the schema.")


class Tool(WireModel):
    """One tool; custom tools are not supported."""

    type: Literal["function"]
    function: Function


class CalledFunction(WireModel):
    name: str = Field(min_length=1, max_length=256)
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(WireModel):
    """A call that the assistant has made in an earlier turn."""

    id: str = Field(min_length=1, max_length=MAX_ID_CHARS)
    type: Literal["function"] = "function"
    function: CalledFunction


class Choice(WireModel):
    """Settled: `mode`, and the names of the tools that may be called (None: all).

    `function`: one function was named, and is called once.
    """

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    function: bool = False


def settle(value: Any, *, bare: bool = False) -> Choice | None:
    """What a word, {"type": "function", ...} or {"type": "allowed_tools", ...} says.

    Args:
        bare: as the Responses API writes the objects: what they are about stands in them, not one level down.
    """
    if value is None or isinstance(value, Choice):
        return value
    if isinstance(value, str) and value in _MODES:
        return Choice(mode=value)  # type: ignore[arg-type]
    if not isinstance(value, dict) or value.get("type") not in ("function", "allowed_tools"):
        raise field_error('must be "none", "auto", "required" or an object that names a function')
    if value["type"] == "function":
        return Choice(mode="required", names=(_name(value, bare),), function=True)
    allowed = value if bare else value.get("allowed_tools")
    allowed = allowed if isinstance(allowed, dict) else {}
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools or allowed.get("mode") not in ("auto", "required"):
        raise field_error("allowed_tools needs a mode, auto or required, and a list of tools")
    return Choice(mode=allowed["mode"], names=tuple(_name(tool, bare) for tool in tools))


def _name(value: Any, bare: bool) -> str:
    tool = value if isinstance(value, dict) else {}
    function = tool.get("function") if not bare else tool if tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        form = '"name": "..."' if bare else '"function": {"name": "..."}'
        raise field_error(f'a function is named by {{"type": "function", {form}}}')
    return name


def choice_schema(*, bare: bool = False) -> dict[str, Any]:
    """The same for the API's description."""

    def tagged(kind: str, **fields: Any) -> dict[str, Any]:
        return _object(type={"const": kind}, **(fields if bare else {kind: _object(**fields)}))

    named = tagged("function", name={"type": "string"})
    tools = {"type": "array", "minItems": 1, "items": named}
    allowed = tagged("allowed_tools", mode={"enum": ["auto", "required"]}, tools=tools)
    return {"anyOf": [{"enum": [*_MODES]}, named, allowed, {"type": "null"}]}


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields]}


ToolChoice = Annotated[Choice | None, BeforeValidator(settle), WithJsonSchema(choice_schema())]
