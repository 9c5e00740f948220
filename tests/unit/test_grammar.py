"""Grammars: sizes are checked first, what cannot be compiled is refused with a reason, masks are right."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import grammar
from engine.errors import InvalidRequest
from engine.grammar import Grammar, GrammarKind, Matcher
from engine.sample import grammar as compiling
from engine.sample.grammar import CompiledGrammars
from engine.sample.sources import ascii_classes
from engine.text.tokenizer import Tokenizer
from tests.helpers.text_models import ends_of, write_model


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def product() -> dict[str, Any]:
    """8 times one of 6: more than a million ways."""
    one = [{"required": [f"p{j}"], "properties": {f"p{j}": {"type": "string"}}} for j in range(6)]
    return {"allOf": [{"type": "object", "anyOf": one} for _ in range(8)]}


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compiled(tokenizer: Tokenizer) -> CompiledGrammars:
    return CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, ends_of(tokenizer))


def asked(grammars: CompiledGrammars, matcher: Matcher) -> tuple[list[int], str | None]:
    words_W = np.zeros(matcher.num_words, dtype=np.uint32)
    [problem] = grammars.fill([matcher], words_W[None])
    return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist(), problem


def allowed(grammars: CompiledGrammars, matcher: Matcher) -> list[int]:
    ids, problem = asked(grammars, matcher)
    assert problem is None
    return ids


TOO_LARGE = {
    "deep": (lambda: grammar.json_schema(nested(3000)), "nested more than"),
    "wide": (lambda: grammar.json_schema(optional(5000)), "properties"),
    "50 000 values": (lambda: grammar.json_schema({"enum": list(range(50_000))}), "values"),
    "long words": (lambda: grammar.json_schema({"const": "a" * 1_000_000}), "characters"),
    "long regex": (lambda: grammar.regex("a" * 100_000), "characters"),
    "1 MB of Lark": (lambda: grammar.lark("start: " + '"a" | ' * 200_000), "characters"),
    "many choices": (lambda: grammar.choice([str(i) for i in range(5000)]), "1 to"),
    "no choice": (lambda: grammar.choice([]), "1 to"),
    "empty choice": (lambda: grammar.choice(["a", ""]), "empty"),
    "empty regex": (lambda: grammar.regex(""), "empty"),
    "no JSON": (lambda: Grammar(GrammarKind.JSON_SCHEMA, "{"), "not JSON"),
    "deep text": (lambda: Grammar(GrammarKind.JSON_SCHEMA, '{"a":' * 40_000 + "1" + "}" * 40_000), "nested"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_are_refused_before_anything_else(case: str) -> None:
    make, words = TOO_LARGE[case]
    with pytest.raises(InvalidRequest, match=words):
        make()


STRUCTURE = {"begin": "<a", "schema": {}, "end": ">"}
REFUSED = {
    "depth 60": (grammar.json_schema({**nested(14), "type": 3}), "type"),
    "900 optional properties": (grammar.json_schema(optional(999)), "too complex|too large"),
    "a product": (grammar.json_schema(product()), "too large"),
    "unknown type": (grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
    "bad pattern": (grammar.json_schema({"type": "string", "pattern": "(("}), "regex parse error|unclosed"),
    "dangling": (grammar.json_schema({"$ref": "#/$defs/x"}), "does not exist"),
    "remote": (grammar.json_schema({"$ref": "https://example.com/s.json"}), "nothing is fetched"),
    "a file": (grammar.json_schema({"$ref": "file:///etc/passwd"}), "nothing is fetched|not"),
    "itself": (grammar.json_schema({"$ref": "#"}), "no text fits"),
    "a circle": (
        grammar.json_schema(
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
        ),
        "no text fits",
    ),
    "uniqueItems": (grammar.json_schema({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
    "not": (grammar.json_schema({"not": {"type": "string"}}), '"not"'),
    "impossible": (
        grammar.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
        "(?i)unsatisfiable",
    ),
    "bad regex": (grammar.regex("a{"), "regex"),
    "look-ahead": (grammar.regex("(?=a)b"), "look-around"),
    "back reference": (grammar.regex("(a)\\1"), "backreferences"),
    "too many states": (grammar.lark("start: A\nA: /(.*a.{15})/ & /(.*b.{16})/ & /(.*c.{17})/"), "."),
    "EBNF": (grammar.lark('root ::= "a"'), "EBNF"),
    "no Lark": (grammar.lark("start: ((("), "."),
    "only a control token": (grammar.lark("start: <|im_start|>"), "."),
    "no trigger": (
        grammar.structural_tag(
            {"structures": [{"begin": "<a", "schema": {}, "end": ">"}], "triggers": ["<b"]}
        ),
        "none of the triggers",
    ),
    "no structures": (grammar.structural_tag({"triggers": ["<b"]}), "structures"),
    "what stands around is no text": (
        grammar.structural_tag({"structures": [STRUCTURE], "forced": "some", "between": 3}),
        "must be strings",
    ),
    **{
        f"thoughts {thoughts}": (
            grammar.structural_tag({"structures": [STRUCTURE], "forced": "one", "thoughts": thoughts}),
            "opens and what closes",
        )
        for thoughts in (3, [], ["a"], ["a", ""], ["a", 3], ["a", "b", "c"], {"a": "b"})
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_with_a_reason(compiled: CompiledGrammars, case: str) -> None:
    refused, words = REFUSED[case]
    with pytest.raises(InvalidRequest, match=words) as caught:
        compiled.start(refused)
    assert str(caught.value).startswith("The grammar cannot be compiled: ")
    assert "panic" not in str(caught.value) and "\n" not in str(caught.value)
    assert not compiled.ready(refused)


HARD = {
    "many items": grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    "a long string": grammar.json_schema({"type": "string", "maxLength": 10**9}),
    "nested counts": grammar.regex("(a{1,1000}){1,1000}"),
    "many ways": grammar.regex("(x+x+)+y"),
    "states": grammar.regex("(a|b)*a(a|b){20}"),
    "alternatives": grammar.regex("|".join(f"w{i}x{i * 31 % 997}" for i in range(2500))),
    "left recursion": grammar.lark('start: start "a" | "a"'),
    "ambiguity": grammar.lark('start: s\ns: s s | s s s | "a" | '),
    "endless": grammar.json_schema(
        {"$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}}}
        | {"$ref": "#/$defs/a"}
    ),
    "5000 names": grammar.json_schema({"enum": [f"value {i}" for i in range(5000)]}),
    "300 optional properties": grammar.json_schema(optional(300)),
    "anything": grammar.json_schema({}),
}


@pytest.mark.parametrize("case", HARD)
def test_what_is_only_hard_works(compiled: CompiledGrammars, case: str) -> None:
    """Some tokens further on it still has a mask, or says that it became too complex."""
    matcher = compiled.start(HARD[case])
    for step in range(40):
        found, problem = asked(compiled, matcher)
        if matcher.ended or problem is not None:
            break
        matcher.take(found[step * 7 % len(found)])
    assert problem in (None, compiling.TOO_COMPLEX)


def test_an_end_is_allowed_where_the_grammar_may_end(
    compiled: CompiledGrammars, tokenizer: Tokenizer
) -> None:
    matcher = compiled.start(grammar.regex("ab?"))
    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    ends = set(ends_of(tokenizer))
    assert not ends & set(allowed(compiled, matcher)) and a in allowed(compiled, matcher)
    matcher.take(a)
    assert set(allowed(compiled, matcher)) == {b, *ends}
    assert not matcher.ended
    matcher.take(b)
    assert matcher.ended


def test_no_control_token_in_anybodys_lark(compiled: CompiledGrammars, tokenizer: Tokenizer) -> None:
    control = set(tokenizer.control.values()) - set(ends_of(tokenizer))
    assert control
    name = next(text for text, token_id in tokenizer.control.items() if token_id in control)
    anything = compiled.start(grammar.lark(f"start: (TEXT | {name} | <[{min(control)}]>)*\nTEXT: /(.|\\n)/"))
    assert not control & set(allowed(compiled, anything))
    assert not control & set(allowed(compiled, compiled.start(grammar.regex("(.|\\n)*"))))


def test_a_tag_may_begin_with_a_control_token(compiled: CompiledGrammars, tokenizer: Tokenizer) -> None:
    name, token_id = next((t, i) for t, i in tokenizer.control.items() if i not in ends_of(tokenizer))
    tag = {"structures": [{"begin": f"{name}x", "schema": {}, "end": ""}], "triggers": [name]}
    matcher = compiled.start(grammar.structural_tag(tag))
    assert token_id in allowed(compiled, matcher)
    matcher.take(token_id)
    assert {tokenizer.token_bytes(i)[:1] for i in allowed(compiled, matcher)} == {b"x"}


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "unigram"])
def test_tokens_of_all_kinds_spell_what_fits(tmp_path: Path, kind: str) -> None:
    """Whatever is drawn from the masks, the text of the tokens is what was asked for."""
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, kind))
    grammars = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size + 40, ends_of(tokenizer))
    for seed in range(20):
        choose = np.random.default_rng(seed)
        matcher, ids = (
            grammars.start(grammar.json_schema({"type": "array", "items": {"enum": ["a b", 7, "ü"]}})),
            [],
        )
        while not matcher.ended and len(ids) < 200:
            found = allowed(grammars, matcher)
            if matcher.ended:
                break
            assert max(found) < tokenizer.vocab_size
            token_id = int(choose.choice(found))
            if token_id in ends_of(tokenizer):
                break
            ids.append(token_id)
            matcher.take(token_id)
        text = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert set(json.loads(text)) <= {"a b", 7, "ü"}


def test_a_model_without_an_end_of_turn(tokenizer: Tokenizer) -> None:
    grammars = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, ())
    matcher = grammars.start(grammar.regex("a+"))
    [a] = tokenizer.encode("a")
    matcher.take(a)
    assert a in [i for i in allowed(grammars, matcher) if i < tokenizer.vocab_size]
    assert not matcher.ended


def test_without_the_package_grammars_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sample.grammar.INSTALLED", False)
    without = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, ends_of(tokenizer))
    with pytest.raises(InvalidRequest, match="llguidance"):
        without.start(grammar.regex("a+"))


def test_compiled_grammars_are_kept_within_a_bound(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "KEPT_GRAMMARS", 3)
    grammars = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, ())
    made = [grammar.regex(f"a{{{i}}}") for i in range(1, 6)]
    for wanted in (*made[:3], made[0], *made[3:]):
        grammars.start(wanted)
    assert [grammars.ready(wanted) for wanted in made] == [True, False, False, True, True]


def test_the_tokenizer_is_loaded_for_the_first_grammar_and_once(tokenizer: Tokenizer) -> None:
    loads: list[int] = []
    both = threading.Barrier(2)

    def load() -> Tokenizer:
        loads.append(1)
        return tokenizer

    def start(number: int) -> Matcher:
        both.wait(10)
        return grammars.start(grammar.regex(f"a{{{number}}}"))

    grammars = CompiledGrammars(load, tokenizer.vocab_size, ())
    assert not loads
    with ThreadPoolExecutor(2) as threads:
        assert len(list(threads.map(start, (1, 2)))) == 2
    assert len(loads) == 1


def test_choices_do_not_share_their_place(compiled: CompiledGrammars, tokenizer: Tokenizer) -> None:
    first, second = (compiled.start(grammar.choice(["ab"])) for _ in range(2))
    [a] = tokenizer.encode("a")
    first.take(a)
    assert allowed(compiled, first) != allowed(compiled, second)


def test_digits_are_ascii() -> None:
    assert ascii_classes(r"\d{2}[\d\-]\\d\w\D") == r"[0-9]{2}[0-9\-]\\d[0-9A-Za-z_][^0-9]"
