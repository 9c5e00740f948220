"""Calls in Python's notation: whatever the grammar allows, our own parser reads as valid arguments."""

from __future__ import annotations

import ast
import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import grammar
from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.sample.grammar import CompiledGrammars
from engine.text.tokenizer import Tokenizer
from server.parsing.chosen import Notations
from server.parsing.message import Message
from server.parsing.tools import CallOptions
from server.parsing.written import PYTHONIC
from tests.helpers.schemas import random_schema
from tests.helpers.text_models import ends_of, write_model

MAX_TOKENS = 1500
READS = CallOptions(frozenset({"f", "g-2"}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compiled(tokenizer: Tokenizer) -> CompiledGrammars:
    return CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, ends_of(tokenizer))


def calls(schemas: dict[str, Any], *, several: bool = False) -> Grammar:
    structures = [
        {"begin": PYTHONIC.begin % name, "schema": schema, "end": PYTHONIC.end, "values": PYTHONIC.values}
        for name, schema in schemas.items()
    ]
    return grammar.forced_structures(
        structures, several=several, first=PYTHONIC.first, between=PYTHONIC.between, last=PYTHONIC.last
    )


def walk(compiled: CompiledGrammars, tokenizer: Tokenizer, wanted: Grammar, seed: int) -> str | None:
    """A text that the grammar allows, token by token at random; None if it takes too long to end."""
    choose, matcher = np.random.default_rng(seed), compiled.start(wanted)
    ids: list[int] = []
    words_1W = np.zeros((1, matcher.num_words), dtype=np.uint32)
    while len(ids) < MAX_TOKENS:
        assert compiled.fill([matcher], words_1W) == [None]
        if matcher.ended:
            break
        allowed = np.flatnonzero(np.unpackbits(words_1W.view(np.uint8), bitorder="little"))
        ids.append(int(choose.choice(allowed)))
        matcher.take(ids[-1])
        if matcher.ended:
            break
    return b"".join(map(tokenizer.token_bytes, ids)).decode() if matcher.ended else None


def read(text: str) -> list[tuple[str, Any]]:
    parser = Notations(frozenset({"tools"}), "pythonic").parser(READS, {})
    assert parser is not None
    message = Message.of([*parser.push(text), *parser.finish()])
    assert not message.content, text
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def as_python(text: str) -> Any:
    """The arguments of the first call, as Python itself reads them."""
    call = ast.parse(text.replace("g-2(", "g(")).body[0].value.elts[0]  # type: ignore[attr-defined]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def parameters(seed: int) -> dict[str, Any]:
    """A random schema as one argument of two; the other one may be left out."""
    inner = random_schema(seed)
    return {
        "type": "object",
        "properties": {"value": inner, "more": {"type": "boolean"}},
        "required": ["value"],
        "additionalProperties": False,
        "$defs": inner.pop("$defs", {}),
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 2**32))
def test_random_schemas(compiled: CompiledGrammars, tokenizer: Tokenizer, number: int, seed: int) -> None:
    schemas = {"f": parameters(number), "g-2": parameters(number + 1)}
    text = walk(compiled, tokenizer, calls(schemas, several=True), seed)
    if text is None:
        return
    found = read(text)
    assert found
    for name, arguments in found:
        jsonschema.validate(arguments, schemas[name])
    assert as_python(text) == found[0][1]


ANY = {"type": "object"}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
BY_HAND: dict[str, dict[str, Any]] = {
    "nothing": {"properties": {}, "additionalProperties": False},
    "anything": {"properties": {"a": {}, "b": True}, "required": ["a"]},
    "any arguments": ANY,
    "more arguments": {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
    "an argument without a schema": {"properties": {"a": {"type": "null"}}, "required": ["b", "a"]},
    "dictionaries": {
        "properties": {
            "free": ANY,
            "ages": {"type": "object", "additionalProperties": {"type": "integer"}},
            "named": {
                "properties": {"a b": {"type": "number"}, 'q"\n': {"type": "string", "maxLength": 3}},
                "required": ['q"\n'],
                "additionalProperties": {"type": "boolean"},
            },
        },
        "required": ["free", "ages", "named"],
    },
    "lists": {
        "properties": {
            "any": {"type": "array", "maxItems": 3},
            "none": {"type": "array", "maxItems": 0},
            "pair": {
                "prefixItems": [{"type": "integer"}, {"const": "x"}],
                "items": {"type": "null"},
                "minItems": 1,
                "maxItems": 4,
            },
            "two": {"items": {"enum": [[1, {"a": None}], True, "é\x01"]}, "minItems": 2, "maxItems": 2},
        },
        "required": ["any", "none", "pair", "two"],
    },
    "kinds": {
        "properties": {
            "a": {"type": ["string", "null", "boolean"], "maxLength": 2},
            "b": {"minimum": 3, "maximum": 5},
            "c": {"type": "string", "enum": ["a", 1, None, "b"]},
            "d": {"allOf": [{"$ref": "#/$defs/node"}], "description": "one", "x-order": 3},
        },
        "required": ["a", "b", "c", "d"],
        "$defs": {"node": NODE},
    },
    "by reference": {"type": "object", "$ref": "#/$defs/node", "$defs": {"node": NODE}},
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_is_allowed_is_valid(compiled: CompiledGrammars, tokenizer: Tokenizer, case: str) -> None:
    schema = BY_HAND[case]
    texts = {walk(compiled, tokenizer, calls({"f": schema}), seed) for seed in range(12)} - {None}
    assert texts and (case == "nothing" or len(texts) > 1)
    for text in filter(None, texts):
        ((_, arguments),) = read(text)
        jsonschema.validate(arguments, schema)


def accepts(compiled: CompiledGrammars, tokenizer: Tokenizer, schema: dict[str, Any], inner: str) -> bool:
    """Whether f(...) with these arguments can be written, one character at a time."""
    matcher = compiled.start(calls({"f": schema}))
    words_1W = np.zeros((1, matcher.num_words), dtype=np.uint32)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    for byte in f"[f({inner})]".encode():
        if compiled.fill([matcher], words_1W) != [None] or matcher.ended:
            return False
        matcher.take(by_bytes[bytes([byte])])
    return matcher.ended


@pytest.mark.parametrize(
    ("case", "good", "bad"),
    [
        ("more arguments", ["", "a=None", "b=3", "a=None, b=3, aa=-1"], ["a=3", "a=None, a=3", "b=None"]),
        (
            "an argument without a schema",
            ['a=None, b={"x": [1.5, None]}'],
            ["a=None", "b=1", "a=None, b=true"],
        ),
        (
            "dictionaries",
            [r'free={}, ages={"é": 3}, named={"a b": 1, "q\"\n": "\\\t", "c": True}'],
            [
                r'free={}, ages={"é": 3.5}, named={"q\"\n": ""}',
                r'free={}, ages={}, named={"a b": 1}',
                r'free={}, ages={}, named={"q\"\n": "", "a b": 1}',
                r'free={}, ages={}, named={"q\"\n": "", "c": 1}',
            ],
        ),
        ("lists", ['any=[], none=[], pair=[1, "x", None], two=[True, [1, {"a": None}]]'], []),
        ("kinds", ['a=None, b=4, c="b", d={"next": {"next": None}}'], ["a=None, b=4, c=None, d={}"]),
    ],
)
def test_what_can_be_written(
    compiled: CompiledGrammars, tokenizer: Tokenizer, case: str, good: list[str], bad: list[str]
) -> None:
    for inner in good:
        assert accepts(compiled, tokenizer, BY_HAND[case], inner), inner
    for inner in bad:
        assert not accepts(compiled, tokenizer, BY_HAND[case], inner), inner


REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"not": {}}, 'not supported: "not"'),
    "oneOf": ({"oneOf": [{"type": "null"}]}, '"oneOf"'),
    "allOf": ({"allOf": [{"type": "null"}, {}]}, '"allOf"'),
    "an empty anyOf": ({"anyOf": []}, "list of schemas"),
    "anyOf and more": ({"anyOf": [{}], "type": "string"}, 'beside anyOf: "type"'),
    "enum and more": ({"enum": ["a"], "minLength": 3}, 'beside enum: "minLength"'),
    "$ref and more": ({"$ref": "#/$defs/a", "minLength": 3}, "beside \\$ref"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    "patternProperties": ({"type": "object", "patternProperties": {}}, '"patternProperties"'),
    "minProperties": ({"type": "object", "minProperties": 1}, '"minProperties"'),
    "unknown type": ({"type": "strin"}, "Invalid type: strin"),
    "no type": ({"type": []}, "allows nothing"),
    "enum of another type": ({"type": "string", "enum": [1]}, "allows nothing"),
    "nothing": (False, "allows nothing"),
    "no schema": (3, "is none"),
    "dangling": ({"$ref": "#/$defs/x"}, "does not exist"),
    "remote": ({"$ref": "http://x/y"}, "nothing is fetched"),
    "itself": ({"$ref": "#/properties/a"}, "no text fits|."),
    "no length": ({"type": "array", "minItems": 3, "maxItems": 2}, "no length"),
    "a list of items": ({"type": "array", "items": [{}]}, "is none"),
    "minItems": ({"type": "array", "minItems": "3"}, "the value of minItems"),
    "properties": ({"type": "object", "properties": []}, "the value of properties"),
    "bad pattern": ({"type": "string", "pattern": "(("}, "."),
    "unknown format": ({"type": "string", "format": "colour"}, "Unknown format: colour"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused(compiled: CompiledGrammars, case: str) -> None:
    schema, says = REFUSED[case]
    wanted = calls({"f": {"properties": {"a": schema}, "required": ["a"], "$defs": {"a": True}}})
    with pytest.raises(InvalidRequest, match=says) as caught:
        compiled.start(wanted)
    assert str(caught.value).startswith("The grammar cannot be compiled: ")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a b": {}}}, "no argument can be called 'a b'"),
        ({"anyOf": [{}]}, "a schema with properties"),
        ({"properties": {"a": False}, "required": ["a"]}, "allows nothing"),
        ({"propertyNames": {}}, '"propertyNames"'),
    ],
)
def test_arguments_that_no_call_can_have(compiled: CompiledGrammars, schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        compiled.start(calls({"f": schema}))
