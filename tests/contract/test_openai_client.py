"""The official `openai` Python client against a real server on a socket."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator

import openai
import pytest

from server.settings import ServerSettings
from tests.helpers.fake_client import embedding_of
from tests.helpers.http import HELLO, Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(ServerSettings(api_keys=("secret",))) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["quire-demo"]
    assert client.models.retrieve("quire-demo").owned_by == "quire"


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="quire-demo", messages=HELLO, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[0].message.content.startswith("Hello, wörld")
    assert reply.choices[0].finish_reason == "stop"
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="quire-demo", messages=HELLO)
    stream = client.chat.completions.create(
        model="quire-demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="quire-demo", messages=HELLO) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content.startswith("Hello")


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="quire-demo", prompt=["a", "b"], max_tokens=4, logprobs=2, echo=True
    )
    assert [choice.text for choice in reply.choices] == ["aHell", "bHell"]
    stream = client.completions.create(model="quire-demo", prompt="a", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hell"


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64 where its caller does not say."""
    inputs = ["hello", "wörld"]
    expected = [embedding_of(list(text.encode())) for text in inputs]
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = client.embeddings.create(model="quire-demo", input=inputs, **more)
        assert [entry.index for entry in reply.data] == [0, 1]
        for entry, vector in zip(reply.data, expected, strict=True):
            value = entry.embedding
            if isinstance(value, str):
                value = list(struct.unpack("<16f", base64.b64decode(value)))
            assert value == pytest.approx(vector, abs=1e-7)
        assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (11, 11)
    short = client.embeddings.create(model="quire-demo", input=[72, 105], dimensions=4)
    assert short.data[0].embedding == pytest.approx(embedding_of([72, 105], 4), abs=1e-7)
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="quire-demo", input="hello", dimensions=17)
    assert refused.value.param == "dimensions"


def test_the_pattern_of_lm_eval(client: openai.OpenAI) -> None:
    """Log likelihoods: token ids in, one token out, the prompt's probabilities back."""
    prompts = [[72, 105, 33], [66, 121, 101]]
    reply = client.completions.create(
        model="quire-demo", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        lists = choice.logprobs
        assert lists.tokens == [*map(chr, prompt), "H"]
        assert lists.token_logprobs[0] is None and all(value <= 0 for value in lists.token_logprobs[1:-1])
        assert all(token in top for token, top in zip(lists.tokens[1:], lists.top_logprobs[1:], strict=True))
        assert lists.text_offset == [0, 1, 2, 3]


def test_the_cache_is_explained_beside_what_the_client_knows(client: openai.OpenAI) -> None:
    extra = {"explain_cache": True, "cache_salt": "mine"}
    reply = client.chat.completions.create(model="quire-demo", messages=HELLO, extra_body=extra)
    (report,) = reply.model_extra["cache"]
    assert report["prompt_tokens"] == reply.usage.prompt_tokens
    stream = client.chat.completions.create(
        model="quire-demo", messages=HELLO, extra_body=extra, stream=True, n=2
    )
    told = [chunk for chunk in stream if "cache" in (chunk.model_extra or {})]
    assert [chunk.choices[0].index for chunk in told] == [0]


def test_errors_have_the_clients_own_types(client: openai.OpenAI, server: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="quire-demo", messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_overload_is_a_rate_limit(client: openai.OpenAI, server: Live) -> None:
    server.engine.max_in_flight = 0
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="quire-demo", messages=HELLO)
    finally:
        server.engine.max_in_flight = None
    assert refused.value.response.headers["retry-after"] == "3"


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, server: Live) -> None:
    server.engine.die_after = 4
    try:
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(model="quire-demo", messages=HELLO, stream=True))
    finally:
        server.engine.die_after = None
