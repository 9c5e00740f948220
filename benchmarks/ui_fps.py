"""Frames per second of the live page, with a large simulated pool, in a real Chromium.

The real app serves the page and the frames of `tests/helpers/ui_pool.py`, five a second; only the engine is
missing. The pointer never rests: it hovers over the atlas, then drags the zoomed atlas about. Frames are
counted where the browser asks for them (requestAnimationFrame), so that a late one counts as late. A frame
in which the atlas was drawn again is counted besides.

    python -m benchmarks.ui_fps [--blocks N] [--churn SHARE ...] [--seconds S] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, ViewportSize, sync_playwright

from benchmarks import machine

GOAL_FPS = 30
CHROMIUM = "/usr/bin/chromium"
SIZE: ViewportSize = {"width": 1440, "height": 1000}
COUNT = """seconds => new Promise(done => {
  const times = [], drawn = quire.atlas.frames, sequence = quire.pool.sequence, began = performance.now();
  const tick = now => {
    times.push(now);
    if (now - began < seconds * 1000) requestAnimationFrame(tick);
    else done({times, drawn: quire.atlas.frames - drawn, frames: quire.pool.sequence - sequence});
  };
  requestAnimationFrame(tick);
})"""


@contextmanager
def server(blocks: int, churn: float) -> Iterator[str]:
    """The app over a simulated pool; its address."""
    command = [sys.executable, "-m", "tests.helpers.ui_pool", "--port", "0", "--no-access-log"]
    command += ["--blocks", str(blocks), "--churn", str(churn), "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
    finally:
        process.terminate()
        process.wait(20)


def measure(page: Page, seconds: float, drag: bool) -> dict[str, float]:
    """Moves the pointer over the atlas for so long, and counts."""
    box = page.locator("#over").bounding_box()
    assert box is not None
    middle_x, middle_y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.evaluate(f"globalThis.counted = ({COUNT})({seconds})")
    page.mouse.move(middle_x, middle_y)
    if drag:
        page.mouse.down()
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        page.mouse.move(
            middle_x + math.cos(passed * 2.1) * box["width"] / 3,
            middle_y + math.sin(passed * 3.3) * box["height"] / 3,
        )
        time.sleep(0.01)
    if drag:
        page.mouse.up()
    result: dict[str, Any] = page.evaluate("counted")
    gaps = sorted(b - a for a, b in zip(result["times"], result["times"][1:], strict=False))
    return {
        "fps": round(1000 * len(gaps) / sum(gaps), 1),
        "atlas_fps": round(1000 * result["drawn"] / sum(gaps), 1),
        "p95_frame_ms": round(gaps[int(len(gaps) * 0.95)], 1),
        "longest_frame_ms": round(gaps[-1], 1),
        "pool_frames_per_s": round(1000 * result["frames"] / sum(gaps), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--churn", type=float, nargs="*", default=[0.0, 0.2, 1.0], metavar="SHARE")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for churn in given.churn:
            with server(given.blocks, churn) as url, browser.new_page(viewport=SIZE) as page:
                page.goto(f"{url}/ui/")
                while not page.evaluate("globalThis.quire?.pool.sequence > 3"):
                    time.sleep(0.1)
                for what in ("hover", "pan"):
                    if what == "pan":
                        for _ in range(4):
                            page.click("#zoom-in")
                    row = {"blocks": given.blocks, "churn": churn, "what": what}
                    row |= measure(page, given.seconds, drag=what == "pan")
                    rows.append(row)
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        browser.close()
    worst = min(row["fps"] for row in rows)
    print(f"lowest: {worst} frames per second; the goal is {GOAL_FPS}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
