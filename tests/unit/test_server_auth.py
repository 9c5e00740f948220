"""Keys -> tenants: who may ask, on whose account, and with whom prefixes are shared."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.views import CacheScope
from server import tenants
from server.settings import ServerSettings, SettingsError
from server.tenants import Tenants
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process
from tests.helpers.settings import parse_args

FILE = """
[tenants.acme]
keys = ["sk-old", "sk-new"]
[tenants.search]
sha256 = ["{digest}"]
share = "internal"
[tenants.batch]
keys = ["sk-batch"]
share = "internal"
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(content: str | bytes) -> str:
        path = tmp_path / "tenants.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def name_of(known: Tenants, key: str) -> str | None:
    tenant = known.find(key.encode())
    return tenant and tenant.name


class TestNames:
    def test_no_keys(self) -> None:
        known = Tenants()
        assert (known.names, known.isolated, known.keys_configured) == (("default",), False, False)
        assert known.anonymous.admin and known.anonymous.scope(None) == CacheScope("default", b"")

    def test_flags_in_their_order(self) -> None:
        known = Tenants(["b", "a"], (), ["root", "root2"])
        assert known.names == ("key-1", "key-2", "admin")
        assert [name_of(known, key) for key in ("b", "a", "root", "root2", "x", "")] == [
            *("key-1", "key-2", "admin", "admin"),
            *(None, None),
        ]
        assert [known.find(key).admin for key in (b"b", b"root")] == [False, True]  # type: ignore[union-attr]

    def test_a_file(self, keys_file: Callable[[str], str]) -> None:
        digest = hashlib.sha256(b"sk-search").hexdigest().upper()
        chosen = parse_args(["--api-key", "k", "--api-keys-file", keys_file(FILE.format(digest=digest))], {})
        known = chosen.tenants()
        assert known.names == ("key-1", "acme", "search", "batch")
        assert [name_of(known, key) for key in ("k", "sk-old", "sk-new", "sk-search", "sk-batch")] == [
            *("key-1", "acme", "acme", "search", "batch")
        ]
        assert "sk-" not in repr(chosen) and "'k'" not in repr(chosen)

    def test_every_known_key_is_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = Tenants([f"k{number}" for number in range(9)], (), ["root"])
        compared: list[bytes] = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append(other)
            return one == other

        monkeypatch.setattr(hmac, "compare_digest", compare)
        for key in (b"k0", b"root", b"unknown"):
            compared.clear()
            known.find(key)
            assert len(compared) == 10


class TestScopes:
    def scope(self, known: Tenants, key: str, salt: str | None = None) -> CacheScope:
        tenant = known.find(key.encode())
        assert tenant is not None
        return tenant.scope(salt)

    def test_one_tenant_needs_no_salt(self) -> None:
        known = Tenants(["a"])
        assert not known.isolated
        assert self.scope(known, "a") == CacheScope("key-1", b"")
        assert len(self.scope(known, "a", "x").salt) == 32

    def test_tenants_are_apart_by_default(self) -> None:
        known = Tenants(["a", "b"], (), ["root"])
        assert known.isolated
        salts = {self.scope(known, key, salt).salt for key in ("a", "b", "root") for salt in (None, "x", "y")}
        assert len(salts) == 9 and b"" not in salts

    def test_one_key_and_an_admin_are_two_tenants(self) -> None:
        assert Tenants(["a"], (), ["root"]).isolated

    def test_sharing_by_configuration(self, keys_file: Callable[[str], str]) -> None:
        known = Tenants((), tenants.read_file(keys_file(FILE.format(digest="0" * 64))), ["root"])
        old, new, batch = (self.scope(known, key) for key in ("sk-old", "sk-new", "sk-batch"))
        assert old == new and old.salt != batch.salt
        group = next(tenant for _, tenant in known._known if tenant.name == "search")
        assert group.scope(None).salt == batch.salt and group.scope(None).tenant == "search"
        assert group.scope("x").salt == self.scope(known, "sk-batch", "x").salt != batch.salt

    def test_a_group_named_like_a_tenant_is_not_its_own(self, keys_file: Callable[[str], str]) -> None:
        content = '[tenants.a]\nkeys=["1"]\n[tenants.b]\nkeys=["2"]\nshare="a"\n'
        known = Tenants((), tenants.read_file(keys_file(content)))
        assert self.scope(known, "1").salt != self.scope(known, "2").salt

    def test_no_salt_imitates_another_group(self) -> None:
        known = Tenants(["a", "b"])
        tricks = (None, "tenant:key-2", "\0", "tenant:key-2\0", "key-2")
        assert not {self.scope(known, "a", salt).salt for salt in tricks} & {
            self.scope(known, "b", salt).salt for salt in tricks[:1]
        }

    def test_shared_by_all(self) -> None:
        known = Tenants(["a", "b"], (), ["root"], share_cache=True)
        assert not known.isolated
        assert {self.scope(known, key).salt for key in ("a", "b", "root")} == {b""}
        assert self.scope(known, "a", "x").salt == self.scope(known, "b", "x").salt != b""


SECRET = "sk-very-secret"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["names no tenants"]),
        ("tenants = 3", ["names no tenants"]),
        ("[tenants]", ["names no tenants"]),
        ("[tenant.a]\nkeys=['x']", ["tenant", "unknown"]),
        ("[tenants.a]", ["[tenants.a]", "no keys"]),
        ("[tenants.a]\nkeys=[]", ["[tenants.a]", "no keys"]),
        (f"[tenants.a]\nkeys='{SECRET}'", ["[tenants.a] keys", "list of strings"]),
        ("[tenants.a]\nkeys=[3]", ["[tenants.a] keys", "list of strings"]),
        (f"[tenants.a]\nkeys=['{SECRET} x']", ["[tenants.a] keys", "printable"]),
        ("[tenants.a]\nkeys=['ü']", ["[tenants.a] keys", "printable"]),
        (f"[tenants.a]\nkeys=['{'x' * 513}']", ["[tenants.a] keys", "512"]),
        (f"[tenants.a]\nsha256=['{SECRET}']", ["[tenants.a] sha256", "64 hex"]),
        (f"[tenants.a]\nkey=['{SECRET}']", ["[tenants.a]", "key is unknown"]),
        ("[tenants.a]\nkeys=['x']\nshare=''", ["[tenants.a] share"]),
        ("[tenants.a]\nkeys=['x']\nshare=3", ["[tenants.a] share"]),
        ("[tenants.A]\nkeys=['x']", ["[tenants.A]", "a-z"]),
        (f"[tenants.{'a' * 64}]\nkeys=['x']", ["a-z"]),
        ("[tenants.'a b']\nkeys=['x']", ["a-z"]),
        ("[tenants.'../x']\nkeys=['x']", ["a-z"]),
        ("[tenants.admin]\nkeys=['x']", ["[tenants.admin]", "server's own"]),
        ("[tenants.key-1]\nkeys=['x']", ["[tenants.key-1]", "server's own"]),
        ("[tenants]\na=['x']", ["[tenants.a]", "table"]),
        (f"[tenants.a]\nkeys=['{SECRET}']\n[tenants.b]\nkeys=['{SECRET}']", ["a and b", "same key"]),
        (f"[tenants.a]\nkeys=['{SECRET}', '{SECRET}']", ["a and a", "same key"]),
        (f"[tenants.a]\nkeys=[{SECRET}]", ["not valid TOML", "line 2"]),
        (f"[tenants.a]\nkeys=['x']\n'{SECRET}'", ["not valid TOML", "at end of document"]),
        ("[tenants.a]\nkeys=['x']\n[tenants.a]\nkeys=['y']", ["not valid TOML", "line 3"]),
        (b"\xff\xfe[", ["not UTF-8"]),
        ("x = " + "[" * 5000 + "]" * 5000, ["nested too deeply"]),
        ("# " + "x" * 2**20, ["larger than"]),
        ("".join(f"[tenants.t{n}]\nkeys=['{n}']\n" for n in range(257)), ["257 tenants", "256"]),
        (f"[tenants.a]\nkeys={[str(n) for n in range(4097)]}", ["4097 keys", "4096"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_files_in_one_line(
    content: str | bytes, words: list[str], keys_file: Callable[[str | bytes], str]
) -> None:
    path = keys_file(content)
    with pytest.raises(SettingsError) as raised:
        parse_args([], {"QUIRE_API_KEYS_FILE": path})
    message = str(raised.value)
    assert message.startswith(f"QUIRE_API_KEYS_FILE '{path}': ") and "\n" not in message
    assert all(word in message for word in words), message
    assert SECRET not in message.replace("key is unknown", "") and len(message) < 300


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SettingsError, match=rf"--api-keys-file '{path}': (no such file|is a directory)"):
            parse_args(["--api-keys-file", str(path)], {})


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-key", SECRET, "--api-key", SECRET],
        ["--api-key", SECRET, "--admin-key", SECRET],
        ["--admin-key", SECRET, "--admin-key", SECRET],
    ],
)
def test_a_key_twice(flags: list[str]) -> None:
    with pytest.raises(SettingsError, match="have the same key") as raised:
        parse_args(flags, {})
    assert SECRET not in str(raised.value)


def test_admin_keys_from_the_variable() -> None:
    assert parse_args([], {"QUIRE_ADMIN_KEY": "a, b"}).admin_keys == ("a", "b")
    assert parse_args([], {"QUIRE_SHARE_CACHE": "yes"}).share_cache


WITH_KEYS = ServerSettings(api_keys=("one", "two"), admin_keys=("root",))
PUBLIC = {"/health", "/ready", "/version", "/ui", "/ui/{name:path}"}
ANY_KEY = {
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model:path}"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/{response_id}"),
    *("/v1/responses/input_tokens", "/v1/responses/{response_id}/cancel"),
    *(
        "/v1/responses/{response_id}/input_items",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/v1/cache/probe",
        "/docs",
        "/openapi.json",
    ),
}
ADMIN = {"/metrics", "/v1/cache", "/v1/cache/blocks/{block_id}", "/v1/cache/reset", "/v1/cache/events"}


def all_routes(app: Any) -> Iterator[Any]:
    for route in app.routes:
        yield from all_routes(route.original_router) if hasattr(route, "original_router") else [route]


@pytest.mark.anyio
class TestRoutes:
    async def test_each_route_is_open_to_whom_it_should_be(self) -> None:
        """A route that is added appears here first: nobody opens one by accident."""
        async with in_process(settings=WITH_KEYS) as (http, _):
            app = http._transport.app  # type: ignore[attr-defined]
            routes = {route.path: sorted(route.methods)[0] for route in all_routes(app)}
            assert set(routes) == PUBLIC | ANY_KEY | ADMIN
            for path, method in routes.items():
                if path in ("/v1/cache/events", "/ui", "/ui/{name:path}"):
                    continue  # a stream without an end; public files are tested with the page
                address = re.sub(r"\{.*\}", "1", path)

                async def status(
                    headers: dict[str, str], method: str = method, address: str = address
                ) -> int:
                    return (await http.request(method, address, headers=headers)).status_code

                assert (await status({}) == 401) == (path not in PUBLIC), path
                assert (await status(bearer("one")) == 403) == (path in ADMIN), path
                assert await status(bearer("root")) not in (401, 403), path
            assert (await http.get("/v1/cache/events", headers=bearer("one"))).status_code == 403

    async def test_without_an_admin_key_any_key_reads_the_metrics(self) -> None:
        async with in_process(settings=ServerSettings(api_keys=("one", "two"))) as (http, _):
            assert (await http.get("/metrics")).status_code == 401
            assert (await http.get("/metrics", headers=bearer("two"))).status_code == 200

    async def test_what_the_refusal_says(self) -> None:
        async with in_process(settings=WITH_KEYS) as (http, _):
            error = (await http.get("/v1/cache", headers=bearer("one"))).json()["error"]
            assert error["code"] == "admin_key_required" and "Bearer" in error["message"]
        async with in_process(settings=ServerSettings(api_keys=("one",))) as (http, _):
            error = (await http.post("/v1/cache/reset", headers=bearer("one"))).json()["error"]
            assert "--admin-key" in error["message"] and "QUIRE_ADMIN_KEY" in error["message"]

    async def test_only_an_admin_key(self) -> None:
        async with in_process(settings=ServerSettings(admin_keys=("root",))) as (http, _):
            assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 401
            assert (
                await http.post(CHAT, json={"messages": HELLO}, headers=bearer("root"))
            ).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            bearer(""),
            bearer("three"),
            bearer("one two"),
            bearer("one" * 1000),
            {"authorization": "Basic one"},
            {"authorization": "one"},
            {"x-api-key": "three"},
            {"x-api-key": ""},
            {"x-api-key": "Bearer root"},
            [("x-api-key", "root"), ("x-api-key", "root")],
            {"x-api-key": "root", "authorization": "Bearer three"},
            {"authorization": "Bearer ü".encode("latin-1")},
            [("authorization", "Bearer one"), ("authorization", "Bearer root")],
        ],
        ids=str,
    )
    async def test_other_keys(self, headers: Any) -> None:
        async with in_process(settings=WITH_KEYS) as (http, _):
            for path in ("/v1/models", "/v1/cache", "/v1/cache/nothing", "/v1/cache/reset?key=root"):
                reply = await http.get(path, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"

    async def test_a_key_as_anthropics_clients_send_it(self) -> None:
        async with in_process(settings=WITH_KEYS) as (http, client):
            for headers in ({"x-api-key": "two"}, {"x-api-key": "root", **bearer("two")}):
                reply = await http.post(CHAT, json={"messages": HELLO}, headers=headers)
                assert reply.status_code == 200
            assert [scope.tenant for scope in client.scopes] == ["key-2", "key-2"]
            assert (await http.get("/v1/cache", headers={"x-api-key": "root"})).status_code == 200

    @pytest.mark.parametrize("name", ["x-tenant", "x-quire-tenant", "openai-organization", "openai-project"])
    async def test_a_tenant_is_nothing_one_can_claim(self, name: str) -> None:
        async with in_process(settings=WITH_KEYS) as (http, client):
            for claim in ("key-2", "admin"):
                body = {"messages": HELLO, "tenant": claim, "user": claim}
                reply = await http.post(CHAT, json=body, headers={**bearer("one"), name: claim})
                assert reply.status_code == 200
                assert client.scopes[-1].tenant == "key-1"
            assert len({scope.salt for scope in client.scopes}) == 1

    async def test_each_request_is_on_its_tenants_account(self) -> None:
        async with in_process(settings=WITH_KEYS) as (http, client):
            for key in ("one", "two", "root"):
                await http.post(COMPLETIONS, json={"prompt": ["a", "b"]}, headers=bearer(key))
                await http.post("/v1/cache/probe", json={"prompt": "a"}, headers=bearer(key))
        names = [scope.tenant for scope in client.scopes]
        assert names == ["key-1", "key-1", "key-2", "key-2", "admin", "admin"]
        assert [scope for _, scope in client.probed] == client.scopes[::2]
        assert len({scope.salt for scope in client.scopes}) == 3

    async def test_the_callers_salt_splits_within_the_tenant(self) -> None:
        async with in_process(settings=WITH_KEYS) as (http, client):
            for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
                for key, salt in (("one", None), ("one", "s"), ("one", "t"), ("two", "s")):
                    reply = await http.post(path, json={**body, "cache_salt": salt}, headers=bearer(key))
                    assert reply.status_code == 200
        salts = [scope.salt for scope in client.scopes]
        assert len(set(salts)) == 4 and salts[:4] == salts[4:]
