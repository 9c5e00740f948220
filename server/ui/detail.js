// The pinned block: what the pool's arrays say of it at once, its tokens and relatives when the server answers.

import { ask } from "./api.js";
import { count, duration, plural, shortId } from "./format.js";
import { el } from "./dom.js";
import { FREE, STATES } from "./pool.js";
import { below, build } from "./tree.js";

const MOST_CHILDREN = 12;
const MOST_TOLD = 1000; // the server names no more

export class Detail {
  /** @param on {pin(id), highlight(highlight | null), moved()} */
  constructor(node, pool, on) {
    Object.assign(this, { node, pool, on });
    this.id = 0;
    this.detail = null;
    this.blockSize = 1;
    this.timer = 0;
  }

  show(id) {
    if (id === this.id && id) id = 0; // a second click lets go
    this.id = id;
    this.detail = null;
    this.node.hidden = id === 0;
    this.render();
    this.#chain();
    if (id) this.#fetch();
    return id;
  }

  /** After a frame: only if this block is in it, and not more than once a second. */
  changed(ids) {
    if (!this.id || this.timer || (ids !== null && !ids.includes(this.id))) return;
    this.timer = setTimeout(() => {
      this.timer = 0;
      if (!this.id) return;
      this.#fetch();
      this.#chain();
    }, 1000);
    this.render();
  }

  async #fetch() {
    const { id } = this;
    try {
      const detail = await ask(`v1/cache/blocks/${id}`);
      if (id === this.id) this.detail = detail;
    } catch (error) {
      if (id === this.id) this.detail = { refused: error.message };
    }
    if (id === this.id) this.render();
  }

  /** The blocks before it and all that go on from it. */
  #chain() {
    const { id, pool } = this;
    if (!id || !pool.kept[id]) return this.on.highlight(null);
    const path = pool.chain(id);
    const ids = below(build(pool, 1), id);
    for (const block of path) ids.add(block);
    this.relatives = ids.size - 1;
    this.on.highlight(ids.size > 1 ? { has: (block) => ids.has(block), path } : null);
  }

  render() {
    const { id, pool, detail } = this;
    if (!id) return this.node.replaceChildren();
    const block = detail?.block ?? detail ?? {};
    const state = pool.state[id];
    const now = performance.now();
    const facts = [["state", state === 3 ? `shared by ${pool.refs[id]}` : STATES[state]]];
    if (state !== FREE) {
      const first = pool.positions[id] * this.blockSize;
      facts.push(["tokens", `${count(first)} – ${count(first + this.blockSize - 1)} of its chain`]);
      if (block.tokens != null) facts.push(["filled", `${block.tokens} of ${this.blockSize}`]);
      facts.push(["taken by", shortId(String(block.owner || pool.laneOf(pool.owners[id])?.request_id || `request #${pool.owners[id]}`))]);
      if (pool.tenant(id)) facts.push(["tenant", pool.tenant(id)]);
      facts.push(["age", duration(pool.ageSeconds(id, now))]);
      if (state === 1) facts.push(["idle for", duration(pool.idleSeconds(id, now))]);
      if (block.holders?.length) facts.push(["held by", block.holders.map(shortId).join(", ")]);
      if (block.digest) facts.push(["digest", block.digest]);
    }
    this.node.replaceChildren(
      el("header", {}, el("h3", {}, `Block ${count(id)}`), el("button.quiet", { type: "button", "aria-label": "Let go of the block", onclick: () => this.on.pin(0) }, "✕")),
      el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      ...this.#relatives(detail),
      ...this.#text(detail));
  }

  #relatives(detail) {
    const link = (id) => el("button.link", { type: "button", onclick: () => this.on.pin(id) }, `#${count(id)}`);
    const parent = this.pool.parent(this.id);
    const children = detail?.children ?? [];
    const rows = [];
    if (parent) rows.push(el("p.relatives", {}, "after ", link(parent)));
    if (children.length) {
      const left = children.length - MOST_CHILDREN;
      rows.push(el("p.relatives", {}, "goes on in ", ...children.slice(0, MOST_CHILDREN).flatMap((id) => [link(id), " "]), left > 0 ? `and ${children.length < MOST_TOLD ? count(left) : "many"} more` : null));
    }
    if (parent || children.length) rows.push(el("p.dim", {}, `${plural(this.relatives ?? 0, "relative")} lit in the atlas`));
    return rows;
  }

  #text(detail) {
    if (!detail) return [el("p.dim", {}, "Asking for its tokens…")];
    if (detail.refused) return [el("p.dim", {}, detail.refused)];
    const text = detail.text ?? detail.block?.text;
    if (text) return [el("h4", {}, "Text"), el("pre", { tabindex: "0" }, text)];
    if (this.pool.state[this.id] === FREE) return [];
    return [el("p.dim", {}, text === "" ? "It holds no tokens yet." : "Texts are shown only where no API keys are configured.")];
  }
}
