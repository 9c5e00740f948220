"""What every reply with a status of 400 and above looks like."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """The same on the paths of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail
