// The last 15 minutes as charts (uPlot), and the curve of what a pool of another size would have reused.
//
// The library is put beside this file by `make install`. Without it everything else still works, and each
// chart says how to get it.

import { duration, percent, short } from "./format.js";
import { $, el, setText } from "./dom.js";
import { variable } from "./palette.js";

const WINDOW_S = 900;
const SHORTEST_S = 60; // a server that has just started
const MOST = 460;
const HEIGHT = 150;
const FONT = "11px system-ui, sans-serif";

const series = (label, colour, extra = {}) => ({ label, colour, ...extra });

// Each chart: where, its lines, a sample -> their values. Stacked ones are given from the bottom up.
const CHARTS = [
  {
    id: "c-occupancy", stacked: true, format: short,
    lines: [series("in use", "--in-use"), series("shared", "--shared"), series("cached", "--cached"), series("free", "--free-line")],
    // "In use" on the server counts shared blocks too; stacked, each block is drawn once.
    values: ({ blocks: b }) => [b.in_use - b.shared, b.shared, b.cached, b.free],
  },
  {
    id: "c-hit", format: percent, range: [0, 1],
    lines: [series("reused", "--reused", { fill: true })],
    values: (s) => [s.query_tokens_per_s > 0 ? s.hit_tokens_per_s / s.query_tokens_per_s : null],
  },
  {
    id: "c-throughput", format: short,
    lines: [series("prompt", "--computed"), series("generated", "--output")],
    values: (s) => [s.prompt_tokens_per_s, s.generated_tokens_per_s],
  },
  {
    id: "c-latency", format: duration, log: true,
    lines: [
      series("first token p50", "--computed"), series("p95", "--computed", { dash: [4, 3] }),
      series("next token p50", "--output"), series("p95", "--output", { dash: [4, 3] }),
    ],
    values: (s) => [s.ttft_p50_s, s.ttft_p95_s, s.inter_token_p50_s, s.inter_token_p95_s],
  },
];

export class Charts {
  constructor() {
    this.samples = [];
    this.plots = [];
    this.whatif = null;
    this.missing = typeof uPlot === "undefined";
    for (const { id } of [...CHARTS, { id: "c-whatif" }]) {
      if (this.missing) $(id).replaceChildren(el("p.empty", {}, "Charts need uPlot, which is fetched when Quire is installed by ", el("code", {}, "make install"), "."));
      else new ResizeObserver(() => this.#resize(id)).observe($(id));
    }
  }

  start(history) {
    this.samples = history.slice(-MOST);
    this.setTheme();
  }

  add(sample) {
    this.samples.push(sample);
    while (this.samples.length > MOST || this.samples[0].t < sample.t - WINDOW_S - 4) this.samples.shift();
    this.#fill();
  }

  /** Colours are the canvas's own, so a new theme means new charts. */
  setTheme() {
    if (this.missing) return;
    for (const plot of this.plots) plot.destroy();
    this.plots = CHARTS.map((chart) => new uPlot(options(chart), empty(chart), $(chart.id)));
    this.whatif?.destroy();
    this.whatif = new uPlot(whatIfOptions(), [[], [], []], $("c-whatif"));
    this.#fill();
  }

  #fill() {
    if (!this.missing && document.hidden) return;
    this.#sentence();
    if (this.missing) return;
    const now = this.samples.at(-1)?.t ?? Date.now() / 1000;
    const from = Math.max(now - WINDOW_S, Math.min(this.samples[0]?.t ?? now, now - SHORTEST_S));
    const times = this.samples.map((sample) => sample.t);
    CHARTS.forEach((chart, at) => {
      const plot = this.plots[at];
      plot.batch(() => {
        plot.setData([times, ...columns(chart, this.samples)], false);
        plot.setScale("x", { min: from, max: now });
        if (!chart.log) plot.setScale("y", { min: 0, max: top(chart, plot.data) });
        else plot.setScale("y", logRange(plot.data));
      });
      newest(plot);
    });
  }

  /** "A pool twice as large would have hit 71 % instead of 43 %." */
  #sentence() {
    const last = this.samples.findLast((sample) => sample.whatif);
    const points = Object.entries(last?.whatif ?? {}).filter(([, ratio]) => ratio != null).map(([size, ratio]) => [Number(size), ratio]).sort((a, b) => a[0] - b[0]);
    setText($("whatif-text"), sentence(points, last?.hit_ratio));
    if (!this.whatif) return;
    this.whatif.batch(() => {
      this.whatif.setData([points.map(([size]) => Math.log2(size)), points.map(([, ratio]) => ratio), points.map(([size, ratio]) => (size === 1 ? ratio : null))], false);
      this.whatif.setScale("x", { min: -1.15, max: 3.15 });
      this.whatif.setScale("y", { min: 0, max: 1 });
    });
  }

  #resize(id) {
    const plot = id === "c-whatif" ? this.whatif : this.plots[CHARTS.findIndex((chart) => chart.id === id)];
    const width = $(id).clientWidth;
    if (plot && width && plot.width !== width) plot.setSize({ width, height: HEIGHT });
  }
}

/** While nobody points at a moment, the legend tells of the last one. */
function newest(plot) {
  if (plot.cursor.left == null || plot.cursor.left < 0) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

const empty = (chart) => [[], ...chart.lines.map(() => [])];

/** The chart's columns; stacked ones summed from the bottom, the top line first, so that fills overlap right. */
function columns(chart, samples) {
  const rows = samples.map(chart.values);
  const plain = chart.lines.map((_, at) => rows.map((row) => row[at] ?? null));
  if (!chart.stacked) return plain;
  for (let at = 1; at < plain.length; at++) plain[at] = plain[at].map((value, i) => value + plain[at - 1][i]);
  return plain.reverse();
}

function top(chart, data) {
  if (chart.range) return chart.range[1];
  let most = 0;
  for (const column of data.slice(1)) for (const value of column) if (value > most) most = value;
  return chart.stacked ? most || 1 : nice(most);
}

/** The next 1, 2 or 5 times a power of ten. */
function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 1.02);
}

function logRange(data) {
  let [low, high] = [Infinity, 0];
  for (const column of data.slice(1))
    for (const value of column)
      if (value > 0) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!high) return { min: 0.001, max: 1 };
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  return { min: 10 ** from, max: 10 ** (to === from ? to + 1 : to) };
}

function axes(format, log) {
  const common = { stroke: variable("--dim"), font: FONT, grid: { stroke: variable("--rule"), width: 1 }, ticks: { show: false } };
  const values = (_, marks) => marks.map((mark) => (mark == null ? "" : format(mark)));
  return [{ ...common, size: 26, space: 60, values: (plot, marks) => marks.map(clock(plot.scales.x.max - plot.scales.x.min)) }, { ...common, size: 52, space: 28, values, ...(log ? { splits: decades } : {}) }];
}

const clock = (range) => (seconds) =>
  new Date(seconds * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: range < 300 ? "2-digit" : undefined });

/** 0.001, 0.01, ...: what is between is read at the pointer. */
function decades(plot, axis, low, high) {
  const marks = [];
  for (let at = Math.round(Math.log10(low)); 10 ** at <= high * 1.001; at++) marks.push(10 ** at);
  return marks;
}

function options(chart) {
  const width = $(chart.id).clientWidth || 320;
  const lines = chart.lines.map((line) => {
    const stroke = variable(line.colour);
    return {
      label: line.label, stroke, width: chart.stacked ? 0.5 : 1.5, dash: line.dash, points: { show: false }, spanGaps: false,
      fill: chart.stacked ? stroke : line.fill ? `color-mix(in srgb, ${stroke} 22%, transparent)` : undefined,
      value: (plot, raw, at, index) => (raw == null ? "–" : chart.format(chart.stacked ? own(plot, raw, at, index) : raw)),
    };
  });
  return {
    width, height: HEIGHT, padding: [8, 10, 0, 0],
    cursor: { sync: { key: "time", setSeries: false }, drag: { x: false, y: false } },
    legend: { live: true },
    hooks: { setCursor: [newest] },
    scales: { x: { time: true, auto: false }, y: { auto: false, distr: chart.log ? 3 : 1 } },
    axes: axes(chart.format, chart.log),
    series: [{ label: "at", value: (_, raw) => (raw == null ? "–" : new Date(raw * 1000).toLocaleTimeString("en-GB")) }, ...(chart.stacked ? lines.reverse() : lines)],
  };
}

/** A stacked line's own value: the sum at its height without the one below. */
const own = (plot, raw, at, index) => raw - (plot.data[at + 1]?.[index] ?? 0);

function whatIfOptions() {
  const stroke = variable("--reused");
  return {
    width: $("c-whatif").clientWidth || 320, height: HEIGHT, padding: [8, 14, 0, 0],
    cursor: { drag: { x: false, y: false } },
    legend: { show: false },
    scales: { x: { time: false, auto: false }, y: { auto: false } },
    axes: axes(percent).map((axis, at) => (at ? axis : { ...axis, splits: () => [-1, 0, 1, 2, 3], values: () => ["½×", "now", "2×", "4×", "8×"] })),
    series: [
      {},
      { label: "would have hit", stroke, width: 2, fill: `color-mix(in srgb, ${stroke} 18%, transparent)`, points: { show: true, size: 6, fill: variable("--panel"), stroke } },
      { label: "now", stroke: variable("--text"), width: 0, points: { show: true, size: 9, fill: variable("--text") } },
    ],
  };
}

const NAMES = new Map([[0.5, "half as large"], [2, "twice as large"], [4, "four times as large"], [8, "eight times as large"]]);
const WORTHWHILE = 0.02;

export function sentence(points, measured) {
  if (!points.length || measured == null) return "No prompts in the last 15 minutes.";
  const larger = points.filter(([size]) => size > 1);
  const best = Math.max(...larger.map(([, ratio]) => ratio));
  // The smallest pool that gets nearly all there is to get.
  const found = larger.find(([, ratio]) => ratio >= best - WORTHWHILE);
  if (found && best > measured + WORTHWHILE)
    return `A pool ${NAMES.get(found[0])} would have hit ${percent(found[1])} instead of ${percent(measured)}.`;
  const half = points.find(([size]) => size === 0.5)?.[1];
  if (half != null && half >= measured - WORTHWHILE)
    return `The pool is large enough: half of it would have hit ${percent(half)}, too.`;
  return `A larger pool would not help: it hits ${percent(measured)}, and there is nothing more to reuse.`;
}
