"""Who is asking: API keys -> tenants, and with whom a tenant shares cached prefixes.

Knows keys (as digests only), names and groups, and the file they may come from; does not know HTTP. The
cache is told a salt that is derived here: a caller can split its own cache with `cache_salt`, and cannot
reach another group's with any.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.views import CacheScope

DEFAULT_NAME = "default"
ADMIN_NAME = "admin"
# Each tenant is a label in metrics, and each key one more comparison per request.
MAX_TENANTS = 256
MAX_KEYS = 4096
MAX_FILE_BYTES = 2**20

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_RESERVED = re.compile(rf"{DEFAULT_NAME}|{ADMIN_NAME}|key-\d+")
_FIELDS = ("keys", "sha256", "share")


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of this server.

    Attributes:
        name: in metrics, logs and the cache's views. Not secret.
        group: whose members share cached prefixes; "" where everybody does.
        admin: may look at the whole cache and empty it.
    """

    name: str
    group: str = ""
    admin: bool = False

    def scope(self, cache_salt: str | None) -> CacheScope:
        """On whose account a request is, and who may share its blocks."""
        if not (self.group or cache_salt):
            return CacheScope(self.name)
        # No group's name holds a NUL, so no group and cache_salt make what another pair makes.
        return CacheScope(self.name, hashlib.sha256(f"{self.group}\0{cache_salt or ''}".encode()).digest())


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """One tenant as it is configured. `digests`: of its keys, which nobody needs to keep."""

    name: str
    digests: tuple[bytes, ...] = field(repr=False)
    share: str = ""


def parse_key(text: str) -> str:
    """Raises ValueError, without the key."""
    if not _KEY.fullmatch(text):
        raise ValueError("a key must be 1 to 512 printable ASCII characters without spaces")
    return text


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Tenants:
    """All tenants of one server.

    Args:
        api_keys: each is a tenant of its own, named by its place.
        named: from the keys file.
        admin_keys: may do everything; their tenant is `admin`.
        share_cache: all share cached prefixes, whoever they are.

    Raises:
        ValueError: a key twice, or too many; without the key.
    """

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        named: Sequence[TenantKeys] = (),
        admin_keys: Sequence[str] = (),
        share_cache: bool = False,
    ) -> None:
        listed = [
            *(TenantKeys(f"key-{at}", (_digest(key),)) for at, key in enumerate(api_keys, 1)),
            *named,
            *([TenantKeys(ADMIN_NAME, tuple(map(_digest, admin_keys)))] if admin_keys else ()),
        ]
        _check(listed)
        self.isolated = len(listed) > 1 and not share_cache
        self.has_admin = bool(admin_keys)
        self._anonymous = Tenant(DEFAULT_NAME, admin=True)
        self._known = [
            (known, Tenant(entry.name, self._group(entry), entry.name == ADMIN_NAME))
            for entry in listed
            for known in entry.digests
        ]
        self.names = tuple(entry.name for entry in listed) or (DEFAULT_NAME,)

    def _group(self, entry: TenantKeys) -> str:
        if not self.isolated:
            return ""
        # A prefix each, so that no group can be named after a tenant.
        return f"group:{entry.share}" if entry.share else f"tenant:{entry.name}"

    @property
    def keys_configured(self) -> bool:
        return bool(self._known)

    @property
    def anonymous(self) -> Tenant:
        """Who asks where no keys are configured: the operator."""
        assert not self._known
        return self._anonymous

    def find(self, key: bytes) -> Tenant | None:
        """Whose key it is. Compares with every known one, so that the time tells nothing."""
        sent = digest(key)
        found = None
        for known, tenant in self._known:
            if hmac.compare_digest(sent, known):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return digest(key.encode("ascii"))


def _check(listed: Sequence[TenantKeys]) -> None:
    if len(listed) > MAX_TENANTS:
        raise ValueError(f"{len(listed)} tenants; at most {MAX_TENANTS}")
    owners: dict[bytes, str] = {}
    for entry in listed:
        for known in entry.digests:
            if known in owners:
                raise ValueError(f"{owners[known]} and {entry.name} have the same key")
            owners[known] = entry.name
    if len(owners) > MAX_KEYS:
        raise ValueError(f"{len(owners)} keys; at most {MAX_KEYS}")


def read_file(name: str) -> tuple[TenantKeys, ...]:
    """The tenants that a TOML file names.

    Raises:
        ValueError: what is wrong, and in which entry; never a key.
    """
    try:
        content = Path(name).read_bytes()
    except OSError as exc:
        raise ValueError((exc.strerror or "cannot be read").lower()) from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except tomllib.TOMLDecodeError as exc:
        # Only the place: the rest of the message may quote the file.
        place = re.search(r"\((at [\w ,]+)\)$", str(exc))
        raise ValueError(f"not valid TOML{', ' + place[1] if place else ''}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    entries = tuple(_entries(document))
    _check(entries)
    return entries


def _entries(document: Mapping[str, Any]) -> Iterator[TenantKeys]:
    for name in document:
        if name != "tenants":
            raise ValueError(f"{_shown(name)}: unknown; tenants are [tenants.NAME]")
    tables = document.get("tenants")
    if not isinstance(tables, dict) or not tables:
        # Without this a file that says nothing would leave the server open to all.
        raise ValueError("names no tenants; each is a table [tenants.NAME] with keys")
    for name, table in tables.items():
        place = f"[tenants.{_shown(name)}]"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{place}: a name has up to 63 of a-z, 0-9, '.', '_' and '-'")
        if _RESERVED.fullmatch(name):
            raise ValueError(f"{place}: this name is the server's own")
        if not isinstance(table, dict):
            raise ValueError(f"{place}: must be a table with keys")
        yield _entry(name, table, place)


def _entry(name: str, table: Mapping[str, Any], place: str) -> TenantKeys:
    for entry in table:
        if entry not in _FIELDS:
            raise ValueError(f"{place}: {_shown(entry)} is unknown; expected {', '.join(_FIELDS)}")
    digests = [_from_key(text, f"{place} keys") for text in _texts(table, "keys", place)]
    digests += [_from_hex(text, f"{place} sha256") for text in _texts(table, "sha256", place)]
    if not digests:
        raise ValueError(f"{place}: has no keys")
    share = table.get("share", "")
    if "share" in table and not (isinstance(share, str) and _NAME.fullmatch(share)):
        raise ValueError(f"{place} share: a name has up to 63 of a-z, 0-9, '.', '_' and '-'")
    return TenantKeys(name, tuple(digests), share)


def _texts(table: Mapping[str, Any], entry: str, place: str) -> list[str]:
    texts = table.get(entry, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place} {entry}: must be a list of strings")
    return texts


def _from_key(text: str, place: str) -> bytes:
    try:
        return _digest(parse_key(text))
    except ValueError as exc:
        raise ValueError(f"{place}: {exc}") from None


def _from_hex(text: str, place: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"{place}: a digest has 64 hex digits")
    return bytes.fromhex(text)


def _shown(name: str) -> str:
    """A name of the file on one line. Long ones may be keys in the wrong place."""
    return name if len(name) <= 63 and re.fullmatch(r"[\w.-]+", name, re.ASCII) else "(a name)"
