// One lane per live request: its phase, how far it is, and a short afterglow when it ends.

import { count, duration, plural, shortId } from "./format.js";
import { $, el, keyed, setText } from "./dom.js";

const GLOW_MS = 1600;
const MOST = 40;
const PARTS = ["reused", "computed", "todo", "output"];

export class Lanes {
  /** @param on {highlight(highlight | null)} */
  constructor(pool, on) {
    Object.assign(this, { pool, on });
    this.glow = new Map(); // key -> {lane, until}
    this.live = new Map();
    this.shownAt = 0;
  }

  /** After a frame: who is here, who has just left. */
  changed(now) {
    const live = new Map(this.pool.lanes.map((lane) => [`${lane.id}/${lane.index}`, lane]));
    for (const [name, lane] of this.live) if (!live.has(name)) this.glow.set(name, { lane, until: now + GLOW_MS });
    for (const name of live.keys()) this.glow.delete(name);
    this.live = live;
    this.shownAt = now;
    this.render(now);
  }

  render(now = performance.now()) {
    for (const [name, { until }] of this.glow) if (until <= now) this.glow.delete(name);
    const rows = [...this.live].map(([name, lane]) => ({ name, lane, over: false }));
    for (const [name, { lane }] of this.glow) rows.push({ name, lane, over: true });
    rows.sort((a, b) => b.lane.age_s - a.lane.age_s);
    const shown = rows.slice(0, MOST);
    this.scale = Math.max(64, ...shown.map(({ lane }) => lane.prompt_tokens + lane.output_tokens));
    keyed($("lanes"), shown, (row) => row.name, (row) => this.#make(row), (node, row) => this.#update(node, row, now));
    const left = this.live.size + this.pool.lanesLeftOut - shown.filter((row) => !row.over).length;
    setText($("lanes-about"), this.live.size ? plural(this.live.size + this.pool.lanesLeftOut, "request") + (left > 0 ? `, ${count(left)} not shown` : "") : "");
    $("lanes-empty").hidden = rows.length > 0;
    clearTimeout(this.timer);
    if (this.glow.size || this.live.size) this.timer = setTimeout(() => this.render(), 500);
  }

  #make({ lane }) {
    const owner = Number(lane.id);
    const node = el("li", {
      onpointerenter: () => this.on.highlight({ has: (id) => this.pool.owners[id] === owner && this.pool.state[id] > 1 }),
      onpointerleave: () => this.on.highlight(null),
    });
    node.parts = { phase: el("span.phase"), name: el("code"), about: el("span.dim"), tokens: el("span.tokens") };
    node.bars = PARTS.map((part) => el(`i.${part}`));
    node.append(
      el("div.who", {}, node.parts.phase, node.parts.name, node.parts.about, node.parts.tokens),
      el("div.bar", { "aria-hidden": "true" }, ...node.bars));
    return node;
  }

  #update(node, { lane, over }, now) {
    const { phase, name, about, tokens } = node.parts;
    const age = lane.age_s + (over ? 0 : Math.max(0, now - this.shownAt) / 1000);
    node.dataset.phase = over ? "ended" : lane.phase;
    setText(phase, over ? "ended" : lane.phase);
    setText(name, shortId(lane.request_id || `#${lane.id}`) + (lane.index ? `·${lane.index}` : ""));
    name.title = lane.request_id;
    const again = lane.preemptions ? ` · preempted ${lane.preemptions}×` : "";
    const priority = lane.priority ? ` · priority ${lane.priority}` : "";
    setText(about, `${lane.tenant === "default" ? "" : `${lane.tenant} · `}${duration(age)} · ${plural(lane.blocks, "block")}${priority}${again}`);
    setText(tokens, `${count(lane.prompt_tokens)} → ${count(lane.output_tokens)}`);
    tokens.title = `${count(lane.prompt_tokens)} prompt tokens, ${count(lane.cached_tokens)} of them reused; ${count(lane.output_tokens)} generated`;
    const reused = Math.min(lane.cached_tokens, lane.prompt_tokens);
    const computed = Math.max(0, Math.min(lane.computed_tokens, lane.prompt_tokens) - reused);
    const parts = [reused, computed, Math.max(0, lane.prompt_tokens - reused - computed), lane.output_tokens];
    parts.forEach((part, at) => (node.bars[at].style.width = `${(part / this.scale) * 100}%`));
  }
}
