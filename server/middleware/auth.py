"""API keys: everything needs one, apart from a short list; and whose key it was, for all that comes after.

Knows paths and headers; does not know routes. Denies by default, so a route added later is closed until
somebody opens it. Decides from `scope["path"]` alone: a URL put together from headers can be forged. Which
routes only an admin may use, routers say (`admin_only`).
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.tenants import Tenant, Tenants
from server.trail import trail_of

# What probes must reach without a secret. Metrics and docs tell about the users' work and stay closed.
PUBLIC_PATHS = frozenset({"/health", "/ready", "/version"})


_SCOPE_KEY = "quire.tenant"


class Auth:
    """Lets through requests that carry one of the keys; without keys, everything.

    Args:
        public: exact paths that need no key, besides PUBLIC_PATHS.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants, public: Collection[str] = ()) -> None:
        self.app = app
        self._public = PUBLIC_PATHS.union(public)
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._public:
            await self.app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is not None:
            scope[_SCOPE_KEY] = tenant
            trail_of(scope).tenant = tenant.name
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant | None:
        if not self._tenants.keys_configured:
            return self._tenants.anonymous
        sent = _sent(scope, b"authorization")
        if not sent:
            # As Anthropic's clients send it; looked at only where there is no other.
            keys = _sent(scope, b"x-api-key")
            return self._tenants.find(keys[0].strip()) if len(keys) == 1 else None
        if len(sent) != 1 or sent[0][:7].lower() != b"bearer ":
            return None
        return self._tenants.find(sent[0][7:].strip())


def _sent(scope: Scope, header: bytes) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == header]


def tenant_of(scope: Scope) -> Tenant:
    """Who asks. Raises KeyError on a public path, where nobody knows."""
    tenant: Tenant = scope[_SCOPE_KEY]
    return tenant


def admin_only(request: Request) -> None:
    """For routers of which every route is the operator's alone.

    Raises:
        ApiError: 403, with what to do about it.
    """
    if tenant_of(request.scope).admin:
        return
    service = request.app.state.service
    how = (
        "send it as `Authorization: Bearer KEY`"
        if service.tenants.has_admin
        else "this server has none: start it with --admin-key or QUIRE_ADMIN_KEY"
    )
    raise ApiError(403, f"This needs an admin key; {how}.", code="admin_key_required")


def admin_if_any(request: Request) -> None:
    """For what operators read with an ordinary key, until they set one of their own.

    Raises:
        ApiError: 403, where an admin key is configured and another one was sent.
    """
    if request.app.state.service.tenants.has_admin:
        admin_only(request)
