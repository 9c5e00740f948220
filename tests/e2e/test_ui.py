"""The live page in a real Chromium, on a real server with the demo model and a pool that is soon full.

pytest tests/e2e/test_ui.py
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import Server, serve, until

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"needs a browser: apt install chromium ({CHROMIUM})", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make dev")

WAIT_MS = 20_000
SYSTEM = (
    "You help people with Quire, a server for language models. Answer in one short sentence, please. " * 2
)
QUESTION = "Which port does Quire listen on?"
IN_USE, CACHED = "in use", "cached"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("ui"), "--kv-cache-memory", "3M") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One look at the page, and what it must not do."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.origin = url
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", self._asked)
        self.page.goto(f"{url}/ui")

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(self.origin + "/"):
            self.strangers.append(request.url)

    def see(self, selector: str) -> Any:
        return sync_api.expect(self.page.locator(selector), f"{selector}; console: {self.complaints}")

    def wait(self, condition: Callable[[], object]) -> None:
        until(condition, WAIT_MS / 1000, lambda: f"console: {self.complaints}")

    def live(self) -> None:
        self.see("#link").to_have_text("live", timeout=WAIT_MS)
        self.wait(lambda: self.page.evaluate("quire.pool.size") > 0)

    def blocks(self, state: str) -> int:
        """As the legend counts them."""
        text = self.page.inner_text(f'#legend li[data-name="{state}"] b')
        return int(text.replace(",", ""))

    def say(self, text: str) -> Any:
        """Sends a message; the answer, complete."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.see(".turn.waiting").to_have_count(0, timeout=WAIT_MS)
        return self.page.locator(".turn.assistant").last

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert self.strangers == []


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    server.post("/v1/cache/reset")
    visit = Visit(browser, server.url, color_scheme="light")
    visit.live()
    yield visit
    visit.close()


def set_system(visit: Visit, text: str) -> None:
    visit.page.click("#play-settings summary")
    visit.page.fill("#system", text)


def pixel_of(visit: Visit, block: int) -> list[int]:
    """What the atlas shows in the middle of a cell, a little off the mark of shared ones."""
    pixel: list[int] = visit.page.evaluate(
        """id => {
          const {left, top, size} = quire.atlas.cellCss(id), ratio = devicePixelRatio;
          const place = [(left + size * .25) * ratio, (top + size * .25) * ratio, 1, 1];
          return [...quire.atlas.base.getContext("2d").getImageData(...place).data].slice(0, 3);
        }""",
        block,
    )
    return pixel


def colour(visit: Visit, name: str) -> list[int]:
    """A colour of the style sheet, as pixels."""
    text = visit.page.evaluate(
        "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()", name
    )
    return [int(text[at : at + 2], 16) for at in (1, 3, 5)]


def test_a_chat_streams_and_the_atlas_shows_its_blocks(visit: Visit) -> None:
    visit.see("#lanes-empty").to_be_visible()
    visit.see("#talk-empty").to_be_visible()
    assert visit.blocks("free") == visit.page.evaluate("quire.pool.size")
    set_system(visit, SYSTEM)
    answer = visit.say(QUESTION)
    assert "8000" in answer.inner_text()
    assert re.search(r"\d+ tokens · first after", answer.inner_text())
    assert answer.locator(".why").get_attribute("data-reused") == "0"
    visit.wait(lambda: visit.blocks(CACHED) >= 2 and visit.blocks(IN_USE) == 0)
    held = visit.page.evaluate("quire.pool.state.indexOf(1)")
    visit.wait(lambda: pixel_of(visit, held) == colour(visit, "--cached"))
    free = visit.page.evaluate("quire.pool.state.indexOf(0, 1)")
    assert pixel_of(visit, free) == colour(visit, "--free")
    visit.see("#tree .what").to_contain_text(["You help people"])


def test_blocks_are_in_use_while_the_answer_streams(visit: Visit) -> None:
    visit.page.click("#play-settings summary")
    visit.page.fill("#max-tokens", "400")
    visit.page.fill("#temperature", "1")
    seen = visit.page.evaluate_handle(
        """() => {
          const seen = {use: 0, phases: new Set()};
          const look = () => {
            seen.use = Math.max(seen.use, quire.pool.counts[2]);
            for (const row of document.querySelectorAll("#lanes li")) seen.phases.add(row.dataset.phase);
            requestAnimationFrame(look);
          };
          look();
          return seen;
        }"""
    )
    for number in range(3):
        visit.say(f"{number}: tell me all about blocks, page tables, prefixes, eviction and preemption.")
    assert seen.evaluate("seen => seen.use") > 0
    phases = seen.evaluate("seen => [...seen.phases]")
    assert "ended" in phases and {"prefill", "decode"} & set(phases)
    visit.see("#lanes-empty").to_be_visible(timeout=WAIT_MS)  # the afterglow is over


def test_the_same_prompt_again_is_shown_as_reused(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.wait(lambda: visit.blocks(CACHED) > 0)  # a frame comes every fifth of a second
    visit.page.click("#clear")
    visit.see(".turn").to_have_count(0)
    answer = visit.say(QUESTION)
    why = answer.locator(".why")
    assert int(why.get_attribute("data-reused") or 0) >= 32
    assert re.search(r"[1-9]\d? % reused", why.inner_text())
    assert "tokens reused" in visit.page.inner_text(".turn.user .meta")
    assert "System prompt: " in why.inner_text()
    visit.see("#seen").to_contain_text(re.compile(r"[1-9]\d* reused"))


def test_where_two_prompts_part_both_texts_are_shown(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.page.click("#clear")
    visit.page.fill("#system", SYSTEM.replace("one short sentence", "many long verses"))
    answer = visit.say(QUESTION)
    assert answer.locator(".why").get_attribute("data-reason") == "diverged"
    answer.locator("summary").click()
    sides = answer.locator(".texts dd").all_inner_texts()
    assert "short" in sides[0] and "many" in sides[1]
    assert len(answer.locator(".texts mark").all()) == 2


def test_the_probe_tells_without_running(visit: Visit, server: Server) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.page.click("#clear")
    before = server.http.get("/metrics").text
    visit.page.fill("#prompt", QUESTION)
    visit.page.click("#probe")
    visit.see(".probed .why").to_contain_text("in the cache")
    assert int(visit.page.get_attribute(".probed .why", "data-reused") or 0) >= 32
    visit.see("#prompt").to_have_value(QUESTION)
    counted = re.compile(r"^quire_requests_received_total.*$", flags=re.M)
    assert counted.findall(server.http.get("/metrics").text) == counted.findall(before)


def test_an_eviction_is_visible(visit: Visit, server: Server) -> None:
    whole = visit.page.evaluate("quire.pool.size")
    for number in range(whole // 2):
        prompt = f"{number} is the number of this prompt, which no other prompt begins with. " * 6
        server.post("/v1/completions", prompt=prompt, max_tokens=4)
    visit.see("#seen").to_contain_text(re.compile(r"[1-9]\d* evicted"))
    visit.wait(lambda: visit.blocks("free") + visit.blocks(CACHED) == whole)
    snapshot = server.http.get("/v1/cache", params={"limit": 1}).json()["blocks"]
    visit.wait(lambda: visit.blocks(CACHED) == snapshot["cached"])


def test_the_cache_is_emptied_on_the_second_click(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.wait(lambda: visit.blocks(CACHED) > 0)
    visit.page.click("#reset")
    visit.see("#reset").to_have_text("Really? Click again")
    assert visit.blocks(CACHED) > 0
    visit.page.click("#reset")
    visit.see("#reset").to_contain_text("emptied")
    visit.wait(lambda: visit.blocks(CACHED) == 0)
    visit.see("#tree-empty").to_be_visible()


def test_a_block_is_found_and_pinned_by_keyboard(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.wait(lambda: visit.blocks(CACHED) >= 2)
    first, second = visit.page.evaluate(
        "[0, 1].map(at => quire.pool.kept.findIndex((kept, id) => kept && quire.pool.positions[id] === at))"
    )
    visit.page.focus("#over")
    visit.page.keyboard.press("Home")
    for _ in range(first - 1):
        visit.page.keyboard.press("ArrowRight")
    visit.see("#cursor-text").to_contain_text(f"Block {first}: cached, request #")
    visit.page.keyboard.press("Enter")
    visit.see("#detail pre").to_contain_text("You help people")
    visit.page.click("#detail .relatives button")
    visit.see("#detail h3").to_have_text(f"Block {second}")
    visit.see("#detail .relatives").to_contain_text([f"after #{first}"])
    assert visit.page.evaluate("quire.atlas.highlight.path") == [first, second]
    visit.page.focus("#over")
    visit.page.keyboard.press("Escape")
    visit.see("#detail").to_be_hidden()
    assert visit.page.evaluate("quire.atlas.highlight") is None


def test_hovering_tells_of_a_block(visit: Visit) -> None:
    cell = visit.page.evaluate("quire.atlas.cellCss(3)")
    middle = {"x": cell["left"] + cell["size"] / 2, "y": cell["top"] + cell["size"] / 2}
    visit.page.hover("#over", position=middle)
    visit.see("#tip").to_contain_text("Block 3: free")
    visit.page.hover("h1")
    visit.see("#tip").to_be_hidden()


def test_the_blocks_can_be_coloured_otherwise(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    visit.say(QUESTION)
    visit.wait(lambda: visit.blocks(CACHED) > 0)
    held = visit.page.evaluate("quire.pool.state.indexOf(1)")
    visit.wait(lambda: pixel_of(visit, held) == colour(visit, "--cached"))
    for mode, words in (("tenant", "default"), ("owner", "#"), ("age", "just now")):
        visit.page.check(f'input[name="mode"][value="{mode}"]')
        visit.see("#legend li >> nth=0").to_contain_text(words)
        visit.wait(lambda: pixel_of(visit, held) != colour(visit, "--cached"))


def test_the_charts_and_the_what_if_sentence_fill(visit: Visit) -> None:
    set_system(visit, SYSTEM)
    for _ in range(2):
        visit.say(QUESTION)
    visit.see("#whatif-text").to_contain_text(re.compile(r"\d+ %"), timeout=WAIT_MS)
    visit.see("#f-hit").to_contain_text("%")
    if not visit.page.evaluate("typeof uPlot === 'function'"):
        pytest.skip("needs the chart library: make install")
    visit.see(".uplot canvas").to_have_count(5)
    visit.see("#c-occupancy .u-legend").to_contain_text(re.compile(r"cached:?\s*\d"))


def test_what_a_user_or_a_model_writes_is_never_html(visit: Visit) -> None:
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    visit.say(text)
    visit.see(".turn.user .text").to_have_text(text)
    assert visit.page.evaluate("document.querySelectorAll('.turn img, .turn .text b').length") == 0
    refused = visit.page.evaluate(
        "(() => { try { document.body.innerHTML = '<i></i>' } catch (e) { return e.name } })()"
    )
    assert refused == "TypeError"
    visit.complaints.clear()  # the browser says that it refused


def test_an_error_is_told_in_words_and_the_message_is_kept(visit: Visit) -> None:
    visit.page.click("#play-settings summary")
    visit.page.fill("#max-tokens", "999999")
    visit.page.fill("#prompt", QUESTION)
    visit.page.click("#send")
    visit.see(".error").to_contain_text("tokens")
    visit.see("#prompt").to_have_value(QUESTION)
    visit.complaints.clear()  # the browser notes each reply of 400


def test_a_long_answer_can_be_stopped(visit: Visit) -> None:
    def go_on(route: Any) -> None:
        body = {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 900}
        route.continue_(post_data=json.dumps(body))

    visit.page.route("**/v1/chat/completions", go_on)
    visit.page.fill("#prompt", "Tell me everything.")
    visit.page.evaluate(
        """new MutationObserver((_, self) => {
          if (!document.querySelector(".turn.assistant .text").textContent) return;
          self.disconnect();
          document.getElementById("stop").click();
        }).observe(document.getElementById("talk"), {subtree: true, childList: true, characterData: true})"""
    )
    visit.page.click("#send")
    visit.see(".turn.assistant .meta").to_have_text("stopped")
    visit.wait(lambda: visit.blocks(IN_USE) == 0)


def test_themes(browser: Any, server: Server) -> None:
    visit = Visit(browser, server.url, color_scheme="dark")
    visit.live()
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = visit.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150
    free = visit.page.evaluate("quire.pool.state.indexOf(0, 1)")
    visit.wait(lambda: pixel_of(visit, free) == colour(visit, "--free"))
    visit.page.click("#theme")
    visit.see("#theme").to_have_text("Light")
    assert sum(map(int, re.findall(r"\d+", visit.page.evaluate(ground)))) > 600
    visit.wait(lambda: pixel_of(visit, free) == colour(visit, "--free"))
    visit.page.reload()
    visit.see("#theme").to_have_text("Light")
    visit.close()


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, server: Server) -> None:
    visit = Visit(
        browser, server.url, viewport={"width": 360, "height": 740}, has_touch=True, device_scale_factor=2
    )
    visit.live()
    answer = visit.say("What is a KV cache?")
    assert answer.inner_text()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    for panel in (".atlas", ".play", ".lanes", ".tree", ".what-if"):
        box = visit.page.locator(panel).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, panel
    visit.close()


CONTRAST = """() => {
  const parse = css => {
    const paint = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
    paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const linear = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(linear)
    .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const css = getComputedStyle(node).backgroundColor;
      if (parse(css)[3] > 250) return parse(css);
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest("[data-phase=ended], .for-readers, .skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push(node.className + " " + node.textContent.slice(0, 30));
  }
  return poor;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, canvas[tabindex]")]
  .filter(node => !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length))
  .map(node => node.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_order_for_everybody(browser: Any, server: Server, scheme: str) -> None:
    visit = Visit(browser, server.url, color_scheme=scheme)
    visit.live()
    visit.say("What is a KV cache?")
    assert visit.page.evaluate(NAMELESS) == []
    assert visit.page.evaluate(CONTRAST) == []
    assert visit.page.evaluate("document.documentElement.lang") == "en"
    visit.page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
    visit.page.click(".top", position={"x": 2, "y": 2})
    order = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        order.append(visit.page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        if visit.page.evaluate("document.activeElement === document.body"):
            break
        outline = visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or order[-1] in ("mode", "sort"), order[-1]  # those outline their label
    wanted = ["mode", "zoom-in", "over", "sort", "clear", "prompt", "probe", "send"]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places), order
    visit.close()


def test_keys_are_asked_for_and_stay_in_the_tab(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, "--api-key", "user-key", "--admin-key", "admin-key") as server:
        visit = Visit(browser, server.url)
        visit.see("#key-dialog").to_be_visible()
        visit.page.fill("#key-input", "wrong")
        visit.page.click("#key-dialog .main")
        visit.see("#key-why").to_have_text("The server does not know that key.")
        visit.see("#key-dialog").to_be_visible()
        visit.page.fill("#key-input", "user-key")
        visit.page.press("#key-input", "Enter")
        visit.see("#key-why").to_contain_text("admin")
        visit.page.click("#key-later")
        assert "8000" in visit.say(QUESTION).inner_text()  # a user may chat all the same
        visit.page.click("#key-button")
        visit.page.fill("#key-input", "admin-key")
        visit.page.press("#key-input", "Enter")
        visit.live()
        visit.see("#notice").to_be_hidden()
        assert visit.page.evaluate("Object.values(sessionStorage)") == ["admin-key"]
        assert visit.page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
        visit.complaints.clear()  # the browser notes each reply of 401 and 403
        visit.close()


def test_a_new_engine_is_shown_when_the_old_one_died(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        visit = Visit(browser, server.url)
        visit.live()
        set_system(visit, SYSTEM)
        visit.say(QUESTION)
        visit.wait(lambda: visit.blocks(CACHED) > 0)
        os.kill(server.engine_pid(), signal.SIGKILL)
        visit.see("#link").to_have_text("engine restarting…")
        visit.see("#link").to_have_text("live", timeout=WAIT_MS)
        visit.wait(lambda: visit.blocks(CACHED) == 0)
        assert "8000" in visit.say(QUESTION).inner_text()
        visit.wait(lambda: visit.blocks(CACHED) > 0)
        # A question that was on its way when the engine died got 503; the browser notes it.
        visit.complaints = [text for text in visit.complaints if "503" not in text]
        visit.close()
