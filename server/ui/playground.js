// Chat with the model, and see what of each message the cache had already.

import { ask, events, Refused, send } from "./api.js";
import { count, duration, percent } from "./format.js";
import { $, el, setText } from "./dom.js";

const STARTERS = ["What is a KV cache?", "Which port does Quire listen on?", "How are blocks shared?"];
const SHORTEST_S = 0.05; // an answer that came at once has no pace

export class Playground {
  /** @param on {denied(error)} */
  constructor(on) {
    this.on = on;
    this.turns = []; // {role, content, node}
    this.running = null;
    this.following = true;
    $("talk").addEventListener("scroll", ({ target }) => (this.following = target.scrollHeight - target.scrollTop - target.clientHeight < 40));
    $("ask").addEventListener("submit", (event) => (event.preventDefault(), this.say()));
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.say();
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("clear").addEventListener("click", () => this.clear());
    $("probe").addEventListener("click", () => this.probe());
    $("starters").append(...STARTERS.map((text) => el("button", { type: "button", onclick: () => (($("prompt").value = text), this.say()) }, text)));
  }

  clear() {
    this.running?.abort();
    for (const child of [...$("talk").children]) if (child.id !== "talk-empty") child.remove();
    this.turns = [];
    $("talk-empty").hidden = false;
    $("prompt").focus();
  }

  /** What a request would say: the system prompt, the conversation, and the draft. */
  #messages(draft) {
    const system = $("system").value.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...this.turns.map(({ role, content }) => ({ role, content })),
      ...(draft ? [{ role: "user", content: draft }] : []),
    ];
  }

  async say() {
    const draft = $("prompt").value.trim();
    if (!draft || this.running) return;
    const messages = this.#messages(draft);
    $("prompt").value = "";
    this.#add("user", draft);
    const answer = this.#add("assistant", "");
    this.#busy(new AbortController());
    answer.node.classList.add("waiting");
    try {
      await this.#stream(messages, answer);
    } catch (error) {
      this.#failed(answer, error);
    } finally {
      answer.node.classList.remove("waiting");
      this.#busy(null);
    }
  }

  async #stream(messages, answer) {
    const began = performance.now();
    const reply = await send("v1/chat/completions", {
      messages, stream: true, explain_cache: true, stream_options: { include_usage: true },
      temperature: Number($("temperature").value) || 0, max_tokens: Number($("max-tokens").value) || 256,
    }, { signal: this.running.signal });
    let usage = null, report = null, first = 0, reason = "";
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Refused(0, chunk.error.message);
      if (chunk.cache?.length) this.#report((report = chunk.cache[0]), answer);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta?.content) continue;
      first ||= performance.now();
      answer.content += choice.delta.content;
      this.#write(answer);
    }
    const parts = [];
    if (usage) parts.push(`${count(usage.completion_tokens)} tokens`);
    if (first) parts.push(`first after ${duration((first - began) / 1000)}`);
    const streamed = (performance.now() - first) / 1000;
    if (first && usage?.completion_tokens > 1 && streamed > SHORTEST_S) parts.push(`${Math.round((usage.completion_tokens - 1) / streamed)} tokens/s`);
    if (reason === "length") parts.push("cut at max. tokens");
    setText(answer.meta, parts.join(" · "));
    this.#toEnd();
    if (!report && usage?.prompt_tokens_details) this.#report({ prompt_tokens: usage.prompt_tokens, reused_tokens: usage.prompt_tokens_details.cached_tokens ?? 0 }, answer);
  }

  #failed(answer, error) {
    if (error.name === "AbortError") return setText(answer.meta, "stopped");
    this.turns = this.turns.filter((turn) => turn !== answer || turn.content);
    const said = this.turns.at(-1);
    if (!answer.content && said?.role === "user") {
      this.turns.pop(); // never answered: it may be sent again
      if (!$("prompt").value) $("prompt").value = said.content;
    }
    answer.node.append(el("p.error", { role: "alert" }, error.message || "Something went wrong."));
    if (error.status === 401 || error.status === 403) this.on.denied(error);
  }

  /** Colours every message that was sent, and says the rest under the answer. */
  #report(report, answer) {
    const sent = this.turns.slice(0, this.turns.indexOf(answer));
    const shares = report.messages ?? null;
    const offset = shares ? shares.length - sent.length : 0;
    sent.forEach((turn, at) => this.#share(turn, shares?.[at + offset]));
    answer.node.querySelector(".why")?.remove();
    answer.node.append(explain(report, offset > 0 ? shares[0] : null));
    this.#toEnd();
  }

  #share(turn, share) {
    if (!share || !share.tokens) return;
    const reused = share.reused_tokens / share.tokens;
    turn.node.classList.add("measured");
    turn.meter.hidden = false;
    turn.meter.firstChild.style.width = `${reused * 100}%`;
    turn.node.dataset.reused = String(share.reused_tokens);
    setText(turn.meta, `${count(share.reused_tokens)} of ${count(share.tokens)} tokens reused`);
  }

  async probe() {
    const messages = this.#messages($("prompt").value.trim());
    $("talk").querySelector(".probed")?.remove();
    const card = el("div.turn.probed", { tabindex: "-1" });
    if (!messages.length) card.append(el("p.dim", {}, "Write something to probe."));
    else {
      try {
        const { cache } = await ask("v1/cache/probe", { messages });
        card.append(el("p.role", {}, "If you sent this now"), explain(cache[0]));
      } catch (error) {
        card.append(el("p.error", { role: "alert" }, error.message));
        if (error.status === 401 || error.status === 403) this.on.denied(error);
      }
    }
    $("talk-empty").hidden = true;
    $("talk").append(card);
    this.#toEnd(true);
  }

  #add(role, content) {
    $("talk-empty").hidden = true;
    $("talk").querySelector(".probed")?.remove();
    const turn = { role, content, text: el("p.text", {}, content), meta: el("p.meta.dim"), meter: el("div.meter", { hidden: true, "aria-hidden": "true" }, el("i")) };
    turn.node = el(`div.turn.${role}`, {}, el("p.role", {}, role === "user" ? "You" : "Model"), turn.text, turn.meter, turn.meta);
    this.turns.push(turn);
    $("talk").append(turn.node);
    this.#toEnd(true);
    return turn;
  }

  #write(turn) {
    turn.late ||= requestAnimationFrame(() => {
      turn.late = 0;
      setText(turn.text, turn.content);
      this.#toEnd();
    });
  }

  /** Follows the text as long as the reader has not scrolled up. */
  #toEnd(always = false) {
    if (always) this.following = true;
    if (this.following) $("talk").scrollTop = $("talk").scrollHeight;
  }

  #busy(controller) {
    this.running = controller;
    $("send").hidden = controller !== null;
    $("stop").hidden = controller === null;
    $("talk").setAttribute("aria-busy", String(controller !== null));
  }
}

/** One report: how much, the server's sentence, and both texts where they part. */
function explain(report, system = null) {
  const share = report.prompt_tokens ? report.reused_tokens / report.prompt_tokens : 0;
  const meter = el("div.meter", { "aria-hidden": "true" }, el("i"));
  meter.firstChild.style.width = `${share * 100}%`;
  const node = el("div.why", {}, report.messages ? null : meter, // else each message has its own
    el("p", {}, el("b", {}, `${percent(share)} reused. `), report.message ?? `${count(report.reused_tokens)} of ${count(report.prompt_tokens)} prompt tokens.`));
  node.dataset.reason = report.reason ?? "";
  node.dataset.reused = String(report.reused_tokens);
  if (system) node.append(el("p.dim", {}, `System prompt: ${count(system.reused_tokens)} of ${count(system.tokens)} tokens.`));
  if (report.cached_text != null && report.prompt_text != null)
    node.append(el("details", {}, el("summary", {}, "Why? Both texts"),
      el("dl.texts", {}, el("dt", {}, "cached"), el("dd", {}, ...parted(report.cached_text, report.prompt_text)), el("dt", {}, "yours"), el("dd", {}, ...parted(report.prompt_text, report.cached_text)))));
  return node;
}

/** A text with what differs from the other one marked, from the first difference on. */
function parted(text, other) {
  const mine = [...text], theirs = [...other];
  let same = 0;
  while (same < mine.length && mine[same] === theirs[same]) same++;
  return [mine.slice(0, same).join(""), el("mark", {}, mine.slice(same).join("") || "∅")];
}
