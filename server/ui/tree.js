// The prefix tree: what is cached, as runs. A run is a chain without forks: one row, however many blocks.
//
// Knows how to build the tree from the pool's parents and how to show its largest part; asks for the texts of
// the runs that are shown, slowly.

import { count, duration, plural } from "./format.js";
import { $, el, keyed, setText } from "./dom.js";
import { CACHED, REUSED, SHARED } from "./pool.js";

const FIRST = 12; // rows per level, before "more"
const MORE = 50;
const FEW = 8;
const EVERY_MS = 1000;
const TEXT_EVERY_MS = 150;

/** Forks and sums over all published blocks, in typed arrays. Linear, so that 100,000 blocks take milliseconds. */
export function build(pool, blocks) {
  const rows = pool.size + 1;
  const first = new Int32Array(rows), next = new Int32Array(rows);
  const weight = new Uint32Array(rows), used = new Uint32Array(rows), shared = new Uint32Array(rows), recent = new Uint32Array(rows);
  const order = byPosition(pool);
  const now = Math.round(pool.nowDs);
  const roots = [];
  for (let at = order.length - 1; at >= 0; at--) { // deepest first: a parent comes after its children
    const id = order[at];
    weight[id] += 1;
    if (pool.state[id] !== CACHED) used[id] += 1;
    if (pool.state[id] === SHARED) shared[id] += 1;
    recent[id] = Math.max(recent[id], pool.state[id] === CACHED ? pool.idle[id] : now);
    const parent = pool.parent(id);
    if (!parent) {
      roots.push(id);
      continue;
    }
    next[id] = first[parent];
    first[parent] = id;
    weight[parent] += weight[id];
    used[parent] += used[id];
    shared[parent] += shared[id];
    recent[parent] = Math.max(recent[parent], recent[id]);
  }
  return { pool, first, next, weight, used, shared, recent, roots, total: order.length, blockSize: blocks };
}

/** The ids of published blocks by position, counted into place. */
function byPosition(pool) {
  let deepest = 0, published = 0;
  for (let id = 1; id <= pool.size; id++) {
    if (!pool.kept[id]) continue;
    published++;
    if (pool.positions[id] > deepest) deepest = pool.positions[id];
  }
  const start = new Uint32Array(deepest + 2);
  for (let id = 1; id <= pool.size; id++) if (pool.kept[id]) start[pool.positions[id] + 1]++;
  for (let at = 1; at < start.length; at++) start[at] += start[at - 1];
  const order = new Uint32Array(published);
  for (let id = 1; id <= pool.size; id++) if (pool.kept[id]) order[start[pool.positions[id]]++] = id;
  return order;
}

export function children(tree, id) {
  const found = [];
  for (let child = tree.first[id]; child; child = tree.next[child]) found.push(child);
  return found;
}

/** From a block as far down as there is one way only. */
export function run(tree, id) {
  const ids = [id];
  for (let at = tree.first[id]; at && !tree.next[at]; at = tree.first[at]) ids.push(at);
  return ids;
}

/** All blocks at and below one. */
export function below(tree, id) {
  const found = new Set();
  const open = [id];
  while (open.length) {
    const at = open.pop();
    found.add(at);
    for (let child = tree.first[at]; child; child = tree.next[child]) open.push(child);
  }
  return found;
}

export class TreePanel {
  /** @param on {highlight(highlight | null), pin(id), text(id) => Promise<string | undefined>} */
  constructor(pool, on) {
    Object.assign(this, { pool, on });
    this.sort = "size";
    this.open = new Map(); // id -> whether, where somebody has said so
    this.limits = new Map();
    this.texts = new Map();
    this.stale = false;
    this.last = 0;
    this.blockSize = 1;
    this.textsShown = false; // by the server, where no keys are configured
    this.untold = [];
    for (const radio of document.getElementsByName("sort"))
      radio.addEventListener("change", () => ((this.sort = radio.value), this.render()));
  }

  changed() {
    if (this.stale) return;
    this.stale = true;
    setTimeout(() => {
      this.stale = false;
      this.render();
    }, Math.max(0, this.last + EVERY_MS - performance.now()));
  }

  render() {
    this.last = performance.now();
    const tree = (this.tree = build(this.pool, this.blockSize));
    $("tree-empty").hidden = tree.total > 0;
    setText($("tree-about"), tree.total ? `${plural(tree.total, "block")} in ${plural(tree.roots.length, "prefix", "prefixes")}` : "");
    for (const id of this.open.keys()) if (!this.pool.kept[id]) this.open.delete(id);
    for (const id of this.texts.keys()) if (!this.pool.kept[id] || this.pool.event[id] > REUSED) this.texts.delete(id);
    this.largest = Math.max(1, ...tree.roots.slice(0, 50_000).map((id) => tree.weight[id]));
    this.untold = [];
    this.#level($("tree"), tree.roots, 0, 0);
    this.#tell();
  }

  #level(list, ids, parent, depth) {
    const { tree } = this;
    const value = this.sort === "size" ? tree.weight : tree.recent;
    ids.sort((a, b) => value[b] - value[a] || tree.weight[b] - tree.weight[a] || a - b);
    const limit = this.limits.get(parent) ?? FIRST;
    const rows = ids.slice(0, limit).map((id) => ({ id, depth }));
    if (ids.length > limit) rows.push({ id: 0, parent, left: ids.length - limit });
    keyed(list, rows, (row) => row.id || "more", (row) => (row.id ? this.#makeRow(row) : this.#makeMore(row)),
      (node, row) => (row.id ? this.#updateRow(node, row) : setText(node.firstChild, `and ${count(row.left)} more`)));
  }

  #makeMore({ parent }) {
    const more = () => {
      this.limits.set(parent, (this.limits.get(parent) ?? FIRST) + MORE);
      this.render();
    };
    return el("li.more", {}, el("button.quiet", { type: "button", onclick: more }));
  }

  #makeRow({ id, depth }) {
    const node = el("li");
    const show = () => this.#highlight(id);
    const hide = () => this.on.highlight(null);
    node.parts = {
      fold: el("button.fold", { type: "button", onclick: () => this.#toggle(id, depth) }),
      used: el("i.in-use"), shared: el("i.shared"), kept: el("i.cached"),
      text: el("span.what"), size: el("span.size"), when: el("span.when.dim"), below: el("ul.branches"),
    };
    const { fold, used, shared, kept, text, size, when, below: under } = node.parts;
    node.append(
      el("div.run", { onpointerenter: show, onpointerleave: hide },
        fold,
        el("button.body", { type: "button", onfocus: show, onblur: hide, onclick: () => this.on.pin(id) },
          el("span.bar", { "aria-hidden": "true" }, shared, used, kept), text, size, when)),
      under);
    return node;
  }

  #updateRow(node, { id, depth }) {
    const { tree, pool } = this;
    const { fold, used, shared, kept, text, size, when, below: under } = node.parts;
    const ids = run(tree, id);
    const forks = children(tree, ids.at(-1));
    const whole = tree.weight[id];
    const open = this.#isOpen(id, depth);
    const width = Math.max(2, (Math.log1p(whole) / Math.log1p(this.largest)) * 100) / whole;
    const inUse = tree.used[id] - tree.shared[id];
    for (const [part, blocks] of [[shared, tree.shared[id]], [used, inUse], [kept, whole - tree.used[id]]]) part.style.width = `${blocks * width}%`;
    setText(size, plural(whole, "block"));
    setText(when, tree.used[id] ? "in use" : `${duration(Math.max(0, (pool.clock(performance.now()) - tree.recent[id]) / 10))} ago`);
    const known = this.texts.get(id);
    const at = pool.positions[id];
    const orphan = depth === 0 && at > 0 ? `from token ${count(at * this.blockSize)}: ` : ""; // what was before is gone
    const tokens = `${count(ids.length * this.blockSize)} tokens`;
    const ways = forks.length ? `${tokens}, then ${count(forks.length)} ways on` : tokens;
    setText(text, orphan + (known ?? ways));
    text.classList.toggle("dim", known === undefined);
    text.title = known === undefined ? "" : `${ways}: ${known}`;
    if (known === undefined) this.untold.push(id);
    fold.hidden = !forks.length;
    setText(fold, open ? "▾" : "▸");
    fold.setAttribute("aria-expanded", String(open));
    fold.setAttribute("aria-label", `${open ? "Hide" : "Show"} the ${forks.length} ways on`);
    if (open && forks.length) this.#level(under, forks, id, depth + 1);
    else if (under.rows?.size) keyed(under, [], null, null, null);
  }

  /** Fills in the texts of what is shown, one question at a time: the engine has better things to do. */
  async #tell() {
    if (this.asking || !this.textsShown || !this.untold.length) return;
    this.asking = true;
    while (this.untold.length && this.textsShown) {
      const id = this.untold.shift();
      if (this.texts.has(id)) continue;
      const text = await this.on.text(id);
      if (text === undefined) this.textsShown = false; // until the next hello
      else this.texts.set(id, text || "(no text)");
      await new Promise((done) => setTimeout(done, TEXT_EVERY_MS));
    }
    this.asking = false;
    this.changed();
  }

  /** Where there is little, it is shown at once. */
  #isOpen(id, depth) {
    return this.open.get(id) ?? (depth === 0 && this.tree.roots.length <= FEW);
  }

  #toggle(id, depth) {
    this.open.set(id, !this.#isOpen(id, depth));
    this.render();
  }

  #highlight(id) {
    const ids = below(this.tree, id);
    const above = this.pool.chain(id);
    for (const block of above) ids.add(block);
    this.on.highlight({ has: (block) => ids.has(block), path: [...above, ...run(this.tree, id).slice(1)] });
  }

}
