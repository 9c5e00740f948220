"""`quire serve`'s command line, without a program around it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from server import settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise settings.SettingsError(message)


def parse_args(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> settings.ServerSettings:
    """Raises SettingsError also where the program would end."""
    parser = _Parser(add_help=False)
    settings.add_arguments(parser)
    return settings.load(parser.parse_args(list(argv)), environ)
