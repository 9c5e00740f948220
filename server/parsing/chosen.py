"""The notations one server reads its model's replies with: told from the template, or by the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from server.parsing import detect
from server.parsing.formats import TOOL_FORMATS
from server.parsing.parser import OutputParser
from server.parsing.reasoning import REASONING_TAGS, ReasoningSplitter
from server.parsing.tools import CallOptions
from server.parsing.written import Written, written

TOOL_CHOICES = ("auto", "none", *TOOL_FORMATS)
REASONING_CHOICES = ("auto", "none", *REASONING_TAGS)


@dataclass(frozen=True, slots=True)
class Notations:
    """See the module.

    Attributes:
        reads: variables of the model's template that a request may set: tools, reasoning_effort,
            enable_thinking.
        tools, reasoning: names of formats; None: not read.
        written: how a grammar has calls written; None where they are not read.
    """

    reads: frozenset[str] = frozenset()
    tools: str | None = None
    reasoning: str | None = None
    written: Written | None = None

    def opened_by(self, prompt_tail: str) -> bool:
        """Whether a prompt with this end has begun the thoughts."""
        return self.reasoning is not None and prompt_tail.rstrip().endswith(
            REASONING_TAGS[self.reasoning].open
        )

    def thoughts(self, *, opened: bool) -> tuple[str, str] | None:
        """What opens and closes thoughts from here on; nothing opens them if the prompt has."""
        if self.reasoning is None:
            return None
        tags = REASONING_TAGS[self.reasoning]
        return "" if opened else tags.open, tags.close

    def parser(
        self, options: CallOptions | None, control: Mapping[str, int], *, opened: bool = False
    ) -> OutputParser | None:
        """What reads one choice; None if its text is all content.

        Args:
            options: None for a request without tools.
            control: the model's control tokens.
            opened: the prompt has begun the thoughts.
        """
        tools = splitter = end_id = None
        if options is not None and self.tools is not None:
            tools = TOOL_FORMATS[self.tools](options)
        if self.reasoning is not None:
            tags = REASONING_TAGS[self.reasoning]
            splitter, end_id = ReasoningSplitter(tags, opened=opened), control.get(tags.close)
        if tools is None and splitter is None:
            return None
        return OutputParser(splitter, tools, end_id)

    def hidden_markers(
        self, control: Mapping[str, int], special_ids: Set[int], *, tools: bool
    ) -> tuple[int, ...]:
        """The markers that are special tokens, which do not reach a parser unless they are shown.

        Args:
            tools: whether calls are read, too.
        """
        of_tools = TOOL_FORMATS[self.tools].markers if tools and self.tools is not None else ()
        of_reasoning = REASONING_TAGS[self.reasoning] if self.reasoning is not None else ()
        ids = {control[marker] for marker in (*of_tools, *of_reasoning) if marker in control}
        return tuple(sorted(ids & special_ids))


def choose(
    templates: Mapping[str, str], tool_parser: str = "auto", reasoning_parser: str = "auto"
) -> Notations:
    """The notations for a model with these templates, by name, as the operator said."""
    # The one for tools is asked first.
    sources = [text for name, text in sorted(templates.items(), key=lambda item: item[0] != "tool_use")]
    tools = _named(tool_parser, detect.tool_format, sources)
    reasoning = _named(reasoning_parser, detect.reasoning_format, sources)
    return Notations(detect.reads(sources), tools, reasoning, written(tools, sources))


def _named(choice: str, find: Callable[[str], str | None], sources: Sequence[str]) -> str | None:
    if choice == "auto":
        return next(filter(None, map(find, sources)), None)
    return None if choice == "none" else choice
