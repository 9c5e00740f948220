"""The dashboards: as generated, without overlap, complete, and tied to the provisioned data source."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import generate, kv_cache, serving
from deploy.grafana.panels import COLUMNS, Row, dashboard, lines
from engine.stats import SECONDS
from server.metrics import Metrics
from tests.helpers.fake_client import FakeClient

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "deploy/grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
OTHER_RULES = [ROOT / "deploy/prometheus/rules.yml", ROOT / "deploy/prometheus/alerts.yml"]

# In no panel: there is nothing to draw.
NOT_SHOWN: set[str] = set()

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def datasource() -> dict[str, Any]:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    return dict(source)


@pytest.mark.parametrize("path, text", list(generate.files()), ids=lambda value: str(value)[-20:])
def test_what_is_committed_is_what_the_generator_makes(path: Path, text: str) -> None:
    assert (ROOT / path).read_text() == text, "python -m deploy.grafana.generate"


def test_the_generator_makes_every_dashboard_there_is() -> None:
    assert set(BOARDS) == set(generate.BOARDS) == {"kv-cache", "serving"}
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)


@each_board
def test_numbers_are_unique_and_there_is_none_of_its_own(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert "id" not in board
    for panel in panels(board):
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)), panel["title"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    return set(
        itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    )


def overlaps(board: dict[str, Any]) -> list[str]:
    taken: dict[tuple[int, int], str] = {}
    found = []
    for panel in board["panels"]:
        for cell in cells(panel):
            if cell in taken:
                found.append(f"{panel['title']} on {taken[cell]}")
            taken[cell] = panel["title"]
    return found


@each_board
def test_panels_lie_side_by_side(board: dict[str, Any]) -> None:
    assert overlaps(board) == []
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= COLUMNS, panel["title"]
        assert place["w"] >= 3 and place["h"] >= 1


def test_panels_of_any_width_and_height_are_laid_out_without_overlap() -> None:
    shapes = [(6, 4), (24, 2), (10, 9), (8, 3), (8, 5), (20, 1), (4, 8), (24, 24)]
    rows = [
        Row("r", [lines("p", "m", "a", [], width=w, height=h) for w, h in order])
        for order in itertools.permutations(shapes, 3)
    ]
    assert overlaps(dashboard("u", "t", "d", rows[:60])) == []


@each_board
def test_rows_are_filled_to_the_edge(board: dict[str, Any]) -> None:
    widths: dict[int, int] = {}
    for panel in board["panels"]:
        widths[panel["gridPos"]["y"]] = widths.get(panel["gridPos"]["y"], 0) + panel["gridPos"]["w"]
    assert set(widths.values()) == {COLUMNS}, widths


@each_board
def test_every_panel_says_what_it_means_and_what_to_do(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(titles) == len(set(titles))
    for panel in panels(board):
        meaning, _, action = panel["description"].partition("\n\n**What to do:** ")
        assert meaning.endswith(".") and action.endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] in ("heatmap", "table")
        if panel["type"] in ("stat", "timeseries"):
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None
            values = [step["value"] for step in steps[1:]]
            assert values == sorted(values), panel["title"]


def test_panels_that_are_named_in_a_text_exist() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    boards = [board["title"].removeprefix("Quire / ") for board in BOARDS.values()]
    titles = {panel["title"] for board in BOARDS.values() for panel in board["panels"]}
    titles |= {*re.findall(r"^### (.+)$", page, flags=re.M), *boards}
    texts = [panel["description"] for board in BOARDS.values() for panel in panels(board)]
    texts.append(page[page.index("\n## Alerts\n") : page.index("\n## Measure a running server\n")])
    others = {"new", "reused", "in use", "shared", "slo", "targets"}  # legends, and a page of Prometheus
    for text in texts:
        named = set(re.findall(r"(?<![*\w])\*([^*]+)\*(?!\*)", text))
        assert {name for name in named - titles if name.lower() not in others} == set()


@each_board
def test_every_query_asks_the_provisioned_data_source(board: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == datasource()["type"] == "prometheus"
    assert variables["datasource"]["current"]["value"] == datasource()["uid"]
    askers = [*panels(board), *board["annotations"]["list"], variables["model"], variables["instance"]]
    askers += [target for panel in panels(board) for target in panel["targets"]]
    assert {asker["datasource"]["uid"] for asker in askers} == {"${datasource}"}


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


@each_board
def test_every_expression_looks_at_the_chosen_servers_only(board: dict[str, Any]) -> None:
    for expr in expressions(board):
        selectors = re.findall(r"quire_\w+(\{[^}]*\})?", expr)
        assert selectors and all('instance=~"$instance"' in selector for selector in selectors), expr


@each_board
def test_every_variable_used_is_one_that_exists(board: dict[str, Any]) -> None:
    known = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", " ".join(expressions(board))))
    assert used - known == {"__rate_interval", "__range"} & used


def test_targets_are_bounds_of_the_histograms() -> None:
    bounds = {str(bound) for bound in SECONDS}
    assert set(serving.FIRST_TOKEN_TARGETS) <= bounds
    assert set(serving.INTER_TOKEN_TARGETS) <= bounds


def exposed() -> dict[str, str]:
    """name -> type, as /metrics has them."""
    text = Metrics(FakeClient()).text().decode()
    return dict(re.findall(r"^# TYPE (quire_\S+) (\w+)", text, flags=re.M))


def used_metrics() -> set[str]:
    texts = [expr for board in BOARDS.values() for expr in expressions(board)]
    texts += [rule.read_text() for rule in OTHER_RULES]
    names = set(re.findall(r"(?<![\w:])(quire_\w+)", " ".join(texts)))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def test_dashboards_and_rules_use_metrics_that_exist() -> None:
    assert used_metrics() - set(exposed()) == set()


def test_every_metric_is_on_a_dashboard() -> None:
    assert set(exposed()) - used_metrics() == NOT_SHOWN


@each_board
def test_counters_are_never_shown_raw_and_gauges_never_as_rates(board: dict[str, Any]) -> None:
    kinds = exposed()
    for expr in expressions(board):
        rated = set(re.findall(r"(?:rate|increase)\((quire_\w+)", expr))
        for name in set(re.findall(r"quire_\w+", expr)):
            kind = kinds[re.sub(r"_(bucket|sum|count)$", "", name)]
            if name == "quire_engine_restarts_total" and name not in rated:
                continue  # shown as the count it is
            assert (name in rated) == (kind in ("counter", "histogram")), expr


def test_provisioning_reads_where_compose_mounts() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/quire.yaml").read_text())["providers"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert datasource()["url"] == "http://prometheus:9090"


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert datasource()["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_the_two_boards_are_about_different_things() -> None:
    assert not set(expressions(kv_cache.make())) & set(expressions(serving.make())) - {
        # Work needs both.
        *(expr for expr in expressions(serving.make()) if "quire_requests_waiting" in expr),
    }
