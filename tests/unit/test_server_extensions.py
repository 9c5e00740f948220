"""What vLLM's users rely on beside OpenAI's parameters: each reaches the engine, the prompt or the reply."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.openai_schema import check
from tests.helpers.fake_client import ASSISTANT, END, INFO, USER, FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, chat_text, completion_text, frames, in_process

pytestmark = pytest.mark.anyio

BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "hello"}}
SCHEMAS = {CHAT: "CreateChatCompletionResponse", COMPLETIONS: "CreateCompletionResponse"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(path: str, **fields: Any) -> tuple[Any, FakeClient]:
    async with in_process() as (http, client):
        reply = await http.post(path, json={**BODIES[path], **fields})
        assert reply.status_code == 200, reply.text
        if not fields.get("stream"):
            check(SCHEMAS[path], reply.json())
        return reply, client


async def refused(path: str, **fields: Any) -> Any:
    async with in_process() as (http, client):
        reply = await http.post(path, json={**BODIES[path], **fields})
        assert reply.status_code == 400 and not client.submitted
        return reply.json()["error"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("top_k", 5, 5),
        ("min_p", 0.1, 0.1),
        ("repetition_penalty", 1.3, 1.3),
        ("stop_token_ids", [1, 2], (1, 2)),
        ("include_stop_str_in_output", True, True),
        ("ignore_eos", True, True),
        ("min_tokens", 4, 4),
        ("skip_special_tokens", False, False),
        ("prompt_logprobs", 3, 3),
        ("allowed_token_ids", [72, 10], (72, 10)),
        ("priority", -3, -3),
    ],
)
async def test_what_the_engine_does(path: str, field: str, value: Any, expected: Any) -> None:
    _, client = await ask(path, **{field: value})
    assert getattr(client.submitted[0][2], field) == expected


@pytest.mark.parametrize(("most", "kept"), [(2, b"lo"), (5, b"hello"), (99, b"hello"), (-1, b"hello")])
async def test_truncated_prompts(most: int, kept: bytes) -> None:
    for prompt in ("hello", list(b"hello")):
        _, client = await ask(COMPLETIONS, prompt=prompt, truncate_prompt_tokens=most)
        assert bytes(client.submitted[0][1]) == kept


async def test_a_prompt_is_cut_to_what_leaves_room_for_the_reply() -> None:
    long = "x" * INFO.max_model_len + "y"
    client = FakeClient(info=INFO)
    client._info = type(INFO)(
        **{name: getattr(INFO, name) for name in INFO.__dataclass_fields__} | {"largest_request_tokens": 9000}
    )
    async with in_process(client) as (http, _):
        for prompt in (long, list(long.encode())):
            body = {"prompt": prompt, "max_tokens": 8, "truncate_prompt_tokens": -1, "echo": True}
            reply = await http.post(COMPLETIONS, json=body)
            assert reply.status_code == 200, reply.text
            assert len(client.submitted[-1][1]) == INFO.max_model_len - 8
            assert reply.json()["choices"][0]["text"].startswith("x" * (INFO.max_model_len - 9) + "y")
            whole = await http.post(COMPLETIONS, json={**body, "truncate_prompt_tokens": None})
            assert whole.json()["error"]["code"] == "context_length_exceeded"


async def test_a_truncated_conversation() -> None:
    reply, client = await ask(CHAT, truncate_prompt_tokens=3, explain_cache=True)
    assert client.submitted[0][1] == [*b"o", END, ASSISTANT]
    assert reply.json()["usage"]["prompt_tokens"] == 3
    assert reply.json()["cache"][0]["messages"] is None, "which tokens are whose can no longer be told"


async def test_more_than_the_context_cannot_be_kept() -> None:
    for path in BODIES:
        error = await refused(path, truncate_prompt_tokens=INFO.max_model_len + 1)
        assert error["param"] == "truncate_prompt_tokens"


async def test_the_last_message_is_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer"}]
    for more in ({}, {"add_generation_prompt": False}, {"add_generation_prompt": None}):
        _, client = await ask(CHAT, messages=messages, continue_final_message=True, **more)
        assert client.submitted[0][1] == [USER, *b"hello", END, ASSISTANT, *b"The answer"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [{"role": "assistant"}]}, "continue_final_message"),
    ],
)
async def test_what_cannot_be_continued(fields: dict[str, Any], param: str) -> None:
    assert (await refused(CHAT, continue_final_message=True, **fields))["param"] == param


async def test_prompt_logprobs_in_chat() -> None:
    reply, client = await ask(CHAT, prompt_logprobs=2, n=2)
    first, second, *others = reply.json()["prompt_logprobs"]
    ids = client.submitted[0][1]
    assert first is None and len(others) == len(ids) - 2
    assert set(second) == {str(ids[1]), str(ids[1] + 1)}
    assert second[str(ids[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": "h"}
    assert second[str(ids[1] + 1)]["rank"] == 2


async def test_a_rank_that_was_not_looked_at_is_null() -> None:
    reply, _ = await ask(COMPLETIONS, prompt_logprobs=0, prompt="ab")
    entry = {"98": {"logprob": -0.5, "rank": None, "decoded_token": "b"}}
    assert reply.json()["choices"][0]["prompt_logprobs"] == [None, entry]


async def test_prompt_logprobs_of_several_prompts_and_with_echo() -> None:
    reply, _ = await ask(COMPLETIONS, prompt=["ab", "xyz"], n=2, prompt_logprobs=1, logprobs=1, echo=True)
    choices = reply.json()["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2, 2, 3, 3]
    assert choices[3]["logprobs"]["tokens"][:3] == ["x", "y", "z"]
    error = await refused(COMPLETIONS, prompt_logprobs=2, logprobs=1, echo=True)
    assert error["param"] == "prompt_logprobs"


async def test_prompt_logprobs_are_not_streamed() -> None:
    for path in BODIES:
        assert (await refused(path, prompt_logprobs=1, stream=True))["param"] == "prompt_logprobs"


async def test_token_ids() -> None:
    reply, client = await ask(CHAT, return_token_ids=True, n=2)
    body = reply.json()
    assert body["prompt_token_ids"] == client.submitted[0][1]
    for choice in body["choices"]:
        assert bytes(choice["token_ids"]).decode() == choice["message"]["content"]
    reply, client = await ask(COMPLETIONS, prompt=["a", "bc"], return_token_ids=True, n=2)
    for position, choice in enumerate(reply.json()["choices"]):
        assert bytes(choice["prompt_token_ids"]) == (b"a", b"bc")[position // 2]
        assert bytes(choice["token_ids"]).decode() == choice["text"]
    assert "token_ids" not in (await ask(CHAT))[0].text


@pytest.mark.parametrize("explain", [False, True])
async def test_token_ids_in_a_stream(explain: bool) -> None:
    fields = {"n": 2, "logprobs": True, "explain_cache": explain}
    reply, client = await ask(CHAT, stream=True, return_token_ids=True, **fields)
    chunks = frames(reply.text)
    assert chunks[0]["prompt_token_ids"] == client.submitted[0][1]
    assert sum("prompt_token_ids" in chunk for chunk in chunks) == 1
    assert sum("cache" in chunk for chunk in chunks) == explain
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
    for index in (0, 1):
        assert bytes(_streamed_ids(chunks, index)).decode() == chat_text(chunks, index)


async def test_token_ids_in_a_stream_of_completions() -> None:
    body = {"prompt": ["a", "bc"], "n": 2, "return_token_ids": True, "echo": True, "max_tokens": 99}
    reply, _ = await ask(COMPLETIONS, stream=True, **body)
    chunks = frames(reply.text)
    for index in range(4):
        prompt = ("a", "bc")[index // 2]
        ids = bytes(_streamed_ids(chunks, index)).decode()
        assert prompt + ids == completion_text(chunks, index)
        told = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert bytes(told[0]["prompt_token_ids"]) == prompt.encode()
        assert not any("prompt_token_ids" in choice for choice in told[1:])


async def test_ids_of_tokens_that_show_nothing_are_in_the_next_chunk() -> None:
    """The fake's word has a character of two tokens."""
    reply, _ = await ask(CHAT, stream=True, return_token_ids=True)
    told = [c["token_ids"] for chunk in frames(reply.text) for c in chunk["choices"]]
    assert list("ö".encode()) in told and all(len(ids) <= 2 for ids in told)


def _streamed_ids(chunks: list[Any], index: int) -> list[int]:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert all("token_ids" in choice for choice in choices)
    return [token_id for choice in choices for token_id in choice["token_ids"]]


@pytest.mark.parametrize("path", BODIES)
async def test_bad_words_are_banned_with_and_without_a_space(path: str) -> None:
    _, client = await ask(path, bad_words=["ab", " c", "ab"])
    sequences = {tuple(text.encode()) for text in ("ab", " ab", " c")}
    assert set(client.submitted[0][2].banned_sequences) == sequences
    _, client = await ask(path, bad_words=[])
    assert client.submitted[0][2].banned_sequences == ()
