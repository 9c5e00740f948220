"""API keys: everything needs one, apart from a short list.

Knows paths and headers; does not know routes. Denies by default, so a route added later is closed until
somebody opens it. Decides from `scope["path"]` alone: a URL put together from headers can be forged. Keys
are compared as digests, all of them every time, so that neither length nor position can be measured.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

# What probes must reach without a secret. Metrics and docs tell about the users' work and stay closed.
PUBLIC_PATHS = frozenset({"/health", "/ready", "/version"})


class Auth:
    """Lets through requests that carry one of the keys; without keys, everything.

    Args:
        public: exact paths that need no key, besides PUBLIC_PATHS.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], public: Collection[str] = ()) -> None:
        self.app = app
        self._public = PUBLIC_PATHS.union(public)
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or not self._digests
            or scope["path"] in self._public
            or self._allows(scope)
        ):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) != 1 or sent[0][:7].lower() != b"bearer ":
            return False
        digest = _digest(sent[0][7:].strip())
        # All are compared, whatever the first ones say: `any` over a generator would stop early.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return True in matches


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
