"""The tokenizer: every kind encodes as the library does, except that nobody can type a control token."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest, ModelError
from engine.text.tokenizer import Tokenizer
from tests.helpers.text_models import KINDS, REASONING, write_model

PROSE = [
    "hello world",
    " leading",
    "Umlaute: äöü",
    "if (a < b) { return [x]; }",
    "日本語 😀",
    "\n\n\nx\n\n",
    "",
]


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = write_model(tmp_path_factory.mktemp("model"), request.param)
    return Tokenizer.from_dir(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_prose_is_encoded_as_the_library_does(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    for text in PROSE:
        for special in (True, False):
            assert ours.encode(text, special) == library.encode(text, add_special_tokens=special).ids


def test_control_tokens_of_a_trusted_author_are_real(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    for literal in ours.control:
        text = f"a{literal} b {literal}{literal}\n c"
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode_chat(ours.segments(text)) == ids


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_nobody_types_a_control_token(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], data: st.DataObject
) -> None:
    ours, _ = pair
    part = st.one_of(st.sampled_from(sorted(ours.control)), st.text(max_size=8))
    text = "".join(data.draw(st.lists(part, max_size=8)))
    unknown = ours.control.get("<unk>", ours.control.get("[UNK]"))
    made = set(ours.encode(text, add_special_tokens=False)) - {unknown}
    assert made.isdisjoint(ours.control.values())


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_typed_control_tokens_keep_their_text(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, kind))
    for literal in tokenizer.control:
        assert tokenizer.decode(tokenizer.encode(f"x {literal}y")) == f"x {literal}y"


def test_segments_are_encoded_as_one_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, "llama"))
    end = tokenizer.control["</s>"]
    assert tokenizer.encode_chat(["hel", "lo", end, "hello"]) == [
        *tokenizer.encode("hello", False), end, *tokenizer.encode("hello", False)
    ]  # fmt: skip


def test_which_added_tokens_are_control(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, "byte_level", REASONING))
    assert {"<|im_end|>", "<s>", "<think>", "</tool_response>", "<|fim|>"} <= set(tokenizer.control)
    assert not {"<b>", "\n\n\n"} & set(tokenizer.control)


def test_special_tokens_are_hidden_when_decoding(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, "byte_level"))
    ids = tokenizer.encode_chat(tokenizer.segments("a<|im_end|><think>b"))
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|><think>b"


def test_token_bytes_may_be_part_of_a_character(tmp_path: Path) -> None:
    for kind in ("byte_level", "llama"):
        tokenizer = Tokenizer.from_dir(write_model(tmp_path, kind))
        ids = tokenizer.encode("\U0001f600", False)
        assert b"".join(map(tokenizer.token_bytes, ids)).strip() == "\U0001f600".encode()
        assert "\ufffd" in tokenizer.token_text(ids[-1])
        assert tokenizer.token_bytes(10**6) == b""
        assert tokenizer.token_text(tokenizer.control["<s>"]) == "<s>"


@pytest.mark.parametrize(
    ("kind", "stated", "expected"), [("llama", None, True), ("llama", False, False), ("llama", True, True),
                                     ("byte_level", None, False), ("byte_level", True, True)]
)  # fmt: skip
def test_bos_as_the_config_says(tmp_path: Path, kind: str, stated: bool | None, expected: bool) -> None:
    config = {} if stated is None else {"add_bos_token": stated}
    tokenizer = Tokenizer.from_dir(write_model(tmp_path, kind, **config))
    ids = tokenizer.encode("hello")
    assert (ids[0] == tokenizer.bos_id) == expected
    assert tokenizer.bos_id not in ids[1:]
    assert tokenizer.bos_id not in tokenizer.encode("hello", False)


def test_tokens_that_only_the_config_knows_are_added(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    size = Tokenizer.from_dir(folder).vocab_size
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(size): {"content": "<|new|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.control["<|new|>"] == size
    assert tokenizer.encode_chat(tokenizer.segments("<|new|>")) == [size]


def test_half_a_surrogate_pair_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        Tokenizer.from_dir(write_model(tmp_path)).encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no tokenizer.json"), ("{", "cannot be read"), ("[]", "JSON object"),
     ('{"model": {"type": "BPE"}}', "no vocabulary"),
     ('{"model": {"vocab": {}, "type": "What"}}', "library")],
)  # fmt: skip
def test_broken_files_are_a_model_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=message) as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_threads_may_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_model(tmp_path))
    expected = [tokenizer.encode(text) for text in PROSE]
    wrong: list[str] = []

    def encode() -> None:
        for _ in range(50):
            wrong.extend(t for t, ids in zip(PROSE, expected, strict=True) if tokenizer.encode(t) != ids)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
