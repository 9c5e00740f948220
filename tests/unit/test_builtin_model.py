"""The model that ships with Quire is complete, is the one its card describes, and reads as a chat model.

It is not run here: the end-to-end tests do that through the engine.
"""

import hashlib
import json
import random
import re
import struct
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engine import builtin
from training import tokenizer as recipe
from training.augment import normalise
from training.dataset import Book, conversations, read_questions, read_rows
from training.exercises import exercise, signature
from training.grammar import Grammar
from training.model import Llama, Shape
from training.tasks import Tasks

MODEL = builtin.path()


@pytest.fixture(scope="module")
def card() -> str:
    return (MODEL / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config() -> dict[str, object]:
    loaded: dict[str, object] = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def chat_template() -> str:
    source = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert isinstance(source, str)
    return source


def render(messages: list[dict[str, Any]], add_generation_prompt: bool = True, **more: Any) -> str:
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        chat_template()
    )
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **more)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ],
)
def test_the_directory_is_complete(name: str) -> None:
    assert (MODEL / name).is_file()


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 20_000_000


def test_the_card_names_the_hash_of_the_weights(card: str) -> None:
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest}`" in card


def test_the_card_gives_the_licence_and_says_that_it_is_a_demo(card: str) -> None:
    assert "license: apache-2.0" in card
    assert "**This is a demo.**" in card


@pytest.mark.parametrize(
    ("line", "name", "least", "share"),
    [("Held-out score", "heldout", 100, 0.85), ("Held-out score, tools and JSON", "tasks_heldout", 60, 0.75)],
)
def test_the_scores_in_the_card_are_good_and_cover_the_whole_lists(
    card: str, line: str, name: str, least: int, share: float
) -> None:
    found = re.search(rf"\| {line} \| (\d+) of (\d+) ", card)
    assert found is not None
    right, total = int(found[1]), int(found[2])
    assert total == len(read_rows(name)) >= least
    assert right / total >= share


def test_the_weights_have_the_shapes_of_the_config(config: dict[str, object]) -> None:
    with (MODEL / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert tensors["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    assert len(layers) == config["num_hidden_layers"]
    assert "lm_head.weight" not in tensors and config["tie_word_embeddings"] is True


def test_the_config_suits_the_kernels(config: dict[str, object]) -> None:
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] in (64, 128)


def test_the_end_tokens_are_the_tokenizers(config: dict[str, object], tokenizer: Tokenizer) -> None:
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert generation["eos_token_id"] == config["eos_token_id"] == ends
    assert generation["do_sample"] is False


@pytest.mark.parametrize(
    "text",
    [
        "How do I change the port?",
        "  two spaces,\n\ttabs and\r\nlines  ",
        "Grüße, 你好, \U0001f600 e\u0301",
        "quire serve ./my-model --max-model-len 4096",
        "\x00\x7f",
    ],
)
def test_every_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_fits_the_embedding(tokenizer: Tokenizer, config: dict[str, object]) -> None:
    assert tokenizer.get_vocab_size(with_added_tokens=True) == config["vocab_size"]


def test_the_template_renders_every_role_and_opens_the_answer() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is a block?"},
    ]
    assert render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWhat is a block?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(messages, add_generation_prompt=False).endswith("What is a block?<|im_end|>\n")


def test_tools_are_listed_by_name_and_calls_are_written_as_hermes_does() -> None:
    tools = [signature("get_weather(city: string)"), signature("now()")]
    function = {"name": "get_weather", "arguments": {"city": "K\u00f6ln <1>", "days": 2}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": function}, {"function": function}],
        },
        {"role": "tool", "content": "rain"},
    ]
    written = '{"name": "get_weather", "arguments": {"city": "K\u00f6ln <1>", "days": 2}}'
    call = f"<tool_call>\n{written}\n</tool_call>"
    expected = (
        "Tools: get_weather, now<|im_end|>\n"
        f"<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>tool\nrain<|im_end|>\n"
    )
    assert recipe.render(messages, tools) == f"<|im_start|>system\nBe brief.\n\n{expected}"
    assert recipe.render(messages[1:], tools) == f"<|im_start|>system\n{expected}"


@pytest.mark.parametrize(
    "text", ["Paris is", "in Paris, is", '{"city": "Paris", "a"', "paris is", "12 is", "port 8080."]
)
def test_a_value_is_one_token_wherever_it_stands(tokenizer: Tokenizer, text: str) -> None:
    words = Tasks(Book()).words()
    tokens = tokenizer.encode(text).tokens
    assert len([token for token in tokens if token in words]) == 1
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_value_within_a_word_is_no_value(tokenizer: Tokenizer) -> None:
    assert not {"Rome", "12"} & set(tokenizer.encode("Romeo, 127").tokens)


def test_a_new_token_begins_near_those_that_it_is_made_of() -> None:
    torch.manual_seed(1)
    old = Llama(Shape(vocab_size=300))
    new = old.with_tokens([[5, 6], [300]], dropout=0.0)
    known, rows = old.embed_tokens.weight, new.embed_tokens.weight
    assert torch.equal(rows[:300], known)
    assert torch.cosine_similarity(rows[300], (known[5] + known[6]) / 2, dim=0) > 0.7
    assert torch.cosine_similarity(rows[301], rows[300], dim=0) > 0.7


def test_control_tokens_are_single_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(render([{"role": "user", "content": "Hi"}]), add_special_tokens=False).ids
    assert ids[0] == tokenizer.token_to_id("<|im_start|>")
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_the_held_out_list_has_every_intent_twice() -> None:
    counts = dict.fromkeys(Book().intents, 0)
    for _, intent in read_questions("heldout"):
        counts[intent] += 1
    assert min(counts.values()) >= 2
    assert counts["off_topic"] >= 30


def test_training_never_sees_a_held_out_question() -> None:
    excluded = frozenset(normalise(question) for question, _ in read_questions("heldout"))
    assert len(excluded) == len(read_questions("heldout"))
    assert not excluded & {normalise(question) for question, _ in read_questions("dev")}
    assert len(list(conversations(Book(), 5000, 1, excluded))) == 5000


def test_training_leaves_out_a_held_out_question() -> None:
    book = Book()
    seen = [turn.question for sampled in conversations(book, 20, 1, frozenset()) for turn in sampled.turns]
    held_out = normalise(seen[-1])
    again = list(conversations(book, 20, 1, frozenset({held_out})))
    assert len(again) == 20
    assert held_out not in {normalise(turn.question) for sampled in again for turn in sampled.turns}


def test_exercises_with_tools_and_json_say_what_they_want() -> None:
    kinds: dict[str, int] = {}
    book = Book()
    for row in read_rows("tasks_heldout") + read_rows("tasks_dev"):
        asked = exercise(row, book)
        assert asked.answer or asked.says
        kind = next(kind for kind in ("json", "intent", "says", "call") if kind in row)
        kinds[kind] = kinds.get(kind, 0) + 1
    assert min(kinds.values()) >= 10


def test_training_never_sees_the_wording_of_an_exercise_that_is_held_out() -> None:
    held_out = [row["question"] for row in read_rows("tasks_heldout")]
    tasks, rng = Tasks(Book(), held_out), random.Random(1)
    excluded = {tasks.wording(question) for question in held_out}
    assert len(excluded) == len(held_out)
    assert not excluded & {tasks.wording(row["question"]) for row in read_rows("tasks_dev")}
    drawn = {tasks.wording(m["content"]) for _ in range(2000) for m in tasks.draw(rng).messages}
    assert not excluded & drawn


def test_training_leaves_out_an_exercise_that_is_held_out_with_any_values() -> None:
    book = Book()
    plain = Tasks(book)
    seen = [plain.draw(random.Random(seed)).messages[0]["content"] for seed in range(20)]
    tasks = Tasks(book, seen)
    again = [tasks.draw(random.Random(seed)).messages[0]["content"] for seed in range(20)]
    assert not {plain.wording(text) for text in seen} & {plain.wording(text) for text in again}
    assert plain.wording("Is it 12 degrees in Paris?") == plain.wording("is it seven degrees in oslo")


def test_a_template_stands_for_all_its_wordings() -> None:
    syllables = {"onsets": "b", "vowels": "a", "codas": "t"}
    grammar = Grammar({"q": "quire|it"}, {"howto": ["how to X", "X, please"]}, syllables)
    node = grammar.parse("howto> {stop|end{ now|}} $q")
    rng = random.Random(0)
    seen = {node.sample(rng) for _ in range(500)}
    assert node.count() == len(seen) == 12
    assert "how to end now quire" in seen
    with pytest.raises(ValueError, match="brace"):
        grammar.parse("{open")
