// Requests to this server, and the key they carry. Paths are relative: the page also works behind a prefix.

const BASE = new URL("../", location.href);
const KEY = "quire-api-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const address = (path) => new URL(path, BASE).href;

/** @throws {Refused} for every reply that is not 2xx, and where there is no reply */
export async function send(path, body, { signal, method = body === undefined ? "GET" : "POST" } = {}) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(address(path), { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it still running?");
  }
  if (!reply.ok) throw new Refused(reply.status, await complaint(reply));
  return reply;
}

export const ask = async (path, body) => (await send(path, body)).json();

async function complaint(reply) {
  try {
    const { error } = await reply.json();
    const wait = reply.headers.get("retry-after");
    return wait ? `${error.message} Try again in ${wait} s.` : error.message;
  } catch {
    return `The server answered ${reply.status} without saying why.`;
  }
}

/** The `data:` values of an event stream, parsed, up to [DONE]. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The connection was lost before the answer was complete.");
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
