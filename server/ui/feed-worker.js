// Reads /v1/cache/events away from the page's own thread: connects, splits, decodes, and tries again.
//
// Not EventSource: that cannot send a key. Posts {kind: "hello" | "pool" | "sample" | "engine", data} for the stream's
// own events and {kind: "state", state, message} for what becomes of the connection.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const SILENCE_MS = 40_000; // the server says something at least every 15 s
const COLUMNS = ["ids", "refs", "owners", "tenants", "positions", "parents", "taken_ds", "idle_ds"];

let current = null; // the one AbortController; another start or a stop ends it

onmessage = ({ data }) => {
  current?.abort();
  current = null;
  if (data.start) {
    current = new AbortController();
    follow(data.url, data.key, current.signal);
  }
};

async function follow(url, key, signal) {
  let wait = FIRST_WAIT_MS;
  while (!signal.aborted) {
    const outcome = await once(url, key, signal, () => (wait = FIRST_WAIT_MS));
    if (signal.aborted) return;
    postMessage({ kind: "state", ...outcome });
    if (outcome.state === "denied" || outcome.state === "absent") return;
    await new Promise((done) => setTimeout(done, wait * (0.75 + Math.random() / 2)));
    wait = Math.min(wait * 2, LONGEST_WAIT_MS);
  }
}

/** One connection, to its end; says how it ended. */
async function once(url, key, signal, onOpen) {
  const silence = new AbortController();
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silence.abort(), SILENCE_MS);
  };
  heard();
  try {
    const headers = { accept: "text/event-stream", ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const reply = await fetch(url, { headers, cache: "no-store", signal: AbortSignal.any([signal, silence.signal]) });
    if (!reply.ok) return await refusal(reply);
    onOpen();
    postMessage({ kind: "state", state: "open" });
    await read(reply.body, heard);
    return { state: "lost", message: "The server ended the stream." };
  } catch {
    return { state: "lost", message: "The server cannot be reached." };
  } finally {
    clearTimeout(timer);
  }
}

async function refusal(reply) {
  let message = `The server answered ${reply.status}.`;
  let code = "";
  try {
    const { error } = await reply.json();
    [message, code] = [error.message, error.code];
  } catch {
    // not ours, or not JSON: the status says enough
  }
  if (reply.status === 401 || reply.status === 403) return { state: "denied", status: reply.status, message };
  if (reply.status === 404) return { state: "absent", message };
  return { state: code === "loading" ? "loading" : "lost", message };
}

/** Cuts the bytes into events. A large frame comes in many pieces: they are joined once, at its end. */
async function read(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    let rest = value;
    if (pieces.length && pieces.at(-1).endsWith("\n") && rest.startsWith("\n")) {
      dispatch(pieces.join(""));
      pieces = [];
      rest = rest.slice(1);
    }
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      dispatch(pieces.join("") + rest.slice(0, end));
      pieces = [];
      rest = rest.slice(end + 2);
    }
    if (rest) pieces.push(rest);
  }
}

function dispatch(text) {
  let kind = "message";
  const data = [];
  for (const line of text.split("\n")) {
    if (line.startsWith("event:")) kind = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (!data.length) return;
  const value = JSON.parse(data.join("\n"));
  if (kind !== "pool") return postMessage({ kind, data: value });
  const buffers = [];
  for (const name of COLUMNS) {
    value[name] = new Uint32Array(bytes(value[name]).buffer);
    buffers.push(value[name].buffer);
  }
  value.kept = bytes(value.kept);
  buffers.push(value.kept.buffer);
  postMessage({ kind, data: value }, buffers);
}

/** base64 -> Uint8Array over a buffer of its own. */
function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
