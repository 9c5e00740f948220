"""`quire chat`: a conversation in the terminal with any OpenAI-compatible server.

Knows flags and exit codes; the conversation is `session`, the wire is `client`, and what a terminal may be
sent is `screen`.

    exit 0  a clean end                        exit 2    the command line is wrong
    exit 1  the server gave no whole answer    exit 130  interrupted
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from server import settings
from server.terminal import session
from server.terminal.client import ChatClient, ChatError, parse_url
from server.terminal.screen import Screen, cleaned

DEFAULT_URL = "http://127.0.0.1:8000/v1"
INTERRUPTED = 130

_T = TypeVar("_T")


def main(arguments: Sequence[str]) -> int:
    """Runs the chat; the return value is the process's exit code."""
    given = make_parser().parse_args(arguments)
    from_variables = settings.terminal_variables()
    sampling = {"temperature": given.temperature, "max_tokens": given.max_tokens}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    talk = bool(not given.question and sys.stdin.isatty())
    screen = Screen(sys.stdout, colour=talk and from_variables.colour and sys.stdout.isatty())
    try:
        key = given.api_key or from_variables.api_key
        client = ChatClient(given.url, key, given.model or "", sampling)
        with asyncio.Runner() as runner:
            chat = session.Chat(client, screen, runner.run, given.system)
            if talk:
                return chat.talk()
            chat.answer_once(" ".join(given.question) if given.question else sys.stdin.read())
            return 0
    except (ChatError, UnicodeDecodeError) as error:
        print(f"quire: error: {' '.join(cleaned(str(error)).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `quire chat ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire chat",
        description="Talks with a model of any OpenAI-compatible server; with QUESTION prints its answer.",
    )
    add = parser.add_argument
    add("question", nargs="*", metavar="QUESTION", help="left out: a conversation, or what is piped in")
    add("--url", default=DEFAULT_URL, type=_argument(parse_url), help=f"of the API (default: {DEFAULT_URL})")
    add("--api-key", metavar="KEY", help="sent as a bearer token [QUIRE_API_KEY]")
    add("--model", metavar="NAME", help="which model (default: the first that the server lists)")
    add("--system", metavar="TEXT", default="", help="system prompt (default: none)")
    add("--temperature", metavar="X", type=_argument(_temperature), help="default: the server's")
    add("--max-tokens", metavar="N", type=_argument(_count), help="longest answer (default: the server's)")
    return parser


def _argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    def checked(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _temperature(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d*)?|\.\d+", text):
        raise ValueError(f"expected a number from 0, not {text!r}")
    return float(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"expected a whole number from 1, not {text!r}")
    return int(text)
