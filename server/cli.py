"""The `quire` command: one subcommand, one function.

Knows the terminal: arguments, one-line errors, exit codes, the start-up report. Does not know HTTP or the
engine's insides.

    exit 0  a clean end             exit 2   the command line or a QUIRE_* variable is wrong
    exit 1  what was asked cannot   128 + n  stopped at once by a second signal n
            work on this machine
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Sequence

from engine.errors import ConfigError
from server import __version__, settings
from server.settings import SettingsError

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; the return value is the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # These two bring their own flags; nothing of them is imported until they are asked for.
    if arguments[:1] == ["bench"]:
        return bench(arguments[1:])
    if arguments[:1] == ["chat"]:
        return chat(arguments[1:])
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return USAGE_ERROR
    command: Callable[[argparse.Namespace], int] = given.run
    return command(given)


def serve(given: argparse.Namespace) -> int:
    """Serves a model until it is told to stop."""
    try:
        chosen = settings.load(given)
    except SettingsError as exc:
        return _complain(str(exc), USAGE_ERROR)
    # Imported late so that `quire --help` and `quire version` are instant.
    from server import log, port

    log.configure_logging(log.log_options(chosen))
    if chosen.log_prompts:
        log.warn_of_prompts()
    try:
        with port.listen(chosen.host, chosen.port) as sock:
            return _serve(chosen, sock)
    except (ConfigError, port.PortTaken) as exc:
        if chosen.log_format == "json":
            return log.complain(str(exc), 1)
        return _complain(str(exc), 1)


def _serve(chosen: settings.ServerSettings, sock: socket.socket) -> int:
    from engine.process.spawn import DEFAULT_FACTORY, Child

    child = Child(DEFAULT_FACTORY)
    try:
        from server import serving  # beside the child's imports, which take as long

        return serving.serve(chosen, sock, child)
    finally:
        child.drop()


def bench(arguments: Sequence[str]) -> int:
    """Measures any OpenAI-compatible server."""
    from server import bench as tool

    return int(tool.main(list(arguments)) or 0)


def chat(arguments: Sequence[str]) -> int:
    """Talks with a model of any OpenAI-compatible server."""
    from server import terminal

    return terminal.main(arguments)


def version(_: argparse.Namespace) -> int:
    print(f"quire {__version__}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire", description="Serves language models from a paged KV cache, over the OpenAI API."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serves MODEL over the OpenAI API. Without MODEL: a small demo model that knows Quire.",
        epilog="Each flag can also be set by the variable in brackets; the flag wins.",
    )
    settings.add_arguments(serve_parser)
    serve_parser.set_defaults(run=serve)
    commands.add_parser("chat", help="talk with a model in the terminal", add_help=False)
    commands.add_parser("bench", help="measure an OpenAI-compatible server", add_help=False)
    commands.add_parser("version", help="print the version").set_defaults(run=version)
    return parser


def _complain(message: str, code: int) -> int:
    print(f"quire: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
