"""Flags and variables -> settings; bad values in one line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from server.settings import SettingsError, parse_bytes
from tests.helpers.settings import parse_args

KIB, MIB, GIB = 2**10, 2**20, 2**30


def test_nothing_said() -> None:
    chosen = parse_args([], {})
    assert (chosen.demo, chosen.model_name, chosen.engine.model) == (True, "quire-demo", "")
    assert (chosen.host, chosen.port, chosen.api_keys) == ("127.0.0.1", 8000, ())
    with pytest.raises(FrozenInstanceError):
        chosen.port = 1  # type: ignore[misc]


def test_a_model() -> None:
    chosen = parse_args(["org/name"], {})
    assert (chosen.demo, chosen.model_name, chosen.engine.model) == (False, "org/name", "org/name")
    chosen = parse_args(["./dir", "--served-model-name", "short"], {})
    assert (chosen.model_name, chosen.engine.served_model_name) == ("short", "short")
    assert parse_args([], {"QUIRE_MODEL": "a/b"}).model_name == "a/b"
    assert parse_args(["files/Tiny-Q8_0.gguf"], {}).model_name == "Tiny-Q8_0"


def test_a_flag_wins_over_its_variable() -> None:
    variables = {"QUIRE_PORT": "9000", "QUIRE_SEED": "7", "QUIRE_NO_PREFIX_CACHING": "true"}
    chosen = parse_args(["--port", "9001"], variables)
    assert (chosen.port, chosen.engine.seed, chosen.engine.prefix_caching) == (9001, 7, False)
    assert parse_args([], {"QUIRE_NO_PREFIX_CACHING": "0"}).engine.prefix_caching


def test_an_empty_variable_is_no_value() -> None:
    assert parse_args([], {"QUIRE_PORT": "", "QUIRE_API_KEY": ""}).port == 8000


def test_keys() -> None:
    assert parse_args(["--api-key", "a", "--api-key", "b"], {}).api_keys == ("a", "b")
    assert parse_args([], {"QUIRE_API_KEY": "a, b,"}).api_keys == ("a", "b")


def test_every_engine_flag() -> None:
    flags = (
        "--dtype float16 --device cpu --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64 "
        "--max-queued-requests 3 --block-size 32 --gpu-memory-utilization 0.5 --kv-cache-memory 4GiB --seed 5"
    )
    options = parse_args(["m", *flags.split()], {}).engine
    assert (options.dtype, options.device, options.max_model_len, options.max_num_seqs) == (
        "float16",
        "cpu",
        512,
        8,
    )
    assert (options.max_num_batched_tokens, options.max_queued_requests, options.block_size) == (64, 3, 32)
    assert (options.gpu_memory_utilization, options.kv_cache_memory_bytes, options.seed) == (0.5, 4 * GIB, 5)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("1", 1), ("500M", 500 * 10**6), ("4GiB", 4 * GIB), ("4gib", 4 * GIB), ("1.5GiB", 3 * GIB // 2)),
        *(("2 KiB", 2 * KIB), ("3MB", 3 * 10**6), ("1048576", MIB), ("7B", 7)),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (["--port", "99999"], {}, ["--port", "99999", "0 to 65535"]),
        (["--port", "x"], {}, ["--port", "'x'"]),
        ([], {"QUIRE_PORT": "-1"}, ["QUIRE_PORT", "-1"]),
        (["--dtype", "int3"], {}, ["--dtype", "bfloat16"]),
        (["--block-size", "24"], {}, ["--block-size", "16, 32, 64, 128"]),
        (["--kv-cache-memory", "4 parsecs"], {}, ["--kv-cache-memory", "4GiB"]),
        (["--kv-cache-memory", "0"], {}, ["--kv-cache-memory", "at least"]),
        (["--gpu-memory-utilization", "90"], {}, ["--gpu-memory-utilization"]),
        (["--gpu-memory-utilization", "."], {}, ["--gpu-memory-utilization"]),
        (["--shutdown-timeout", "-3"], {}, ["--shutdown-timeout"]),
        (["--shutdown-timeout", "nan"], {}, ["--shutdown-timeout"]),
        (["--max-model-len", "0"], {}, ["--max-model-len"]),
        (["--max-model-len", "9" * 5000], {}, ["--max-model-len"]),
        ([], {"QUIRE_NO_ACCESS_LOG": "maybe"}, ["QUIRE_NO_ACCESS_LOG", "true or false"]),
        (["--served-model-name", " "], {}, ["--served-model-name"]),
        (["--nonsense"], {}, ["--nonsense"]),
    ],
)
def test_bad_values_name_their_place(flags: list[str], variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_args(flags, variables)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_bad_key_is_not_shown() -> None:
    with pytest.raises(SettingsError) as raised:
        parse_args(["--api-key", "my secret"], {})
    assert "--api-key" in str(raised.value) and "secret" not in str(raised.value)


def test_only_settings_reads_the_environment() -> None:
    root = Path(__file__).parents[2] / "server"
    readers = [
        path.name
        for path in root.rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert [name for name in readers if name != "settings.py"] == []
