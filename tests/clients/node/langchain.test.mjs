// LangChain for JavaScript, by its package for OpenAI.
import assert from "node:assert/strict";
import { test } from "node:test";

import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";

import { all, Asked, baseURL, MODEL, Report, SORT, SORTED, WEATHER } from "./asked.mjs";

const model = new ChatOpenAI({ model: MODEL, apiKey: "none", temperature: 0, maxRetries: 0, configuration: { baseURL } });
const get_weather = tool(() => "rain", { name: "get_weather", description: "Get the weather.", schema: Asked });

test("invoke and stream", async () => {
  assert.equal((await model.invoke(SORT)).text, SORTED);
  assert.equal((await all(await model.stream(SORT))).map((chunk) => chunk.text).join(""), SORTED);
});

test("a forced call", async () => {
  const called = await model.bindTools([get_weather], { tool_choice: "required", parallel_tool_calls: false }).invoke(WEATHER);
  assert.equal(called.tool_calls.length, 1);
  Asked.parse(called.tool_calls[0].args);
});

for (const method of ["jsonSchema", "functionCalling"])
  test(`structured output by ${method}`, async () => {
    Report.parse(await model.withStructuredOutput(Report, { method, name: "report" }).invoke(WEATHER));
  });
