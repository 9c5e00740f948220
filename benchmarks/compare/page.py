"""The tables of docs/performance.md. Knows the findings as plain values, not the servers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.statistics import Summary, compare

BEGIN = "<!-- written by `python -m benchmarks.compare`: begin -->"
END = "<!-- end -->"
OURS = "quire"
Row = dict[str, Any]


def write_page(page: Path, content: dict[str, Any]) -> None:
    """Replaces what is between the page's two markers. Raises ValueError where it lacks them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no markers {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{render(content)}\n\n{END}{after}")


def render(content: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    parts = [_conditions(content)]
    for model in content["models"]:
        runs = [run for run in content["runs"] if run["model"] == model]
        for group in _unique(run["group"] for run in runs):
            parts.append(f"### {model}, {group}")
            parts.append(_loads_table(content, [run for run in runs if run["group"] == group]))
        parts.append(f"### {model}, start")
        parts.append(_starts_table([start for start in content["starts"] if start["model"] == model]))
        absent = [row for row in content["absent"] if row["model"] == model]
        parts += [f"`{row['engine']}` did not start here: {row['reason']}" for row in absent]
    return "\n\n".join(parts)


def _conditions(content: dict[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    disturbed = sum(run["disturbed"] for run in content["runs"])
    hardware = "{cores} cores of {cpu}, Python {python}, torch {torch}".format_map(machine)
    limits = f"{content['limit_cores']:g} cores in each of {content['attempts']} attempts"
    text = (
        f"{hardware}, {machine['when'][:10]}; {versions}. {content['repeats']} rounds; medians, with the "
        f"lowest and the highest in brackets. {disturbed} of {len(content['runs'])} runs were disturbed: "
        f"something else took more than {limits}."
    )
    loads = [f"- {name}: {load}" for name, load in content["loads"].items()]
    return "\n".join([textwrap.fill(text, 120, break_long_words=False), "", *loads])


def _loads_table(content: dict[str, Any], runs: list[Row]) -> str:
    head = (
        "load", "engine", "output tok/s", "against the best peer", "first token p50 / p95, ms",
        "its p95 against the best peer", "between tokens p50 / p95, ms", "of the bound",
        "cores taken by others",
    )  # fmt: skip
    rows = []
    for load in content["loads"]:
        of_load = [run for run in runs if run["load"] == load]
        bound = content.get("bounds", {}).get(runs[0]["model"], {}).get(runs[0]["group"], {}).get(load, 0.0)
        engines = _unique(run["engine"] for run in of_load)
        rows += [_load_row(load, engine, of_load, bound) for engine in engines]
    return _table(head, rows)


def _load_row(load: str, engine: str, runs: list[Row], bound: float) -> list[str]:
    own = [run for run in runs if run["engine"] == engine]
    good = [run for run in own if not run["fault"]]
    if not good:
        return [load, engine, f"failed: {own[-1]['fault']}", *[""] * 6]

    def ms(name: str, digits: int) -> str:
        return f"{1000 * Summary.of([run[name] for run in good]).median:,.{digits}f}"

    speed = Summary.of([run["tokens_per_s"] for run in good])
    return [
        load,
        engine,
        f"{_number(speed.median)} ({_number(speed.low)}-{_number(speed.high)})",
        _against_peers(engine, runs, "tokens_per_s", higher_is_better=True),
        f"{ms('ttft_p50_s', 0)} / {ms('ttft_p95_s', 0)}",
        _against_peers(engine, runs, "ttft_p95_s", higher_is_better=False),
        f"{ms('gap_p50_s', 1)} / {ms('gap_p95_s', 1)}",
        f"{speed.median / bound:.0%}" if bound else "",
        f"{Summary.of([run['others_cores'] for run in good]).median:.2f}",
    ]


def _against_peers(engine: str, runs: list[Row], name: str, *, higher_is_better: bool) -> str:
    """Empty for a peer: the page compares Quire, not the peers among themselves."""
    if not _is_ours(engine):
        return ""
    summaries = {
        other: Summary.of(values)
        for other in _unique(run["engine"] for run in runs)
        if (values := [run[name] for run in runs if run["engine"] == other and not run["fault"]])
    }
    peers = {other: found for other, found in summaries.items() if not _is_ours(other)}
    found = compare(summaries[engine], peers, higher_is_better=higher_is_better)
    return f"{found.ratio:.2f} x {found.peer}: {found.verdict}" if found else "no peer"


def _starts_table(starts: list[Row]) -> str:
    rows = []
    for engine in _unique(start["engine"] for start in starts):
        own = [start for start in starts if start["engine"] == engine]
        ready = Summary.of([start["ready_s"] for start in own])
        resident = Summary.of([start["resident_bytes"] / 1e6 for start in own])
        spread = f"({ready.low:.1f}-{ready.high:.1f})"
        rows.append([engine, f"{ready.median:.1f} {spread}", f"{resident.median:,.0f}"])
    return _table(("engine", "ready after, s", "resident, MB"), rows)


def _table(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _is_ours(engine: str) -> bool:
    return engine.split(":")[0] == OURS


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
