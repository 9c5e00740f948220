"""Which tools a request gives its model, how hard the model is to think, and how its replies are read.

Everything here is decided by the request and by what the model's chat template can do. What cannot be done is
said, never left out in silence. Knows no tokens and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.errors import ApiError, invalid, shorten, unsupported
from server.parsing.chosen import Notations
from server.parsing.tools import CallOptions
from server.schema.chat import Conversation
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
    if choice is not None and choice.mode == "required":
        if not tools:
            raise invalid("tool_choice: there are no tools to call.", "tool_choice")
        _check_known(choice.names or (), tools)
        raise _not_yet("tool_choice: a call cannot be forced yet; use auto or none.", "tool_choice")
    for position, tool in enumerate(tools):
        if tool.function.strict:
            param = f"tools[{position}].function.strict"
            raise _not_yet(f"{param}: arguments cannot be held to a schema yet; leave it out.", param)
    if choice is not None and choice.names is not None:
        _check_known(choice.names, tools)
        tools = [tool for tool in tools if tool.function.name in choice.names]
    if not tools or (choice is not None and choice.mode == "none"):
        return ()
    if "tools" not in notations.reads:
        raise _not_yet("tools: this model's chat template does not take tools.", "tools")
    if notations.tools is None:
        raise _not_yet(
            "tools: how this model writes calls is not known to this server; --tool-call-parser says it.",
            "tools",
        )
    return tools


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
