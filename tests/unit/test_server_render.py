"""Events -> bytes: what a stream says piece by piece is what the whole reply says at once."""

from __future__ import annotations

import json
import math

from engine.types import FinishReason, TokenEvent, TokenLogprob
from server.logprobs import LegacyLogprobs, chat_logprobs
from server.render import DONE, ChatChunks, Choice, Common, CompletionChunks, Echo, Head
from tests.helpers.fake_client import FakeTokenizer
from tests.helpers.http import chat_text, frames

HEAD = Head('id"1', 5, "a/model", "fp_1")
TOKENIZER = FakeTokenizer()
AWKWARD = 'quote " backslash \\ line\nfeed \r\n\u2028 nul \0 emoji 👩‍👩‍👧 data: [DONE]\n\n'


def no_usage() -> dict[str, int]:
    return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def last(text: str = "", index: int = 0) -> TokenEvent:
    return TokenEvent(index, text, (1,), finish_reason=FinishReason.STOP)


def test_any_text_survives() -> None:
    chunks = ChatChunks(Common(HEAD, no_usage, (False, False), TOKENIZER), 1)
    stream = b"".join(chunks.event(0, TokenEvent(0, character, (1,))) for character in AWKWARD)
    stream += chunks.event(0, last("end")) + chunks.end()
    parsed = frames(stream.decode())
    assert chat_text(parsed) == AWKWARD + "end"
    assert {chunk["id"] for chunk in parsed} == {'id"1'}


def test_each_choice_begins_with_its_role_and_events_without_text_write_nothing() -> None:
    chunks = ChatChunks(Common(HEAD, no_usage, (False, False), TOKENIZER), 1)
    begun = frames((ChatChunks(Common(HEAD, no_usage, (False, False), TOKENIZER), 2).begin() + DONE).decode())
    assert [(c["index"], c["delta"]["role"]) for chunk in begun for c in chunk["choices"]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert chunks.event(0, TokenEvent(0, "", (1,))) == b""


def test_usage_is_read_when_it_is_written() -> None:
    counts = no_usage()
    chunks = CompletionChunks(Common(HEAD, lambda: dict(counts), (True, True), TOKENIZER), [None])
    for total in (1, 2):
        counts["total_tokens"] = total
        (chunk,) = frames((chunks.event(0, TokenEvent(0, "x", (1,))) + b"data: [DONE]\n\n").decode())
        assert chunk["usage"]["total_tokens"] == total


def test_the_stop_reason_is_told_where_there_is_one() -> None:
    choice = Choice(0)
    choice.add(TokenEvent(0, "a", (1,), finish_reason=FinishReason.STOP, stop_reason="END"))
    assert choice.chat(TOKENIZER, False)["stop_reason"] == "END"
    plain = Choice(0)
    plain.add(last("a"))
    assert "stop_reason" not in plain.chat(TOKENIZER, False)


def test_impossible_tokens_are_numbers_in_json() -> None:
    entry = TokenLogprob(65, -math.inf, ((66, -math.inf),))
    (chat,) = chat_logprobs(TOKENIZER, [entry])["content"]
    assert chat["logprob"] == chat["top_logprobs"][0]["logprob"] == -9999.0
    assert json.dumps(LegacyLogprobs(TOKENIZER).lists([65], [entry]), allow_nan=False)


def test_parts_of_characters_stay_distinct() -> None:
    raw = "é".encode()
    entries = [TokenLogprob(byte, -1.0, ((0xE2, -0.5), (byte, -1.0))) for byte in raw]
    lists = LegacyLogprobs(TOKENIZER).lists(list(raw), entries)
    assert lists["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert all(
        token in top and len(top) == 2
        for token, top in zip(lists["tokens"], lists["top_logprobs"], strict=True)
    )
    assert [entry["bytes"] for entry in chat_logprobs(TOKENIZER, entries)["content"]] == [[0xC3], [0xA9]]


def test_an_echo_comes_first_and_offsets_go_on() -> None:
    echo = Echo("AB", (65, 66))
    prompt = (None, TokenLogprob(66, -2.0))
    first = TokenEvent(0, "C", (67,), (TokenLogprob(67, -1.0),), prompt_logprobs=prompt)
    end = TokenEvent(0, "D", (68,), (TokenLogprob(68, -1.0),), finish_reason=FinishReason.LENGTH)
    chunks = CompletionChunks(Common(HEAD, no_usage, (False, False), TOKENIZER), [echo])
    parsed = frames((chunks.event(0, first) + chunks.event(0, end) + chunks.end()).decode())
    assert [chunk["choices"][0]["text"] for chunk in parsed] == ["AB", "C", "D"]
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in parsed]
    assert offsets == [[0, 1], [2], [3]]
    choice = Choice(0)
    choice.add(first)
    choice.add(end)
    whole = choice.completion(TOKENIZER, True, echo)
    assert whole["text"] == "ABCD" and whole["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert whole["logprobs"]["token_logprobs"] == [None, -2.0, -1.0, -1.0]
