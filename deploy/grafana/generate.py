"""Writes the dashboards, and their panels' meaning into docs/operations.md.

    python -m deploy.grafana.generate

Both are committed: Grafana reads files, people read pages. A test holds them to this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from deploy.grafana import kv_cache, serving
from deploy.grafana.panels import Json

ROOT = Path(__file__).resolve().parents[2]
BOARDS = {"kv-cache": kv_cache.make, "serving": serving.make}
PAGE = Path("docs/operations.md")


def files() -> Iterator[tuple[Path, str]]:
    """Every generated file, by its path from the root."""
    page = (ROOT / PAGE).read_text()
    for name, make in BOARDS.items():
        board = make()
        yield Path(f"deploy/grafana/dashboards/{name}.json"), json.dumps(board, indent=1) + "\n"
        page = _replace(page, name, _table(board))
    yield PAGE, page


def _table(board: Json) -> str:
    lines = []
    for panel in board["panels"]:
        if panel["type"] == "row":
            lines += ["", f"**{panel['title']}**", "", "| panel | what it shows | what to do |"]
            lines += ["| --- | --- | --- |"]
        else:
            meaning, action = panel["description"].split("\n\n**What to do:** ")
            lines.append(f"| {panel['title']} | {meaning} | {action} |")
    return "\n".join(lines[1:]) + "\n"


def _replace(page: str, name: str, text: str) -> str:
    start, end = f"<!-- panels of {name}, generated -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE} has no place for the panels of {name}: {start!r} to {end!r}")
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    for path, text in files():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
