// promptfoo, by its command, with each kind of provider by its defaults.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "node:test";

// The same as tests/clients/asked.py.
const MODEL = "triad-5m";
const SORT = "Put these in ascending order: jacket, hammer, pencil, door, shovel, umbrella";
const SORTED = "1. door\n2. hammer\n3. jacket\n4. pencil\n5. shovel\n6. umbrella";
const schema = {
  type: "object",
  properties: { unit: { type: "string", enum: ["C", "F"] }, days: { type: "integer", minimum: 1, maximum: 7 } },
  required: ["unit", "days"],
  additionalProperties: false,
};

const server = process.env.TRIAD_CLIENTS_URL;
const command = path.join(import.meta.dirname, "node_modules", "promptfoo", "dist", "src", "entrypoint.js");
const folder = mkdtempSync(path.join(tmpdir(), "promptfoo-"));
process.on("exit", () => rmSync(folder, { recursive: true }));

const kinds = {
  "openai:chat": `${server}/v1`,
  "openai:responses": `${server}/v1`,
  "openai:completion": `${server}/v1`,
  "anthropic:messages": server,
};

// The output of each provider; the command fails where one has an error or breaks an assertion.
function evaluate(asked, config, wanted, assertions) {
  const providers = wanted.map((kind) => ({
    id: `${kind}:${MODEL}`,
    config: { apiBaseUrl: kinds[kind], apiKey: "none", ...config },
  }));
  const given = path.join(folder, "config.json");
  const made = path.join(folder, "made.json");
  const tests = [{ vars: { asked }, assert: assertions }];
  writeFileSync(given, JSON.stringify({ prompts: ["{{asked}}"], providers, tests }));
  const quiet = ["--no-cache", "--no-write", "--no-table", "--no-progress-bar"];
  execFileSync(process.execPath, [command, "eval", "-c", given, "-o", made, ...quiet], {
    env: {
      ...process.env,
      PROMPTFOO_CONFIG_DIR: folder,
      PROMPTFOO_DISABLE_REMOTE_GENERATION: "1",
      PROMPTFOO_DISABLE_TELEMETRY: "1",
      PROMPTFOO_DISABLE_UPDATE: "1",
    },
    stdio: ["ignore", "inherit", "inherit"],
  });
  const { results } = JSON.parse(readFileSync(made, "utf8")).results;
  assert.equal(results.length, wanted.length);
  return results.map((result) => result.response);
}

test("texts", () => {
  evaluate(SORT, {}, ["openai:chat", "openai:responses", "anthropic:messages"], [{ type: "equals", value: SORTED }]);
  const [completed] = evaluate(SORT, {}, ["openai:completion"], []);
  assert.ok(completed.output.length > 0);
  assert.ok(completed.tokenUsage.completion > 0);
});

test("a form, and a forced call", () => {
  const json_schema = { name: "asked", strict: true, schema };
  evaluate("How is the weather in Oslo?", { response_format: { type: "json_schema", json_schema } }, ["openai:chat"], [
    { type: "is-json", value: schema },
  ]);
  const tool = { type: "function", function: { name: "get_weather", parameters: schema } };
  const forced = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
  evaluate("How is the weather in Oslo?", forced, ["openai:chat"], [{ type: "is-valid-openai-tools-call" }]);
});
