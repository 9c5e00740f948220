"""Text under a grammar: whatever a random model likes best, it is valid, and nobody else is changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import grammar
from engine.core import EngineCore
from engine.grammar import Grammar
from engine.llm import LLM
from engine.sample.grammar import CompiledGrammars
from engine.text.tokenizer import Tokenizer
from engine.types import FinishReason, SamplingParams
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import Stream, make_core, run
from tests.helpers.schemas import REGEXES, random_schema

MAX_TOKENS = 900
CHECKER = jsonschema.FormatChecker()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("structured"), "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_dir(path)


def make(path: Path, **limits: Any) -> EngineCore:
    given = {"max_model_len": 4096, "num_blocks": 2400, "max_num_seqs": 32, **limits}
    core = make_core(path, **given)
    core.grammars = CompiledGrammars(lambda: Tokenizer.from_dir(path), VOCAB_SIZE, ())
    return core


def check(schema: dict[str, Any], stream: Stream, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(stream.token_ids)
    assert stream.finish_reason is FinishReason.STOP, (schema, text[-300:])
    jsonschema.validate(json.loads(text), schema, format_checker=CHECKER)


SCENES = {
    "plain": {},
    "a step ahead": {"steps_ahead": 2},
    "preempted": {"num_blocks": 66, "steps_ahead": 2, "max_num_batched_tokens": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_random_schemas(path: Path, tokenizer: Tokenizer, scene: str) -> None:
    """200 schemas, some with several choices, all at once, after prompts that begin alike."""
    core = make(path, **SCENES[scene])
    schemas = {f"r{seed}": random_schema(seed) for seed in range(200)}
    requests = []
    for seed, (name, schema) in enumerate(schemas.items()):
        prompt = tokenizer.encode("The same beginning, long enough for some blocks. " * 2 + name)
        params = SamplingParams(
            seed=seed,
            n=3 if seed % 10 == 0 else 1,
            max_tokens=MAX_TOKENS,
            logprobs=2 if seed % 7 == 0 else None,
            frequency_penalty=0.5 if seed % 5 == 0 else 0.0,
            min_tokens=4 if seed % 11 == 0 else 0,
            grammar=grammar.json_schema(schema),
        )
        requests.append((name, prompt, params))
    streams = run(core, requests)
    for (name, _), stream in streams.items():
        check(schemas[name], stream, tokenizer)
    assert len(streams) == 200 + 2 * 20
    snapshot = core.snapshot()
    assert snapshot.prefix_hits > 100
    assert (snapshot.preemptions > 0) == (scene == "preempted")
    assert snapshot.blocks_in_use == 0


def texts(
    core: EngineCore, tokenizer: Tokenizer, wanted: Grammar, *, n: int = 8, **params: Any
) -> list[tuple[str, FinishReason | None]]:
    given: dict[str, Any] = {"n": n, "max_tokens": 300, "seed": 5, **params}
    streams = run(core, [("r", tokenizer.encode("go"), SamplingParams(grammar=wanted, **given))])
    return [(tokenizer.decode(stream.token_ids), stream.finish_reason) for stream in streams.values()]


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_regex_matches_the_whole(path: Path, tokenizer: Tokenizer, pattern: str) -> None:
    for text, reason in texts(make(path), tokenizer, grammar.regex(pattern)):
        assert re.fullmatch(pattern, text, re.ASCII), text
        assert reason is FinishReason.STOP


def test_a_choice_is_one_of_them(path: Path, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no (really)", "a|b", "tab\there", "日本"]
    found = texts(make(path), tokenizer, grammar.choice(choices), n=24)
    assert {text for text, _ in found} <= set(choices)
    assert len({text for text, _ in found}) > 2


def test_a_lark_grammar(path: Path, tokenizer: Tokenizer) -> None:
    """Sums in brackets: not regular, so that a parser is needed."""
    source = 'start: sum "."\nsum: term ("+" term)~0..2\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,2}/'
    for text, reason in texts(make(path), tokenizer, grammar.lark(source), n=16):
        if reason is FinishReason.STOP:
            assert text.endswith(".") and text.count("(") == text.count(")")
            assert eval(text[:-1].replace("0", "1"), {}) >= 1
        else:
            assert reason is FinishReason.LENGTH


def test_any_object(path: Path, tokenizer: Tokenizer) -> None:
    for text, reason in texts(make(path), tokenizer, grammar.JSON_OBJECT, max_tokens=MAX_TOKENS, n=4):
        if reason is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)


def test_tagged_stretches_are_held_and_the_rest_is_free(path: Path, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tag = {"structures": [{"begin": "<f=a>", "schema": schema, "end": "</f>"}], "triggers": ["<f="]}
    bias = {tokenizer.encode("<")[0]: 20.0}
    found = "".join(
        text
        for text, _ in texts(
            make(path), tokenizer, grammar.structural_tag(tag), n=8, logit_bias=bias, top_k=40
        )
    )
    assert re.findall(r"<f=", found) == re.findall(r"<f=(?=a>)", found)


@pytest.mark.parametrize("several", [False, True])
def test_forced_structures(path: Path, tokenizer: Tokenizer, several: bool) -> None:
    """As for tools that must be called: nothing but calls, each with arguments by its own schema."""
    schemas = {"add": random_schema(1), "weather": {**random_schema(2), "x-guidance": {"lenient": True}}}
    calls = [
        {"begin": f'<call>{{"name": "{name} 🌍", "arguments": ', "schema": schema, "end": "}</call>\n"}
        for name, schema in schemas.items()
    ]
    wanted = grammar.forced_structures(calls, several=several)
    for text, reason in texts(make(path), tokenizer, wanted, max_tokens=MAX_TOKENS):
        assert reason is FinishReason.STOP or (several and reason is FinishReason.LENGTH)
        whole = text[: text.rindex("</call>\n") + len("</call>\n")]
        assert whole == text or reason is FinishReason.LENGTH
        made = whole.split("</call>\n")[:-1]
        assert len(made) == 1 or several
        for call in made:
            body = json.loads(call.removeprefix("<call>"))
            jsonschema.validate(body["arguments"], schemas[body["name"].removesuffix(" 🌍")])


def test_nobody_else_is_changed(path: Path, tokenizer: Tokenizer) -> None:
    """The same request gives the same tokens, alone or among those under a grammar."""
    free = ("free", tokenizer.encode("hello"), SamplingParams(max_tokens=60, seed=3, logprobs=1))
    alone = run(make(path), [free])["free", 0]
    held = [
        (
            f"r{i}",
            tokenizer.encode("x"),
            SamplingParams(max_tokens=200, grammar=grammar.json_schema(random_schema(i))),
        )
        for i in range(6)
    ]
    for ahead in (1, 2):
        among = run(make(path, steps_ahead=ahead), [*held, free])["free", 0]
        assert among.token_ids == alone.token_ids
        assert among.logprobs == alone.logprobs


def test_logprobs_are_the_models_own(path: Path, tokenizer: Tokenizer) -> None:
    """The first token is forced; without the grammar it has the same probability."""
    prompt = tokenizer.encode("hello")
    forced = run(make(path), [("r", prompt, SamplingParams(logprobs=5, grammar=grammar.choice(["Quire"])))])[
        "r", 0
    ]
    free = run(make(path), [("r", prompt, SamplingParams(logprobs=5, max_tokens=1))])["r", 0]
    assert tokenizer.decode(forced.token_ids) == "Quire"
    assert forced.logprobs[0].top == free.logprobs[0].top
    assert forced.logprobs[0].logprob < 0


def test_cut_off_by_max_tokens(path: Path, tokenizer: Tokenizer) -> None:
    [(text, reason)] = texts(make(path), tokenizer, grammar.regex("a{50}"), n=1, max_tokens=10)
    assert (text, reason) == ("a" * 10, FinishReason.LENGTH)


def test_complete_with_the_last_token_is_no_cut(path: Path, tokenizer: Tokenizer) -> None:
    [(text, reason)] = texts(make(path), tokenizer, grammar.regex("a{10}"), n=1, max_tokens=10)
    assert (text, reason) == ("a" * 10, FinishReason.STOP)


def test_nothing_left_harms_nobody_else(path: Path, tokenizer: Tokenizer) -> None:
    """The grammar wants a token that the request forbids: an error for it, and the others go on."""
    core = make(path, steps_ahead=2)
    end = tokenizer.encode("b")[0]
    stuck = SamplingParams(grammar=grammar.regex("ab"), stop_token_ids=(end,), min_tokens=5)
    dead_end = SamplingParams(grammar=grammar.lark('start: ("a" | "b") <|user|>'))
    good = SamplingParams(grammar=grammar.regex("abc"))
    streams = run(
        core, [(name, [5], p) for name, p in (("stuck", stuck), ("dead", dead_end), ("good", good))]
    )
    assert streams["stuck", 0].finish_reason is FinishReason.ERROR
    assert streams["dead", 0].finish_reason is FinishReason.ERROR
    assert tokenizer.decode(streams["good", 0].token_ids) == "abc"
    assert core.snapshot().blocks_in_use == 0


def test_offline(path: Path) -> None:
    llm = LLM(str(path), dtype="float32")
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    [output] = llm.generate("x", SamplingParams(max_tokens=150, n=2, grammar=grammar.json_schema(schema)))
    for choice in output.choices:
        assert len(json.loads(choice.text)) == 2
