"""Offline generation through the LLM class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from engine.llm import LLM
from engine.types import FinishReason, SamplingParams
from tests.helpers.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = make_checkpoint(tmp_path_factory.mktemp("llm"), "llama")
    return LLM(str(path), dtype="float32", kv_cache_memory_bytes=4 << 20)


def test_texts_ids_and_lists_of_either(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello there")
    [by_text] = llm.generate("hello there", GREEDY)
    [by_ids] = llm.generate(ids, GREEDY)
    both = llm.generate(["hello there", ids], GREEDY)
    texts = {output.choices[0].text for output in (by_text, by_ids, *both)}
    assert len(texts) == 1
    assert by_text.prompt_ids == tuple(ids)
    assert len(by_text.choices[0].token_ids) == 12
    assert by_text.choices[0].finish_reason is FinishReason.LENGTH


def test_a_batch_may_be_longer_than_a_servers_queue(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    assert len(llm.generate([[5, 6, i % 90] for i in range(400)], params)) == 400


def test_choices_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=10, ignore_eos=True)
    first, second = llm.generate(["abc", "abc"], params)
    assert [c.token_ids for c in first.choices] == [c.token_ids for c in second.choices]
    assert len({c.token_ids for c in first.choices}) == 3


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    [whole] = llm.generate("hello there", GREEDY)
    text = whole.choices[0].text
    stop = text[4:7]
    [cut] = llm.generate(
        "hello there", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert (cut.choices[0].finish_reason, cut.choices[0].stop_reason) == (FinishReason.STOP, stop)


def test_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, logprobs=2)
    [output] = llm.generate([5, 6, 7, 8], params)
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in rest if entry] == [6, 7, 8]
    assert all(entry is not None and len(entry.top) == 2 for entry in rest)


def test_one_bad_prompt_harms_nothing(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate([[1, 2], [1] * 100_000], GREEDY)
    with pytest.raises(InvalidRequest):
        llm.generate([[1, 2], [10**6]], GREEDY)
    assert llm.generate([1, 2], GREEDY)[0].choices[0].finish_reason is FinishReason.LENGTH


def test_needs_none_of_the_servers_dependencies(tmp_path: Path) -> None:
    missing = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "msgspec", "llguidance")
    blocked = f"import sys\nfor m in {missing}:\n"
    code = blocked + "    sys.modules[m] = None\nfrom engine.llm import LLM\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_only_allowed_tokens(llm: LLM) -> None:
    allowed = (5, 9, 33)
    for sampling in ({"temperature": 0.0}, {"seed": 3}):
        params = SamplingParams(max_tokens=20, ignore_eos=True, allowed_token_ids=allowed, **sampling)
        [output] = llm.generate("hello there", params)
        assert set(output.choices[0].token_ids) <= set(allowed)


def test_banned_sequences(llm: LLM) -> None:
    """What the model would say first is banned step by step; other requests of the batch say it still."""
    [plain] = llm.generate("hello there", GREEDY)
    said = plain.choices[0].token_ids
    banned = (said[:3], (said[5],))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, banned_sequences=banned)
    kept, other = llm.generate(["hello there"] * 2, [params, GREEDY])
    ids = kept.choices[0].token_ids
    assert ids[:2] == said[:2] and ids[2] != said[2] and said[5] not in ids
    assert other.choices[0].token_ids == said
