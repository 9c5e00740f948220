"""From what a request says to prompt token ids.

Knows tokenizers, chat templates and lengths; does not know HTTP or sampling. Text that is long is
tokenised in a thread, after a look at its length, so that one request cannot hold up the others' streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from engine.errors import ContextTooLong, QuireError
from engine.types import token_array
from server import chat, spans
from server.errors import invalid
from server.spans import MessageSpan

# A text with more characters than this per token of context cannot fit: tokens are shorter on average
# in every language and in code. Only long runs of one character come near it.
MAX_CHARS_PER_TOKEN = 32
# Tokenising takes about a microsecond per character; below this it is done in place.
INLINE_CHARS = 2048
MAX_WORKERS = 2

T = TypeVar("T")


class Tokenizer(Protocol):
    """The part of engine.text's tokenizer that the server uses."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def control(self) -> Mapping[str, int]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Template(Protocol):
    """The part of engine.text's chat template that the server uses."""

    @property
    def sources(self) -> Mapping[str, str]: ...
    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]: ...
    def render_text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: what the engine computes; long ones are an array, for the time that lists take.
        text: the same, where the reply may have to repeat it.
        messages: which of the ids are which message's, where that was asked and can be told.
    """

    ids: Sequence[int]
    text: str | None = None
    messages: Sequence[MessageSpan] | None = None

    def shortened(self, most: int | None) -> Prompt:
        """Its last `most` tokens. What was cut can no longer be told by text or messages."""
        return self if most is None or len(self.ids) <= most else Prompt(self.ids[-most:])


class Prompts:
    """Makes prompts with one model's tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._pool = ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def from_text(self, text: str, add_special_tokens: bool, context_tokens: int) -> Prompt:
        """Tokenises one text, which takes its time: see `run`.

        Raises:
            ContextTooLong: it cannot fit, said before any work is done.
        """
        _check_length(len(text), context_tokens)
        ids = token_array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return Prompt(_not_empty(ids, "prompt"), text)

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word as it begins a text, and as it follows a space."""
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(encode(text)) for text in texts))

    def from_ids(self, ids: Sequence[int], vocab_size: int, context_tokens: int) -> Prompt:
        """Checks ids that the caller made."""
        if len(ids) > context_tokens:
            raise ContextTooLong(
                f"The prompt has {len(ids)} tokens; this model's context has {context_tokens}.", "prompt"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise invalid(f"prompt: a token id is not in the vocabulary (0 to {vocab_size - 1}).", "prompt")
        return Prompt(token_array(ids))

    async def from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        context_tokens: int,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
        locate: bool = False,
    ) -> Prompt:
        """Renders a conversation with the model's chat template.

        Args:
            continue_final_message: end where the last message's text does.
            locate: say also which tokens are which message's.
        """
        template = self._template
        if template is None:
            raise invalid(
                "This model has no chat template; use /v1/completions.", "messages", "no_chat_template"
            )
        chars = chat.size(messages, variables.get("tools", ()))
        if continue_final_message:
            add_generation_prompt, variables = False, {**variables, "continue_final_message": True}
        _check_length(chars, context_tokens)

        def render() -> Prompt:
            turns = chat.with_arguments(messages)
            ids = template.render(turns, add_generation_prompt=add_generation_prompt, **variables)
            found = find_spans(ids, turns) if locate else None
            return Prompt(_not_empty(token_array(ids), "messages"), messages=found)

        def find_spans(
            ids: Sequence[int], messages: Sequence[Mapping[str, Any]]
        ) -> Sequence[MessageSpan] | None:
            as_text = partial(template.render_text, add_generation_prompt=add_generation_prompt, **variables)
            # A template may refuse what it would take without marks.
            with contextlib.suppress(QuireError):
                return spans.find(ids, messages, as_text, self.tokenizer.token_bytes)
            return None

        return await self.run(chars + 32 * len(messages), render)

    async def run(self, work_chars: int, call: Callable[[], T]) -> T:
        """Calls at once, or in a thread if that is work for longer."""
        if work_chars <= INLINE_CHARS:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


def _check_length(chars: int, context_tokens: int) -> None:
    if chars > context_tokens * MAX_CHARS_PER_TOKEN:
        raise ContextTooLong(
            f"The prompt has {chars} characters; that is more than {context_tokens} tokens can hold.",
            "prompt",
        )


def _not_empty(ids: array[int], param: str) -> array[int]:
    if not ids:
        raise invalid(f"{param}: must not be empty.", param)
    return ids
