// The cluster as it goes: a snapshot a second, and each shift of plan with what it was decided from.
import { askForKey, call, element, events, figures, milliseconds, number } from "./server.js";

const MODES = ["ar", "self_speculation", "diffusion"];
const KEPT_S = 300;
const GAP_S = 5; // the time without a snapshot that is shown as such
const RETRY_MS = 1000;
const MADE_S = 10; // what a plan makes is averaged over so long after its shift
const field = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
let watching = null;
let chosen = null;
const history = new Map(); // by replica: [{at_s, mode, rates}], oldest first
const shifts = new Map();

field("legend").append(...MODES.map((mode) => element("span", { class: mode, text: mode })));

export function watchCluster(on) {
  if (on && !watching) {
    watching = new AbortController();
    follow(watching.signal);
  } else if (!on && watching) {
    watching.abort();
    watching = null;
  }
}

async function follow(signal) {
  while (!signal.aborted) {
    try {
      field("status").textContent = "live";
      for await (const { name, data } of events(await call("v1/triad/events", { signal }))) {
        if (name === "snapshot") take(JSON.parse(data));
        if (name === "shift") addShift(JSON.parse(data));
      }
    } catch (error) {
      if (signal.aborted) return;
      field("status").textContent = error.message;
      if (error.status === 401) return;
      if (error.status === 403 && !(await askForKey(error.message))) return;
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

function take(snapshot) {
  field("status").textContent = !snapshot.ready ? "no replica can serve yet"
    : snapshot.store.available ? "live" : "Redis does not answer: each replica decides for itself";
  for (const found of snapshot.replicas) remember(found, snapshot.at_s);
  const present = new Set(snapshot.replicas.map((found) => found.replica));
  for (const name of history.keys()) if (!present.has(name)) history.delete(name);
  field("whole").replaceChildren(element("h3", { text: "All replicas" }), whole(snapshot));
  field("replicas").replaceChildren(...snapshot.replicas.map(card));
  if (chosen) tellShift(chosen);
}

function remember(found, at_s) {
  const kept = (history.get(found.replica) ?? []).filter((seen) => seen.at_s > at_s - KEPT_S);
  const before = kept.at(-1)?.at_s ?? at_s;
  const nothing = { mode: "none", rates: {} };
  if (at_s - before > GAP_S) kept.push({ at_s: before + 1, ...nothing }, { at_s: at_s - 1, ...nothing });
  kept.push({ at_s, mode: found.plan?.mode ?? "none", rates: found.tokens_per_s_by_mode });
  history.set(found.replica, kept);
}

const byMode = (counts) =>
  MODES.filter((mode) => counts[mode]).map((mode) => `${mode} ${Math.round(counts[mode])}`).join(", ") || "–";

function total(replicas, key) {
  return Object.fromEntries(MODES.map((mode) => [mode, sum(replicas.map((found) => found[key][mode] ?? 0))]));
}

function whole({ replicas, latency, leader }) {
  const rates = total(replicas, "tokens_per_s_by_mode");
  return figures([
    ["running", `${sum(replicas.map((found) => found.running))}`],
    ["waiting", `${sum(replicas.map((found) => found.waiting))}`],
    ["running by mode", byMode(total(replicas, "running_by_mode"))],
    ["tokens/s", number(sum(Object.values(rates)))],
    ["tokens/s by mode", byMode(rates)],
    ...latencies(latency),
    ["leader", leader ?? "none"],
  ]);
}

const latencies = (found) => [
  ["TTFT p50 / p95", `${milliseconds(found.ttft_p50_s)} / ${milliseconds(found.ttft_p95_s)}`],
  ["TPOT p50 / p95", `${milliseconds(found.tpot_p50_s, 1)} / ${milliseconds(found.tpot_p95_s, 1)}`],
];

const bound = ({ threshold, factor, risk }) =>
  risk ? `, risk ${risk}` : factor ? `, factor ${factor}` : threshold ? `, threshold ${threshold}` : "";

function card(found) {
  const plan = found.plan;
  const told = !plan ? "no plan yet"
    : `${plan.mode}${plan.block_length > 1 ? `, blocks of ${plan.block_length}` : ""}`
      + `${bound(plan)}, for ${number(plan.held_s)} s`;
  const kept = history.get(found.replica);
  return element("section", { class: "card", "data-replica": found.replica },
    element("h3", { text: `${found.replica}${found.freshness === "fresh" ? "" : ` (${found.freshness})`}` }),
    element("div", { class: `mode ${plan?.mode ?? "none"}`, text: told }),
    element("p", { class: "reason", text: plan?.reason ? `${plan.rule}: ${plan.reason}` : "" }),
    figures([
      ["running / places", `${found.running} / ${found.max_running}`],
      ["waiting", `${found.waiting}`],
      ["running by mode", byMode(found.running_by_mode)],
      ["pinned by request", byMode(found.pinned_by_mode)],
      ["tokens/s by mode", byMode(found.tokens_per_s_by_mode)],
      ["pages", `${found.pages_used} / ${found.num_pages}`],
      ...latencies(found.latency),
    ]),
    rateChart(kept), strip(kept));
}

const svg = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

/** The place of each snapshot in a chart KEPT_S wide, whose end is now. */
const places = (kept) => kept.map(({ at_s }) => KEPT_S - (kept.at(-1).at_s - at_s));

/** Tokens a second by mode, one on the other, over the last minutes. */
function rateChart(kept) {
  const chart = svg("svg", { viewBox: `0 0 ${KEPT_S} 100`, preserveAspectRatio: "none", role: "img" });
  const most = Math.max(1, ...kept.map(({ rates }) => sum(Object.values(rates))));
  chart.setAttribute("aria-label", `tokens a second by mode over five minutes, at most ${number(most)}`);
  const floor = kept.map(() => 0);
  const x = places(kept);
  for (const mode of MODES) {
    const below = [...floor];
    kept.forEach(({ rates }, index) => (floor[index] += (100 * (rates[mode] ?? 0)) / most));
    const at = (heights) => heights.map((height, index) => `${x[index]},${100 - height}`);
    chart.append(svg("path", { class: mode, d: `M${[...at(floor), ...at(below).reverse()].join("L")}Z` }));
  }
  return chart;
}

/** Which mode the plan in force said, over the same minutes. */
function strip(kept) {
  const chart = svg("svg", { viewBox: `0 0 ${KEPT_S} 1`, preserveAspectRatio: "none", role: "img", class: "strip" });
  const x = places(kept);
  let begin = 0;
  kept.forEach(({ mode }, index) => {
    if (index + 1 < kept.length && kept[index + 1].mode === mode) return;
    const end = x[index + 1] ?? KEPT_S;
    chart.append(svg("rect", { class: mode, x: x[begin] - 1, width: end - x[begin] + 1, height: 1 }));
    begin = index + 1;
  });
  chart.setAttribute("aria-label", `mode of the plan in force, now ${kept.at(-1).mode}`);
  return chart;
}

const named = (plan) => (plan ? `${plan.mode}${plan.block_length > 1 ? ` ${plan.block_length}` : ""}` : "nothing");

function addShift(shift) {
  const id = `${shift.at_s} ${shift.replica} ${shift.version}`;
  if (shifts.has(id)) return; // told again after a reconnection
  shifts.set(id, shift);
  const time = new Date(1000 * shift.at_s).toLocaleTimeString();
  const button = element("button", { "aria-pressed": "false" },
    `${time} ${shift.replica}: ${named(shift.before)} → `,
    element("span", { class: `mode ${shift.plan.mode}`, text: named(shift.plan) }));
  button.addEventListener("click", () => {
    chosen = shift;
    for (const other of field("shifts").querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    tellShift(shift);
    field("shift").focus();
  });
  field("shifts").prepend(element("li", {}, button));
}

/** Tokens a second that the replica made after the shift; null where the page did not see that. */
function made(shift) {
  const seen = (history.get(shift.replica) ?? [])
    .filter(({ at_s }) => at_s >= shift.at_s && at_s <= shift.at_s + MADE_S);
  return seen.length < 2 ? null : sum(seen.map(({ rates }) => sum(Object.values(rates)))) / seen.length;
}

function tellShift(shift) {
  const { load, before, plan } = shift;
  const expected = (found) => (found ? `${number(found.expected_tokens_per_s)} tokens/s` : "–");
  field("shift").hidden = false;
  field("shift").replaceChildren(
    element("h3", { text: `${shift.replica}: ${named(before)} → ${named(plan)}` }),
    element("p", { class: "reason", text: `${shift.rule}: ${shift.reason}` }),
    figures([
      ["forecast, new plan", expected(plan)],
      ["forecast, old plan", expected(before)],
      [`made in ${MADE_S} s after`, made(shift) === null ? "not seen" : `${number(made(shift))} tokens/s`],
      ["made before", `${number(load.tokens_per_s)} tokens/s`],
      ["running", `${load.running}`], ["waiting", `${load.waiting}`], ["auto", `${load.auto}`],
      ["running by mode", byMode(load.running_by_mode)],
      ["pages", `${load.pages_used} / ${load.num_pages}`],
      ["age of the load", milliseconds(shift.input_age_s)],
      ["plan's version", `${shift.version}`],
    ]));
}

field("burst").addEventListener("click", async () => {
  const body = {
    num_requests: Number(field("burst-size").value), duration_s: Number(field("burst-length").value),
  };
  try {
    await call("v1/triad/burst", { body });
    field("burst-said").textContent = `${body.num_requests} requests at once for ${body.duration_s} s`;
  } catch (error) {
    field("burst-said").textContent = error.message;
    if (error.status === 403) askForKey(error.message);
  }
});
