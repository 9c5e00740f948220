"""Which tools a request gives its model, how hard the model is to think, and how its replies are read.

Everything here is decided by the request and by what the model's chat template can do. What cannot be done is
said, never left out in silence. Knows no tokens and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from engine.errors import InvalidRequest
from engine.grammar import Grammar, forced_structures, schema_of, structural_tag
from server.errors import ApiError, invalid, shorten, unsupported
from server.parsing.chosen import Notations
from server.parsing.tools import CallOptions
from server.parsing.written import Written
from server.schema.chat import ChatRequest, Conversation
from server.schema.tools import Tool

# The prompt's last tokens, among which a template may have begun the model's thoughts.
TAIL_TOKENS = 16
_NO_EFFORT = ("none", "medium")


def offered(notations: Notations, request: Conversation) -> Sequence[Tool]:
    """The tools that the model is shown and may call.

    Raises:
        ApiError: 400, for what the request contradicts or this server or model cannot do.
    """
    tools, choice = request.tools or (), request.tool_choice
    _check_names(tool.function.name for tool in tools)
    forced = choice is not None and choice.mode == "required"
    if forced and not tools:
        raise invalid("tool_choice: there are no tools to call.", "tool_choice")
    if choice is not None and choice.names is not None:
        _check_known(choice.names, tools)
        tools = [tool for tool in tools if tool.function.name in choice.names]
    if not tools or (choice is not None and choice.mode == "none"):
        return ()
    if "tools" not in notations.reads:
        raise _not_yet("tools: this model's chat template does not take tools.", "tools")
    if notations.written is None:
        raise _not_yet(
            "tools: how this model writes calls is not known to this server; --tool-call-parser says it.",
            "tools",
        )
    if not forced:
        names = {tool.function.name for tool in tools}
        _check_strict(notations, notations.written, names, request.tools or ())
    return tools


def _check_strict(notations: Notations, written: Written, names: Set[str], tools: Sequence[Tool]) -> None:
    """Raises 400 where nothing says that a call begins."""
    if written.marker:
        return
    for position, tool in enumerate(tools):
        if tool.function.strict and tool.function.name in names:
            param = f"tools[{position}].function.strict"
            raise _not_yet(
                f"{param}: in this model's notation, {notations.tools}, calls that the model chooses to make "
                "cannot be held to a schema; leave it out, or use tool_choice required.",
                param,
            )


def grammar(notations: Notations, request: ChatRequest, *, opened: bool) -> Grammar | None:
    """What holds the model to the calls that the request wants; None where it is free, or held to a format.

    Calls that must be made leave no room for a format. Where calls may be made, the text is calls or JSON.

    Args:
        opened: the prompt has begun the thoughts.

    Raises:
        ApiError: 400, a schema is none of arguments.
        InvalidRequest: they are too large.
    """
    tools, choice, written = offered(notations, request), request.tool_choice, notations.written
    if not tools or written is None:
        return None
    instead = None if request.must_call else _format(request)
    try:
        if request.must_call or instead is not None:
            named = choice is not None and choice.function
            return forced_structures(
                [_structure(written, tool, _schema(tool, always=request.must_call)) for tool in tools],
                several=not named and request.parallel_tool_calls is not False,
                first=written.first,
                between=written.between,
                last=written.last,
                thoughts=notations.thoughts(opened=opened),
                instead=instead,
            )
        if not any(tool.function.strict for tool in tools):
            return None
        structures = [_structure(written, tool, _schema(tool), alone=True) for tool in tools]
        return structural_tag({"structures": structures, "triggers": [written.marker]})
    except InvalidRequest as error:
        raise InvalidRequest(error.message, "tools") from error


def _format(request: ChatRequest) -> Any:
    """The schema of the text, if it must be JSON. Raises InvalidRequest: it is none, or too large."""
    wanted = request.wanted_grammar()
    try:
        return None if wanted is None else schema_of(wanted)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, request.grammar_field) from error


_ANY = {"type": "object"}
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def _schema(tool: Tool, *, always: bool = False) -> Mapping[str, Any]:
    """Of the arguments. Any object where the tool is not strict, unless its schema is `always` held to."""
    if not (always or tool.function.strict):
        return _ANY
    schema = tool.function.parameters
    if schema is None:
        return _NOTHING
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise invalid(f"tools: the parameters of {tool.function.name!r} are not an object.", "tools")
    return {**schema, "type": "object"}


def _structure(
    written: Written, tool: Tool, schema: Mapping[str, Any], *, alone: bool = False
) -> dict[str, Any]:
    """`alone`: with what else stands around calls."""
    first, last = (written.first, written.last) if alone else ("", "")
    return {
        "begin": first + written.begin % tool.function.name,
        "schema": schema,
        "end": written.end + last,
        "values": written.values,
    }


def call_options(notations: Notations, request: Conversation) -> CallOptions | None:
    """How calls are to be read; None where there can be none."""
    tools = offered(notations, request)
    if not tools:
        return None
    names = frozenset(tool.function.name for tool in tools)
    return CallOptions(names, parallel=request.parallel_tool_calls is not False)


def template_variables(notations: Notations, request: Conversation) -> dict[str, Any]:
    """What the template gets besides messages."""
    tools = [_plain(tool) for tool in offered(notations, request)]
    return {
        **_thinking(notations, request.reasoning_effort),
        **request.chat_template_kwargs,
        **({"tools": tools} if tools else {}),
    }


def _thinking(notations: Notations, effort: str | None) -> dict[str, Any]:
    """The effort in the words that the template knows: its own variable, or a switch.

    Raises:
        ApiError: 400, the model can only be used as it is.
    """
    if effort is None:
        return {}
    found: dict[str, Any] = {}
    if "reasoning_effort" in notations.reads:
        found["reasoning_effort"] = effort
    if "enable_thinking" in notations.reads:
        found["enable_thinking"] = effort != "none"
    if not found and effort not in _NO_EFFORT:
        raise unsupported("reasoning_effort")
    return found


def _plain(tool: Tool) -> dict[str, Any]:
    """As Hugging Face's templates expect it, which is OpenAI's shape with nothing missing."""
    function: Mapping[str, Any] = tool.function.model_dump(exclude={"strict"}, exclude_none=True)
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.function.name, "description": "", **function, "parameters": parameters},
    }


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for position, name in enumerate(names):
        if name in seen:
            param = f"tools[{position}].function.name"
            raise invalid(f"{param}: there are two tools of this name.", param)
        seen.add(name)


def _check_known(names: Iterable[str], tools: Iterable[Tool]) -> None:
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise invalid(f"tool_choice: there is no tool {shorten(name)!r} among the tools.", "tool_choice")


def _not_yet(message: str, param: str) -> ApiError:
    return invalid(message, param, "unsupported_parameter")
