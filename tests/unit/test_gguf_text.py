"""Vocabularies of GGUF files: they encode as the tokenizers that they were made from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from engine.errors import ModelError
from engine.gguf.config import end_ids
from engine.gguf.container import read_gguf
from engine.text.files import read_text_files, sampling_defaults
from engine.text.tokenizer import Tokenizer
from tests.helpers.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, text_metadata, write_raw
from tests.helpers.text_models import CHATML, CORPUS

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|begin|>", "<|end|>")
TEXTS = [
    *CORPUS,
    "",
    " x  y\t\n\n z",
    "We'LL see 1234567 and 3.14!\r\n",
    "e\u0301 is é",
    "a  b   c\n\n\n  d",
    "...!!?$%^~|<=>",
    "<|begin|> <|end|>",
]


def words(digits: str) -> Any:
    split = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# As the tokenizer.json of a model of each kind has them.
RULES: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": words(r"\p{N}{1,3}"),
    "qwen2": words(r"\p{N}"),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def original(pre: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = RULES[pre]
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *TEXTS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=sorted(RULES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = tmp_path_factory.mktemp("text")
    library = original(request.param)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = text_metadata(folder, request.param)
    file = write_raw(folder / "text.gguf", {**metadata, "tokenizer.ggml.add_bos_token": False})
    return Tokenizer.from_dir(file), library


def test_it_encodes_as_the_original(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    assert ours.vocab_size == library.get_vocab_size()
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode_chat(ours.segments(text)) == ids, text
        assert ours.decode(ours.encode(text)) == library.decode(
            library.encode(text).ids, skip_special_tokens=False
        )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("aé ́1٣'sSLl\n\r\t  .<|日😀"), max_size=20))
def test_it_encodes_any_text_as_the_original(pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    ours, library = pair
    assert ours.encode(text) == library.encode(text).ids


PIECES = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "ca", "▁ab", "aa", "▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(folder: Path, **changes: Any) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "never"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), UNUSED]
    # The shorter pieces "ab", "aa" ... before the longer ones, but "bc" before "ab".
    scores = {piece: -float(i) for i, piece in enumerate(["bc", "▁▁", "aa", "ab", "▁a", "ca", "▁ab", "abc"])}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [scores.get(token, 0.0 if token in BYTES else -100.0) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return write_raw(folder / "pieces.gguf", metadata)


def merged(text: str) -> list[str]:
    """SentencePiece's BPE: of neighbours that make a piece, those of the best score first, from the left."""
    order = ["bc", "▁▁", "aa", "ab", "▁a", "ca", "▁ab", "abc"]
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        known = [pair for pair in pairs if pair in order]
        if not known:
            return symbols
        at = pairs.index(min(known, key=order.index))
        symbols[at : at + 2] = [pairs[at]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("abc "), min_size=1, max_size=12))
def test_sentencepiece_merges_by_score(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = Tokenizer.from_dir(sentencepiece(tmp_path_factory.getbasetemp()))
    ids = tokenizer.encode(text)
    assert [tokenizer.token_string(token_id) for token_id in ids] == ["<s>", *merged(text)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_bytes_and_spaces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(sentencepiece(tmp_path))
    ids = tokenizer.encode("aé\n")
    assert [tokenizer.token_string(i) for i in ids] == ["<s>", "▁a", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(ids) == "aé\n"
    assert tokenizer.encode("</s>", add_special_tokens=False).count(2) == 0
    bare = Tokenizer.from_dir(sentencepiece(tmp_path, add_space_prefix=False, add_bos_token=False))
    assert [bare.token_string(i) for i in bare.encode("ab")] == ["ab"]
    assert bare.decode(bare.encode(" ab")) == " ab"


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(sentencepiece(tmp_path, add_eos_token=True))
    ids = tokenizer.encode("a")
    assert (ids[0], ids[-1]) == (1, 2)


def gpt2(folder: Path, **metadata: Any) -> Path:
    tokens = ["<|end|>", "<|eot|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    common = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[NORMAL] * 256],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
    }
    given = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_raw(folder / "text.gguf", {k: v for k, v in {**common, **given}.items() if v is not None})


def test_a_bos_token_by_default(tmp_path: Path) -> None:
    """Files from before add_bos_token was written rely on the rule of the model's kind."""
    for pre, expected in (("llama-bpe", True), ("qwen2", False), ("default", False), (None, False)):
        file = gpt2(tmp_path, tokenizer__ggml__pre=pre)
        assert (Tokenizer.from_dir(file).encode("") == [0]) is expected


def test_words_without_merges(tmp_path: Path) -> None:
    """Llama 3 takes a whole word that is a token, even where no merges lead there."""
    tokens = ["<|end|>", "hello", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    kinds = [CONTROL, *[NORMAL] * 257]
    for pre, count in (("llama-bpe", 1), ("qwen2", 5)):
        file = gpt2(
            tmp_path,
            tokenizer__ggml__pre=pre,
            tokenizer__ggml__tokens=tokens,
            tokenizer__ggml__token_type=kinds,
        )
        assert len(Tokenizer.from_dir(file).encode("hello", add_special_tokens=False)) == count


def test_ends_templates_and_sampling(tmp_path: Path) -> None:
    file = gpt2(
        tmp_path,
        tokenizer__ggml__eot_token_id=1,
        tokenizer__chat_template=CHATML,
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="{{ tools }}",
        general__sampling__temp=0.5,
        general__sampling__top_k=20,
    )
    assert end_ids(read_gguf(file)) == [0, 1]
    files = read_text_files(file)
    assert files.templates == {"default": CHATML, "tool_use": "{{ tools }}"}
    assert sampling_defaults(files) == {"temperature": 0.5, "top_k": 20}
    assert files.named_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"pre": "command-r"},
            "tokenizer.ggml.pre 'command-r' is not supported; known: gpt2 with default, gpt-2",
        ),
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"model": None}, "tokenizer.ggml.model '' is not supported"),
        ({"tokens": None}, "must be lists of one length"),
        ({"token_type": [1, 2]}, "must be lists of one length"),
        ({"pre": ["qwen2"]}, "tokenizer.ggml.pre is not of type str"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of str"),
        ({"merges": "a b"}, "tokenizer.ggml.merges is not of type list"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = gpt2(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in changes.items()})
    with pytest.raises(ModelError) as caught:
        read_text_files(file)
    assert words in str(caught.value)
    assert str(caught.value).startswith("text.gguf: ")
