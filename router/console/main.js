// The page's two views, its tabs, and the model's name.
import { askForKey, json } from "./server.js";
import { watchCluster } from "./cluster.js";
import { startPlayground } from "./playground.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(name) {
  const chosen = tabs.find((tab) => tab.getAttribute("aria-controls") === name) ?? tabs[0];
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  look();
}

/** Watches the cluster only while somebody sees it: a page that the browser keeps hidden does not. */
function look() {
  watchCluster(!document.hidden && !document.getElementById("cluster").hidden);
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    const name = tab.getAttribute("aria-controls");
    history.pushState(null, "", `#${name}`); // to set location.hash would take the focus off the tab
    show(name);
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}
document.addEventListener("visibilitychange", look);
addEventListener("pageshow", look);
addEventListener("pagehide", () => watchCluster(false));
addEventListener("popstate", () => show(location.hash.slice(1)));
document.getElementById("key-button").addEventListener("click", () => askForKey("Another key for this tab:"));

startPlayground();
show(location.hash.slice(1));
try {
  const model = (await json("v1/models")).data[0];
  document.getElementById("model").textContent = model.id;
  document.body.dataset.model = model.id;
  for (const option of document.getElementById("mode").options) {
    option.disabled = option.value !== "auto" && model.modes !== null && !model.modes.includes(option.value);
  }
} catch (error) {
  document.getElementById("model").textContent = error.message;
}
