// OpenAI's SDK for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { all, Asked, baseURL, MODEL, Report, SORT, SORTED, WEATHER } from "./asked.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const sorting = { model: MODEL, temperature: 0, messages: [{ role: "user", content: SORT }] };
const asking = { model: MODEL, temperature: 0, messages: [{ role: "user", content: WEATHER }] };
const tool = {
  type: "function",
  function: { name: "get_weather", description: "Get the weather.", parameters: z.toJSONSchema(Asked) },
};

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create(sorting);
  assert.equal(whole.choices[0].message.content, SORTED);
  assert.ok(!whole._request_id.includes(","));
  const chunks = await all(await client.chat.completions.create({ ...sorting, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), SORTED);
  assert.equal(await client.chat.completions.stream(sorting).finalContent(), SORTED);
});

test("an answer parsed by zod", async () => {
  const response_format = zodResponseFormat(Report, "report");
  const parsed = await client.chat.completions.parse({ ...asking, response_format });
  Report.parse(parsed.choices[0].message.parsed);
});

test("a forced call, and runTools", async () => {
  const forced = { ...asking, tools: [tool], tool_choice: "required", parallel_tool_calls: false };
  const whole = await client.chat.completions.create(forced);
  const streamed = await client.chat.completions.stream(forced).finalMessage();
  for (const message of [whole.choices[0].message, streamed]) {
    assert.equal(message.tool_calls.length, 1);
    Asked.parse(JSON.parse(message.tool_calls[0].function.arguments));
  }
  const seen = [];
  const run = (given) => {
    seen.push(given);
    return "rain";
  };
  const runner = client.chat.completions.runTools({
    ...asking,
    max_tokens: 100,
    parallel_tool_calls: false,
    tool_choice: { type: "function", function: { name: "get_weather" } },
    tools: [{ type: "function", function: { ...tool.function, function: run, parse: JSON.parse } }],
  });
  await runner.done();
  assert.ok(seen.length >= 1);
  seen.forEach((given) => Asked.parse(given));
});

test("Responses, whole and streamed, and a call of theirs", async () => {
  const body = { model: MODEL, input: SORT, temperature: 0 };
  assert.equal((await client.responses.create(body)).output_text, SORTED);
  assert.equal((await client.responses.stream(body).finalResponse()).output_text, SORTED);
  const called = await client.responses.create({
    ...body,
    input: WEATHER,
    tools: [{ type: "function", strict: true, ...tool.function }],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  Asked.parse(JSON.parse(called.output.find((item) => item.type === "function_call").arguments));
});

test("a stream that is given up", async () => {
  const stream = await client.chat.completions.create({ ...sorting, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});
