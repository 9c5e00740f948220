"""Reports -> sentences and figures; and which tokens are which message's, for many templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.text.chat import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.views import CacheReport, EvictionCause, MissReason
from server import spans
from server.explain import MAX_TEXT_CHARS, Explainer, sentence
from server.prompts import Prompt
from server.spans import MessageSpan
from tests.helpers.fake_client import FakeTemplate, FakeTokenizer
from tests.helpers.text_models import CHATML, INST, PARTS, REASONING, write_model

R = MissReason
BASE = CacheReport(300, 256, R.NEVER_SEEN, 256)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            CacheReport(300, 288, R.PARTIAL_BLOCK, 288),
            "288 of 300 prompt tokens are in the cache; the other 12 do not fill a block of 16, and only "
            "full blocks are shared.",
        ),
        (
            CacheReport(64, 48, R.LAST_TOKEN, 48),
            "All 64 prompt tokens are in the cache; the last 16 are computed again, because the answer "
            "begins with the last token's result.",
        ),
        (
            BASE,
            "256 of 300 prompt tokens are in the cache; what follows from token 256 on was never computed.",
        ),
        (
            replace(BASE, memory_full=True),
            "256 of 300 prompt tokens are in the cache; what follows from token 256 on was never computed, "
            "or so long ago that its eviction is forgotten.",
        ),
        (
            replace(BASE, reason=R.EVICTED, evicted_s=12.34, eviction_cause=EvictionCause.CAPACITY),
            "256 of 300 prompt tokens are in the cache; what follows from token 256 on was evicted 12.3 s "
            "ago, because its block was needed for other tokens.",
        ),
        (
            replace(BASE, reason=R.EVICTED, evicted_s=600.0, eviction_cause=EvictionCause.RESET),
            "256 of 300 prompt tokens are in the cache; what follows from token 256 on was evicted 10 min "
            "ago, when the cache was reset.",
        ),
        (
            replace(BASE, reason=R.EVICTED, evicted_s=9000.0, eviction_cause=EvictionCause.RECLAIMED),
            "256 of 300 prompt tokens are in the cache; what follows from token 256 on was evicted 2 h ago, "
            "when the last request that used it wrote on in its block.",
        ),
        (
            CacheReport(300, 256, R.DIVERGED, 262),
            "256 of 300 prompt tokens are in the cache; what is cached goes on differently from token "
            "262 on.",
        ),
        (
            CacheReport(300, 0, R.OTHER_SALT, 0),
            "0 of 300 prompt tokens are in the cache; what follows from token 0 on is cached under another "
            "cache_salt only.",
        ),
        (
            CacheReport(300, 1, R.IN_PROGRESS, 1),
            "1 of 300 prompt tokens is in the cache; what follows from token 1 on is being computed by "
            "another request at this moment.",
        ),
        (
            CacheReport(1, 0, R.PROMPT_LOGPROBS, 0),
            "None of 1 prompt token is reused, because the prompt's log probabilities were asked for.",
        ),
        (
            CacheReport(300, 0, R.CACHING_OFF, 0),
            "None of 300 prompt tokens is reused, because this server runs without prefix caching.",
        ),
    ],
    ids=lambda value: value.reason if isinstance(value, CacheReport) else "",
)
def test_sentences(report: CacheReport, expected: str) -> None:
    assert sentence(report, 16) == expected


@pytest.mark.parametrize("reason", MissReason)
def test_every_reason_has_its_own_sentence(reason: MissReason) -> None:
    def said(other: MissReason) -> str:
        return sentence(CacheReport(40, 16, other, 16), 16)

    text = said(reason)
    assert text.endswith(".") and text.count(".") == 1 and "40" in text and " None" not in text
    assert all(said(other) != text for other in MissReason if other is not reason)


def explained(report: CacheReport, prompt: Prompt | None = None) -> dict[str, Any]:
    given = prompt or Prompt(list(b"x" * report.prompt_tokens))
    found = Explainer(FakeTokenizer(), 16).report(2, given, report)
    return dict(json.loads(json.dumps(found)))


def test_figures() -> None:
    report = CacheReport(300, 256, R.EVICTED, 256, 1.23456, EvictionCause.RESET)
    found = explained(report)
    assert found.pop("message")
    assert found == {
        "prompt": 2,
        "prompt_tokens": 300,
        "reused_tokens": 256,
        "computed_tokens": 44,
        "block_size": 16,
        "reason": "evicted",
        "at_token": 256,
        "evicted_seconds_ago": 1.235,
        "eviction_cause": "reset",
        "cached_text": None,
        "prompt_text": None,
        "messages": None,
    }


def test_both_texts_around_the_place() -> None:
    ours = b"0123456789abcdefGHIJ-klmnop"
    report = CacheReport(len(ours), 16, R.DIVERGED, 20, cached_ids=tuple(b"GHIJ_klm"), context_start=16)
    found = explained(report, Prompt(list(ours)))
    assert (found["cached_text"], found["prompt_text"]) == ("GHIJ_klm", "GHIJ-klm")


def test_a_short_prompts_text_ends_with_it() -> None:
    report = CacheReport(18, 16, R.DIVERGED, 17, cached_ids=tuple(b"abcdefgh"), context_start=16)
    assert explained(report, Prompt(list(b"0123456789abcdefaX")))["prompt_text"] == "aX"


def test_texts_are_bounded_and_show_control_tokens() -> None:
    report = CacheReport(9000, 0, R.DIVERGED, 0, cached_ids=(256, *[97] * 5000))
    found = explained(report, Prompt([98] * 9000))
    assert len(found["cached_text"]) == len(found["prompt_text"]) == MAX_TEXT_CHARS
    assert found["cached_text"].startswith("<|user|>a")


def test_the_other_sides_text_is_not_shown_where_it_is_not_ours() -> None:
    found = explained(CacheReport(300, 256, R.DIVERGED, 262, context_start=256))
    assert found["cached_text"] is None and found["prompt_text"] is None


@pytest.mark.parametrize(
    ("reused", "expected"), [(0, [0, 0, 0]), (4, [3, 0, 0]), (16, [10, 0, 1]), (40, [10, 0, 20])]
)
def test_reused_tokens_by_message(reused: int, expected: list[int]) -> None:
    messages = (MessageSpan("system", 1, 11), MessageSpan("assistant", 0, 0), MessageSpan("user", 15, 35))
    report = CacheReport(40, reused, R.NEVER_SEEN, reused)
    found = explained(report, Prompt([0] * 40, messages=messages))["messages"]
    assert [message["reused_tokens"] for message in found] == expected
    assert [message["tokens"] for message in found] == [10, 0, 20]


# Where messages are in a prompt.

USUAL = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "user"},  # also the name of its role
    {"role": "assistant", "content": "a\n\n  b äöü 日本語 😀"},
    {"role": "user", "content": "  the quick brown fox \n"},
]
ALTERNATING = USUAL[1:]
TEMPLATES = {"chatml": CHATML, "reasoning": REASONING, "inst": INST, "parts": PARTS}


def located(
    tmp_path: Path, kind: str, template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> tuple[list[int], tuple[MessageSpan, ...] | None, Tokenizer]:
    folder = write_model(tmp_path / kind, kind, template)
    tokenizer = Tokenizer.from_dir(folder)
    chat = ChatTemplate.from_dir(folder, tokenizer)
    assert chat is not None
    ids = chat.render(messages, **variables)
    found = spans.find(
        ids, messages, lambda given: chat.render_text(given, **variables), tokenizer.token_bytes
    )
    return ids, found, tokenizer


def told(ids: Sequence[int], span: MessageSpan, tokenizer: Tokenizer) -> str:
    raw = b"".join(map(tokenizer.token_bytes, ids[span.start : span.end]))
    return raw.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_found(kind: str, name: str, tmp_path: Path) -> None:
    messages = ALTERNATING if name == "inst" else USUAL
    ids, found, tokenizer = located(tmp_path, kind, TEMPLATES[name], messages)
    assert found is not None
    end = 0
    for message, span in zip(messages, found, strict=True):
        text = told(ids, span, tokenizer)
        assert span.role == message["role"] and span.start >= end
        # A token at the edge may hold a character or two of what is around.
        assert message["content"].strip() in text and len(text) <= len(message["content"].strip()) + 4
        end = span.end
    assert end <= len(ids)


def test_empty_messages_have_no_tokens(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": " \n"}, {"role": "user", "content": "hello world"}]
    ids, found, tokenizer = located(tmp_path, "byte_level", CHATML, messages)
    assert found is not None
    assert (found[0].start, found[0].end) == (0, 0)
    assert told(ids, found[1], tokenizer) == "hello world"


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_", "end|> x", "a<|im_start|>user\nb", "\ue000\ue001"])
def test_typed_control_tokens_are_the_messages_own(text: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": text}, {"role": "user", "content": "hello"}]
    ids, found, tokenizer = located(tmp_path, "byte_level", CHATML, messages)
    assert found is not None
    assert told(ids, found[0], tokenizer) == text
    assert told(ids, found[1], tokenizer) == "hello"


def test_equal_messages_are_told_apart(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}] * 3
    ids, found, tokenizer = located(tmp_path, "byte_level", CHATML, messages, add_generation_prompt=False)
    assert found is not None
    assert len({span.start for span in found}) == 3
    assert {told(ids, span, tokenizer) for span in found} == {"hello"}


def test_a_composing_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "byte_level", CHATML)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_dir(folder)
    chat = ChatTemplate.from_dir(folder, tokenizer)
    assert chat is not None
    messages = [{"role": "user", "content": "u\u0308ber"}, {"role": "user", "content": "next"}]
    ids = chat.render(messages)
    found = spans.find(ids, messages, chat.render_text, tokenizer.token_bytes)
    assert found is not None and [told(ids, span, tokenizer) for span in found] == ["über", "next"]


DROPS = "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"
TURNS = "{% for m in messages | reverse %}{{ m['content'] }} {% endfor %}"
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }} {% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}"
CUTS = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"
REFUSES = "{% if messages[0]['content'] != 'one' %}{{ raise_exception('no') }}{% endif %}one two"


@pytest.mark.parametrize("template", [DROPS, TURNS, SHOUTS, TWICE, CUTS], ids=str)
def test_where_it_cannot_be_told_nothing_is_said(template: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one</think>x"}, {"role": "user", "content": "two</think>y"}]
    _, found, _ = located(tmp_path, "byte_level", template, messages)
    assert found is None


def test_a_tokenizer_that_changes_letters(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "The Quick Brown Fox"}]
    _, found, _ = located(tmp_path, "word_piece", "{{ messages[0]['content'] }}", messages)
    assert found is None


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_template_that_refuses_marks_is_still_served(tmp_path: Path) -> None:
    from server.prompts import Prompts

    folder = write_model(tmp_path, "byte_level", REFUSES)
    tokenizer = Tokenizer.from_dir(folder)
    prompts = Prompts(tokenizer, ChatTemplate.from_dir(folder, tokenizer))
    prompt = await prompts.from_messages(
        [{"role": "user", "content": "one"}], 100, add_generation_prompt=True, variables={}, locate=True
    )
    prompts.close()
    assert prompt.ids and prompt.messages is None


def test_the_fakes_template() -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    template, tokenizer = FakeTemplate(), FakeTokenizer()
    found = spans.find(template.render(messages), messages, template.render_text, tokenizer.token_bytes)
    assert found == (MessageSpan("system", 1, 3), MessageSpan("user", 5, 10))
