// The official client for Node, against the built-in model: what grammars force fits the types it was made from.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.QUIRE_URL, apiKey: "none", maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const messages = [{ role: "user", content: "Which port does Quire listen on?" }];
const Answer = z.object({ port: z.int().min(0).max(99999), sure: z.boolean(), unit: z.enum(["tcp", "udp"]).nullable() });

test("chat", async () => {
  const reply = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.match(reply.choices[0].message.content, /8000/);
});

test("chat, parsed", async () => {
  const reply = await client.chat.completions.parse({
    model,
    messages,
    temperature: 0,
    response_format: zodResponseFormat(Answer, "answer"),
  });
  Answer.parse(reply.choices[0].message.parsed);
});

test("a stream, parsed", async () => {
  const stream = client.chat.completions.stream({
    model,
    messages,
    temperature: 0,
    response_format: zodResponseFormat(Answer, "answer"),
  });
  Answer.parse((await stream.finalChatCompletion()).choices[0].message.parsed);
});

test("a response, parsed", async () => {
  const response = await client.responses.parse({
    model,
    input: "Which port does Quire listen on?",
    temperature: 0,
    text: { format: zodTextFormat(Answer, "answer") },
  });
  Answer.parse(response.output_parsed);
});
