"""What both generation APIs share: strict fields, sampling parameters, refusals, the way to SamplingParams.

Knows field names, types and limits; does not know prompts, routes or replies. Types are strict (true is
not 1, "3" is not 3); null always means the default; unknown fields are taken and reported, because SDKs
send new ones every month; fields that would silently change the answer if ignored are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from engine.grammar import Grammar
from engine.types import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from server.errors import ApiError, invalid, shorten, unsupported
from server.schema.reasons import REASONS

INT32_MAX = 2**31 - 1


def field_error(message: str, field: str = "") -> PydanticCustomError:
    """A complaint in our words; `field` names the culprit where the validator sees the whole model."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "field": field})


def _parse_stop(value: Any) -> Any:
    """One string or a list of them -> a tuple."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(
        isinstance(text, str) for text in texts[: MAX_STOP_STRINGS + 1]
    ):
        raise field_error("must be a string or a list of strings")
    if len(texts) > MAX_STOP_STRINGS:
        raise field_error(f"has {len(texts)} strings; at most {MAX_STOP_STRINGS}")
    return tuple(texts)


def _parse_logit_bias(value: Any) -> Any:
    """{"42": -100} -> {42: -100.0}."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise field_error("must be an object of token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise field_error(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS}")
    return {_token_id(key): _bias(bias) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
        raise field_error(f"key {shorten(key)!r} is not a token id")
    return int(key)


def _bias(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
        raise field_error("each bias must be a number from -100 to 100")
    return float(value)


Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOP_STRINGS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_CHARS},
                },
                {"type": "null"},
            ]
        }
    ),
]

LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_parse_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_LOGIT_BIAS,
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]


MAX_SALT_CHARS = 256
CacheSalt = str | None
PRIORITY: Any = Field(
    0,
    ge=-INT32_MAX - 1,
    le=INT32_MAX,
    description="Requests of a smaller one are begun earlier, and set back later where memory lacks.",
)
CACHE_SALT: Any = Field(
    None,
    min_length=1,
    max_length=MAX_SALT_CHARS,
    description="Cached prefixes are shared only between requests of the same salt.",
)


class WireModel(BaseModel):
    """Strict types, unknown fields kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, hide_input_in_errors=True)

    # Fields that would change the answer and are not to be had, each with the values that ask for nothing.
    refused: ClassVar[Mapping[str, Sequence[Any]]] = {}

    # Names of other servers for what is called otherwise here: name -> ours.
    replaced: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Says of what is refused which values are not."""
        reference = handler(core_schema)
        fields = handler.resolve_ref_schema(reference).setdefault("properties", {})
        for name, nothing in cls.refused.items():
            fields[name] = _refusal(name, nothing, fields.get(name, {}))
        for name, ours in cls.replaced.items():
            fields[name] = {"type": "null", "description": f"Not supported: use {ours}."}
        return reference

    @property
    def unknown_fields(self) -> list[str]:
        return sorted(self.__pydantic_extra__ or {})

    @property
    def ungranted_fields(self) -> list[str]:
        """Ignored fields that ask for something which the caller would miss."""
        return []


def _refusal(name: str, nothing: Sequence[Any], field: Mapping[str, Any]) -> dict[str, Any]:
    reason = f"Not supported: {REASONS[name]}." if name in REASONS else "Not supported."
    kept = {key: field[key] for key in ("title", "default", "description") if key in field}
    # 1 and 1.0 are one value on the wire.
    values = list({repr(value).removesuffix(".0"): value for value in (*nothing, None)}.values())
    return {"description": reason, **kept, "enum": values}


MAX_BAD_WORDS = 64
BadWord = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(WireModel):
    """What a stream tells besides text."""

    include_usage: bool | None = Field(False, description="One more chunk at the end, with the whole usage.")
    continuous_usage_stats: bool | None = Field(
        False, description="With include_usage: usage so far in every chunk."
    )
    include_obfuscation: bool | None = Field(None, description="Taken and ignored: chunks are never padded.")


class EngineRequest(WireModel):
    """The fields of everything that runs prompts in the engine."""

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=INT32_MAX,
        json_schema_extra={"not": {"const": 0}},
        description="Keep the prompt's last so many tokens; -1: as many as fit.",
    )
    user: str | None = Field(None, description="Taken and ignored.")
    priority: int | None = PRIORITY
    cache_salt: CacheSalt = CACHE_SALT
    explain_cache: bool | None = Field(
        False, description="Say in `cache` what of the prompt was reused, and why not more."
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> EngineRequest:
        if self.truncate_prompt_tokens == 0:
            raise field_error("must be -1, or at least 1", "truncate_prompt_tokens")
        return self

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return False

    @property
    def grammar_field(self) -> str:
        """Which field a complaint about the grammar is about."""
        return "grammar"


class GenerationRequest(EngineRequest):
    """The fields both APIs have. Names are those of SamplingParams wherever they mean the same."""

    refused: ClassVar = {
        "use_beam_search": (False,),
        "length_penalty": (1.0, 1),
        "early_stopping": (False,),
        "logits_processors": ([],),
        "return_tokens_as_token_ids": (False,),
        "thinking_token_budget": (),
        "spaces_between_special_tokens": (True,),
        "prompt_embeds": (),
        "chat_template": (),
        "kv_transfer_params": (),
    }
    n: int | None = Field(
        1, ge=1, le=MAX_CHOICES, description="Choices per prompt; the prompt is computed once."
    )
    stream: bool | None = Field(False, description="Server-sent events, ending with `data: [DONE]`.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(
        1.0, ge=0, le=2, description="0 is greedy. The model's generation_config.json may set other defaults."
    )
    top_p: float | None = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    top_k: int | None = Field(
        0, ge=-1, le=INT32_MAX, description="Keep the k likeliest tokens; 0 or -1: all."
    )
    min_p: float | None = Field(
        0.0, ge=0, le=1, description="Least probability relative to the likeliest token."
    )
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        1.0, gt=0, le=100, description="1 is off; also counts the prompt."
    )
    logit_bias: LogitBias = Field(default_factory=dict, description="Token id to a value added to its logit.")
    allowed_token_ids: list[int] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ALLOWED_TOKEN_IDS,
        description="Nothing else is generated; the end of turn neither, if it is not among them.",
    )
    bad_words: list[BadWord] | None = Field(
        None,
        max_length=MAX_BAD_WORDS,
        description="Not generated in the tokens they are usually written in, also after a space.",
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same text, whatever else runs."
    )
    stop: Stop = Field((), description=f"Up to {MAX_STOP_STRINGS} strings that end a choice.")
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    min_tokens: int | None = Field(0, ge=0, le=INT32_MAX, description="No stop is honoured before this many.")
    ignore_eos: bool | None = Field(False, description="Do not end at the model's end-of-turn tokens.")
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log probabilities of the prompt's tokens, with this many alternatives; not in streams.",
    )
    return_token_ids: bool | None = Field(
        False, description="Also the ids: `prompt_token_ids`, and `token_ids` of each choice."
    )

    @model_validator(mode="after")
    def _possible(self) -> GenerationRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("cannot be had in a stream", "prompt_logprobs")
        return self

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    def wanted_grammar(self) -> Grammar | None:
        """What the text must be. Raises InvalidRequest, naming the field."""
        return None

    @property
    def usage_in_stream(self) -> tuple[bool, bool]:
        """(a usage chunk at the end, usage in every chunk)."""
        if self.stream_options is None:
            return False, False
        last = bool(self.stream_options.include_usage)
        return last, last and bool(self.stream_options.continuous_usage_stats)


AskT = TypeVar("AskT", bound=EngineRequest)
RequestT = TypeVar("RequestT", bound=GenerationRequest)
WireT = TypeVar("WireT", bound=WireModel)

# Those that SamplingParams takes as they are; what else it has by the same name is made below.
_SAMPLING_FIELDS = GenerationRequest.model_fields.keys() & {param.name for param in fields(SamplingParams)}
_SAMPLING_FIELDS -= {"stop_token_ids", "allowed_token_ids", "prompt_logprobs"}


def to_sampling_params(
    request: GenerationRequest,
    defaults: Mapping[str, float],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    shown_token_ids: tuple[int, ...] = (),
    banned_sequences: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """The one way from a request to SamplingParams.

    Args:
        defaults: the model's own, for fields that the request leaves out.
        shown_token_ids: special tokens that whoever reads the text must see.
        banned_sequences: `bad_words` in tokens.

    Raises:
        InvalidRequest: naming the field.
    """
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS & request.model_fields_set}
    return SamplingParams(
        **{**defaults, **{name: value for name, value in given.items() if value is not None}},
        stop_token_ids=tuple(request.stop_token_ids or ()),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        shown_token_ids=shown_token_ids,
        allowed_token_ids=tuple(request.allowed_token_ids or ()),
        banned_sequences=banned_sequences,
        grammar=request.wanted_grammar(),
    )


def parse(model: type[WireT], body: dict[str, Any]) -> WireT:
    """Validates a body.

    Raises:
        ApiError: 400, naming the first field that is wrong or not supported.
    """
    _refuse_unsupported(model, body)
    try:
        return model.model_validate(body)
    except ValidationError as exc:
        raise _first_problem(exc) from None


def _refuse_unsupported(model: type[WireModel], body: Mapping[str, Any]) -> None:
    """Raises for a field that is refused, unless its value asks for nothing, or has another name here."""
    for name, nothing in model.refused.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(none) and value == none for none in nothing):
            raise unsupported(name, REASONS.get(name, ""))
    for name, ours in model.replaced.items():
        if body.get(name) is not None:
            raise unsupported(name, f"use {ours}")


def _first_problem(exc: ValidationError) -> ApiError:
    problem = exc.errors(include_url=False, include_input=False)[0]
    param = ".".join(filter(None, [_param(problem["loc"]), problem.get("ctx", {}).get("field")]))
    text = problem["msg"]
    return invalid(f"{param}: {text[:1].lower()}{text[1:200]}.", param)


def _param(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return shorten(path)
