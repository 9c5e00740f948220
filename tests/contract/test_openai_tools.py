"""Tools and reasoning: the shapes OpenAI describes, and the official `openai` client on a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from engine.types import SamplingParams
from server.app import create_app
from server.docs import openapi
from server.settings import ServerSettings
from tests.contract.openai_schema import check
from tests.helpers.fake_client import FakeClient, FakeTokenizer
from tests.helpers.http import CHAT, HELLO, Live, frames, in_process, live
from tests.helpers.tool_template import HERMES, THINKING, ToolTemplate

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
THOUGHT = "<think>\nParis, then.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def agent(prompt_ids: Sequence[int], params: SamplingParams, index: int) -> str:
    """Calls a tool until there is an answer in the prompt."""
    if b'"tool_calls"' in bytes(token_id for token_id in prompt_ids if token_id < 256):
        return THOUGHT + "It rains."
    return THOUGHT + "I look.\n" + CALL + "\n" + CALL.replace("Paris", "Rome")


class Remembering(ToolTemplate):
    """Writes earlier calls into the prompt."""

    def render(self, messages: Any, **kwargs: Any) -> list[int]:
        calls = [message for message in messages if "tool_calls" in message]
        return [*(json.dumps(calls).encode() if calls else b""), *super().render(messages, **kwargs)]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(make=lambda: FakeClient(agent), template=Remembering(HERMES + THINKING)) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "extra", [{}, {"n": 2}, {"logprobs": True}, {"max_tokens": 90}, {"tool_choice": "auto"}]
)
async def test_shapes(extra: dict[str, Any]) -> None:
    body = {"model": "quire-demo", "messages": HELLO, "tools": TOOLS, **extra}
    check("CreateChatCompletionRequest", body)
    document = openapi(create_app(FakeClient(), ServerSettings(), FakeTokenizer()))
    operation = document["paths"][CHAT]["post"]

    def ours(schema: Any, value: Any) -> None:
        Draft202012Validator({**schema, "components": document["components"]}).validate(value)

    template = Remembering(HERMES + THINKING)
    async with in_process(FakeClient(agent), template=template) as (http, _):
        whole = (await http.post(CHAT, json=body)).json()
        usage = {"include_usage": True}
        chunks = frames((await http.post(CHAT, json={**body, "stream": True, "stream_options": usage})).text)
    ours(operation["requestBody"]["content"]["application/json"]["schema"], body)
    ours(operation["responses"]["200"]["content"]["application/json"]["schema"], whole)
    check("CreateChatCompletionResponse", whole)
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
    assert whole["choices"][0]["finish_reason"] == ("length" if "max_tokens" in extra else "tool_calls")
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }


def test_a_conversation_with_tools(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris and Rome?"}]
    first = client.chat.completions.create(model="quire-demo", messages=messages, tools=TOOLS)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert choice.message.reasoning_content == choice.message.reasoning == "Paris, then."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"city": "Paris"},
        {"city": "Rome"},
    ]
    assert first.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT.rstrip())
    messages.append(choice.message)
    for call in choice.message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    last = client.chat.completions.create(model="quire-demo", messages=messages, tools=TOOLS)
    assert last.choices[0].message.content == "It rains." and last.choices[0].finish_reason == "stop"
    assert last.choices[0].message.tool_calls is None


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="quire-demo", messages=HELLO, tools=TOOLS, stream=True)
    names: list[str] = []
    arguments: list[str] = []
    thoughts = content = ""
    finish = None
    for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        thoughts += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id:
                names.append(call.function.name)
                arguments.append("")
            arguments[call.index] += call.function.arguments
        finish = chunk.choices[0].finish_reason or finish
    assert (thoughts, content, finish) == ("Paris, then.", "I look.", "tool_calls")
    assert names == ["get_weather"] * 2 and arguments == ['{"city": "Paris"}', '{"city": "Rome"}']


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="quire-demo", messages=HELLO, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        '{"city": "Paris"}',
        '{"city": "Rome"}',
    ]
    assert choice.message.content == "I look." and choice.finish_reason == "tool_calls"


def test_a_choice_that_cannot_be(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="quire-demo",
            messages=HELLO,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "x"}},
        )
    assert refused.value.param == "tool_choice" and refused.value.code == "invalid_value"
