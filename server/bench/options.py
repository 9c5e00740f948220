"""The command line of `quire bench`, parsed into one frozen object. It opens nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

EPILOG = """\
examples:
  quire bench                                         8 streams at a time, 100 requests, 127.0.0.1:8000
  quire bench --concurrency 64 --requests 500 --input-len 256-1024 --output-len 128
  quire bench --rate 4 --requests 200                 open loop: 4 requests per second on average
  quire bench --shared-prefix-len 1024 --input-len 64 what the prefix cache buys
  quire bench --url http://host:8000 --api chat --api-key KEY --json result.json

The exit status is 0 when every request succeeded, 1 when one failed, 2 when the run could not start.
"""


DEFAULT_URL = "http://127.0.0.1:8000"


class LengthRange(NamedTuple):
    """An inclusive range of lengths, in tokens; a fixed length has low == high."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


DEFAULT_LENGTH = LengthRange(128, 128)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the user asked.

    Attributes:
        rate: mean arrivals per second (open loop); None is a closed loop of `concurrency` clients.
        prompt_form: "ids", "text", or "auto": ids where the server takes them.
    """

    url: str = DEFAULT_URL
    model: str | None = None
    api: str = "completions"
    api_key: str | None = None
    requests: int = 100
    concurrency: int = 8
    rate: float | None = None
    max_in_flight: int = 1024
    warmup: int = 1
    input_len: LengthRange = DEFAULT_LENGTH
    output_len: LengthRange = DEFAULT_LENGTH
    shared_prefix_len: int = 0
    prompt_form: str = "auto"
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    max_seconds: float = 600.0
    timeout_s: float = 300.0
    json_path: str | None = None
    quiet: bool = False


def parse(args: list[str]) -> BenchOptions:
    """Raises SystemExit, as argparse does, on --help and on bad arguments."""
    parser = make_parser()
    options = BenchOptions(**vars(parser.parse_args(args)))
    if options.prompt_form == "ids" and options.api == "chat":
        parser.error("--prompt-form ids needs --api completions: chat messages are text")
    return options


def make_parser() -> argparse.ArgumentParser:
    """The parser of `quire bench`."""
    parser = argparse.ArgumentParser(
        prog="quire bench",
        description="Send generated requests to an OpenAI-compatible server and measure its streams.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("each request"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", dest="json_path", metavar="FILE", help="also write everything as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(**asdict(BenchOptions()))
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", type=_url, help="where the server is (default: %(default)s)")
    add("--model", help="model name (default: the first that /v1/models lists)")
    add("--api", choices=("completions", "chat"), help="default: %(default)s")
    add("--api-key", metavar="KEY", help="sent as a bearer token")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--requests", type=_positive, metavar="N", help="how many to measure (default: 100)")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency", type=_positive, metavar="C",
        help="closed loop: C clients, each sends its next request when the last one ended (default: 8)",
    )  # fmt: skip
    loop.add_argument(
        "--rate", type=_positive_float, metavar="R",
        help="open loop: Poisson arrivals, R per second on average; latency counts from the arrival",
    )  # fmt: skip
    add(
        "--max-in-flight", type=_positive, metavar="N",
        help="open loop: most connections at once; later arrivals wait (default: 1024)",
    )  # fmt: skip
    add("--warmup", type=_natural, metavar="N", help="requests before measuring (default: 1)")
    add(
        "--max-seconds", type=_positive_float, metavar="S",
        help="end the run after this long; what is unfinished counts as failed (default: 600)",
    )  # fmt: skip
    add(
        "--timeout", dest="timeout_s", type=_positive_float, metavar="S",
        help="give up on one request after this long (default: 300)",
    )  # fmt: skip


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input-len", type=_length_range, metavar="N|LOW-HIGH",
        help="prompt tokens after the shared prefix (default: 128)",
    )  # fmt: skip
    add(
        "--output-len", type=_length_range, metavar="N|LOW-HIGH",
        help="tokens to generate, sent as max_tokens (default: 128)",
    )  # fmt: skip
    add(
        "--shared-prefix-len", type=_natural, metavar="N",
        help="tokens that every prompt begins with (default: 0); warm-up uses another prefix",
    )  # fmt: skip
    add(
        "--prompt-form", choices=("auto", "ids", "text"),
        help="token ids give exact lengths; text is used for chat and for servers without them",
    )  # fmt: skip
    add(
        "--ignore-eos", action=argparse.BooleanOptionalAction,
        help="generate the full output length (an extension of vLLM's; default: on)",
    )  # fmt: skip
    add("--temperature", type=float, metavar="T", help="default: 0, greedy")
    add("--seed", type=int, metavar="N", help="of prompts, lengths and arrivals (default: 0)")


def _url(text: str) -> str:
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"not an http URL: {text}")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _length_range(text: str) -> LengthRange:
    low, dash, high = text.partition("-")
    try:
        lengths = LengthRange(int(low), int(high if dash else low))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a length or LOW-HIGH: {text}") from None
    if not 1 <= lengths.low <= lengths.high:
        raise argparse.ArgumentTypeError(f"needs 1 <= LOW <= HIGH: {text}")
    return lengths


def _positive(text: str) -> int:
    return _at_least(int(text), 1)


def _natural(text: str) -> int:
    return _at_least(int(text), 0)


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return value
