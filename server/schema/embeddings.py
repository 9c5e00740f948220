"""What POST /v1/embeddings takes and tells. Knows the wire's fields; does not know what a model can do."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from server.schema.cache import CacheExplanation
from server.schema.common import INT32_MAX, EngineRequest
from server.schema.completions import parse_prompt, prompt_forms
from server.schema.replies import PromptTokensDetails

# OpenAI's limit.
MAX_INPUTS = 2048

Inputs = Annotated[
    tuple[Any, ...],
    BeforeValidator(lambda value: parse_prompt(value, MAX_INPUTS)),
    WithJsonSchema({"anyOf": list(prompt_forms(MAX_INPUTS))}),
]


class EmbeddingRequest(EngineRequest):
    """Texts to turn into vectors."""

    refused: ClassVar = {
        "messages": (),
        "normalize": (True,),
        "use_activation": (True,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    input: Inputs = Field(description=f"A text, token ids, or a list of up to {MAX_INPUTS} of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: of 32-bit floats, little endian."
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        le=INT32_MAX,
        description="Only the first so many values, scaled to length 1 again; up to the model's own number.",
    )
    add_special_tokens: bool | None = Field(
        True, description="Put the model's own tokens around a text, as its tokenizer says."
    )


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int = Field(description="Of its input.")
    embedding: list[float] | str = Field(description="Of length 1. Text with base64.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingReply(BaseModel):
    id: str
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    cache: list[CacheExplanation] | None = None
