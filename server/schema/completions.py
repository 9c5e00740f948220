"""What POST /v1/completions takes.

Knows prompts in their four forms (text, token ids, lists of either) and the legacy API's own fields; does
not know tokenizers or the vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import MAX_CHOICES, MAX_LOGPROBS
from server.schema.common import INT32_MAX, field_error
from server.schema.structured import ConstrainedRequest

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = MAX_CHOICES

Prompt = str | list[int]


def parse_prompt(value: Any, most: int = MAX_PROMPTS) -> Any:
    """Any of the four forms -> a tuple of up to `most` texts and id lists. One prompt is a tuple of one."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        raise field_error("must be a text, a list of token ids, or a non-empty list of either")
    if len(prompts) > most:
        raise field_error(f"has {len(prompts)} texts; at most {most}")
    for prompt in prompts:
        _check_prompt(prompt)
    return tuple(prompts)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, (str, list)):
        raise field_error("each prompt must be a text or a list of token ids")
    if not prompt:
        raise field_error("must not be empty")
    if isinstance(prompt, list) and not all(type(token_id) is int for token_id in prompt):
        raise field_error("token ids must be whole numbers")


_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string", "minLength": 1}


def prompt_forms(most: int) -> tuple[dict[str, Any], ...]:
    """The forms, for the API's description."""
    several = {"type": "array", "minItems": 1, "maxItems": most}
    return _TEXT, _IDS, {**several, "items": {"anyOf": [_TEXT, _IDS]}}


PROMPT_FORMS = prompt_forms(MAX_PROMPTS)

Prompts = Annotated[
    tuple[Any, ...],
    BeforeValidator(lambda value: parse_prompt(value)),
    WithJsonSchema({"anyOf": list(PROMPT_FORMS)}),
]


class CompletionRequest(ConstrainedRequest):
    """Text to continue."""

    refused: ClassVar = {
        **ConstrainedRequest.refused,
        "suffix": ("",),
    }

    prompt: Prompts = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(
        DEFAULT_MAX_TOKENS, ge=0, le=INT32_MAX, description="Most tokens to generate; 0 only with echo."
    )
    echo: bool | None = Field(False, description="Begin each choice with its prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log probabilities with this many alternatives."
    )
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Equal to n, or left out.")
    suffix: str | None = Field(None, description="Not supported yet: empty or left out.")
    add_special_tokens: bool | None = Field(
        True, description="Begin a text with the model's own first token."
    )

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise field_error("must equal n on this server", "best_of")
        both = None not in (self.logprobs, self.prompt_logprobs)
        if self.echo and both and self.logprobs != self.prompt_logprobs:
            raise field_error("differs from logprobs, which echo asks of the prompt too", "prompt_logprobs")
        if self.token_limit == 0 and not self.echo:
            raise field_error("may be 0 only with echo", "max_tokens")
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise field_error(f"times the number of prompts may be at most {MAX_CHOICES}", "n")
        return self

    @property
    def token_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
