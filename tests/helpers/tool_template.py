"""A template for the fake engine that shows tools and earlier calls, and may begin the model's thoughts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.helpers.fake_client import ASSISTANT, FakeTemplate

HERMES = "{% if tools %}<tools></tools><tool_call></tool_call>{% endif %}"
THINKING = "{{ content.split('</think>')[-1] }}{% if enable_thinking %}{% endif %}"


class ToolTemplate(FakeTemplate):
    """FakeTemplate with all else that it is given in front, as JSON.

    Attributes:
        seen: what `render` was called with, last.
    """

    def __init__(self, source: str = HERMES, opening: str = "") -> None:
        self.sources = {"default": source}
        self._opening = opening
        self.seen: tuple[Sequence[Mapping[str, Any]], dict[str, Any]] = ((), {})

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        self.seen = (messages, kwargs)
        ids = super().render(messages, add_generation_prompt=add_generation_prompt)
        front = json.dumps(kwargs, sort_keys=True).encode() if kwargs else b""
        opening = self._opening.encode() if ids[-1] == ASSISTANT else b""
        return [*front, *ids, *opening]
