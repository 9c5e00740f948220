"""Spawning an engine process, and nothing that takes long to import."""

from __future__ import annotations

import socket
import subprocess
import sys

DEFAULT_FACTORY = "engine.build:build"


class Child:
    """A new process and our end of the socket to it.

    It waits for its Start frame and imports what it will need, which takes two seconds: a server that spawns
    it first can import its own parts meanwhile.

    Args:
        factory: "module:function" that builds core and info.
    """

    def __init__(self, factory: str) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            descriptor = theirs.fileno()
            module = factory.partition(":")[0]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine.process", str(descriptor), module],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
            )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """Kills this child, and no other process: a child that was waited for has no pid any more."""
        if self.is_alive:
            self.process.kill()

    def drop(self) -> None:
        """Ends a child that may never have been told anything."""
        self.socket.close()
        self.kill()
        self.process.wait()
