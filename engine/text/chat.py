"""Messages to a prompt, through the model's own chat template, with no way to type a control token.

A template mixes its own control tokens with what users wrote. Which is which is lost once it is rendered,
so text that could pass for a control token is marked before:

1. If no string of the caller's holds a control token or could become part of one at its ends, every
   control token in the rendered text is the template's. This is nearly always so.
2. Otherwise the messages are rendered twice: as they are, and with marks around each literal and at each
   doubtful end. The marks are characters that occur nowhere in the input. In the marked rendering a control
   token is real unless it stands in its marks or a mark cuts it.
3. If the two renderings differ in white space at most (templates strip, and a mark can be in the way), the
   plain one is used with the marked one's verdicts; else the marked one without its marks. Either way the
   prompt is one the template writes when nobody types control tokens.

Limits: a template that rewrites letters inside a caller's string (case, replace, slices) could make a control
token out of something that was none. Roles become part of control tokens in some templates; a role that
occurs inside one is taken only if it is a usual role.

Knows tokens only through Tokenizer; knows no HTTP.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import InvalidRequest, ModelError
from engine.text.files import DEFAULT_TEMPLATE, NAMED_TOKENS, TextFiles, read_text_files
from engine.text.sandbox import ChatEnvironment
from engine.text.tokenizer import Segment, Tokenizer

USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})
TIME_LIMIT_S = 10.0
_TOOL_TEMPLATE = "tool_use"
_RESERVED = frozenset({*NAMED_TOKENS, "tokenize", "chat_template"})
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Marks are taken from the first, what ends an open message from the second; private-use planes have room for
# input that uses some of them.
_MARK_CANDIDATES = range(0xF0000, 0xF1000)
_END_CANDIDATES = range(0xFF000, 0xFFF00)

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """One model's chat template.

    Args:
        templates: by name; "default" is the usual one, "tool_use" serves requests with tools.
        tokenizer: the model's.

    Attributes:
        sources: the templates' own text, by name.

    Raises:
        ModelError: a template is not valid Jinja.
    """

    def __init__(self, templates: Mapping[str, str], tokenizer: Tokenizer) -> None:
        self.sources = dict(templates)
        self._environment = ChatEnvironment()
        self._tokenizer = tokenizer
        self._edges = _Edges(tokenizer.control)
        self._find = tokenizer.find_control
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in templates.items()}
        except jinja2.TemplateError as error:
            raise ModelError(f"The chat template is not valid: {_first_line(error)}") from error

    @classmethod
    def from_dir(cls, directory: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template beside the weights, None if the model has none."""
        return cls.from_files(read_text_files(directory), tokenizer)

    @classmethod
    def from_files(cls, files: TextFiles, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The same from files already read."""
        return cls(files.templates, tokenizer) if files.templates else None

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Renders and encodes a prompt.

        Args:
            kwargs: `continue_final_message`, for a prompt that ends where the last message's text does; and
                further variables for the template (enable_thinking, documents ...).

        Raises:
            InvalidRequest: the template does not accept the messages, or they make it too costly.
        """
        segments = self.segments(messages, tools, add_generation_prompt, **kwargs)
        return self._tokenizer.encode_chat(segments)

    def render_text(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for people to read."""
        names = {token_id: text for text, token_id in self._tokenizer.control.items()}
        segments = self.segments(messages, tools, add_generation_prompt, **kwargs)
        return "".join(names[part] if isinstance(part, int) else part for part in segments)

    def segments(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[Segment]:
        """Renders a prompt in pieces: text, and the ids of the control tokens the template wrote."""
        if not continue_final_message:
            return self._segments(messages, tools, add_generation_prompt, **kwargs)
        # What a template writes after the last message is only known by where that message ends.
        [end] = _unused_characters(_END_CANDIDATES, set().union(*_strings([messages, tools, kwargs])), 1)
        *before, last = messages
        open_ended = [*before, {**last, "content": f"{last.get('content') or ''}{end}"}]
        return _until(end, self._segments(open_ended, tools, False, **kwargs))

    def _segments(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> list[Segment]:
        self._check_roles(messages)
        if reserved := _RESERVED.intersection(kwargs):
            raise InvalidRequest(
                f"{min(reserved)} cannot be set for the chat template.", "chat_template_kwargs"
            )
        inputs = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": list(tools or ()) or None,
            **kwargs,
        }
        template = self._choose(bool(tools))
        fixed = {
            "documents": None,
            **self._tokenizer.named_tokens,
            "add_generation_prompt": add_generation_prompt,
        }
        plain = self._run(template, fixed | inputs)
        if not any(self._edges.doubtful(text) for text in _strings(inputs)):
            return self._tokenizer.segments(plain)
        marks = _Marks(_strings(inputs), plain)
        marked = self._run(template, fixed | _map_strings(inputs, lambda text: self._mark(text, marks)))
        return self._judge(plain, marked, marks)

    def _choose(self, with_tools: bool) -> jinja2.Template:
        templates = self._templates
        name = _TOOL_TEMPLATE if with_tools and _TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
        if name in templates:
            return templates[name]
        return next(iter(templates.values()))

    def _run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            return self._environment.run(template, variables, TIME_LIMIT_S)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise InvalidRequest(
                f"The model's chat template does not accept these messages: {_first_line(error)}", "messages"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise InvalidRequest("The messages are nested too deeply or too large.", "messages") from error

    def _check_roles(self, messages: Messages) -> None:
        for message in messages:
            role = message.get("role")
            if isinstance(role, str) and role not in USUAL_ROLES and self._edges.inside(role):
                raise InvalidRequest(
                    f"{role[:64]!r} is not a role this model's messages may have.", "messages"
                )

    def _mark(self, text: str, marks: _Marks) -> str:
        """Marks what could pass for a control token, or for part of one together with its neighbours."""
        head = marks.edge if self._edges.ends_one(text) else ""
        tail = marks.edge if self._edges.begins_one(text) else ""
        pieces, end = [head], 0
        for match in self._find(text):
            pieces += (text[end : match.start()], marks.open, match[0], marks.close)
            end = match.end()
        return "".join((*pieces, text[end:], tail))

    def _judge(self, plain: str, marked: str, marks: _Marks) -> list[Segment]:
        """Step 3 of the module's description."""
        if marks.escaped_in(marked):
            raise InvalidRequest("The messages hold control tokens that cannot be told apart.", "messages")
        text, cuts, quoted = marks.remove(marked)
        genuine = [
            match.span()
            for match in self._find(text)
            if match.span() not in quoted
            and not any(cut in cuts for cut in range(match.start() + 1, match.end()))
        ]
        if text != plain:
            moved = _move_spans(genuine, text, plain)
            if moved is not None:
                text, genuine = plain, moved
        return self._cut(text, genuine)

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
        pieces: list[Segment] = []
        end = 0
        for start, stop in spans:
            pieces += (text[end:start], self._tokenizer.control[text[start:stop]])
            end = stop
        return [*pieces, text[end:]]


class _Edges:
    """Which strings hold a control token, or part of one at an end where a neighbour could complete it."""

    def __init__(self, control: Mapping[str, int]) -> None:
        tokens = [token for token in control if len(token) > 1]
        self._all = "\0".join(tokens)
        begins = sorted(
            {token[:cut] for token in tokens for cut in range(1, len(token))}, key=len, reverse=True
        )
        ends = sorted(
            {token[cut:] for token in tokens for cut in range(1, len(token))}, key=len, reverse=True
        )
        self._begins, self._ends = tuple(begins), tuple(ends)
        self._firsts = frozenset(token[0] for token in tokens)
        self._holds = re.compile("|".join(map(re.escape, control)) or r"(?!)").search

    def doubtful(self, text: str) -> bool:
        return self.begins_one(text) or self.ends_one(text) or self._holds(text) is not None

    def begins_one(self, text: str) -> bool:
        """Whether the end of `text` is the beginning of a control token."""
        return text.endswith(self._begins)

    def ends_one(self, text: str) -> bool:
        """Whether `text` begins with the end of a control token."""
        return text.startswith(self._ends)

    def inside(self, text: str) -> bool:
        return text in self._all


class _Marks:
    """Three characters that occur in no input: around a literal, and at a doubtful end."""

    def __init__(self, inputs: Iterator[str], rendered: str) -> None:
        used = set(rendered).union(*inputs)
        self.open, self.close, self.edge = _unused_characters(_MARK_CANDIDATES, used, 3)
        self._split = re.compile(f"([{self.open}{self.close}{self.edge}])").split

    def escaped_in(self, rendered: str) -> bool:
        """Whether a template wrote marks as JSON escapes, where they no longer mark."""
        return any(json.dumps(mark)[1:-1] in rendered for mark in (self.open, self.close, self.edge))

    def remove(self, marked: str) -> tuple[str, set[int], set[tuple[int, int]]]:
        """Returns the text without marks, where marks were, and the spans that stood in marks."""
        pieces: list[str] = []
        cuts: set[int] = set()
        quoted: set[tuple[int, int]] = set()
        size, opened = 0, -1
        for piece in self._split(marked):
            if piece == self.close and opened >= 0:
                quoted.add((opened, size))
            if piece in (self.open, self.close, self.edge):
                cuts.add(size)
                opened = size if piece == self.open else -1
            else:
                pieces.append(piece)
                size += len(piece)
        return "".join(pieces), cuts, quoted


def _move_spans(spans: Sequence[tuple[int, int]], text: str, other: str) -> list[tuple[int, int]] | None:
    """The same places in a text that differs only in white space; None if it differs in more."""
    here, there = _visible(text), _visible(other)
    if len(here) != len(there) or any(text[i] != other[j] for i, j in zip(here, there, strict=True)):
        return None
    moved = []
    for start, stop in spans:
        # Not a dictionary of all places: of a million characters it would be made in one long breath.
        first, last = bisect_left(here, start), bisect_left(here, stop - 1)
        if here[first : first + 1] != [start] or here[last : last + 1] != [stop - 1]:
            return None
        span = (there[first], there[last] + 1)
        if other[slice(*span)] != text[start:stop]:
            return None
        moved.append(span)
    return moved


def _visible(text: str) -> list[int]:
    return [i for i, character in enumerate(text) if not character.isspace()]


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reasoning goes by several names; templates read the first, gpt-oss's the last."""
    text = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    if text is None:
        return message
    return {"thinking": text, **message, "reasoning_content": text}


def _unused_characters(candidates: range, used: set[str], count: int) -> list[str]:
    free = list(islice((chr(code) for code in candidates if chr(code) not in used), count))
    if len(free) < count:
        raise InvalidRequest("The messages use too many private-use characters.", "messages")
    return free


def _until(end: str, segments: Sequence[Segment]) -> list[Segment]:
    """What comes before the last `end`."""
    for position in range(len(segments) - 1, -1, -1):
        part = segments[position]
        if isinstance(part, str) and end in part:
            kept = [*segments[:position], part[: part.rindex(end)]]
            return [part.replace(end, "") if isinstance(part, str) else part for part in kept]
    raise InvalidRequest(
        "The model's chat template does not let its last message be continued.", "continue_final_message"
    )


def _strings(value: Any) -> Iterator[str]:
    """Every string in the caller's values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every string changed; keys that a template may look up by name stay as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) or key.isidentifier() else change(key): _map_strings(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line[:300]
