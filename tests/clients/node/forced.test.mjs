// Calls forced by schemas that zod makes of random types: zod takes each, and every lossless mode makes the same.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

import { baseURL, MODEL, server, WEATHER } from "./asked.mjs";
import { generator, parametersOf, randomObject } from "./schemas.mjs";

const NUM_CASES = Number(process.env.TRIAD_CASES ?? 25);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

async function tokensOf(prompt) {
  const body = JSON.stringify({ prompt, add_special_tokens: false });
  const headers = { "Content-Type": "application/json" };
  return (await (await fetch(`${server}/tokenize`, { method: "POST", headers, body })).json()).tokens;
}

// Brings strings and lists to an end, which a small model does not find by itself.
async function bias() {
  const ends = await Promise.all(['"', "}", "]", '",', '"}'].map(tokensOf));
  return Object.fromEntries(ends.filter((ids) => ids.length === 1).map(([id]) => [id, 12]));
}

test(`${NUM_CASES} random types`, { timeout: 3_600_000 }, async (context) => {
  const logit_bias = await bias();
  const counts = { whole: 0, cut: 0, "enforced in part": 0, refused: 0 };
  for (let seed = 0; seed < NUM_CASES; seed++) {
    const random = generator(seed);
    const type = randomObject(random);
    const parameters = parametersOf(random, type);
    const asked = {
      model: MODEL,
      temperature: 0,
      max_tokens: 160,
      truncate_prompt_tokens: 512, // what forces the call is the grammar
      logit_bias,
      messages: [{ role: "user", content: WEATHER }],
      tools: [{ type: "function", function: { name: "act", parameters } }],
      tool_choice: seed % 2 ? "required" : { type: "function", function: { name: "act" } },
      parallel_tool_calls: false,
    };
    const found = [];
    let warning = null;
    try {
      for (const mode of ["ar", "self_speculation", "auto"]) {
        const body = { ...asked, decoding: { mode } };
        const { data, response } = await client.chat.completions.create(body).withResponse();
        warning = response.headers.get("warning");
        const { message, finish_reason } = data.choices[0];
        found.push([finish_reason, message.tool_calls[0].function.arguments]);
      }
      const streamed = await client.chat.completions.stream({ ...asked, decoding: { mode: "auto" } }).finalMessage();
      found.push([found[0][0], streamed.tool_calls[0].function.arguments]);
    } catch (error) {
      if (!(error instanceof OpenAI.BadRequestError)) throw error;
      counts.refused++;
      context.diagnostic(`${seed}: ${error.message}`);
      continue;
    }
    const told = `seed ${seed}: ${JSON.stringify(parameters)}`;
    for (const other of found) assert.deepEqual(other, found[0], told);
    const [end, text] = found[0];
    if (end === "length") counts.cut++;
    else if (warning !== null) {
      counts["enforced in part"]++;
      context.diagnostic(`${seed}: ${warning}`);
    } else {
      counts.whole++;
      const read = type.safeParse(JSON.parse(text));
      assert.ok(read.success, `${told}\n${text}\n${read.error}`);
    }
  }
  context.diagnostic(JSON.stringify(counts));
  assert.equal(counts.refused, 0);
  assert.ok(counts.whole > 0.5 * NUM_CASES, JSON.stringify(counts));
});
