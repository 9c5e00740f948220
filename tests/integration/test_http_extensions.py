"""vLLM's extensions with a real engine: what is asked for is what is generated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, frames
from tests.integration.test_http_engine import Quire

pytestmark = pytest.mark.slow

GREEDY = {"prompt": "hello there", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def quire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    folder = tmp_path_factory.mktemp("serve")
    running = Quire(make_checkpoint(folder, "llama"), folder / "log")
    with contextlib.closing(running):
        yield running


def post(quire: Quire, path: str, body: dict[str, Any]) -> Any:
    reply = quire.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_there_and_back(quire: Quire) -> None:
    told = post(quire, "/tokenize", {"prompt": GREEDY["prompt"], "return_token_strs": True})
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    whole = post(quire, COMPLETIONS, {**GREEDY, "return_token_ids": True})
    assert whole["choices"][0]["prompt_token_ids"] == told["tokens"]
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == 12
    shown = {"skip_special_tokens": False}
    text = post(quire, COMPLETIONS, {**GREEDY, **shown})["choices"][0]["text"]
    both = post(quire, "/detokenize", {"tokens": [*told["tokens"], *ids]})["prompt"]
    before = post(quire, "/detokenize", {"tokens": told["tokens"]})["prompt"]
    assert both == before + text


def test_allowed_and_bad(quire: Quire) -> None:
    plain = post(quire, COMPLETIONS, {**GREEDY, "return_token_ids": True})["choices"][0]
    allowed = [5, 9, 33]
    asked = {**GREEDY, "allowed_token_ids": allowed, "return_token_ids": True}
    assert set(post(quire, COMPLETIONS, asked)["choices"][0]["token_ids"]) <= set(allowed)
    word = next(
        text
        for token_id in plain["token_ids"]
        if (text := post(quire, "/detokenize", {"tokens": [token_id]})["prompt"].strip()).isalpha()
        and len(post(quire, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]) == 1
    )
    [banned] = post(quire, "/tokenize", {"prompt": word, "add_special_tokens": False})["tokens"]
    asked = {**GREEDY, "bad_words": [word], "return_token_ids": True}
    assert banned not in post(quire, COMPLETIONS, asked)["choices"][0]["token_ids"]


def test_truncated_is_as_if_it_had_been_short(quire: Quire) -> None:
    ids = list(range(20, 60))
    cut = post(quire, COMPLETIONS, {**GREEDY, "prompt": ids, "truncate_prompt_tokens": 8})
    short = post(quire, COMPLETIONS, {**GREEDY, "prompt": ids[-8:]})
    assert cut["choices"][0]["text"] == short["choices"][0]["text"]
    assert cut["usage"]["prompt_tokens"] == 8


def test_prompt_logprobs_are_those_of_an_echo(quire: Quire) -> None:
    body = {**GREEDY, "max_tokens": 1, "n": 1}
    echo = post(quire, COMPLETIONS, {**body, "echo": True, "logprobs": 3})["choices"][0]["logprobs"]
    told = post(quire, COMPLETIONS, {**body, "prompt_logprobs": 3})["choices"][0]["prompt_logprobs"]
    assert told[0] is None and len(told) == len(echo["tokens"]) - 1
    for entry, expected in zip(told[1:], echo["token_logprobs"][1:], strict=False):
        own = next(iter(entry.values()))
        assert own["logprob"] == pytest.approx(expected, abs=1e-4)
        ranked = sorted(entry.values(), key=lambda value: value["rank"] or 99)
        assert [value["rank"] for value in ranked[:3]] == [1, 2, 3]


def test_a_message_is_continued(quire: Quire) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "so"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "return_token_ids": True}
    whole = post(quire, CHAT, {**body, "temperature": 0})
    asked = {"messages": messages, "continue_final_message": True}
    assert whole["prompt_token_ids"] == post(quire, "/tokenize", asked)["tokens"]
    chunks = frames(quire.http.post(CHAT, json={**body, "temperature": 0, "stream": True}).text)
    streamed = [token_id for chunk in chunks for c in chunk["choices"] for token_id in c["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
