"""What /tokenize and /detokenize take and tell, in vLLM's shapes. Knows the wire's fields only."""

from __future__ import annotations

from pydantic import BaseModel, Field

from server.schema.cache import PromptOrMessages
from server.schema.common import WireModel


class TokenizeRequest(PromptOrMessages):
    """A text, or a conversation, to turn into token ids."""

    prompt: str | None = Field(None, description="A text.")
    add_special_tokens: bool | None = Field(
        True, description="Of a prompt: begin it with the model's own first token."
    )
    return_token_strs: bool | None = Field(False, description="Also the text of each token.")


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="U+FFFD where a token is only part of a character.")


class DetokenizeRequest(WireModel):
    """Token ids to turn into text."""

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    tokens: list[int] = Field(description="Ids of the model's vocabulary.")


class DetokenizeReply(BaseModel):
    prompt: str = Field(description="Special tokens are shown.")
