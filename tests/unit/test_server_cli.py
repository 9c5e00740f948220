"""The `quire` command: exit codes, one-line errors, the start-up report."""

from __future__ import annotations

import io
import socket
import sys
import types
from dataclasses import replace

import pytest

from server import cli, report
from server.settings import ServerSettings
from tests.helpers.fake_client import INFO


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our handler would keep the stream that pytest captures into, beyond the test."""
    monkeypatch.setattr("server.log.configure_logging", lambda options: None)


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("quire 0.")


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    assert ended.value.code == 0
    assert "QUIRE_KV_CACHE_MEMORY" in capsys.readouterr().out


def test_a_bad_flag_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "x"]) == 2
    assert "--port" in one_line(capsys.readouterr().err)


def test_a_taken_port_is_exit_1_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "server.serving", types.ModuleType("server.serving"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "already in use" in one_line(capsys.readouterr().err)


def test_a_model_that_is_not_there_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "/no/such/folder", "--port", "0"]) == 1
    assert "/no/such/folder" in one_line(capsys.readouterr().err)


def test_bench_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    fake = types.ModuleType("server.bench")
    fake.main = lambda arguments: seen.append(arguments) or 3  # type: ignore[attr-defined]
    monkeypatch.setattr("server.bench", fake, raising=False)
    monkeypatch.setitem(sys.modules, "server.bench", fake)
    assert cli.main(["bench", "--help", "x"]) == 3
    assert seen == [["--help", "x"]]


def test_the_report_says_what_was_decided_and_why() -> None:
    text = "\n".join(report.lines(INFO, ServerSettings(demo=False, model_name="m"), "http://127.0.0.1:8000"))
    for words in (
        "FakeForCausalLM",
        "1.0 MiB",
        "512 blocks of 16 tokens = 8192 tokens",
        "up to 2048 tokens",
        "block_size = 16: the fake's own",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8000/docs",
        "http://127.0.0.1:8000/metrics",
    ):
        assert words in text, text
    assert "demo" not in text
    assert all(len(line) < 120 for line in text.splitlines())


def test_the_demo_is_called_a_demo() -> None:
    assert "demo model" in report.lines(INFO, ServerSettings(), "")[0]
    assert "demo" not in report.lines(INFO, replace(ServerSettings(), demo=False, model_name="m"), "")[0]


def test_progress_in_a_file_is_a_few_lines() -> None:
    out = io.StringIO()
    progress = report.LoadProgress(out)
    for done in range(1001):
        progress(done, 1000)
    progress.close()
    assert out.getvalue().count("\n") == 4 and "100% of 1000 B" in out.getvalue()


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = Terminal()
    progress = report.LoadProgress(out)
    progress(1 << 20, 2 << 20)
    progress(2 << 20, 2 << 20)
    progress.close()
    assert "Loading weights" in out.getvalue() and "100%" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(count: int, shown: str) -> None:
    assert report.size(count) == shown
