"""The official `openai` client for Node, in a folder of its own: what it does is in node/*.test.mjs.

The first run installs it from the npm registry; without node, npm or a network these tests skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Overloaded, RequestFailed
from engine.types import SamplingParams, TokenEvent
from server.settings import ServerSettings
from tests.helpers.fake_client import FakeClient, hello
from tests.helpers.http import live
from tests.helpers.servers import serve
from tests.helpers.tool_template import ToolTemplate

FOLDER = Path(__file__).with_name("node")
OLDEST_NODE = 20
INSTALL_S, RUN_S = 120, 120
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node() -> str:
    """The program, with the client installed; skips where one of them cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {version} is too old for the client; it takes {OLDEST_NODE}")
    # No lock file: the versions are exact, neither package has dependencies, and a lock names hosts.
    options = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline")
    try:
        made = subprocess.run(
            [npm, "install", *options], cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the client within {INSTALL_S} s")
    if made.returncode != 0:
        pytest.skip(f"npm cannot install the client: {made.stderr.strip()[-300:]}")
    return node


def run(node: str, script: str, url: str) -> None:
    done = subprocess.run(
        [node, "--test", script],
        cwd=FOLDER,
        env={**os.environ, "QUIRE_URL": f"{url}/v1"},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def said(prompt_ids: Sequence[int]) -> str:
    return bytes(token_id for token_id in prompt_ids if token_id < 256).decode()


def script(prompt_ids: Sequence[int], params: SamplingParams, index: int) -> str:
    prompt = said(prompt_ids)
    if prompt.endswith("It rains."):
        return "It rains, then."
    if prompt.endswith("weather?"):
        return f"I look.\n{CALL}"
    if prompt.endswith("break"):
        raise RequestFailed("as asked")
    return hello(prompt_ids, params, index)


class Refusing(FakeClient):
    """Has no room for those who say "refuse", the first time for those who say "refuse once"."""

    def __init__(self) -> None:
        super().__init__(script)
        self._refused = False

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *more: Any, **named: Any
    ) -> AsyncIterator[TokenEvent]:
        prompt = said(prompt_ids)
        if prompt.endswith("refuse") or (prompt.endswith("refuse once") and not self._refused):
            self._refused = prompt.endswith("once")
            raise Overloaded("The queue is full.", retry_after_s=1)
        return super().submit(request_id, prompt_ids, params, *more, **named)


def test_a_scripted_engine(node: str) -> None:
    with live(ServerSettings(api_keys=("secret",)), Refusing, ToolTemplate()) as server:
        run(node, "scripted.test.mjs", server.url)


def test_the_builtin_model(node: str, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        run(node, "builtin.test.mjs", server.url)
