"""Grafana's classic dashboard model, as far as the dashboards need it: one function per kind of panel.

Knows JSON fields, the grid of 24 columns and the variables that every query uses. Does not know what is
measured: the queries are in `kv_cache` and `serving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

COLUMNS = 24
DATASOURCE_UID = "quire-prometheus"  # provisioning/datasources/prometheus.yaml
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
INSTANCE = 'instance=~"$instance"'
WINDOW = "$__rate_interval"

BLUE, GREEN, ORANGE, RED, PURPLE, YELLOW, GREY = (
    "blue", "green", "orange", "red", "purple", "yellow", "#8e8e8e",
)  # fmt: skip
PERCENTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Query:
    """One expression. `legend` may name labels: {{tenant}}."""

    expr: str
    legend: str = ""
    format: str = "time_series"
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """What is in a panel and how large it is; where it lies and its number come from its dashboard.

    `meaning` says what is shown, `action` what to do about it; both are in the panel's tooltip and in
    docs/operations.md.
    """

    kind: str
    title: str
    meaning: str
    action: str
    queries: Sequence[Query]
    width: int
    height: int
    defaults: Json
    options: Json
    overrides: Sequence[Json] = ()
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


def of(metric: str, *labels: str) -> str:
    """The selector of a metric on the chosen instances."""
    return f"{metric}{{{', '.join((INSTANCE, *labels))}}}"


def rate(metric: str, *labels: str, by: str = "", window: str = WINDOW) -> str:
    """Per second, summed over instances; `by` keeps labels apart."""
    return f"sum{_by(by)}(rate({of(metric, *labels)}[{window}]))"


def increase(metric: str, *labels: str, by: str = "", window: str = "$__range") -> str:
    return f"sum{_by(by)}(increase({of(metric, *labels)}[{window}]))"


def total(metric: str, *labels: str, by: str = "") -> str:
    """A gauge, summed over instances."""
    return f"sum{_by(by)}({of(metric, *labels)})"


def quantile(share: float, histogram: str, window: str = WINDOW) -> str:
    return f"histogram_quantile({share:g}, {rate(histogram + '_bucket', by='le', window=window)})"


def within(histogram: str, bound: str, window: str = WINDOW) -> str:
    """The share of observations up to a bound, which must be one of the histogram's own."""
    label = f'le="{bound}"'
    return (
        f"{rate(histogram + '_bucket', label, window=window)} / {rate(histogram + '_count', window=window)}"
    )


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


def percentiles(
    title: str, meaning: str, action: str, histogram: str, width: int = 8, unit: str = "s"
) -> Panel:
    queries = [Query(quantile(share, histogram), f"p{share * 100:g}") for share in PERCENTILES]
    return lines(title, meaning, action, queries, unit=unit, width=width)


def lines(
    title: str,
    meaning: str,
    action: str,
    queries: Sequence[Query],
    *,
    unit: str = "short",
    width: int = 8,
    height: int = 8,
    stacked: bool = False,
    colors: Mapping[str, str] | None = None,
    thresholds: Sequence[tuple[float, str]] = (),
    top: float | None = None,
    dashed: Sequence[str] = (),
) -> Panel:
    """Curves over time. `thresholds` are drawn as lines; `dashed` names legends."""
    custom: Json = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 70 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if thresholds else "off"},
    }
    overrides = [_override(name, "color", _fixed(color)) for name, color in (colors or {}).items()]
    overrides += [_override(name, "custom.lineStyle", {"dash": [8, 8], "fill": "dash"}) for name in dashed]
    options = {
        "legend": {"calcs": ["mean", "max", "lastNotNull"], "displayMode": "table", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "none" if stacked else "desc"},
    }
    return Panel(
        "timeseries", title, meaning, action, queries, width, height,
        _defaults(unit, thresholds, top, custom), options, overrides,
    )  # fmt: skip


def stat(
    title: str,
    meaning: str,
    action: str,
    expr: str,
    *,
    unit: str = "short",
    thresholds: Sequence[tuple[float, str]] = (),
    mappings: Sequence[Json] = (),
    start: str = GREEN,
    width: int = 3,
    decimals: int | None = None,
) -> Panel:
    """One number with its recent past behind it."""
    defaults = _defaults(unit, thresholds, None, {}, start)
    defaults["mappings"] = list(mappings)
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    }
    return Panel("stat", title, meaning, action, [Query(expr)], width, 4, defaults, options)


def bar_gauge(
    title: str,
    meaning: str,
    action: str,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int,
    top: float | None = None,
) -> Panel:
    options = {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "showUnfilled": True,
        "valueMode": "color",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    defaults = _defaults(unit, (), top, {}, BLUE)
    return Panel("bargauge", title, meaning, action, queries, width, 8, defaults, options)


def heatmap(
    title: str, meaning: str, action: str, histogram: str, *, unit: str = "s", width: int = 8
) -> Panel:
    """How many observations fell into each bucket, over time."""
    expr = increase(histogram + "_bucket", by="le", window=WINDOW)
    options = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": "short"},
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "scale": "exponential",
            "exponent": 0.5,
            "steps": 64,
        },
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    custom = {"scaleDistribution": {"type": "linear"}}
    return Panel(
        "heatmap", title, meaning, action, [Query(expr, "{{le}}", "heatmap")], width, 8,
        {"custom": custom}, options,
    )  # fmt: skip


def timeline(
    title: str, meaning: str, action: str, query: Query, mappings: Sequence[Json], width: int
) -> Panel:
    """States over time, one band for each series."""
    options = {
        "mergeValues": True,
        "showValue": "never",
        "rowHeight": 0.9,
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single"},
    }
    defaults = _defaults("short", (), None, {"fillOpacity": 80, "lineWidth": 0})
    defaults["mappings"] = list(mappings)
    return Panel("state-timeline", title, meaning, action, [query], width, 8, defaults, options)


def facts(title: str, meaning: str, action: str, metric: str, width: int = COLUMNS, height: int = 4) -> Panel:
    """The labels of an info metric as a table, one line for each instance."""
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
    extra = {
        "transformations": [
            {"id": "organize", "options": {"excludeByName": hidden, "indexByName": {"instance": 0}}}
        ]
    }
    query = Query(of(metric), format="table", instant=True)
    defaults = {"custom": {"align": "left", "filterable": False}}
    options = {"showHeader": True, "cellHeight": "sm"}
    return Panel("table", title, meaning, action, [query], width, height, defaults, options, (), extra)


def value_map(texts: Mapping[str, tuple[str, str]]) -> list[Json]:
    """Values shown as words: {"1": ("up", "green")}."""
    options = {
        value: {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return [{"type": "value", "options": options}]


def choice(name: str, label: str, values: Sequence[str], chosen: str, description: str) -> Json:
    """A variable with a fixed list of values."""
    return {
        "type": "custom",
        "name": name,
        "label": label,
        "description": description,
        "query": ",".join(values),
        "current": {"text": chosen, "value": chosen, "selected": True},
        "options": [{"text": value, "value": value, "selected": value == chosen} for value in values],
        "multi": False,
        "includeAll": False,
        "hide": 0,
    }


def dashboard(
    uid: str, title: str, description: str, rows: Sequence[Row], variables: Sequence[Json] = ()
) -> Json:
    """A whole dashboard: panels numbered and laid out row by row, from left to right."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["quire"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "timepicker": {},
        "annotations": {"list": [_restarts()]},
        "links": [
            {
                "type": "dashboards", "tags": ["quire"], "title": "Quire", "asDropdown": False,
                "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link",
            }
        ],
        "templating": {"list": [*_where(), *variables]},
        "panels": _lay_out(rows),
    }  # fmt: skip


def _where() -> list[Json]:
    datasource = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": DATASOURCE_UID, "selected": True},
        "hide": 0,
    }
    models = _labels("model", "Model", "label_values(quire_build_info, model)")
    instances = _labels("instance", "Server", 'label_values(quire_build_info{model=~"$model"}, instance)')
    return [datasource, models, instances]


def _labels(name: str, label: str, query: str) -> Json:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*" if name == "model" else None,
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        "hide": 0,
    }


def _restarts() -> Json:
    return {
        "name": "Engine restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": RED,
        "expr": f"sum by (instance) (increase({of('quire_engine_restarts_total')}[{WINDOW}])) > 0",
        "titleFormat": "Engine restarted",
        "textFormat": "{{instance}}",
    }


def _lay_out(rows: Sequence[Row]) -> list[Json]:
    panels: list[Json] = []
    top = 0
    for row in rows:
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "gridPos": place,
             "panels": []}
        )  # fmt: skip
        left, line, top = 0, top + 1, top + 1
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, line = 0, top
            place = {"x": left, "y": line, "w": panel.width, "h": panel.height}
            panels.append(_panel(panel, len(panels) + 1, place))
            left, top = left + panel.width, max(top, line + panel.height)
    return panels


def _panel(panel: Panel, number: int, place: Json) -> Json:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": f"{panel.meaning}\n\n**What to do:** {panel.action}",
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(query, index) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": panel.defaults, "overrides": list(panel.overrides)},
        "options": panel.options,
        **panel.extra,
    }


def _target(query: Query, index: int) -> Json:
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": query.format,
        "instant": query.instant,
        "range": not query.instant,
    }


def _defaults(
    unit: str,
    thresholds: Sequence[tuple[float, str]],
    top: float | None,
    custom: Json,
    start: str = GREEN,
) -> Json:
    steps: list[Json] = [{"color": start, "value": None}]
    steps += [{"color": color, "value": value} for value, color in thresholds]
    defaults: Json = {
        "unit": unit,
        "min": 0,
        "color": {"mode": "palette-classic" if custom else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": custom,
    }
    if top is not None:
        defaults["max"] = top
    return defaults


def _override(name: str, what: str, value: Any) -> Json:
    return {"matcher": {"id": "byName", "options": name}, "properties": [{"id": what, "value": value}]}


def _fixed(color: str) -> Json:
    return {"mode": "fixed", "fixedColor": color}
