"""How callers reach an engine: the EngineClient protocol and its two implementations.

    protocol.py    what callers may expect
    requests.py    all live requests: admission, hand-over to their callers, ends
    questions.py   questions about the cache, and those who watch it
    desk_client.py what both clients do in the same way, with these two
    inprocess.py   an engine on a thread of this process
    supervised.py  an engine in a process of its own, watched and replaced when it dies

Token ids in, text events out. Nothing here knows HTTP, and nothing imports torch.
"""

from engine.client.inprocess import InProcessClient
from engine.client.protocol import EngineClient
from engine.client.requests import check_request
from engine.client.supervised import ProcessClient

__all__ = ["EngineClient", "InProcessClient", "ProcessClient", "check_request"]
