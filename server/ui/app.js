// Puts the page together: the feed in, the panels out. Everything else is in the modules it names.

import { address, ask, key } from "./api.js";
import { Atlas } from "./atlas.js";
import { Charts } from "./charts.js";
import { Detail } from "./detail.js";
import { $, el, keyed, setText } from "./dom.js";
import { count, duration, percent, plural, short, shortId } from "./format.js";
import { Lanes } from "./lanes.js";
import { hueCss } from "./palette.js";
import { Playground } from "./playground.js";
import { CACHED, FREE, Pool, STATES } from "./pool.js";
import { applyTheme, onTheme } from "./theme.js";
import { TreePanel } from "./tree.js";

const HIDDEN_MS = 60_000; // a page nobody looks at for so long lets the server rest
const SLOW_MS = 1000; // for what counts through the whole pool
const MOST_IN_LEGEND = 10;

const pool = new Pool();
const charts = new Charts();
const playground = new Playground({ denied });
const detail = new Detail($("detail"), pool, { pin, highlight: (found) => light("pin", found) });
const atlas = new Atlas($("base"), $("over"), pool, { hover, pin, cursor: readCursor });
const lanes = new Lanes(pool, { highlight: (found) => light("pointer", found) });
const tree = new TreePanel(pool, { pin: show, highlight: (found) => light("pointer", found), text: blockText });
let hello = null;

// --- the feed

const policy = globalThis.trustedTypes?.createPolicy("quire", { createScriptURL: (url) => url });
const workerUrl = new URL("feed-worker.js", import.meta.url).href;
const feed = new Worker(policy ? policy.createScriptURL(workerUrl) : workerUrl);
feed.onmessage = ({ data }) => handlers[data.kind]?.(data.data ?? data);

const connect = () => feed.postMessage({ start: true, url: address("v1/cache/events"), key: key.get() });

const handlers = {
  state({ state, message, status }) {
    if (state === "open") return link("live", "live");
    if (state === "denied") {
      link("denied", "no access");
      return denied({ status, message });
    }
    if (state === "absent") {
      link("denied", "not offered");
      return notice(`This server does not offer the live view: ${message}`);
    }
    link("lost", state === "loading" ? "the model is loading…" : "reconnecting…");
    $("link").title = message;
  },

  engine({ up }) {
    if (up) return;
    link("lost", "engine restarting…");
    tree.textsShown = false; // there is nobody to ask
  },

  hello(data) {
    hello = data;
    link("live", "live");
    notice("");
    setText($("about"), `${data.model} · ${data.dtype}${data.kv_dtype === data.dtype ? "" : `, KV in ${data.kv_dtype}`} on ${data.device} · ${data.version}`);
    setText($("play-model"), data.model);
    setText($("atlas-about"), `${plural(data.num_blocks, "block")} of ${data.block_size} tokens`);
    tree.blockSize = detail.blockSize = data.block_size;
    tree.textsShown = !data.keys_configured;
    $("key-button").hidden = !data.keys_configured;
    charts.start(data.history);
    if (data.history.length) figures(data.history.at(-1));
  },

  pool(frame) {
    const now = performance.now();
    const ids = pool.apply(frame, now);
    atlas.changed(ids);
    lanes.changed(now);
    tree.changed();
    detail.changed(ids);
    $("map-empty").hidden = true;
    legendSoon();
    setText($("seen"), `Since you opened this page: ${plural(pool.seen.taken, "block")} taken, ${count(pool.seen.reused)} reused, ${count(pool.seen.evicted)} evicted`);
  },

  sample(sample) {
    charts.add(sample);
    figures(sample);
  },
};

function figures({ blocks, running, waiting, hit_ratio, generated_tokens_per_s, prompt_tokens_per_s, ttft_p50_s }) {
  const whole = blocks.in_use + blocks.cached + blocks.free;
  setText($("f-used"), percent(whole ? blocks.in_use / whole : 0));
  setText($("f-hit"), hit_ratio == null ? "–" : percent(hit_ratio));
  setText($("f-running"), count(running));
  setText($("f-waiting"), waiting ? `+ ${count(waiting)} waiting` : "");
  setText($("f-generated"), short(generated_tokens_per_s));
  setText($("f-prompt"), short(prompt_tokens_per_s));
  setText($("f-ttft"), ttft_p50_s == null ? "–" : duration(ttft_p50_s));
}

function link(state, text) {
  $("link").dataset.state = state;
  $("link").title = "";
  setText($("link").lastElementChild, text);
}

function notice(text) {
  $("notice").hidden = !text;
  setText($("notice"), text);
}

// --- keys

function denied({ status, message }) {
  $("key-button").hidden = false;
  if (status === 401 && key.get()) {
    key.set("");
    message = "The server does not know that key.";
  }
  notice(message);
  setText($("key-why"), message);
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-button").addEventListener("click", () => {
  setText($("key-why"), "");
  $("key-dialog").showModal();
});
$("key-later").addEventListener("click", () => $("key-dialog").close(""));
$("key-dialog").addEventListener("close", () => {
  const given = $("key-input").value.trim();
  if ($("key-dialog").returnValue === "use") {
    key.set(given);
    notice("");
    connect();
  }
  $("key-input").value = "";
  $("key-dialog").returnValue = "";
});

// --- the atlas's surroundings

const lights = { pin: null, pointer: null, legend: null };

/** Several may want to light blocks: what the pointer is on wins, then what is pinned. */
function light(who, found) {
  lights[who] = found;
  atlas.setHighlight(lights.pointer ?? lights.legend ?? lights.pin);
}

/** Pins a block, or lets go of the one that is pinned. The card stands where it does not hide it. */
function pin(id) {
  const pinned = detail.show(id);
  atlas.pin(pinned);
  if (!pinned) return;
  atlas.reveal(pinned);
  $("detail").classList.toggle("at-left", atlas.cellCss(pinned).left > $("map").clientWidth / 2);
}

function show(id) {
  if (detail.id !== id) pin(id);
}

function describe(id) {
  const state = pool.state[id];
  const now = performance.now();
  const lines = [`Block ${count(id)}: ${STATES[state]}`];
  if (state === FREE) return lines;
  const lane = pool.laneOf(pool.owners[id]);
  lines.push(lane?.request_id ? shortId(lane.request_id) : `request #${pool.owners[id]}`);
  lines.push(`position ${count(pool.positions[id])}${hello ? `, from token ${count(pool.positions[id] * hello.block_size)}` : ""}`);
  if (pool.refs[id] > 1) lines.push(`shared by ${pool.refs[id]}`);
  if (pool.tenantNames.length > 1) lines.push(`tenant ${pool.tenant(id)}`);
  lines.push(state === CACHED ? `idle for ${duration(pool.idleSeconds(id, now))}` : `taken ${duration(pool.ageSeconds(id, now))} ago`);
  return lines;
}

function hover(id, event) {
  const tip = $("tip");
  tip.hidden = !id || event.pointerType === "touch";
  if (tip.hidden) return;
  const [head, ...rest] = describe(id);
  tip.replaceChildren(el("b", {}, head), ...rest.map((line) => el("span", {}, line)));
  const right = event.clientX + tip.offsetWidth + 24 > innerWidth;
  const low = event.clientY + tip.offsetHeight + 24 > innerHeight;
  tip.style.transform = `translate(${event.clientX + (right ? -tip.offsetWidth - 12 : 14)}px, ${event.clientY + (low ? -tip.offsetHeight - 12 : 14)}px)`;
}

function readCursor(id) {
  setText($("cursor-text"), id && pool.size ? describe(id).join(", ") : "");
}

/** The text of a block on one line; undefined where it cannot be had. */
async function blockText(id) {
  try {
    const { text } = await ask(`v1/cache/blocks/${id}`);
    return text?.replace(/<\|[^|>]*\|>/g, " · ").replace(/\s+/g, " ").trim();
  } catch {
    return undefined;
  }
}

for (const radio of document.getElementsByName("mode"))
  radio.addEventListener("change", () => {
    atlas.setMode(radio.value);
    legend();
  });
$("zoom-in").addEventListener("click", () => atlas.zoom(1.5));
$("zoom-out").addEventListener("click", () => atlas.zoom(1 / 1.5));
$("zoom-fit").addEventListener("click", () => atlas.zoomOut());

const reset = $("reset");
let armed = 0;
reset.addEventListener("click", async () => {
  clearTimeout(armed);
  if (reset.dataset.armed !== "yes") {
    reset.dataset.armed = "yes";
    setText(reset, "Really? Click again");
    armed = setTimeout(disarm, 4000);
    return;
  }
  disarm();
  try {
    const { blocks_emptied } = await ask("v1/cache/reset", {});
    setText(reset, `${plural(blocks_emptied, "block")} emptied`);
    armed = setTimeout(disarm, 4000);
  } catch (error) {
    notice(error.message);
    if (error.status === 401 || error.status === 403) denied(error);
  }
});

function disarm() {
  reset.dataset.armed = "";
  setText(reset, "Empty the cache");
}

// --- the legend

let legendTimer = 0;
function legendSoon() {
  if (atlas.mode === "state") return legend();
  legendTimer ||= setTimeout(() => {
    legendTimer = 0;
    legend();
  }, SLOW_MS);
}

function legend() {
  const items = { state: byState, age: byAge, owner: byOwner, tenant: byTenant }[atlas.mode]();
  keyed($("legend"), items, (item) => `${atlas.mode} ${item.name}`, makeLegend, (node, item) => {
    node.item = item;
    node.firstChild.firstChild.style.background = item.colour;
    setText(node.firstChild.children[1], item.label ?? item.name);
    setText(node.firstChild.children[2], item.count == null ? "" : count(item.count));
  });
}

function makeLegend(item) {
  const node = el("li", { "data-name": item.name });
  const on = () => node.item.has && light("legend", { has: node.item.has });
  const off = () => light("legend", null);
  node.append(el("button", { type: "button", onpointerenter: on, onpointerleave: off, onfocus: on, onblur: off }, el("i.swatch"), el("span"), el("b")));
  return node;
}

const byState = () => [2, 3, 1, 0].map((state) => ({
  name: STATES[state], count: pool.counts[state], colour: `var(--${STATES[state].replace(" ", "-")})`, has: (id) => pool.state[id] === state,
}));

function byAge() {
  const bounds = [[0, 1, "in use or just now"], [1, 10, "idle for 1 – 10 s"], [10, 60, "10 – 60 s"], [60, 600, "1 – 10 min"], [600, Infinity, "longer"]];
  const counts = bounds.map(() => 0);
  const now = performance.now();
  const age = (id) => bounds.findIndex(([, to]) => pool.idleSeconds(id, now) < to);
  for (let id = 1; id <= pool.size; id++) if (pool.state[id] !== FREE) counts[age(id)]++;
  return bounds.map(([from, , label], at) => ({
    name: label, count: counts[at], has: (id) => pool.state[id] !== FREE && age(id) === at,
    colour: `color-mix(in oklab, var(--age-new), var(--age-old) ${Math.min(100, (Math.log1p(from) / Math.log1p(600)) * 100)}%)`,
  }));
}

function byOwner() {
  const held = new Map();
  for (let id = 1; id <= pool.size; id++) if (pool.state[id] !== FREE) held.set(pool.owners[id], (held.get(pool.owners[id]) ?? 0) + 1);
  return top(held, (owner) => shortId(pool.laneOf(owner)?.request_id ?? `#${owner}`), (owner) => (id) => pool.owners[id] === owner && pool.state[id] !== FREE);
}

function byTenant() {
  const held = new Map();
  for (let id = 1; id <= pool.size; id++) if (pool.state[id] !== FREE) held.set(pool.tenants[id], (held.get(pool.tenants[id]) ?? 0) + 1);
  return top(held, (tenant) => pool.tenantNames[tenant] ?? "", (tenant) => (id) => pool.tenants[id] === tenant && pool.state[id] !== FREE);
}

function top(held, label, has) {
  const sorted = [...held].sort((a, b) => b[1] - a[1]);
  const items = sorted.slice(0, MOST_IN_LEGEND).map(([number, blocks]) => ({ name: String(number), label: label(number), count: blocks, colour: hueCss(number), has: has(number) }));
  const left = sorted.length - items.length;
  if (left > 0) items.push({ name: "more", label: `and ${count(left)} more`, count: sorted.slice(MOST_IN_LEGEND).reduce((sum, [, blocks]) => sum + blocks, 0), colour: "transparent" });
  return items;
}

// --- theme, and a page nobody looks at

onTheme(() => {
  atlas.setTheme();
  charts.setTheme();
  legend();
});
applyTheme();

// Time passes also while nothing changes.
setInterval(() => atlas.mode === "age" && !document.hidden && atlas.repaint(), SLOW_MS);
setInterval(() => hello && !document.hidden && tree.changed(), 5 * SLOW_MS);

let resting = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(resting);
  if (document.hidden) {
    resting = setTimeout(() => {
      resting = -1;
      feed.postMessage({ start: false });
      link("lost", "paused");
    }, HIDDEN_MS);
  } else if (resting === -1) connect();
});

connect();
globalThis.quire = { atlas, pool }; // for the console, and for tests
