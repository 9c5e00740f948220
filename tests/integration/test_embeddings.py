"""Embeddings against `transformers`' own hidden states, whatever the batch, the chunking, the cache or the
preemptions.

    pytest tests/integration/test_embeddings.py
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engine.embedding import Pooling, PoolingKind
from engine.errors import ContextTooLong, InvalidRequest
from engine.llm import LLM
from engine.types import FinishReason, SamplingParams
from tests.helpers.audit import check_core
from tests.helpers.checkpoints import ALL_CONFIGS, make_checkpoint, reference_embedding, reference_generate
from tests.helpers.engines import Stream, make_core, run

PROMPTS = {
    "one-token": [7],
    "short": [5, 17, 3],
    "one-block": list(range(10, 26)),
    "long": [(7 * i + 3) % 90 + 5 for i in range(45)],
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
Vector = NDArray[np.float64]


def asks(kind: PoolingKind = PoolingKind.LAST, dimensions: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=0, pooling=Pooling(kind, dimensions))


@functools.cache
def expected(path: Path, name: str, kind: PoolingKind, dimensions: int | None = None) -> Vector:
    return reference_embedding(path, PROMPTS[name], kind, dimensions)


def assert_same(stream: Stream, vector: Vector) -> None:
    assert stream.finish_reason is FinishReason.STOP and stream.token_ids == []
    assert stream.embedding is not None
    found = np.frombuffer(stream.embedding, "<f4")
    assert found.shape == vector.shape
    np.testing.assert_allclose(found, vector, atol=2e-5)
    assert abs(float(np.linalg.norm(found.astype(np.float64))) - 1) < 1e-6


@pytest.fixture(params=ALL_CONFIGS, ids=lambda config: config.id)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = request.param
    return make_checkpoint(tmp_path_factory.mktemp("model"), config.family, **config.overrides)


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("kind", PoolingKind)
def test_every_family_and_pooling_alone_and_in_a_mixed_batch(path: Path, kind: PoolingKind) -> None:
    core = make_core(path)
    for name, prompt in PROMPTS.items():
        assert_same(run(core, [(name, prompt, asks(kind))])[name, 0], expected(path, name, kind))
    mixed = [
        ("text", PROMPTS["long"], GREEDY),
        *((name, prompt, asks(kind)) for name, prompt in PROMPTS.items()),
        ("sampled", [9] * 20, SamplingParams(seed=3, max_tokens=9, ignore_eos=True)),
    ]
    streams = run(make_core(path), mixed)
    for name in PROMPTS:
        assert_same(streams[name, 0], expected(path, name, kind))
    assert streams["text", 0].token_ids == reference_generate(path, PROMPTS["long"], 24)[0]


@pytest.mark.parametrize("kind", PoolingKind)
@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_in_chunks_beside_decodes(llama: Path, kind: PoolingKind, steps_ahead: int) -> None:
    core = make_core(llama, max_num_batched_tokens=7, max_num_seqs=5, steps_ahead=steps_ahead)
    streams = run(
        core,
        [
            ("text", [5, 6, 7], GREEDY),
            *((name, prompt, asks(kind)) for name, prompt in PROMPTS.items()),
            *((f"{name}-again", prompt, asks(kind)) for name, prompt in PROMPTS.items()),
        ],
    )
    for name in PROMPTS:
        assert_same(streams[name, 0], expected(llama, name, kind))
        assert_same(streams[f"{name}-again", 0], expected(llama, name, kind))
    check_core(core)


@pytest.mark.parametrize("kind", PoolingKind)
@pytest.mark.parametrize("dimensions", [1, 17, 64])
def test_dimensions_are_cut_and_scaled_again(llama: Path, kind: PoolingKind, dimensions: int) -> None:
    streams = run(make_core(llama), [("cut", PROMPTS["long"], asks(kind, dimensions))])
    assert_same(streams["cut", 0], expected(llama, "long", kind, dimensions))


@pytest.mark.parametrize(("kind", "reused"), [("last", 32), ("mean", 0), ("cls", 0)])
@pytest.mark.parametrize("first", ["embedding", "text"])
def test_after_a_prefix_was_computed_by_another(llama: Path, kind: str, reused: int, first: str) -> None:
    """Last-token pooling reuses all blocks but the last token's; the others need every token."""
    core, wanted = make_core(llama), PoolingKind(kind)
    run(core, [("first", PROMPTS["long"], asks() if first == "embedding" else GREEDY)])
    again = run(core, [("again", PROMPTS["long"], asks(wanted))])["again", 0]
    assert again.cached_tokens == reused
    assert_same(again, expected(llama, "long", wanted))


def test_an_embedding_leaves_its_blocks_to_text(llama: Path) -> None:
    core = make_core(llama)
    run(core, [("vector", PROMPTS["long"], asks(PoolingKind.MEAN))])
    text = run(core, [("text", PROMPTS["long"], GREEDY)])["text", 0]
    assert text.cached_tokens == 32
    assert text.token_ids == reference_generate(llama, PROMPTS["long"], 24)[0]


@pytest.mark.parametrize("kind", PoolingKind)
@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_after_preemption(llama: Path, kind: PoolingKind, steps_ahead: int) -> None:
    """A text that grows takes the blocks of the younger one, in the middle of its prompt."""
    core = make_core(llama, num_blocks=5, max_num_batched_tokens=3, max_num_seqs=2, steps_ahead=steps_ahead)
    core.add("text", PROMPTS["short"], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    streams = {"text": Stream(), "vector": Stream()}
    for step in range(200):
        if step == 10:
            core.add("vector", PROMPTS["long"], asks(kind))
        for output in core.step():
            streams[output.request_id].add(output)
    assert not core.has_work
    assert core.snapshot().preemptions and core.snapshot().recomputed_tokens
    assert_same(streams["vector"], expected(llama, "long", kind))
    assert streams["text"].token_ids == reference_generate(llama, PROMPTS["short"], 40)[0]


def test_out_of_range_dimensions_and_prompts_are_refused(llama: Path) -> None:
    core = make_core(llama, max_model_len=40)
    for dimensions in (-1, 0, 65):
        with pytest.raises(InvalidRequest, match=r"dimensions must be in \[1, 64\]") as refused:
            core.add("r", [5, 6], asks(dimensions=dimensions))
        assert refused.value.param == "dimensions"
    with pytest.raises(InvalidRequest, match="empty"):
        core.add("r", [], asks())
    with pytest.raises(ContextTooLong):
        core.add("r", [5] * 41, asks())
    assert not core.has_work
    vector = run(core, [("r", [5] * 40, asks())])["r", 0]  # the whole context: nothing is generated
    assert vector.finish_reason is FinishReason.STOP


def test_an_embedding_comes_alone() -> None:
    for more in ({"n": 2}, {"max_tokens": 1}, {"logprobs": 0}, {"prompt_logprobs": 0}):
        with pytest.raises(InvalidRequest, match="comes alone"):
            SamplingParams(**{"max_tokens": 0, "pooling": Pooling(), **more})


def test_aborting_gives_everything_back(llama: Path) -> None:
    core = make_core(llama, max_num_batched_tokens=8)
    core.add("r", PROMPTS["long"], asks(PoolingKind.MEAN))
    core.step()
    core.abort("r")
    outputs = [output for _ in range(3) for output in core.step()]
    assert [(o.finish_reason, o.embedding) for o in outputs] == [(FinishReason.ABORT, None)]
    check_core(core)
    again = run(core, [("again", PROMPTS["short"], asks(PoolingKind.MEAN))])["again", 0]
    assert_same(again, expected(llama, "short", PoolingKind.MEAN))


def test_a_vector_that_is_not_finite_fails_alone(llama: Path, tmp_path: Path) -> None:
    """One token's embedding is broken in the file: who reads it gets an error, and leaves nothing cached."""
    path = shutil.copytree(llama, tmp_path / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][99] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    core = make_core(path)
    good, bad = PROMPTS["long"], [*PROMPTS["long"][:20], 99, *PROMPTS["long"][20:]]
    for kind in PoolingKind:
        streams = run(core, [("good", good, asks(kind)), ("bad", bad, asks(kind)), ("text", good, GREEDY)])
        assert_same(streams["good", 0], expected(llama, "long", kind))
        if kind is not PoolingKind.CLS:  # the first token sees nothing of it
            assert streams["bad", 0].finish_reason is FinishReason.ERROR
            assert streams["bad", 0].embedding is None
    again = run(core, [("again", good, asks())])["again", 0]
    assert_same(again, expected(llama, "long", PoolingKind.LAST))


class TestOffline:
    def test_texts_and_ids(self, llama: Path) -> None:
        llm = LLM(str(llama), dtype="float32", kv_cache_memory_bytes=4 << 20)
        ids = llm.tokenizer.encode("hello there")
        by_text, by_ids = llm.embed(["hello there", ids])
        assert by_text.prompt_ids == by_ids.prompt_ids == tuple(ids)
        wanted = reference_embedding(llama, ids)
        for output in (by_text, by_ids, *llm.embed("hello there"), *llm.embed(ids)):
            assert output.embedding.dtype == np.float32
            np.testing.assert_allclose(output.embedding, wanted, atol=2e-5)
        [short] = llm.embed("hello there", dimensions=5)
        np.testing.assert_allclose(short.embedding, wanted[:5] / np.linalg.norm(wanted[:5]), atol=2e-5)
        with pytest.raises(InvalidRequest, match="dimensions"):
            llm.embed("hello there", dimensions=65)
        assert len(llm.embed([[5, 6, i % 90] for i in range(400)])) == 400
        assert llm.generate("hello there", GREEDY)[0].choices[0].token_ids

    def test_a_tokenizer_may_end_a_text_with_a_token_of_its_own(self, llama: Path, tmp_path: Path) -> None:
        path = shutil.copytree(llama, tmp_path / "ends")
        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <|eos|>", special_tokens=[("<|eos|>", 2)]
        )
        tokenizer.save(str(path / "tokenizer.json"))
        llm = LLM(str(path), dtype="float32", kv_cache_memory_bytes=4 << 20)
        [output] = llm.embed("hello")
        assert output.prompt_ids[-1] == 2 and len(output.prompt_ids) == 6

    def test_the_model_says_how_to_pool(self, llama: Path, tmp_path: Path) -> None:
        path = shutil.copytree(llama, tmp_path / "mean")
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
        llm = LLM(str(path), dtype="float32", kv_cache_memory_bytes=4 << 20)
        [output] = llm.embed(PROMPTS["long"])
        np.testing.assert_allclose(output.embedding, expected(llama, "long", PoolingKind.MEAN), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
class TestADecoderSavedAlone:
    """As embedding models are: no prefix in the names, no output layer."""

    def test_without_tied_embeddings_it_embeds_and_refuses_text(self, family: str, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path, family, bare=True, tie_word_embeddings=False)
        llm = LLM(str(path), dtype="float32", kv_cache_memory_bytes=4 << 20)
        assert llm.info.architecture.endswith("Model")
        wanted = reference_embedding(path, PROMPTS["long"])
        [output] = llm.embed(PROMPTS["long"])
        np.testing.assert_allclose(output.embedding, wanted, atol=2e-5)
        with pytest.raises(InvalidRequest, match="embeddings only"):
            llm.generate("hello")

    def test_with_tied_embeddings_it_also_writes(self, family: str, tmp_path: Path) -> None:
        bare = make_checkpoint(tmp_path, family, bare=True, tie_word_embeddings=True)
        whole = make_checkpoint(tmp_path, family, tie_word_embeddings=True)
        llm = LLM(str(bare), dtype="float32", kv_cache_memory_bytes=4 << 20)
        [output] = llm.generate(PROMPTS["short"], GREEDY)
        assert list(output.choices[0].token_ids) == reference_generate(whole, PROMPTS["short"], 24)[0]
        assert llm.embed(PROMPTS["short"])
