"""The port, taken before anything expensive is imported. Knows sockets alone."""

from __future__ import annotations

import socket

# Bounds what the kernel keeps for a reader that has stopped; it doubles the figure.
SEND_BUFFER_BYTES = 256 * 1024


class PortTaken(Exception):
    """One line for the person at the terminal."""


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before anything expensive is loaded. Connections are accepted later.

    Raises:
        PortTaken: somebody else has it, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    try:
        taken.bind((host, port))
    except OSError as exc:
        taken.close()
        reason = (exc.strerror or str(exc)).lower()
        raise PortTaken(
            f"Cannot listen on {host} port {port}: {reason}. Choose another --port or --host."
        ) from exc
    return taken
