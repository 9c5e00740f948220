"""The demo model calls tools and fills in JSON through the server: the held-out list that its card scores.

pytest tests/e2e/test_demo_tasks.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.servers import Server, serve
from training.dataset import Book, read_rows
from training.exercises import exercise, schema, signature

PARIS = [{"name": "get_weather", "arguments": {"city": "Paris"}}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("demo")) as server:
        yield server


def ask(server: Server, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": row["question"]}],
        "max_tokens": 200,
        **more,
    }
    if "tools" in row:
        body["tools"] = [signature(text) for text in row["tools"]]
    message: dict[str, Any] = server.post("/v1/chat/completions", **body)["choices"][0]["message"]
    return message


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [{"name": one["name"], "arguments": json.loads(one["arguments"])} for one in functions]


def streamed(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The choices of the chunks of a stream."""
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield from json.loads(line.removeprefix("data: "))["choices"]


def right(server: Server, row: dict[str, Any]) -> bool:
    """Whether the reply is what the line wants."""
    if "json" in row:
        form = {"type": "json_schema", "json_schema": {"name": "fields", "schema": schema(row["json"])}}
        return bool(json.loads(ask(server, row, response_format=form)["content"]) == row["json"])
    if "intent" in row:
        return bool(ask(server, row)["content"] == Book().answer(row["intent"]))
    if "says" not in row:
        return calls(ask(server, row)) == [row["call"]]
    function = {"name": row["call"]["name"], "arguments": json.dumps(row["call"]["arguments"])}
    messages = exercise(row, Book()).messages
    messages[1]["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    messages[2]["tool_call_id"] = "call_1"
    content = ask(server, row, messages=messages)["content"] or ""
    return all(part in content for part in row["says"])


def test_the_held_out_list(server: Server) -> None:
    rows = read_rows("tasks_heldout")
    wrong = [row["question"] for row in rows if not right(server, row)]
    assert len(wrong) <= 0.25 * len(rows), f"{len(wrong)} of {len(rows)} are wrong"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_the_same_call(server: Server, choice: Any) -> None:
    row = {"question": "Is it raining in Paris?", "tools": ["get_weather(city: string)"]}
    assert calls(ask(server, row)) == calls(ask(server, row, tool_choice=choice)) == PARIS


def test_a_streamed_call_is_the_same_call(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "Is it raining in Paris?"}],
        "tools": [signature("get_weather(city: string)")],
    }
    name, arguments, end = "", "", None
    for choice in streamed(server, body):
        for piece in choice["delta"].get("tool_calls") or ():
            name += piece["function"].get("name") or ""
            arguments += piece["function"].get("arguments") or ""
        end = choice["finish_reason"] or end
    assert [{"name": name, "arguments": json.loads(arguments)}] == PARIS
    assert end == "tool_calls"


def test_streamed_json_is_the_same_json(server: Server) -> None:
    wanted = {"name": "atlas", "port": 8100}
    row = {"question": "The server is called atlas and listens on port 8100", "json": wanted}
    form = {"type": "json_schema", "json_schema": {"name": "fields", "schema": schema(wanted)}}
    assert right(server, row)
    body = {"messages": [{"role": "user", "content": row["question"]}], "response_format": form}
    content = "".join(choice["delta"].get("content") or "" for choice in streamed(server, body))
    assert json.loads(content) == wanted
