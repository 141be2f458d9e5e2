// Calls to the server this page is from, with an API key where it asks for one, and its event streams.
const KEY = "triad-api-key";
const dialog = document.getElementById("key-dialog");
let asking = null;

/** Asks for an API key; true if one was given. Calls that need one at the same time ask once. */
export function askForKey(why) {
  asking ??= new Promise((resolve) => {
    document.getElementById("key-why").textContent = why;
    const field = document.getElementById("key");
    field.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "ok" && field.value.trim();
      if (given) sessionStorage.setItem(KEY, given);
      field.value = "";
      resolve(Boolean(given));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** The answer to a call, if it is a success; otherwise an Error with the server's own words. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (response.ok) return response;
    const said = await response.json().then((found) => found.error?.message, () => null);
    const message = said ?? `The server answered ${response.status}.`;
    if (response.status === 401) {
      // Another call may have been given the key while this one was under way.
      if (sessionStorage.getItem(KEY) !== key || (await askForKey(message))) continue;
    }
    throw Object.assign(new Error(message), { status: response.status });
  }
}

export async function json(path, options) {
  return (await call(path, options)).json();
}

/** The server-sent events of an answer, each as {name, data}. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let received = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    received += value;
    const whole = received.split("\n\n");
    received = whole.pop();
    for (const text of whole) {
      const event = { name: "message", data: "" };
      for (const line of text.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      yield event;
    }
  }
}

/** An element with a class, text and children. */
export function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** A list of figures with their names, from [name, value] pairs. */
export function figures(pairs) {
  const items = pairs.map(([name, value]) =>
    element("div", {}, element("dt", { text: name }), element("dd", { text: value })));
  return element("dl", { class: "figures" }, ...items);
}

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);
export const milliseconds = (seconds, digits = 0) =>
  seconds === null || seconds === undefined ? "–" : `${(1000 * seconds).toFixed(digits)} ms`;
