"""Incremental detokenisation: what is shown piecewise is what a whole decode shows, in whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import make_detokenizer
from engine.text.tokenizer import Tokenizer
from tests.helpers.text_models import KINDS, write_model

# Every plane, combining marks, joined emoji, and what tokenizers treat specially.
TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab <>▁é\u0301👩\u200d👧日\n")),
    max_size=24,
)


def load(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Tokenizer:
    return Tokenizer.from_dir(write_model(tmp_path_factory.mktemp("model"), kind))


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory, request.param)


@pytest.fixture(scope="module", params=["byte_level", "llama", "gemma"])
def lossless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory, request.param)


def pieces(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, **options: bool
) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [], **options)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_any_text_survives(lossless: Tokenizer, text: str) -> None:
    if lossless.strip_left:
        text = text.replace("▁", "_")  # SentencePiece's space; the two are one to it
    shown = pieces(lossless, lossless.encode(text))
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_tokens_are_harmless(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A model may say anything: broken characters, control tokens, ids beyond the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    shown = "".join(pieces(tokenizer, ids))
    shown.encode("utf-8")
    if tokenizer.byte_table is not None:
        assert shown == tokenizer.decode(ids)


def test_a_cut_character_is_replaced_only_at_the_end(lossless: Tokenizer) -> None:
    ids = lossless.encode("a\U0001f600", False)[:-1]
    *before, last = pieces(lossless, ids)
    assert "".join(before) == "a"
    assert last == "\ufffd"


def test_text_after_a_prompt_keeps_its_space(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = load(tmp_path_factory, "llama")
    bos = [tokenizer.control["<s>"]]
    ids = tokenizer.encode("hello world", False)
    assert "".join(pieces(tokenizer, ids, bos)) == "hello world"
    assert "".join(pieces(tokenizer, ids, bos + ids)) == " hello world"


def test_special_tokens_are_shown_on_request(lossless: Tokenizer) -> None:
    ids = lossless.encode_chat(lossless.segments("a<|im_end|>b"))
    assert "".join(pieces(lossless, ids)).replace(" ", "") == "ab"
    assert "<|im_end|>" in "".join(pieces(lossless, ids, skip_special_tokens=False))


def test_word_pieces_join(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = load(tmp_path_factory, "word_piece")
    ids = tokenizer.encode("the quick foxes, jumping")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_some_special_tokens_are_shown_where_others_are_not(tokenizer: Tokenizer) -> None:
    """A parser of calls must see [TOOL_CALLS], which a reader of the text must not."""
    special = sorted(tokenizer.special_ids)
    shown, hidden = special[0], special[-1]
    assert shown != hidden
    word = tokenizer.encode("word", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer, word, shown=(shown,))
    text = "".join([*map(detokenizer.push, [*word, shown, hidden, *word]), detokenizer.finish()])
    assert tokenizer.token_text(shown).strip() in text
    assert tokenizer.token_text(hidden).strip() not in text
