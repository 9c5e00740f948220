"""How callers reach an engine: an EngineClient, of two kinds.

    base.py        what callers may expect, and what both kinds do in the same way
    requests.py    all live requests: admission, hand-over to their callers, ends
    questions.py   questions about the cache, and those who watch it
    inprocess.py   an engine on a thread of this process
    supervised.py  an engine in a process of its own, watched and replaced when it dies

Token ids in, text events out. Nothing here knows HTTP, and nothing imports torch.
"""

from engine.client.base import EngineClient
from engine.client.inprocess import InProcessClient
from engine.client.requests import check_request
from engine.client.supervised import ProcessClient

__all__ = ["EngineClient", "InProcessClient", "ProcessClient", "check_request"]
