"""Schemathesis against a real server: thousands of requests made from our own description, right and wrong.

It holds the description to the server, and the server to the description: every status, header, body and
event that comes back is described; what the description allows is served, and what it does not is refused.
What no schema can say of a request is in BEYOND_SCHEMAS.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from engine.types import SamplingParams
from tests.helpers.fake_client import FakeClient, hello
from tests.helpers.http import Live, live
from tests.helpers.tool_template import ToolTemplate

MIN_CASES = 2000
CONFIG: dict[str, Any] = {
    "seed": 4,
    "continue-on-failure": True,
    "generation": {"max-examples": 15, "database": "none", "no-shrink": True},
    "phases": {"examples": {"enabled": False}, "stateful": {"enabled": False}},
    # What is not found or too large is refused, whatever else is wrong with it.
    "checks": {"negative_data_rejection": {"expected-statuses": [400, 404, 405, 413, 415]}},
    # It has no end; a few events will do.
    "operations": [{"include-path": "/v1/cache/events", "max-stream-events": 2}],
}
# A request that the description allows may be refused for these reasons and no other.
BEYOND_SCHEMAS = re.compile(
    r"""
    # the served model: its context, vocabulary, vectors and template
      together\ that\ is\ more\ than\ the\ context | tokens\ of\ KV\ memory | this\ model's\ context
    | is\ not\ in\ the\ vocabulary | each\ must\ have\ 1\ to\ 32\ tokens
    | dimensions\ must\ be\ in
    | this\ model\ does\ not\ think | (reasoning_|reasoning\.|output_config\.)effort\ is\ not\ supported
    # two fields that must agree
    | best_of:\ must\ equal\ n | min_tokens\ \(\d+\)\ is\ larger | max_tokens:\ may\ be\ 0\ only\ with\ echo
    | needs\ logprobs\ to\ be\ true | differs\ from\ (max_completion_tokens|logprobs)
    | times\ the\ number\ of\ prompts | cannot\ be\ combined\ with | cannot\ be\ had\ in\ a\ stream
    | cannot\ be\ true\ together | has\ no\ text\ to\ go\ on\ from
    # tools that are named twice, or not at all; calls of one turn
    | (tool_use\ blocks;|tool_calls:\ list\ should\ have)\ at\ most
    | there\ are\ no\ tools\ to\ call | there\ is\ no\ tool | two\ tools\ of\ this\ name
    # text in a language of its own
    | is\ not\ JSON | cannot\ be\ compiled
    # what is not there (any more)
    | has\ nothing\ but\ thoughts
    | there\ is\ no\ response | there\ is\ no\ such\ item | This\ response\ has\ ended
    # to JSON Schema 1.0 is a whole number
    | (should\ be\ a\ valid\ integer|must\ be\ whole\ numbers|true,\ false,\ null,\ whole\ numbers)
    | each\ prompt\ must\ be
    """,
    re.VERBOSE,
)


@dataclass
class Findings:
    """What a run has found."""

    cases: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, event: events.EngineEvent) -> None:
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            self.problems.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            return
        for case_id, interaction in event.recorder.interactions.items():
            self.cases += 1
            self.operations[event.recorder.label] += 1
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
            for check in event.recorder.checks.get(case_id, ()):
                self._failed(check, event.recorder.label, interaction)

    def _failed(self, check: Any, label: str, interaction: Any) -> None:
        if check.failure_info is None:
            return
        said = interaction.response.content.decode()[:400] if interaction.response is not None else ""
        if check.name == "positive_data_acceptance" and BEYOND_SCHEMAS.search(said):
            return
        sent = (interaction.request.body or b"").decode("utf-8", "replace")[:2000]
        self.problems.append(
            f"{label}: {check.failure_info.failure.message}\n{said}\n{interaction.request.uri} {sent}"
        )


def run(server: Live, **changes: Any) -> Findings:
    config = SchemathesisConfig.from_dict({**CONFIG, **changes})
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
    found = Findings()
    for event in from_schema(schema).execute():
        found.add(event)
    return found


CALL = '<tool_call>{"name": "look", "arguments": {"at": "this"}}</tool_call>'


def say(prompt_ids: Sequence[int], params: SamplingParams, index: int) -> str:
    """Text, or text and a call, or a call that is none."""
    return hello(prompt_ids, params, index) + ("", CALL, CALL[:-20])[len(prompt_ids) % 3]


def talker() -> FakeClient:
    client = FakeClient(say)
    client.tokens_per_event = 16
    client.frame_s = 0.001
    return client


@pytest.fixture
def server() -> Iterator[Live]:
    with live(make=talker, template=ToolTemplate()) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_server_is_what_it_says(server: Live) -> None:
    found = run(server)
    assert not found.problems, "\n\n".join(found.problems[:20])
    assert found.cases >= MIN_CASES
    assert not [status for status in found.statuses if status >= 500]
