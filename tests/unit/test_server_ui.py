"""The live page's files: which there are, and how they are answered."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from server.routes import ui
from server.settings import ServerSettings
from tests.helpers.http import in_process


def get(*requests: tuple[str, str], settings: ServerSettings | None = None) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with in_process(settings=settings) as (http, _):
            return [await http.request(method, path) for method, path in requests]

    return asyncio.run(run())


def test_every_file_is_served_with_its_type_and_a_strict_policy() -> None:
    served = ui.files()
    assert {"index.html", "style.css", "app.js", "feed-worker.js", "icon.svg"} <= served.keys()
    replies = get(*(("GET", f"/ui/{name}") for name in served))
    for (name, file), reply in zip(served.items(), replies, strict=True):
        assert reply.status_code == 200, name
        assert reply.content == file.content
        assert reply.headers["content-type"] == ui.TYPES[Path(name).suffix]
        assert reply.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_at_ui_with_and_without_a_slash() -> None:
    without, page = get(("GET", "/ui"), ("GET", "/ui/"))
    assert (without.status_code, without.headers["location"]) == (307, "ui/")
    assert page.status_code == 200 and b"<title>Quire</title>" in page.content


def test_asks_again_only_for_what_changed() -> None:
    async def run() -> None:
        async with in_process() as (http, _):
            first = await http.get("/ui/app.js")
            again = await http.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
            other = await http.get("/ui/app.js", headers={"if-none-match": '"0123456789abcdef"'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert other.status_code == 200

    asyncio.run(run())


def test_head_has_the_length_and_no_body() -> None:
    whole, head = get(("GET", "/ui/style.css"), ("HEAD", "/ui/style.css"))
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize(
    "path",
    ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/..%2fapp.py", "/ui//etc/passwd", "/ui/vendor", "/ui/none.js"],
)
def test_there_is_nothing_else(path: str) -> None:
    [reply] = get(("GET", path))
    assert reply.status_code == 404


def test_no_key_is_asked_for_the_page_but_for_what_it_shows() -> None:
    settings = ServerSettings(api_keys=("secret",))
    names = [f"/ui/{name}" for name in ui.files()]
    *page, unknown, events = get(
        *(("GET", path) for path in ("/ui/", *names, "/ui/none.js", "/v1/cache/events")), settings=settings
    )
    assert {reply.status_code for reply in page} == {200}
    assert (unknown.status_code, events.status_code) == (401, 401)


def test_it_can_be_left_out() -> None:
    replies = get(("GET", "/ui"), ("GET", "/ui/"), ("GET", "/ui/app.js"), settings=ServerSettings(ui=False))
    assert {reply.status_code for reply in replies} == {404}


def test_without_the_chart_library_the_page_does_not_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<a>\n<script src="vendor/x.js"></script>\n<b>')
    assert ui.files(tmp_path)["index.html"].content == b"<a>\n<b>"
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor/x.js").write_text("1")
    found = ui.files(tmp_path)
    assert b"vendor/x.js" in found["index.html"].content and "vendor/x.js" in found


def test_the_page_names_nothing_from_elsewhere() -> None:
    """Addresses in comments and in SVG's namespace aside; the policy forbids it anyway."""
    for name, file in ui.files().items():
        if name.startswith("vendor/") or name.endswith(".txt"):
            continue
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text), name


def test_every_module_that_is_imported_is_there() -> None:
    served = ui.files()
    for name, file in served.items():
        if name.endswith(".js") and "/" not in name:
            for target in re.findall(r'^import .* from "\./(.+)";$', file.content.decode(), flags=re.M):
                assert target in served, (name, target)


def test_every_id_the_code_looks_for_is_in_the_page_once() -> None:
    served = ui.files()
    ids = re.findall(r'\bid="([\w-]+)"', served["index.html"].content.decode())
    assert len(ids) == len(set(ids))
    code = "".join(
        file.content.decode() for name, file in served.items() if re.fullmatch(r"[\w-]+\.js", name)
    )
    assert set(re.findall(r'\$\("([\w-]+)"\)', code)) <= set(ids)
