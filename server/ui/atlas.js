// The block atlas: one cell per block on a canvas.
//
// Three layers. The map has one pixel per block and is only written where blocks changed. The lower canvas
// shows a window of the map, scaled without smoothing, under a pattern that cuts the cells apart. The upper
// canvas holds what follows the pointer (cursor, pinned block, chain), so that hovering never repaints cells.

import { CACHED, FREE, SHARED } from "./pool.js";
import { mix, palette } from "./palette.js";

const FLASH_MS = 700;
const LARGEST_CELL = 38; // CSS pixels, at the zoom that shows everything
const LARGEST_ZOOMED = 48;
const GAPS_FROM = 4; // device pixels: smaller cells touch
const OLDEST_S = 600; // the end of the age scale
const MOST_LINKS = 4000; // drawn of one chain

export class Atlas {
  /** @param on {hover(id, event), pin(id), cursor(id)} */
  constructor(base, over, pool, on) {
    Object.assign(this, { base, over, pool, on });
    this.paint = base.getContext("2d", { alpha: false });
    this.paintOver = over.getContext("2d");
    this.map = document.createElement("canvas");
    this.mapPaint = this.map.getContext("2d");
    this.mode = "state";
    this.colours = palette();
    this.cols = this.rows = 0;
    this.view = { cell: 1, x: 0, y: 0 }; // device pixels per block; offset of block 1
    this.hovered = this.pinned = 0;
    this.cursor = 1;
    this.highlight = null; // {has(id), path}: everything else is dimmed
    this.flashing = [];
    this.flashEnd = new Float64Array(0);
    this.stale = { all: true, low: 0, high: -1, base: true, over: true };
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.frames = 0;
    this.requested = 0;
    new ResizeObserver(() => this.layout()).observe(base.parentElement);
    this.#listen();
  }

  // --- what the outside calls

  /** After the pool took over a frame. */
  changed(ids) {
    const { pool } = this;
    if (ids === null) {
      if (this.flashEnd.length !== pool.size + 1) this.flashEnd = new Float64Array(pool.size + 1);
      this.flashing = [];
      this.stale.all = true;
      this.layout();
      return;
    }
    const end = performance.now() + FLASH_MS;
    const flashes = !this.calm.matches;
    this.clock = pool.clock(performance.now());
    for (let row = 0; row < ids.length; row++) {
      const id = ids[row];
      if (id === 0 || id > pool.size) continue;
      if (flashes && pool.event[id]) {
        if (this.flashEnd[id] === 0) this.flashing.push(id);
        this.flashEnd[id] = end;
      } else if (this.flashEnd[id] === 0) this.#colour(id, 0);
    }
    this.#request();
  }

  setMode(mode) {
    this.mode = mode;
    this.repaint();
  }

  /** @param highlight null, or {has: id => boolean, path: ids in the order of the chain} */
  setHighlight(highlight) {
    if (this.highlight === highlight) return;
    this.highlight = highlight;
    this.repaint();
  }

  pin(id) {
    this.pinned = id;
    if (id) this.cursor = id;
    this.#touchOver();
  }

  setTheme() {
    this.colours = palette();
    this.repaint();
  }

  /** Everything, in the next frame: ages grew, or the colours mean something else. */
  repaint() {
    this.stale.all = true;
    this.#touchOver();
  }

  cellCss(id) {
    const { cell, x, y } = this.view;
    const ratio = devicePixelRatio;
    return { left: (x + ((id - 1) % this.cols) * cell) / ratio, top: (y + Math.floor((id - 1) / this.cols) * cell) / ratio, size: cell / ratio };
  }

  zoom(factor, atX = this.base.width / 2, atY = this.base.height / 2) {
    const { view } = this;
    const wanted = factor > 1 ? Math.max(view.cell * factor, view.cell + 1) : view.cell * factor;
    const largest = Math.max(this.fit, LARGEST_ZOOMED * devicePixelRatio);
    const cell = Math.min(largest, Math.max(this.fit, wanted < 1 ? wanted : Math.round(wanted)));
    view.x = atX - ((atX - view.x) / view.cell) * cell;
    view.y = atY - ((atY - view.y) / view.cell) * cell;
    view.cell = cell;
    this.#settle();
  }

  zoomOut() {
    this.view = { cell: this.fit, x: 0, y: 0 };
    this.#settle();
  }

  get zoomed() {
    return this.view.cell > this.fit;
  }

  /** Moves the window so that the block can be seen. */
  reveal(id) {
    if (!this.zoomed) return;
    const { view, base } = this;
    const column = (id - 1) % this.cols, row = Math.floor((id - 1) / this.cols);
    view.x = Math.min(-column * view.cell + base.width - view.cell, Math.max(view.x, -column * view.cell));
    view.y = Math.min(-row * view.cell + base.height - view.cell, Math.max(view.y, -row * view.cell));
    this.#settle();
  }

  // --- geometry

  /** Columns and cell size for the width there is; the height follows. Whole device pixels keep cells even. */
  layout() {
    const size = this.pool.size;
    const frame = this.base.parentElement;
    const ratio = devicePixelRatio;
    const width = Math.floor(frame.clientWidth * ratio);
    if (!size || !width) return;
    const tallest = Math.floor(Math.max(220, Math.min(innerHeight * 0.56, 560)) * ratio);
    let cell = Math.floor(LARGEST_CELL * ratio);
    while (cell > 1 && Math.ceil(size / Math.floor(width / cell)) * cell > tallest) cell--;
    if (Math.ceil(size / width) > tallest && cell === 1) cell = Math.sqrt((width * tallest) / size);
    const cols = Math.min(size, Math.floor(width / cell));
    const widest = Math.min(Math.floor(width / cols), Math.floor(LARGEST_CELL * ratio));
    if (Math.ceil(size / cols) * widest <= tallest * 1.1) cell = Math.max(cell, widest);
    const rows = Math.ceil(size / cols);
    const height = Math.min(Math.floor(tallest * 1.1), Math.max(Math.ceil(rows * cell), Math.floor(96 * ratio)));
    const same = cols === this.cols && rows === this.rows && cell === this.fit && this.base.width === width && this.base.height === height;
    if (same && this.pixels) return this.#request();
    Object.assign(this, { cols, rows, fit: cell });
    for (const canvas of [this.base, this.over]) Object.assign(canvas, { width, height });
    frame.style.height = `${height / ratio}px`;
    frame.classList.add("ready");
    Object.assign(this.map, { width: cols, height: rows });
    this.image = new ImageData(cols, rows);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.stale.all = true;
    this.zoomOut();
  }

  /** Keeps the window on the map. */
  #settle() {
    const { view, base } = this;
    view.x = Math.min(0, Math.max(view.x, base.width - this.cols * view.cell));
    view.y = Math.min(0, Math.max(view.y, base.height - this.rows * view.cell));
    if (this.cols * view.cell <= base.width) view.x = 0;
    if (this.rows * view.cell <= base.height) view.y = 0;
    base.parentElement.classList.toggle("zoomed", this.zoomed);
    this.stale.base = true;
    this.#touchOver();
  }

  /** The block at a place, 0 where there is none. */
  at(clientX, clientY) {
    const box = this.base.getBoundingClientRect();
    const column = Math.floor(((clientX - box.left) * devicePixelRatio - this.view.x) / this.view.cell);
    const row = Math.floor(((clientY - box.top) * devicePixelRatio - this.view.y) / this.view.cell);
    const id = row * this.cols + column + 1;
    return column >= 0 && column < this.cols && row >= 0 && id <= this.pool.size ? id : 0;
  }

  // --- colours

  /** Writes one block's pixel; `flash` of 256 is left of what just happened to it. */
  #colour(id, flash) {
    const { pool, colours, highlight } = this;
    let colour = this.#plain(id, pool.state[id]);
    if (highlight && !highlight.has(id)) colour = mix(colour, colours.ground, 205);
    else if (flash > 0 && pool.event[id]) colour = mix(colour, colours.flashes[pool.event[id]], flash);
    const at = id - 1;
    this.pixels[at] = colour;
    if (this.stale.high < this.stale.low) this.stale.low = this.stale.high = at;
    else if (at < this.stale.low) this.stale.low = at;
    else if (at > this.stale.high) this.stale.high = at;
  }

  #plain(id, state) {
    const { pool, colours } = this;
    if (state === FREE || this.mode === "state") return colours.states[state];
    if (this.mode === "age") {
      const idle = state === CACHED ? (this.clock - pool.idle[id]) / 10 : 0;
      return colours.ages[Math.min(64, Math.floor((Math.log1p(Math.max(0, idle)) / Math.log1p(OLDEST_S)) * 64))];
    }
    const colour = colours.hue(this.mode === "tenant" ? pool.tenants[id] : pool.owners[id]);
    return state === CACHED ? mix(colour, colours.ground, 110) : colour;
  }

  #colourAll() {
    this.clock = this.pool.clock(performance.now());
    for (let id = 1; id <= this.pool.size; id++) this.#colour(id, 0);
  }

  #fade(now) {
    const { flashing, flashEnd } = this;
    let still = 0;
    for (let at = 0; at < flashing.length; at++) {
      const id = flashing[at];
      const left = flashEnd[id] - now;
      if (left > 0) flashing[still++] = id;
      else flashEnd[id] = 0;
      this.#colour(id, left > 0 ? Math.min(256, ((left / FLASH_MS) * 256) | 0) : 0);
    }
    flashing.length = still;
  }

  // --- drawing

  #touchOver() {
    this.stale.over = true;
    this.#request();
  }

  #request() {
    this.requested ||= requestAnimationFrame((now) => this.#draw(now));
  }

  #draw(now) {
    this.requested = 0;
    if (!this.pixels) return;
    const { stale } = this;
    if (stale.all) this.#colourAll();
    if (this.flashing.length) this.#fade(now);
    if (stale.high >= stale.low) {
      const low = Math.floor(stale.low / this.cols), high = Math.floor(stale.high / this.cols);
      this.mapPaint.putImageData(this.image, 0, 0, 0, low, this.cols, high - low + 1);
      stale.base = true;
    }
    if (stale.base) this.#drawBase();
    if (stale.over) this.#drawOver();
    Object.assign(stale, { all: false, low: 0, high: -1, base: false, over: false });
    this.frames++;
    if (this.flashing.length) this.#request();
  }

  #drawBase() {
    const { paint, base, view, cols, rows } = this;
    const { cell, x, y } = view;
    const left = Math.max(0, Math.floor(-x / cell)), top = Math.max(0, Math.floor(-y / cell));
    const wide = Math.min(cols - left, Math.ceil(base.width / cell) + 1);
    const high = Math.min(rows - top, Math.ceil(base.height / cell) + 1);
    paint.fillStyle = this.colours.panel;
    paint.fillRect(0, 0, base.width, base.height);
    paint.imageSmoothingEnabled = false;
    paint.drawImage(this.map, left, top, wide, high, x + left * cell, y + top * cell, wide * cell, high * cell);
    if (cell < GAPS_FROM) return;
    paint.fillStyle = this.#gaps(cell);
    paint.translate(x, y);
    paint.fillRect(-x, -y, base.width, base.height);
    paint.setTransform(1, 0, 0, 1, 0, 0);
    if (cell >= 11 * devicePixelRatio && this.mode === "state") this.#markShared(left, top, wide, high);
  }

  /** A tile of ground with a hole in the shape of a cell. */
  #gaps(cell) {
    const name = `${cell} ${this.colours.panel}`;
    if (this.tile?.name === name) return this.tile.pattern;
    const tile = Object.assign(document.createElement("canvas"), { width: cell, height: cell });
    const paint = tile.getContext("2d");
    const gap = cell >= 9 ? Math.max(2, Math.round(cell / 9)) : 1;
    paint.fillStyle = this.colours.panel;
    paint.fillRect(0, 0, cell, cell);
    paint.globalCompositeOperation = "destination-out";
    paint.beginPath();
    paint.roundRect(0, 0, cell - gap, cell - gap, cell >= 9 ? cell / 6 : 0);
    paint.fill();
    this.tile = { name, pattern: this.paint.createPattern(tile, "repeat") };
    return this.tile.pattern;
  }

  /** Large cells say "shared" by a mark as well: colour alone is not for everybody. */
  #markShared(left, top, wide, high) {
    const { paint, pool, view: { cell, x, y } } = this;
    paint.fillStyle = this.colours.panel;
    const size = Math.round(cell / 4.5), inset = Math.round((cell - Math.round(cell / 9) - size) / 2);
    for (let row = top; row < top + high; row++)
      for (let column = left; column < left + wide; column++) {
        const id = row * this.cols + column + 1;
        if (id <= pool.size && pool.state[id] === SHARED) paint.fillRect(x + column * cell + inset, y + row * cell + inset, size, size);
      }
  }

  #drawOver() {
    const { paintOver: paint, over } = this;
    paint.clearRect(0, 0, over.width, over.height);
    if (this.highlight?.path?.length > 1) this.#drawChain(this.highlight.path);
    if (this.pinned) this.#ring(this.pinned, this.colours.accent, 3);
    if (document.activeElement === over) this.#ring(this.cursor, this.colours.line, 2);
    if (this.hovered && this.hovered !== this.pinned) this.#ring(this.hovered, this.colours.line, 2);
  }

  #ring(id, colour, width) {
    const { cell, x, y } = this.view;
    const ratio = devicePixelRatio;
    const around = Math.max(cell, 9 * ratio);
    const middleX = x + (((id - 1) % this.cols) + 0.5) * cell, middleY = y + (Math.floor((id - 1) / this.cols) + 0.5) * cell;
    const paint = this.paintOver;
    for (const [ring, line] of [[this.colours.panel, width + 2], [colour, width]]) {
      paint.strokeStyle = ring;
      paint.lineWidth = line * ratio * (cell < 6 * ratio ? 0.75 : 1);
      paint.beginPath();
      paint.roundRect(middleX - around / 2 - 1, middleY - around / 2 - 1, around, around, 3 * ratio);
      paint.stroke();
    }
  }

  #drawChain(path) {
    const { cell, x, y } = this.view;
    const paint = this.paintOver;
    paint.strokeStyle = this.colours.line;
    paint.globalAlpha = 0.55;
    paint.lineWidth = Math.max(1, Math.min(1.75, cell / 8)) * devicePixelRatio;
    paint.lineJoin = "round";
    paint.beginPath();
    for (let at = 0; at < Math.min(path.length, MOST_LINKS); at++) {
      const place = path[at] - 1;
      paint.lineTo(x + ((place % this.cols) + 0.5) * cell, y + (Math.floor(place / this.cols) + 0.5) * cell);
    }
    paint.stroke();
    paint.globalAlpha = 1;
  }

  // --- pointer and keys

  #listen() {
    const { over } = this;
    const pointers = new Map();
    let moved = 0;
    over.addEventListener("pointerdown", (event) => {
      pointers.set(event.pointerId, event);
      moved = 0;
    });
    over.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (before && (this.zoomed || pointers.size === 2)) moved = this.#drag(pointers, before, event, moved);
      if (before) pointers.set(event.pointerId, event);
      this.#hover(before && moved > 4 ? 0 : this.at(event.clientX, event.clientY), event);
    });
    const end = (event) => pointers.delete(event.pointerId);
    over.addEventListener("pointerup", end);
    over.addEventListener("pointercancel", end);
    over.addEventListener("pointerleave", (event) => (end(event), this.#hover(0, event)));
    over.addEventListener("click", (event) => {
      const id = this.at(event.clientX, event.clientY);
      if (moved <= 4 && id) this.on.pin(id);
    });
    over.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    over.addEventListener("keydown", (event) => this.#key(event));
    over.addEventListener("focus", () => (this.#touchOver(), this.on.cursor(this.cursor)));
    over.addEventListener("blur", () => (this.#touchOver(), this.on.cursor(0)));
  }

  #drag(pointers, before, event, moved) {
    const ratio = devicePixelRatio;
    if (!this.over.hasPointerCapture(event.pointerId)) this.over.setPointerCapture(event.pointerId);
    if (pointers.size === 2) {
      const [other] = [...pointers.values()].filter((pointer) => pointer.pointerId !== event.pointerId);
      const apart = (a) => Math.hypot(a.clientX - other.clientX, a.clientY - other.clientY);
      const box = this.over.getBoundingClientRect();
      this.zoom(apart(event) / apart(before), (other.clientX - box.left) * ratio, (other.clientY - box.top) * ratio);
      return moved + 10;
    }
    this.view.x += (event.clientX - before.clientX) * ratio;
    this.view.y += (event.clientY - before.clientY) * ratio;
    this.#settle();
    return moved + Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
  }

  #hover(id, event) {
    this.on.hover(id, event);
    if (id === this.hovered) return;
    this.hovered = id;
    this.#touchOver();
  }

  /** With Ctrl (or a pinch) it zooms; else it moves the window while there is more to see, or the page. */
  #wheel(event) {
    const { view } = this;
    if (event.ctrlKey || event.metaKey) {
      const box = this.over.getBoundingClientRect();
      const ratio = devicePixelRatio;
      this.zoom(event.deltaY < 0 ? 1.25 : 0.8, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
    } else if (this.zoomed) {
      view.x -= event.deltaX * devicePixelRatio;
      view.y -= event.deltaY * devicePixelRatio;
      this.#settle();
    } else return;
    event.preventDefault();
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.cols, ArrowDown: this.cols, Home: -1e9, End: 1e9 }[event.key];
    if (step) {
      const to = Math.abs(step) === 1e9 ? (step < 0 ? 1 : this.pool.size) : this.cursor + step;
      if (to >= 1 && to <= this.pool.size) this.cursor = to;
      this.reveal(this.cursor);
      this.on.cursor(this.cursor);
    } else if (event.key === "Enter" || event.key === " ") this.on.pin(this.cursor);
    else if (event.key === "Escape") this.on.pin(0);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.zoomOut();
    else return;
    event.preventDefault();
    this.#touchOver();
  }
}
