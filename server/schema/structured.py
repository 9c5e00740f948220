"""What text a request wants: `response_format`, as OpenAI has it, and `structured_outputs`, as vLLM does.

Knows both wire forms and turns them into a Grammar; does not know whether it compiles.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine import grammar
from engine.errors import InvalidRequest
from engine.grammar import Grammar
from server.schema import conditions
from server.schema.common import GenerationRequest, WireModel, field_error


def _check_schema(schema: Any) -> Any:
    if not isinstance(schema, dict | bool):
        raise field_error("must be an object")
    return schema


Schema = Annotated[Any, BeforeValidator(_check_schema), WithJsonSchema({"type": ["object", "boolean"]})]


class Strict(WireModel):
    """What is not known here would change the text: it is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class JsonSchemaFormat(Strict):
    """A schema with a name. It is always followed exactly, strict or not."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema = Field(alias="schema", description="A JSON Schema.")
    strict: bool | None = Field(None, description="Taken and ignored: every schema is followed exactly.")


class TagStructure(Strict):
    """A stretch of text: what it begins with, JSON by a schema, and its end."""

    begin: str
    schema_: Schema = Field(alias="schema")
    end: str


class ResponseFormat(Strict):
    """What the reply must be."""

    model_config = ConfigDict(
        json_schema_extra=conditions.by_type(
            {
                "text": (),
                "json_object": (),
                "json_schema": ("json_schema",),
                "structural_tag": ("structures", "triggers"),
            }
        )
    )

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = Field(None, description="With type json_schema.")
    structures: list[TagStructure] | None = Field(None, min_length=1, description="With type structural_tag.")
    triggers: list[str] | None = Field(
        None,
        min_length=1,
        description="With type structural_tag: texts from which on a structure must follow.",
    )

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_error("type json_schema needs it", "json_schema")
        if self.type == "structural_tag" and not (self.structures and self.triggers):
            raise field_error("type structural_tag needs structures and triggers", "structures")
        return self

    def grammar(self) -> Grammar | None:
        """Raises InvalidRequest: it is too large."""
        if self.type == "json_object":
            return grammar.JSON_OBJECT
        if self.json_schema is not None and self.type == "json_schema":
            return grammar.json_schema(self.json_schema.schema_)
        if self.type == "structural_tag":
            structures = [s.model_dump(by_alias=True) for s in self.structures or ()]
            return grammar.structural_tag({"structures": structures, "triggers": self.triggers})
        return None


_WORDS = {"minLength": 1, **conditions.GIVEN}
_ONE_KIND = conditions.one_of(
    {
        "json": conditions.GIVEN,
        "regex": _WORDS,
        "choice": conditions.GIVEN,
        "grammar": _WORDS,
        "json_object": {"const": True},
        "structural_tag": conditions.GIVEN,
    },
    {"json_object": {"enum": [False, None]}},
)


class StructuredOutputs(Strict):
    """Exactly one of these."""

    model_config = ConfigDict(json_schema_extra=_ONE_KIND)

    json_: Annotated[Any, WithJsonSchema({"type": ["object", "boolean", "string", "null"]})] = Field(
        None, alias="json", description="A JSON Schema, or one written as text."
    )
    regex: str | None = Field(None, description="The whole text matches. No look-around, no back references.")
    choice: list[str] | None = Field(
        None,
        description="The text is one of these.",
        json_schema_extra={"minItems": 1, "maxItems": grammar.MAX_CHOICES, "items": {"minLength": 1}},
    )
    grammar: str | None = Field(None, description="A grammar in Lark's notation, from the rule start on.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    structural_tag: Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})] = Field(
        None, description="Free text with structures in it; as in response_format."
    )

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        named = [name for name in _KINDS if getattr(self, name) is not None]
        if self.json_object is False:
            named.remove("json_object")
        if len(named) != 1:
            raise field_error("needs exactly one of " + ", ".join(n.rstrip("_") for n in _KINDS))
        if not isinstance(self.json_, dict | bool | str | None):
            raise field_error("must be an object", "json")
        if self.structural_tag is not None and not isinstance(self.structural_tag, dict | str):
            raise field_error("must be an object, or one written as text", "structural_tag")
        return self

    def to_grammar(self) -> Grammar:
        """Raises InvalidRequest: it is too large, or text that should be JSON is none."""
        if self.json_ is not None:
            if isinstance(self.json_, str):
                return Grammar(grammar.GrammarKind.JSON_SCHEMA, self.json_)
            return grammar.json_schema(self.json_)
        if self.regex is not None:
            return grammar.regex(self.regex)
        if self.choice is not None:
            return grammar.choice(self.choice)
        if self.grammar is not None:
            return grammar.lark(self.grammar)
        if self.structural_tag is not None:
            if isinstance(self.structural_tag, str):
                return Grammar(grammar.GrammarKind.STRUCTURAL_TAG, self.structural_tag)
            return grammar.structural_tag(self.structural_tag)
        return grammar.JSON_OBJECT


_KINDS = ("json_", "regex", "choice", "grammar", "json_object", "structural_tag")


class ConstrainedRequest(GenerationRequest):
    """A request that may say what its text must be."""

    replaced: ClassVar = {
        **GenerationRequest.replaced,
        "guided_json": "structured_outputs.json",
        "guided_regex": "structured_outputs.regex",
        "guided_choice": "structured_outputs.choice",
        "guided_grammar": "structured_outputs.grammar",
        "guided_decoding_backend": "structured_outputs",
        "guided_whitespace_pattern": "structured_outputs",
        "regex": "structured_outputs.regex",
        "ebnf": "structured_outputs.grammar",
        "grammar": "structured_outputs.grammar",
        "json_schema": "response_format",
        "structural_tag": "structured_outputs.structural_tag",
    }

    response_format: ResponseFormat | None = Field(
        None, description="What the text must be; left out: any text."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same with more kinds: a regular expression, a choice, a grammar."
    )

    @model_validator(mode="after")
    def _one_format(self) -> ConstrainedRequest:
        if self.structured_outputs is not None and self._formatted:
            raise field_error("cannot be combined with response_format", "structured_outputs")
        return self

    @property
    def _formatted(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def constrained(self) -> bool:
        return self.structured_outputs is not None or self._formatted

    @property
    def grammar_field(self) -> str:
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def wants_json(self) -> bool:
        if self.structured_outputs is not None:
            return self.structured_outputs.json_ is not None or bool(self.structured_outputs.json_object)
        return self.response_format is not None and self.response_format.type in (
            "json_object",
            "json_schema",
        )

    def wanted_grammar(self) -> Grammar | None:
        try:
            if self.structured_outputs is not None:
                return self.structured_outputs.to_grammar()
            return None if self.response_format is None else self.response_format.grammar()
        except InvalidRequest as error:
            raise InvalidRequest(error.message, self.grammar_field) from error
