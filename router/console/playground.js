// One prompt, answered in one mode or raced in all, each token coloured by the forward that let it out.
import { call, element, events, figures, json, number } from "./server.js";

const MODES = ["ar", "self_speculation", "diffusion", "auto"];
const HUE_STEP = 137.5; // the golden angle: neighbouring forwards never look alike
const field = (id) => document.getElementById(id);
let running = null;

class Card {
  constructor(mode) {
    this.mode = mode;
    this.answer = element("pre", { class: "answer", "aria-label": `answer in ${mode}` });
    this.told = element("div");
    this.node = element("section", { class: "card", "data-mode": mode },
      element("h3", { text: mode }), this.told, this.answer);
    Object.assign(this, { began: performance.now(), first: null, last: null, tokens: 0, forwards: 0 });
    this.byMode = {};
    this.tell();
  }

  take(part, choiceText) {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    this.tokens += part.tokens;
    this.forwards = part.forward;
    this.byMode[part.mode] = (this.byMode[part.mode] ?? 0) + part.tokens;
    if (!choiceText) return;
    const run = element("span", { text: choiceText, "data-forward": part.forward, "data-mode": part.mode,
      title: `forward ${part.forward}, ${part.mode}: ${part.tokens} token${part.tokens === 1 ? "" : "s"}` });
    if (part.forward === 0) run.className = "prefill";
    else run.style.setProperty("--hue", String((part.forward * HUE_STEP) % 360));
    this.answer.append(run);
  }

  tell() {
    // From the request on: between the first token and the last there may be no time that a browser can see.
    const seconds = this.last === null ? null : (this.last - this.began) / 1000;
    this.told.replaceChildren(figures([
      ["forwards", number(this.forwards)],
      ["tokens", number(this.tokens)],
      ["tokens a forward", this.forwards ? number((this.tokens - 1) / this.forwards, 2) : "–"],
      ["first token", this.first === null ? "–" : `${number(this.first - this.began)} ms`],
      ["tokens/s", seconds ? number(this.tokens / seconds) : "–"],
      ["made by", Object.keys(this.byMode).join(", ") || "–"],
    ]));
  }

  fail(message) {
    this.answer.append(element("p", { class: "wrong", role: "alert", text: message }));
  }
}

function decoding(mode) {
  const asked = { mode, trace: true };
  const length = field("block-length").value;
  const threshold = field("threshold").value;
  if (length && mode !== "ar") asked.block_length = Number(length);
  if (threshold && (mode === "diffusion" || mode === "auto")) asked.threshold = Number(threshold);
  return asked;
}

async function answer(card, signal) {
  const body = {
    model: document.body.dataset.model, stream: true, decoding: decoding(card.mode),
    messages: [{ role: "user", content: field("prompt").value }],
    temperature: Number(field("temperature").value),
  };
  if (field("max-tokens").value) body.max_tokens = Number(field("max-tokens").value);
  card.began = performance.now();
  try {
    for await (const { data } of events(await call("v1/chat/completions", { body, signal }))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const part of chunk.decoding?.trace ?? []) card.take(part, part.text);
      if (chunk.decoding?.forwards !== undefined) card.forwards = chunk.decoding.forwards;
      card.tell();
    }
    card.node.dataset.state = "done";
  } catch (error) {
    if (error.name !== "AbortError") card.fail(error.message);
    card.node.dataset.state = error.name === "AbortError" ? "stopped" : "failed";
  }
}

async function run(modes) {
  if (!field("ask").reportValidity()) return;
  running?.abort();
  const mine = (running = new AbortController());
  field("stop").disabled = false;
  const cards = modes.map((mode) => new Card(mode));
  field("answers").replaceChildren(...cards.map((card) => card.node));
  let winner = null;
  await Promise.all(cards.map(async (card) => {
    await answer(card, mine.signal);
    if (modes.length > 1 && winner === null && card.node.dataset.state === "done") {
      winner = card;
      card.node.classList.add("winner");
    }
  }));
  if (running === mine) {
    running = null;
    field("stop").disabled = true;
  }
}

function race() {
  const absent = [...field("mode").options].filter((option) => option.disabled).map((option) => option.value);
  return run(MODES.filter((mode) => !absent.includes(mode)));
}

function fitFields() {
  const mode = field("mode").value;
  field("block-length").disabled = mode === "ar";
  field("threshold").disabled = mode === "ar" || mode === "self_speculation";
}

async function fillExamples() {
  const list = field("example");
  const prompts = await json("console/examples.json");
  for (const { family, prompt } of prompts) {
    list.append(element("option", { value: prompt, text: `${family}: ${prompt.slice(0, 60)}` }));
  }
  list.addEventListener("change", () => list.value && (field("prompt").value = list.value));
  if (!field("prompt").value) {
    list.selectedIndex = 1 + prompts.findIndex((each) => each.family === "sql");
    field("prompt").value = list.value;
  }
}

export function startPlayground() {
  field("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run([field("mode").value]);
  });
  field("race").addEventListener("click", race);
  field("stop").addEventListener("click", () => running?.abort());
  field("mode").addEventListener("change", fitFields);
  addEventListener("keydown", (event) => {
    if (field("playground").hidden || field("key-dialog").open) return;
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (event.shiftKey) race();
      else run([field("mode").value]);
    }
  });
  fitFields();
  fillExamples();
}
