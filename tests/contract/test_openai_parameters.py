"""Every parameter of OpenAI's two requests, one row each: honoured, taken as meaningless here, or refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.embedding import Pooling
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.embeddings import EmbeddingRequest
from tests.contract.openai_schema import request_fields
from tests.helpers.http import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, in_process
from tests.helpers.parameters import ignored

pytestmark = pytest.mark.anyio

SCHEMAS = {
    CHAT: "CreateChatCompletionRequest",
    COMPLETIONS: "CreateCompletionRequest",
    EMBEDDINGS: "CreateEmbeddingRequest",
}
MODELS: dict[str, Any] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, EMBEDDINGS: EmbeddingRequest}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hello"},
    EMBEDDINGS: {"input": "hello"},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Honoured:
    """`sampling`: what of SamplingParams it sets; other effects are tested where they are made."""

    value: Any
    sampling: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ignored:
    """It asks for nothing that changes an answer. `named`: but for something the caller would miss."""

    value: Any
    named: bool = False


@dataclass(frozen=True)
class Refused:
    """`value` asks for what is not here; `fine` asks for nothing."""

    value: Any
    fine: Any = None


Fate = Honoured | Ignored | Refused

BOTH: dict[str, Fate] = {
    "model": Honoured("quire-demo"),
    "frequency_penalty": Honoured(0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": Honoured(-0.5, {"presence_penalty": -0.5}),
    "logit_bias": Honoured({"5": -100}, {"logit_bias": {5: -100.0}}),
    "max_tokens": Honoured(7, {"max_tokens": 7}),
    "n": Honoured(2, {"n": 2}),
    "seed": Honoured(3, {"seed": 3}),
    "stop": Honoured(["a", "b"], {"stop": ("a", "b")}),
    "stream": Honoured(True),
    "stream_options": Honoured({"include_usage": True, "include_obfuscation": True}, beside={"stream": True}),
    "temperature": Honoured(0.3, {"temperature": 0.3}),
    "top_p": Honoured(0.4, {"top_p": 0.4}),
    "user": Ignored("somebody"),
}
ROWS: dict[str, dict[str, Fate]] = {
    CHAT: {
        **BOTH,
        "messages": Honoured(HELLO),
        "max_completion_tokens": Honoured(7, {"max_tokens": 7}),
        "logprobs": Honoured(True, {"logprobs": 0}),
        "top_logprobs": Honoured(2, {"logprobs": 2}, beside={"logprobs": True}),
        "tools": Honoured([]),
        "tool_choice": Honoured("none"),
        "parallel_tool_calls": Honoured(False),
        "reasoning_effort": Honoured("medium"),
        "response_format": Honoured({"type": "text"}),
        "safety_identifier": Ignored("somebody"),
        "prompt_cache_key": Ignored("key"),
        "prompt_cache_options": Ignored({"mode": "implicit"}),
        "prompt_cache_retention": Ignored("24h"),
        "prediction": Ignored({"type": "content", "content": "x"}),
        "metadata": Ignored({"a": "b"}),
        "store": Ignored(True, named=True),
        "audio": Refused({"voice": "alloy", "format": "wav"}),
        "modalities": Refused(["text", "audio"], fine=["text"]),
        "functions": Refused([{"name": "f"}], fine=[]),
        "function_call": Refused({"name": "f"}, fine="auto"),
        "moderation": Refused({"model": "m"}),
        "service_tier": Refused("flex", fine="auto"),
        "verbosity": Refused("low", fine="medium"),
        "web_search_options": Refused({}),
    },
    COMPLETIONS: {
        **BOTH,
        "prompt": Honoured(["a", "b"]),
        "best_of": Honoured(2, {"n": 2}, beside={"n": 2}),
        "echo": Honoured(True),
        "logprobs": Honoured(2, {"logprobs": 2}),
        "suffix": Refused("x", fine=""),
    },
    EMBEDDINGS: {
        "model": Honoured("quire-demo"),
        "input": Honoured(["a", "b"]),
        "encoding_format": Honoured("base64"),
        "dimensions": Honoured(3, {"pooling": Pooling(dimensions=3)}),
        "user": Ignored("somebody"),
    },
}
CASES = [pytest.param(path, name, id=f"{path}-{name}") for path, rows in ROWS.items() for name in rows]


@pytest.mark.parametrize("path", ROWS)
def test_there_is_a_row_for_every_parameter(path: str) -> None:
    assert set(ROWS[path]) == request_fields(SCHEMAS[path])


@pytest.mark.parametrize(("path", "name"), CASES)
async def test_parameter(path: str, name: str) -> None:
    fate, model = ROWS[path][name], MODELS[path]
    good = GOOD[path]
    async with in_process() as (http, client):
        await http.post(path, json=good)
        beside = fate.beside if isinstance(fate, Honoured) else {}
        reply = await http.post(path, json={**good, **beside, name: fate.value})
        plain, *others = [params for _, _, params in client.submitted]
        match fate:
            case Honoured(sampling=sampling):
                assert reply.status_code == 200, reply.text
                assert {key: getattr(others[-1], key) for key in sampling} == sampling
                assert "x-quire-warnings" not in reply.headers and name not in ignored(model)
            case Ignored(named=named):
                assert reply.status_code == 200, reply.text
                assert others == [plain] and name in ignored(model)
                warning = f"ignored fields: {name}" if named else None
                assert reply.headers.get("x-quire-warnings") == warning
            case Refused(fine=fine):
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, name)
                assert (
                    error["code"] == "unsupported_parameter"
                    and f"{name} is not supported" in error["message"]
                )
                assert error["message"].startswith(f"{name} is not supported by this server: ")
                assert (await http.post(path, json={**good, name: fine})).status_code == 200


@pytest.mark.parametrize("path", MODELS)
def test_every_refusal_says_why(path: str) -> None:
    from server.schema.reasons import REASONS

    assert set(MODELS[path].refused) - set(REASONS) == set()
