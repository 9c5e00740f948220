"""`quire serve`, put together: model folder, tokenizer, engine process, app, server.

The composition root of the API process. Knows which concrete classes are used; nothing else does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from engine import builtin, hub
from engine.client import ProcessClient
from engine.errors import ConfigError, ModelError
from engine.text.chat import ChatTemplate
from engine.text.files import read_text_files, sampling_defaults
from engine.text.tokenizer import Tokenizer
from server import report
from server.app import create_app
from server.log import log_options
from server.run import Server
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.process.spawn import Child
    from server.tracing import Tracing

logger = logging.getLogger("quire")


def serve(settings: ServerSettings, sock: socket.socket, child: Child) -> int:
    """Serves until told to stop; returns the exit code.

    Args:
        sock: from `port.listen`.
        child: the engine's process, which has begun with its imports.

    Raises:
        ConfigError: the model or the machine cannot do what was asked.
    """
    # Before the loop runs: a download takes minutes, and Ctrl-C should end it.
    folder = _folder(settings)
    tracing = _tracing(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, folder, sock, child, tracing))
    finally:
        if tracing is not None:
            tracing.shutdown()


async def _serve(
    settings: ServerSettings, folder: Path, sock: socket.socket, child: Child, tracing: Tracing | None
) -> int:
    options = replace(settings.engine, model=str(folder))
    progress = report.LoadProgress() if settings.log_format == "text" else None
    files = read_text_files(folder)
    tokenizer = Tokenizer(files)
    template = ChatTemplate.from_files(files, tokenizer)
    client = ProcessClient(
        options, tokenizer, on_progress=progress, log_options=log_options(settings), child=child
    )
    app = create_app(client, settings, tokenizer, template, sampling_defaults(files), tracing)
    server = Server(app, settings)
    show = report.printer(settings, url(settings.host, sock), lambda: client.info)
    try:
        return await server.run_until_stopped(sock, show)
    finally:
        if progress is not None:
            progress.close()


def _tracing(settings: ServerSettings) -> Tracing | None:
    """What sends traces, if somebody wants them.

    Raises:
        ConfigError: the packages for it are missing, and we were told by name to trace.
    """
    if not settings.otlp_endpoint:
        return None
    try:
        from server import tracing
    except ImportError as error:
        missing = f"Tracing needs the packages of quire[otel] (pip install 'quire[otel]'): {error}."
        if settings.otlp_required:
            raise ConfigError(missing) from error
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is traced. %s", missing)
        return None
    return tracing.connect(settings.otlp_endpoint)


def _folder(settings: ServerSettings) -> Path:
    """Where the model's files are, fetched if need be."""
    if not settings.demo:
        return hub.find_model(settings.engine.model, weights=True)
    if not builtin.path().is_dir():
        raise ModelError("The built-in demo model is not in this installation; name a MODEL to serve.")
    return builtin.path()


def url(host: str, sock: socket.socket) -> str:
    """Where a person on this machine finds the server."""
    port = sock.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(
        host, f"[{host}]" if ":" in host else host
    )
    return f"http://{shown}:{port}"
