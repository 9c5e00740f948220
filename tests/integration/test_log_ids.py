"""A request's names in the log: the caller's, the reply's, and the engine's own number."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from engine.client import InProcessClient
from server.app import create_app
from server.settings import ServerSettings
from tests.helpers.fake_client import FakeTemplate, FakeTokenizer
from tests.helpers.fake_engine import INFO, ByteTokenizer, FakeCore


def test_a_request_the_engine_failed_is_found_by_each_of_its_ids(caplog: pytest.LogCaptureFixture) -> None:
    core = FakeCore()

    async def main() -> httpx.Response:
        client = InProcessClient(core, INFO, ByteTokenizer())
        app = create_app(client, ServerSettings(), FakeTokenizer(), FakeTemplate())
        async with app.router.lifespan_context(app):
            await app.state.service.started.wait()
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                headers = {"x-request-id": "mine-1"}
                return await http.post("/v1/completions", json={"prompt": "error"}, headers=headers)

    caplog.set_level(logging.INFO, logger="quire")
    assert asyncio.run(main()).status_code == 500
    error, line = caplog.records
    fields = line.__dict__["fields"]
    assert (fields["request_id"], fields["engine_requests"], fields["error"]) == (
        "mine-1",
        core.added,
        "request_failed",
    )
    assert error.getMessage() == f"request {fields['id']} failed in the engine: its own fault"
    assert line.levelname == "WARNING"
    assert line.getMessage().endswith(f"| mine-1 {fields['id']} (engine: {core.added[0]})")
