"""Tools and reasoning over the API: what reaches the template, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.settings import ServerSettings
from tests.helpers.fake_client import FakeClient, FakeTemplate
from tests.helpers.http import CHAT, HELLO, chat_text, frames, in_process
from tests.helpers.tool_template import HERMES, THINKING, ToolTemplate

pytestmark = pytest.mark.anyio

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time.", "strict": None}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(
    text: str,
    template: FakeTemplate | None = None,
    settings: ServerSettings | None = None,
    client: FakeClient | None = None,
    **fields: Any,
) -> tuple[Any, list[Any]]:
    """The whole reply, and the chunks of the same request streamed."""
    engine = client or FakeClient()
    engine.script = lambda ids, params, index: text
    body = {"messages": HELLO, **fields}
    async with in_process(engine, settings, template=template or ToolTemplate()) as (http, _):
        whole = await http.post(CHAT, json=body)
        stream = await http.post(CHAT, json={**body, "stream": True})
    if whole.status_code != 200:
        assert stream.json() == whole.json()
        return whole.json(), []
    return whole.json(), frames(stream.text)


async def refused(template: FakeTemplate | None = None, **fields: Any) -> Any:
    reply, _ = await ask("", template, **fields)
    return reply["error"]


def deltas(chunks: list[Any], index: int = 0) -> list[Any]:
    return [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def streamed_calls(chunks: list[Any], index: int = 0) -> list[dict[str, Any]]:
    """Calls put together as OpenAI's clients do."""
    calls: list[dict[str, Any]] = []
    for delta in deltas(chunks, index):
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["type"] == "function" and call["function"]["arguments"] == ""
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return calls


def finish(chunks: list[Any], index: int = 0) -> Any:
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert not any(reasons[:-1])
    return reasons[-1]


async def test_a_call() -> None:
    whole, chunks = await ask(CALL, tools=TOOLS)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls" == finish(chunks)
    assert choice["message"]["content"] is None and "reasoning_content" not in choice["message"]
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    (streamed,) = streamed_calls(chunks)
    assert streamed["function"] == call["function"]
    assert deltas(chunks)[0] == {"role": "assistant", "content": None, "refusal": None}
    assert not chat_text(chunks)
    arguments = [d["tool_calls"][0]["function"]["arguments"] for d in deltas(chunks) if "tool_calls" in d]
    assert max(map(len, arguments)) <= 3, "arguments come while they are written"


async def test_text_and_several_calls() -> None:
    text = f'I look.\n{CALL}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'
    whole, chunks = await ask(text, tools=TOOLS)
    message = whole["choices"][0]["message"]
    assert message["content"] == "I look." == chat_text(chunks)
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["get_weather", "now"] == [call["function"]["name"] for call in streamed_calls(chunks)]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_one_call_at_most() -> None:
    whole, chunks = await ask(CALL + CALL + "!", tools=TOOLS, parallel_tool_calls=False)
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1 == len(streamed_calls(chunks))
    assert whole["choices"][0]["message"]["content"] is None and not chat_text(chunks)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_without_tools_the_text_is_text(fields: dict[str, Any]) -> None:
    template = ToolTemplate()
    whole, chunks = await ask(CALL, template, **fields)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert chat_text(chunks) == CALL and finish(chunks) == "stop"
    assert template.seen[1] == {}


async def test_a_broken_call_is_content() -> None:
    text = 'So: <tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>'
    whole, chunks = await ask(text, tools=TOOLS)
    message = whole["choices"][0]["message"]
    assert message["content"] == text and "tool_calls" not in message
    assert whole["choices"][0]["finish_reason"] == "stop" == finish(chunks)
    (begun,) = streamed_calls(chunks)
    assert begun["function"]["arguments"] == '{"city": Paris'
    assert chat_text(chunks) == "So:}}</tool_call>"


async def test_a_call_that_is_cut_off_is_content() -> None:
    whole, chunks = await ask(CALL, tools=TOOLS, max_tokens=60)
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "length" == finish(chunks)
    assert choice["message"]["content"] == CALL[:60]
    whole, _ = await ask(CALL + " more", tools=TOOLS, max_tokens=len(CALL) + 2)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_stop_string_still_stops() -> None:
    whole, chunks = await ask("Well" + CALL, tools=TOOLS, stop=["<tool_call>"])
    (choice,) = whole["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Well", "stop")
    assert choice["stop_reason"] == "<tool_call>" and chat_text(chunks) == "Well"


async def test_choices_are_read_apart() -> None:
    texts = ["plain", CALL, "<think>", CALL + CALL]
    client = FakeClient()
    async with in_process(client, template=ToolTemplate()) as (http, _):
        client.script = lambda ids, params, index: texts[index]
        body = {"messages": HELLO, "tools": TOOLS, "n": 4}
        whole = (await http.post(CHAT, json=body)).json()
        chunks = frames((await http.post(CHAT, json={**body, "stream": True})).text)
    for index, (calls, content) in enumerate([(0, "plain"), (1, None), (0, "<think>"), (2, None)]):
        message = whole["choices"][index]["message"]
        assert (len(message.get("tool_calls", ())), message["content"]) == (calls, content)
        assert len(streamed_calls(chunks, index)) == calls
        assert chat_text(chunks, index) == (content or "")
        assert finish(chunks, index) == whole["choices"][index]["finish_reason"]


@pytest.mark.parametrize("tokens_per_event", [1, 7, 1000])
async def test_logprobs_of_every_token(tokens_per_event: int) -> None:
    client = FakeClient()
    client.tokens_per_event = tokens_per_event
    text = "<think>hm</think>Look " + CALL
    template = ToolTemplate(HERMES + THINKING)
    whole, chunks = await ask(text, template, client=client, tools=TOOLS, logprobs=True, top_logprobs=1)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == text
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": ()})["content"]
    ]
    assert streamed == entries


async def test_the_template_gets_the_tools() -> None:
    template = ToolTemplate()
    await ask("", template, tools=TOOLS)
    weather, now = template.seen[1]["tools"]
    assert weather["function"] == {"name": "get_weather", "description": "", "parameters": PARAMETERS}
    assert now["function"]["description"] == "The time." and "strict" not in now["function"]
    assert now["function"]["parameters"] == {"type": "object", "properties": {}}
    await ask(
        "",
        template,
        tools=TOOLS,
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}},
    )
    assert [tool["function"]["name"] for tool in template.seen[1]["tools"]] == ["now"]


async def test_the_template_gets_earlier_calls() -> None:
    template = ToolTemplate()
    calls = [
        {"id": f"c{number}", "type": "function", "function": {"name": "now", "arguments": arguments}}
        for number, arguments in enumerate(['{"a": [1]}', "", "not JSON", "[" * 9000])
    ]
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c0", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "Noon.", "tool_calls": [], "reasoning": "so"},
    ]
    whole, _ = await ask("", template, messages=messages)
    assert "error" not in whole
    _, assistant, tool, last = template.seen[0]
    found = [call["function"]["arguments"] for call in assistant["tool_calls"]]
    assert found == [{"a": [1]}, {}, "not JSON", "[" * 9000]
    assert assistant["content"] == "" and assistant["reasoning_content"] == "hm"
    assert tool == {"role": "tool", "content": "noon", "tool_call_id": "c0", "name": "now"}
    assert last == {"role": "assistant", "content": "Noon.", "reasoning_content": "so"}


async def test_ids_that_mistrals_templates_take() -> None:
    template = ToolTemplate("{{ tools }}[TOOL_CALLS]")
    whole, _ = await ask("[TOOL_CALLS]now[ARGS]{}", template, tools=TOOLS)
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()
    foreign = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [foreign, call]},
        {"role": "tool", "content": "4", "tool_call_id": "call_1"},
    ]
    await ask("", template, messages=messages)
    _, assistant, tool = template.seen[0]
    short, own = (call["id"] for call in assistant["tool_calls"])
    assert own == call["id"] and len(short) == 9 and tool["tool_call_id"] == short


async def test_what_cannot_be_done_is_said() -> None:
    pythonic = ToolTemplate("{{ tools }}[func_name1(")
    error = await refused(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}})
    assert (error["param"], error["code"]) == ("tool_choice", "invalid_value") and "'x'" in error["message"]
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    error = await refused(pythonic, tools=[WEATHER, strict])
    assert (error["param"], error["code"]) == ("tools[1].function.strict", "unsupported_parameter")
    error = await refused(FakeTemplate(), tools=TOOLS)
    assert error["param"] == "tools" and "template does not take tools" in error["message"]
    error = await refused(ToolTemplate("{{ tools }}"), tools=TOOLS)
    assert error["param"] == "tools" and "--tool-call-parser" in error["message"]


async def test_the_operator_says_how_calls_are_written() -> None:
    mistral = ServerSettings(tool_call_parser="mistral")
    whole, _ = await ask("[TOOL_CALLS]now[ARGS]{}", ToolTemplate("{{ tools }}"), mistral, tools=TOOLS)
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    reply, _ = await ask("", None, ServerSettings(tool_call_parser="none"), tools=TOOLS)
    assert reply["error"]["param"] == "tools"
    off = ServerSettings(reasoning_parser="none")
    whole, chunks = await ask("<think>a</think>b", ToolTemplate(THINKING), off)
    assert whole["choices"][0]["message"]["content"] == "<think>a</think>b" == chat_text(chunks)


async def test_markers_that_are_special_tokens_are_shown_to_whoever_reads_them() -> None:
    client = FakeClient()
    template = ToolTemplate("{{ tools }}[TOOL_CALLS]<|end|>")
    async with in_process(client, template=template) as (http, _):
        service_tokenizer = http._transport.app.state.service.prompts.tokenizer  # type: ignore[attr-defined]
        service_tokenizer.control = {**service_tokenizer.control, "[TOOL_CALLS]": 300, "[ARGS]": 301}
        service_tokenizer.special_ids = service_tokenizer.special_ids | {300}
        for fields in ({"tools": TOOLS}, {}):
            assert (await http.post(CHAT, json={"messages": HELLO, **fields})).status_code == 200
    assert [params.shown_token_ids for _, _, params in client.submitted] == [(300,), ()]
    assert all(params.skip_special_tokens for _, _, params in client.submitted)


def thoughts(chunks: list[Any], name: str = "reasoning_content") -> str:
    return "".join(delta.get(name) or "" for delta in deltas(chunks))


@pytest.mark.parametrize("opening", ["", "<think>\n"])
async def test_thoughts_apart_from_the_answer(opening: str) -> None:
    text = ("" if opening else "<think>\n") + "Hm, wörld.\n</think>\n\nYes."
    whole, chunks = await ask(text, ToolTemplate(THINKING, opening))
    message = whole["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "Hm, wörld.",
        "reasoning": "Hm, wörld.",
    }
    assert thoughts(chunks) == thoughts(chunks, "reasoning") == "Hm, wörld." and chat_text(chunks) == "Yes."
    assert deltas(chunks)[0]["content"] == ""
    expected = len(text[: text.index("</think>") + len("</think>")].encode())
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": expected}
    _, chunks = await ask(text, ToolTemplate(THINKING, opening), stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": expected}


async def test_thoughts_that_nobody_wants_to_see() -> None:
    text = "<think>Hm.</think>Yes."
    whole, chunks = await ask(text, ToolTemplate(THINKING), include_reasoning=False)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert not thoughts(chunks) and chat_text(chunks) == "Yes."
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("<think>Hm.</think>")


async def test_thoughts_without_an_answer() -> None:
    whole, chunks = await ask("<think>Hm.", ToolTemplate(THINKING))
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "Hm.")
    assert thoughts(chunks) == "Hm." and not chat_text(chunks)


async def test_thoughts_then_a_call() -> None:
    whole, chunks = await ask(f"<think>Hm.</think>\n{CALL}", ToolTemplate(HERMES + THINKING), tools=TOOLS)
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm." == thoughts(chunks)
    assert message["content"] is None and len(message["tool_calls"]) == 1 == len(streamed_calls(chunks))


@pytest.mark.parametrize(
    ("source", "effort", "expected"),
    [
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}),
        ("{% if enable_thinking %}", "none", {"enable_thinking": False}),
        ("{% if enable_thinking %}", "low", {"enable_thinking": True}),
        (
            "{{ reasoning_effort }}{{ enable_thinking }}",
            "none",
            {"reasoning_effort": "none", "enable_thinking": False},
        ),
        ("", "medium", {}),
        ("", "none", {}),
        ("", None, {}),
    ],
)
async def test_effort(source: str, effort: str | None, expected: dict[str, Any]) -> None:
    template = ToolTemplate(source)
    whole, _ = await ask("", template, reasoning_effort=effort)
    assert "error" not in whole and template.seen[1] == expected


async def test_effort_that_the_model_does_not_know() -> None:
    assert (await refused(ToolTemplate(""), reasoning_effort="high"))["param"] == "reasoning_effort"


async def test_template_variables_of_the_request_win() -> None:
    template = ToolTemplate(THINKING)
    await ask("", template, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert template.seen[1] == {"enable_thinking": False}


async def test_usage_always_says_how_much_was_thought() -> None:
    whole, chunks = await ask("Hi", FakeTemplate(), stream_options={"include_usage": True})
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_a_probe_looks_at_the_same_prompt() -> None:
    body = {
        "messages": [
            *HELLO,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ],
        "tools": TOOLS,
    }
    client = FakeClient()
    async with in_process(client, template=ToolTemplate()) as (http, _):
        assert (await http.post(CHAT, json=body)).status_code == 200
        probe = await http.post("/v1/cache/probe", json=body)
        forced = await http.post("/v1/cache/probe", json={**body, "tool_choice": "required"})
        unknown = {"type": "function", "function": {"name": "x"}}
        refusal = await http.post("/v1/cache/probe", json={**body, "tool_choice": unknown})
    assert probe.status_code == 200 == forced.status_code, probe.text
    assert client.probed[0][0] == client.submitted[0][1]
    assert json.dumps(TOOLS[0]["function"]["name"]).encode() in bytes(
        i for i in client.probed[0][0] if i < 256
    )
    assert refusal.status_code == 400
