"""The documentation against the code: links, paths, flags, variables, words, examples."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.compare.__main__ import make_parser as compare_parser
from server import settings, terminal
from server.bench.options import make_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "kernels/README.md",
        ROOT / "benchmarks/README.md",
    ]
)
TOP = {"server", "engine", "kernels", "tests", "docs", "benchmarks", "training", "deploy", ".ci"}


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, spaces to hyphens, punctuation gone."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def mentioned_paths(text: str) -> Iterator[str]:
    """`engine/core.py`, `tests/`, `docs/adr/`: in backticks, from the root, without wildcards."""
    for code in re.findall(r"`([\w.\-/*]+)`", text):
        if "/" in code and code.split("/")[0] in TOP and "*" not in code:
            yield code


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_in_backticks_exist(page: Path) -> None:
    assert [path for path in mentioned_paths(page.read_text()) if not (ROOT / path).exists()] == []


def serve_options() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    settings.add_arguments(parser)
    return options_of(parser)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_serve_flag_is_documented_with_its_variable() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    missing = [
        name
        for flag in (*settings.SERVER_FLAGS, *settings.ENGINE_FLAGS)
        for name in (flag.option, flag.variable)
        if f"`{name}" not in text
    ]
    assert missing == []


# Of the scripts in benchmarks/.
SCRIPT_FLAGS = {
    "--only",
    "--png",
    "--size",
    "--tokens",
    "--every",
    "--input",
    "--output",
    "--fa3",
    "--archs",
    "--merge",  # llama.cpp's
    "--repeats",
    "--threads",
    "--streams",
    "--prompt",
    "--models",
    "--budget",
    "--dry-run",
    "--json",
    "--part",
    "--table",
    "--tune",
}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_flag_mentioned_exists(page: Path) -> None:
    if page.is_relative_to(ROOT / "docs/adr") or page.parent.name in ("benchmarks", "kernels"):
        pytest.skip("speaks of other programs' flags")
    text = re.sub(r"^.*\b(pip|docker|git|curl|make|python -m venv)\b.*$", "", page.read_text(), flags=re.M)
    flags = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*[a-z0-9])", text))
    parsers = (make_parser(), terminal.make_parser(), compare_parser())
    known = serve_options().union(SCRIPT_FLAGS, *map(options_of, parsers))
    assert flags - known == set()


def test_the_glossarys_words_are_used() -> None:
    glossary = ROOT / "docs/glossary.md"
    words = re.findall(r"^\| \*\*(.+?)\*\*", glossary.read_text(), flags=re.M)
    assert len(words) == len(set(words))
    others = " ".join(page.read_text() for page in PAGES if page != glossary)
    code = " ".join(
        file.read_text() for package in ("server", "engine") for file in (ROOT / package).rglob("*.py")
    )
    text = re.sub(r"[\s_]+", " ", f"{others} {code}".lower())
    assert [word for word in words if word.lower() not in text] == []


def test_the_python_in_the_readme_compiles() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_pictures_are_small_and_described() -> None:
    for picture in (ROOT / "docs/img").iterdir():
        assert picture.stat().st_size < 200 * 1024, picture
        if picture.suffix == ".svg":
            assert "<title" in picture.read_text(), picture
    for page in PAGES:
        assert not re.search(r"!\[\]\(", page.read_text()), f"{page} has a picture without a description"


def test_decisions_are_numbered_without_gaps_and_say_their_status() -> None:
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    for number, page in enumerate(pages, 1):
        title, status = page.read_text().split("\n\n")[:2]
        assert page.name.startswith(f"{number:04d}-"), page.name
        assert re.match(rf"# (ADR )?{number:04d}|# {number}\. ", title), title
        assert re.search(r"\b(accepted|superseded|proposed)\b", status, flags=re.I), page.name
