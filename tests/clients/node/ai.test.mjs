// Vercel's AI SDK, by its packages for OpenAI (Responses, their default, and chats) and for servers like it.
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";

import { all, Asked, baseURL, MODEL, Report, SORT, SORTED, WEATHER } from "./asked.mjs";

const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "triad",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = { responses: openai(MODEL), chat: openai.chat(MODEL), compatible: compatible(MODEL) };
const greedy = { temperature: 0, maxRetries: 0 };
// Triad stores nothing: without this the SDK sends of an answer in the history its id alone.
const providerOptions = { openai: { store: false } };

for (const [name, model] of Object.entries(models)) {
  test(`${name}: text, whole and streamed`, async () => {
    const whole = await generateText({ model, ...greedy, prompt: SORT });
    assert.equal(whole.text, SORTED);
    assert.ok(whole.usage.outputTokens > 1);
    const streamed = streamText({ model, ...greedy, prompt: SORT });
    assert.equal((await all(streamed.textStream)).join(""), SORTED);
    assert.ok((await streamed.usage).outputTokens > 1);
  });

  test(`${name}: objects`, async () => {
    Report.parse((await generateObject({ model, ...greedy, prompt: WEATHER, schema: Report })).object);
    const output = Output.object({ schema: Report });
    Report.parse((await generateText({ model, ...greedy, prompt: WEATHER, output })).output);
  });

  test(`${name}: a forced call, and an answer to its result`, async () => {
    const seen = [];
    const get_weather = tool({
      description: "Get the weather.",
      inputSchema: Asked,
      execute: (given) => {
        seen.push(given);
        return "rain";
      },
    });
    const asked = {
      model,
      ...greedy,
      providerOptions,
      maxOutputTokens: 100,
      prompt: WEATHER,
      tools: { get_weather },
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    };
    const whole = await generateText(asked);
    assert.equal(whole.steps.length, 2);
    const streamed = streamText(asked);
    await streamed.consumeStream({ onError: (error) => assert.fail(error) });
    assert.equal((await streamed.steps).length, 2);
    assert.ok(seen.length >= 2);
    seen.forEach((given) => Asked.parse(given));
  });
}

test("a hint", async () => {
  const hinted = { openai: { reasoningEffort: "low" } };
  const answered = await generateText({ model: openai.chat(MODEL), ...greedy, prompt: SORT, providerOptions: hinted });
  assert.equal(answered.text, SORTED);
});
