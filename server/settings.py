"""Flags and QUIRE_* environment -> one frozen ServerSettings, with the engine's options inside.

The only place in the project that reads the environment. Knows each setting's name, type, unit, default
and limits, in one table that also writes `quire serve --help`; does not know what the settings do. A flag
wins over its variable; a bad value is one line that names where it came from.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from engine.config import EngineOptions, Quantization
from server import tenants
from server.parsing.chosen import REASONING_CHOICES, TOOL_CHOICES
from server.tenants import TenantKeys, Tenants

DEMO_NAME = "quire-demo"
_TRACES = "/v1/traces"

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class SettingsError(Exception):
    """One line for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything the HTTP side was told.

    Attributes:
        demo: no MODEL was given; the built-in one is served.
        model_name: what requests call the model.
        api_keys, named_tenants, admin_keys: no keys are asked for where all three are empty.
        strict: unknown fields of requests are refused.
        colour: of text logs on a terminal.
        otlp_endpoint: where traces go; empty: nobody traces. Not `otlp_required`: no variable or flag of ours
            asked for it, so that going on without is right where it cannot be.
        engine: what the engine was told; its `model` is empty when `demo`.
    """

    engine: EngineOptions = field(default_factory=lambda: EngineOptions(model=""))
    demo: bool = True
    model_name: str = DEMO_NAME
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    named_tenants: tuple[TenantKeys, ...] = ()
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    share_cache: bool = False
    log_level: str = "info"
    log_format: str = "text"
    colour: bool = True
    log_prompts: bool = False
    access_log: bool = True
    ui: bool = True
    otlp_endpoint: str = ""
    otlp_required: bool = True
    strict: bool = False
    metrics_compat: str = "none"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    sse_keep_alive_s: float = 15.0
    shutdown_timeout_s: float = 30.0

    def tenants(self) -> Tenants:
        """Raises ValueError where two have the same key."""
        return Tenants(self.api_keys, self.named_tenants, self.admin_keys, self.share_cache)


def parse_bytes(text: str) -> int:
    """ "4GiB", "500M" or "1048576" -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("expected a size such as 4GiB, 500M or plain bytes")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError("must be at least 1 byte")
    return size


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"\d{1,9}(\.\d*)?", text.strip()) or float(text) > high:
            raise ValueError(f"expected seconds from 0 to {high:g}")
        return float(text)

    return parse


def _share(text: str) -> float:
    if not re.fullmatch(r"[01]?\.?\d*", text.strip()) or not text.strip(". ") or not 0 < float(text) <= 1:
        raise ValueError("expected a share above 0, up to 1")
    return float(text)


def _choice(*values: str | int) -> Callable[[str], str | int]:
    known = {str(value): value for value in values}

    def parse(text: str) -> str | int:
        if text not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return known[text]

    return parse


def _quantization(text: str) -> str:
    return str(Quantization.parse(text))


def _text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("must not be empty")
    return text


def _switch(text: str) -> bool:
    word = text.lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("expected true or false")
    return word in ("1", "true", "yes", "on")


def _collector(text: str) -> str:
    """The full address for traces, from a collector's base address."""
    parts = urlsplit(text.strip())
    known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not known or not text.isprintable():
        raise ValueError("expected an address such as http://127.0.0.1:4318")
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path if path.endswith(_TRACES) else path + _TRACES))


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting: `--name VALUE` or QUIRE_NAME.

    Attributes:
        target: a field of EngineOptions or ServerSettings; left out: named as the flag is.
        switch_to: what a flag without a value sets its target to.
        secret: repeatable, and never shown.
    """

    name: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    target: str = ""
    switch_to: bool | None = None
    secret: bool = False

    def __post_init__(self) -> None:
        if not self.target:
            object.__setattr__(self, "target", self.name.replace("-", "_"))

    @property
    def option(self) -> str:
        return "--" + self.name

    @property
    def variable(self) -> str:
        return "QUIRE_" + self.name.replace("-", "_").upper()


def _on(name: str, text: str) -> Flag:
    return Flag(name, _switch, "", text, switch_to=True)


def _off(name: str, text: str) -> Flag:
    """`no-X` turns X off."""
    return Flag(name, _switch, "", text, name.removeprefix("no-").replace("-", "_"), switch_to=False)


def _timeout(name: str, most: float, text: str) -> Flag:
    return Flag(name, _seconds(most), "SECONDS", text, name.replace("-", "_") + "_s")


_COUNT = _whole(1, 2**31 - 1)

SERVER_FLAGS = (
    Flag("host", _text, "ADDRESS", "address to listen on (default: 127.0.0.1; 0.0.0.0 is every interface)"),
    Flag("port", _whole(0, 65535), "PORT", "port to listen on (default: 8000; 0 picks a free one)"),
    Flag(
        "api-key",
        tenants.parse_key,
        "KEY",
        "ask for this key; repeatable, or comma separated in the variable; each is a tenant of its own "
        "(default: none)",
        target="api_keys",
        secret=True,
    ),
    Flag(
        "api-keys-file",
        tenants.read_file,
        "FILE",
        "tenants by name, in TOML: [tenants.NAME] with keys = [...], and share = GROUP to share "
        "prefixes (default: none)",
        target="named_tenants",
    ),
    Flag(
        "admin-key",
        tenants.parse_key,
        "KEY",
        "may also look at the whole cache and empty it; repeatable (default: none)",
        target="admin_keys",
        secret=True,
    ),
    _on("share-cache", "all keys share cached prefixes (default: each tenant has its own)"),
    Flag(
        "served-model-name",
        _text,
        "NAME",
        "name in the API (default: MODEL as given; of a GGUF file, its name without .gguf)",
        target="model_name",
    ),
    Flag(
        "tool-call-parser",
        _choice(*TOOL_CHOICES),
        "FORMAT",
        f"how the model writes tool calls: {', '.join(TOOL_CHOICES)} (default: auto, by its chat template)",
    ),
    Flag(
        "reasoning-parser",
        _choice(*REASONING_CHOICES),
        "TAGS",
        f"what the model thinks between: {', '.join(REASONING_CHOICES)} (default: auto, as above)",
    ),
    _on("strict", "refuse requests with unknown fields (default: ignore and name them)"),
    Flag("log-level", _choice("debug", "info", "warning", "error"), "LEVEL", "default: info"),
    Flag(
        "log-format", _choice("text", "json"), "FORMAT", "text, or json: one object per line (default: text)"
    ),
    _on("log-prompts", "write the beginning of every prompt to the log, for debugging"),
    _off("no-access-log", "no line per request"),
    _off("no-ui", "no live page at /ui"),
    Flag(
        "otlp-endpoint",
        _collector,
        "URL",
        "send traces to this collector, such as http://127.0.0.1:4318; needs quire[otel] "
        "(default: OTEL_EXPORTER_OTLP_ENDPOINT, else no tracing)",
    ),
    Flag(
        "metrics-compat",
        _choice("none", "vllm"),
        "NAMES",
        "vllm: /metrics also has the names of vLLM (default: none)",
    ),
    Flag(
        "max-body-size", parse_bytes, "SIZE", "largest request body (default: 8MiB)", target="max_body_bytes"
    ),
    Flag(
        "max-header-size",
        parse_bytes,
        "SIZE",
        "largest request head (default: 64KiB)",
        target="max_header_bytes",
    ),
    Flag("max-connections", _COUNT, "N", "connections at a time (default: 4096)"),
    _timeout("header-timeout", 3600, "for a request's head (default: 10)"),
    _timeout("body-timeout", 3600, "for a body to start and go on (default: 30)"),
    _timeout("stall-timeout", 3600, "drop a reader stuck this long (default: 30)"),
    _timeout("keep-alive", 3600, "idle connections stay open (default: 75)"),
    _timeout("sse-keep-alive", 3600, "comment in idle streams (default: 15; 0: never)"),
    _timeout("shutdown-timeout", 86400, "running requests may finish (default: 30)"),
)

ENGINE_FLAGS = (
    Flag(
        "dtype",
        _choice("auto", "bfloat16", "float16", "float32"),
        "TYPE",
        "auto, bfloat16, float16 or float32 (default: auto)",
    ),
    Flag(
        "quantization",
        _quantization,
        "TYPE",
        "hold weights in int8 or int4, with one scale per int8 output or 32 int4 inputs, or in groups: "
        "int8-g128, int4-g64 ... (default: as the checkpoint has them)",
    ),
    Flag("device", _choice("auto", "cpu", "cuda"), "DEVICE", "auto, cpu or cuda (default: auto)"),
    Flag(
        "max-model-len", _COUNT, "TOKENS", "longest prompt + output (default: the model's own, or what fits)"
    ),
    Flag("max-num-seqs", _COUNT, "N", "sequences in one step (default: by device)"),
    Flag("max-num-batched-tokens", _COUNT, "TOKENS", "tokens in one step (default: by device)"),
    Flag("max-queued-requests", _COUNT, "N", "queue length before 429 (default: by max-num-seqs)"),
    Flag(
        "block-size",
        _choice(16, 32, 64, 128),
        "TOKENS",
        "tokens per KV block: 16, 32, 64 or 128 (default: by device)",
    ),
    Flag("gpu-memory-utilization", _share, "SHARE", "of the GPU's memory, 0 to 1 (default: 0.9)"),
    Flag(
        "kv-cache-memory",
        parse_bytes,
        "SIZE",
        "size of the KV pool, such as 4GiB or 500M (default: what is left)",
        target="kv_cache_memory_bytes",
    ),
    Flag(
        "kv-cache-dtype",
        _choice("auto", "int8", "fp8"),
        "TYPE",
        "of keys and values: auto (the model's); in half of that: int8, or fp8 (GPU only) (default: auto)",
    ),
    Flag("threads", _whole(1, 1024), "N", "that compute, on a CPU (default: one for each physical core)"),
    Flag(
        "cuda-graphs",
        _choice("auto", "off"),
        "WHEN",
        "run decode steps as CUDA graphs: auto (on a GPU), or off (default: auto)",
    ),
    _off("no-prefix-caching", "do not share equal prefixes"),
    _on(
        "deterministic",
        "the same bits whatever else is in a batch; costs speed on a GPU, where a request that is preempted "
        "may still differ (default: off)",
    ),
    Flag("seed", _whole(0, 2**63 - 1), "N", "draws the seeds that requests leave out (default: random)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and every flag."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a directory, GGUF file or Hugging Face id (QUIRE_MODEL); left out: the small built-in demo",
    )
    for title, flags in (("server", SERVER_FLAGS), ("engine", ENGINE_FLAGS)):
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text = f"{flag.help} [{flag.variable}]"
    if flag.switch_to is not None:
        group.add_argument(flag.option, dest=flag.name, action="store_true", default=None, help=text)
    else:
        action = "append" if flag.secret else "store"
        group.add_argument(flag.option, dest=flag.name, metavar=flag.metavar, action=action, help=text)


def load(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> ServerSettings:
    """Settles every value.

    Raises:
        SettingsError: a value that cannot be, naming the flag or variable.
    """
    variables = os.environ if environ is None else environ
    given = vars(args)
    server = _values(SERVER_FLAGS, given, variables)
    engine = _values(ENGINE_FLAGS, given, variables)
    model = given.get("model") or variables.get("QUIRE_MODEL") or None
    name = server.pop("model_name", None) or _name_of(model) or DEMO_NAME
    options = EngineOptions(model=model or "", served_model_name=name, **engine)
    server.setdefault("colour", _wants_colour(variables))
    if "otlp_endpoint" not in server:
        server.update(otlp_endpoint=_ambient_collector(variables), otlp_required=False)
    chosen = ServerSettings(engine=options, demo=model is None, model_name=name, **server)
    try:
        chosen.tenants()
    except ValueError as exc:
        raise SettingsError(f"API keys: {exc}") from None
    return chosen


@dataclass(frozen=True, slots=True)
class TerminalVariables:
    """What `quire chat` takes from the environment."""

    api_key: str | None = field(repr=False)
    colour: bool


def terminal_variables(environ: Mapping[str, str] | None = None) -> TerminalVariables:
    """A server's QUIRE_API_KEY may hold several keys: any of them opens it, so the first does."""
    variables = os.environ if environ is None else environ
    keys = [key.strip() for key in variables.get("QUIRE_API_KEY", "").split(",") if key.strip()]
    return TerminalVariables(keys[0] if keys else None, _wants_colour(variables))


def _name_of(model: str | None) -> str | None:
    """A GGUF file goes by its name alone, anything else by what was given."""
    return PurePath(model).stem if model and model.endswith(".gguf") else model


def _wants_colour(variables: Mapping[str, str]) -> bool:
    return not variables.get("NO_COLOR") and variables.get("TERM") != "dumb"


def _ambient_collector(variables: Mapping[str, str]) -> str:
    """What OpenTelemetry's own variables say, which are often set for every program of a cluster."""
    if (
        variables.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or variables.get("OTEL_TRACES_EXPORTER") == "none"
    ):
        return ""
    name = "OTEL_EXPORTER_OTLP_ENDPOINT"
    found = variables.get(name)
    return _checked(_collector, found, name) if found else ""


def _values(flags: Sequence[Flag], given: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for flag in flags:
        found = _found(flag, given.get(flag.name), variables.get(flag.variable))
        if found is not None:
            values[flag.target] = found
    return values


def _found(flag: Flag, from_flag: Any, from_variable: str | None) -> Any:
    if flag.switch_to is not None:
        on = from_flag or (from_variable and _checked(flag.parse, from_variable, flag.variable))
        return flag.switch_to if on else None
    if from_flag is not None:
        texts, source = from_flag, flag.option
    elif from_variable:
        texts, source = from_variable, flag.variable
    else:
        return None
    if not flag.secret:
        return _checked(flag.parse, texts, source)
    keys = texts if isinstance(texts, list) else [key.strip() for key in texts.split(",") if key.strip()]
    return tuple(_checked(flag.parse, key, source, secret=True) for key in keys)


def _checked(parse: Callable[[str], Any], text: str, source: str, secret: bool = False) -> Any:
    try:
        return parse(text)
    except ValueError as exc:
        shown = "" if secret else f" {text!r}"
        raise SettingsError(f"{source}{shown}: {exc}") from None
