"""/ui: the live page, as static files.

Knows the files beside `server/ui/index.html` and nothing of what they show: the page asks the API like any
other client. The list is made once, at start; a name that is not on it does not exist, so no path can lead
anywhere else. The files hold no data and are public; what they ask for is not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from server.errors import ApiError, shorten

ROOT = Path(__file__).parent.parent / "ui"
PREFIX = "/ui"
INDEX = "index.html"
TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
    }
)
# Everything from here, nothing inline: text that a model wrote can never become a script.
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "trusted-types quire; require-trusted-types-for 'script'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time; the answer is mostly 304
}


@dataclass(frozen=True, slots=True)
class File:
    """One file, as it was at start."""

    content: bytes
    kind: str
    etag: str


def files(root: Path = ROOT) -> dict[str, File]:
    """What is served: name under /ui/ -> file."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in TYPES:
            content = path.read_bytes()
            if path.name == INDEX:
                content = _without_missing(content, root)
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[path.relative_to(root).as_posix()] = File(content, TYPES[path.suffix], etag)
    return found


def _without_missing(index: bytes, root: Path) -> bytes:
    """The page without the lines that name a file of vendor/ that was not fetched."""
    lines = index.split(b"\n")
    named = [re.search(rb'"(vendor/[\w.]+)"', line) for line in lines]
    kept = [
        line
        for line, name in zip(lines, named, strict=True)
        if name is None or (root / name[1].decode()).is_file()
    ]
    return b"\n".join(kept)


def public_paths(served: Mapping[str, File]) -> frozenset[str]:
    """The addresses that need no key."""
    return frozenset({PREFIX, f"{PREFIX}/", *(f"{PREFIX}/{name}" for name in served)})


def router(served: Mapping[str, File]) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.api_route(PREFIX, methods=["GET", "HEAD"])
    async def without_slash() -> Response:
        # Relative, so that it also holds behind a proxy that adds a prefix.
        return RedirectResponse("ui/", 307)

    @routes.api_route(PREFIX + "/{name:path}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        found = served.get(name or INDEX)
        if found is None:
            raise ApiError(404, f"The page has no file '{shorten(name)}'.")
        return _reply(found, request)

    return routes


def _reply(file: File, request: Request) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    headers |= {"content-type": file.kind, "content-length": str(len(file.content))}
    return Response(b"" if request.method == "HEAD" else file.content, headers=headers)
