"""What /tokenize and /detokenize take and tell, in vLLM's shapes. Knows the wire's fields only."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.schema import conditions
from server.schema.cache import ProbeRequest
from server.schema.chat import MAX_MESSAGES, ChatMessage, Conversation
from server.schema.common import WireModel, field_error


class TokenizeRequest(Conversation):
    """A text, or a conversation, to turn into token ids."""

    refused: ClassVar = ProbeRequest.refused

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    prompt: str | None = Field(None, description="A text.")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="In place of a prompt: a conversation."
    )
    add_special_tokens: bool | None = Field(
        True, description="Of a prompt: begin it with the model's own first token."
    )
    return_token_strs: bool | None = Field(False, description="Also the text of each token.")

    model_config = ConfigDict(
        json_schema_extra=conditions.one_of({"prompt": conditions.GIVEN, "messages": conditions.GIVEN})
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("or messages: send one of the two", "prompt")
        return self


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
