"""Schemathesis against a real server: thousands of requests made from our own description, right and wrong.

It holds the description to the server, and the server to the description: every status, header, body and
event that comes back is described; what is described as right is served, what is not is refused. What no
schema can say about a right request is in BEYOND_SCHEMAS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.generation.case import Case

from tests.helpers.fake_client import FakeClient
from tests.helpers.http import live

MIN_CASES = 2000
CONFIG: dict[str, Any] = {
    "seed": 4,
    "continue-on-failure": True,
    "max-stream-events": 100,
    "generation": {"max-examples": 30, "database": "none", "no-shrink": True},
    "phases": {
        "examples": {"enabled": False},
        "stateful": {"enabled": False},
        "coverage": {"enabled": True},
        "fuzzing": {"enabled": True},
    },
    "checks": {
        "negative_data_rejection": {"expected-statuses": ["400", "401", "403", "404", "405", "413", "415"]}
    },
}


def run(url: str) -> Iterator[events.ScenarioFinished]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=SchemathesisConfig.from_dict(CONFIG))
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            yield event
        elif isinstance(event, (events.NonFatalError, events.FatalError)):
            print("ERR", event)


def test_probe() -> None:
    import time

    with live(make=make) as server:
        n = 0
        seen = Counter()
        for event in run(server.url):
            n += len(event.recorder.interactions)
            print(
                "--",
                event.phase,
                event.label,
                event.status,
                len(event.recorder.interactions),
                round(event.elapsed_time, 1),
                round(time.process_time(), 1),
                flush=True,
            )
            for id, checks in event.recorder.checks.items():
                inter = event.recorder.interactions.get(id)
                case = event.recorder.cases[id].value
                for check in checks:
                    if check.failure_info is not None:
                        f = check.failure_info.failure
                        body = (
                            inter.response.content[:300].decode("utf-8", "replace")
                            if inter and inter.response
                            else ""
                        )
                        key = (
                            check.name,
                            event.label,
                            f.message[:800],
                            body if check.name != "negative_data_rejection" else "",
                        )
                        seen[key[:2]] += 1
                        if seen[key[:2]] < 400:
                            print(
                                "FAIL",
                                check.name,
                                event.label,
                                f.message.replace("\n", " | ")[:600],
                                "<<",
                                body,
                                ">>",
                                repr(case.query)[:200] if case.method == "GET" else repr(case.body)[:700],
                            )
        print(n, seen)


def make() -> FakeClient:
    client = FakeClient()
    client.tokens_per_event = 8
    return client
