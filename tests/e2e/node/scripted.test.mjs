// The official client for Node, against a server whose engine says what it is told to.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.env.QUIRE_URL;
const client = new OpenAI({ baseURL, apiKey: "secret", maxRetries: 0 });
const model = "quire-demo";
const messages = [{ role: "user", content: "hello" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "Of a city.", parameters } }];

async function all(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

test("models", async () => {
  const found = await all(client.models.list());
  assert.deepEqual(found.map(({ id }) => id), [model]);
  assert.equal((await client.models.retrieve(model)).owned_by, "quire");
});

test("chat", async () => {
  const { data, response } = await client.chat.completions.create({ model, messages, n: 2 }).withResponse();
  assert.equal(data.choices.length, 2);
  assert.match(data.choices[0].message.content, /^Hello, wörld/);
  assert.equal(data.choices[0].finish_reason, "stop");
  assert.ok(data.usage.total_tokens > 0);
  assert.ok(response.headers.get("x-request-id"));
});

test("a stream of chat, with its usage", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create({ model, messages, ...options }));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.match(text, /^Hello, wörld/);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, Buffer.byteLength(text));
});

test("the streaming helper", async () => {
  const stream = client.chat.completions.stream({ model, messages, logprobs: true, top_logprobs: 2 });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const completion = await stream.finalChatCompletion();
  assert.equal(completion.choices[0].message.content, text);
  assert.equal(completion.choices[0].logprobs.content[0].top_logprobs.length, 2);
});

test("a stream that its reader leaves", async () => {
  const stream = await client.chat.completions.create({ model, messages, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});

test("completions", async () => {
  const reply = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 4, logprobs: 1 });
  assert.deepEqual(reply.choices.map(({ text }) => text), ["Hell", "Hell"]);
  assert.equal(reply.choices[0].logprobs.tokens.length, 4);
  const chunks = await all(await client.completions.create({ model, prompt: "a", max_tokens: 4, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), "Hell");
});

test("a stream of tool calls", async () => {
  const content = "weather?";
  const stream = client.chat.completions.stream({ model, messages: [{ role: "user", content }], tools });
  const names = [];
  stream.on("tool_calls.function.arguments.done", ({ name }) => names.push(name));
  const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.deepEqual(names, ["get_weather"]);
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Köln" });
});

test("a call, parsed", async () => {
  const tool = zodFunction({ name: "get_weather", parameters: z.object({ city: z.string() }) });
  const reply = await client.chat.completions.parse({
    model,
    messages: [{ role: "user", content: "weather?" }],
    tools: [tool],
    tool_choice: "required",
  });
  assert.deepEqual(reply.choices[0].message.tool_calls[0].function.parsed_arguments, { city: "Köln" });
});

for (const stream of [false, true]) {
  test(`tools that are run, ${stream ? "streamed" : "whole"}`, async () => {
    const asked = [];
    const lookUp = ({ city }) => {
      asked.push(city);
      return "It rains.";
    };
    const runner = client.chat.completions.runTools({
      model,
      stream,
      messages: [{ role: "user", content: "weather?" }],
      tools: [
        {
          type: "function",
          function: { name: "get_weather", description: "Of a city.", parameters, function: lookUp, parse: JSON.parse },
        },
      ],
    });
    assert.equal(await runner.finalContent(), "It rains, then.");
    assert.deepEqual(asked, ["Köln"]);
  });
}

test("responses", async () => {
  const made = await client.responses.create({ model, input: "hello", instructions: "Be brief." });
  assert.match(made.output_text, /^Hello, wörld/);
  const next = await client.responses.create({ model, input: "go on", previous_response_id: made.id });
  assert.equal(next.previous_response_id, made.id);
  assert.equal((await client.responses.retrieve(made.id)).output_text, made.output_text);
  assert.equal((await all(client.responses.inputItems.list(next.id))).length, 3);
  await client.responses.delete(made.id);
  await assert.rejects(client.responses.retrieve(made.id), OpenAI.NotFoundError);
});

test("a stream of a response", async () => {
  const flat = { type: "function", name: "get_weather", parameters, strict: false };
  const stream = client.responses.stream({ model, input: "weather?", tools: [flat] });
  const events = await all(stream);
  assert.deepEqual(events.slice(0, 2).map(({ type }) => type), ["response.created", "response.in_progress"]);
  const response = await stream.finalResponse();
  const call = response.output.find(({ type }) => type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Köln" });
  assert.equal(response.status, "completed");
});

test("errors are of the client's own classes", async () => {
  const { chat } = client;
  await assert.rejects(chat.completions.create({ model: "gpt-4o", messages }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.deepEqual([error.status, error.code, error.param], [404, "model_not_found", "model"]);
    return true;
  });
  await assert.rejects(chat.completions.create({ model, messages, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test("a full queue is a rate limit that says when to come again", async () => {
  const body = { model, messages: [{ role: "user", content: "refuse" }] };
  await assert.rejects(client.chat.completions.create(body), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.equal(error.headers.get("retry-after"), "1");
    return true;
  });
  const patient = new OpenAI({ baseURL, apiKey: "secret", maxRetries: 1 });
  const once = [{ role: "user", content: "refuse once" }];
  const reply = await patient.chat.completions.create({ model, messages: once });
  assert.match(reply.choices[0].message.content, /^Hello/);
});

test("what breaks in a stream is thrown", async () => {
  const body = { model, messages: [{ role: "user", content: "break" }], stream: true };
  await assert.rejects(async () => all(await client.chat.completions.create(body)), OpenAI.APIError);
});
