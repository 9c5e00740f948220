"""What the cache endpoints take and tell. Knows the wire's fields only."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine.views import EvictionCause, MissReason
from server.schema import conditions
from server.schema.chat import MAX_MESSAGES, ChatMessage, ChatRequest, Conversation
from server.schema.common import CACHE_SALT, INT32_MAX, CacheSalt, field_error
from server.schema.completions import PROMPT_FORMS, parse_prompt

State = Literal["in_use", "shared", "cached", "free"]
STATES: tuple[str, ...] = ("in_use", "shared", "cached", "free")

OptionalPrompts = Annotated[
    tuple[Any, ...] | None,
    BeforeValidator(lambda value: None if value is None else parse_prompt(value)),
    WithJsonSchema({"anyOf": [*PROMPT_FORMS, {"type": "null"}]}),
]


class PromptOrMessages(Conversation):
    """A prompt, or a conversation, of which nothing is generated."""

    # What would change the prompt and is not built yet; the rest of a generation request is ignored.
    refused: ClassVar = {
        name: ChatRequest.refused[name]
        for name in (
            *("functions", "documents", "chat_template"),
            *("prompt_embeds", "kv_transfer_params", "mm_processor_kwargs"),
        )
    }

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    prompt: Any = None
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="In place of a prompt: a conversation."
    )

    model_config = ConfigDict(
        json_schema_extra=conditions.one_of({"prompt": conditions.GIVEN, "messages": conditions.GIVEN})
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> PromptOrMessages:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("or messages: send one of the two", "prompt")
        return self


class ProbeRequest(PromptOrMessages):
    """A prompt, or a conversation, to look up without running it."""

    prompt: OptionalPrompts = Field(None, description="Text, token ids, or a list of either.")
    cache_salt: CacheSalt = CACHE_SALT
    add_special_tokens: bool | None = Field(
        True, description="As in completions: begin a text with the model's own first token."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="As in completions: keep the last so many tokens."
    )


class MessageReuse(BaseModel):
    """One message's own tokens, without those that the template puts around it."""

    role: str
    tokens: int
    reused_tokens: int


class CacheExplanation(BaseModel):
    """What of one prompt was reused, or would be, and why not more."""

    prompt: int = Field(description="Which of the request's prompts, from 0.")
    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    block_size: int
    reason: MissReason
    at_token: int = Field(description="The first token that is not reused; diverged: the first that differs.")
    message: str = Field(description="The same in a sentence.")
    evicted_seconds_ago: float | None
    eviction_cause: EvictionCause | None
    cached_text: str | None = Field(description="diverged: what is cached around that place, if it is yours.")
    prompt_text: str | None = Field(description="diverged: the prompt around the same place.")
    messages: list[MessageReuse] | None = Field(description="Chat only; null where the template hides it.")


class ProbeReply(BaseModel):
    object: Literal["cache.probe"]
    model: str
    cache: list[CacheExplanation]


class CacheBlock(BaseModel):
    """One block of the pool."""

    block_id: int
    state: State
    tenant: str = Field(description="On whose account it is; empty where it is free.")
    owner: str = Field(description="The request that took it, while that lives.")
    holders: list[str] = Field(description="The live requests that use it, 32 at most.")
    position: int = Field(description="It holds the tokens from position * block_size on.")
    tokens: int = Field(description="How many of its slots hold keys and values.")
    digest: str = Field(description="Of its content and all before it; empty where it cannot be shared.")
    parent: int = Field(description="The block with the tokens before; 0: none.")
    age_s: float
    idle_s: float | None = Field(description="Since nobody uses it; null while somebody does.")


class BlockCounts(BaseModel):
    in_use: int
    shared: int = Field(description="Among those in use.")
    cached: int
    free: int


class CacheReply(BaseModel):
    object: Literal["cache"]
    block_size: int
    num_blocks: int
    blocks: BlockCounts
    tokens_held: int
    data: list[CacheBlock]
    next_block: int | None = Field(description="The next page's `first_block`; null: this was the last.")


class BlockReply(BaseModel):
    object: Literal["cache.block"]
    block: CacheBlock
    children: list[int] = Field(description="Cached blocks that go on from it, the newest 1000.")
    token_ids: list[int] | None = Field(description="Null where API keys are configured.")
    text: str | None = Field(description="Null where API keys are configured.")


class ResetReply(BaseModel):
    object: Literal["cache.reset"]
    blocks_emptied: int
