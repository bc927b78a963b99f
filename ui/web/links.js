// What is shown stands in the address: the tab, the folder and its image, the run, the drawn image. So links
// lead there, and Back goes back: #train?run=ID&image=STEP-PROMPT, #dataset?folder=PATH&image=NAME, #generate?image=NAME.

import { openFolder } from "./folders.js";

const TABS = ["dataset", "train", "generate", "tools"];
const WAIT = 30_000; // ms for the page and the folder of a link to be there
let applying = false;

const tabs = () => [...document.querySelectorAll("#pages button[role=tab]")].slice(0, TABS.length);
const shown = () => TABS[Math.max(0, tabs().findIndex((one) => one.getAttribute("aria-selected") === "true"))];

export function parsed(fragment) {
  const [tab, query] = fragment.replace(/^#/, "").split("?");
  return { tab: TABS.includes(tab) ? tab : TABS[0], ...Object.fromEntries(new URLSearchParams(query || "")) };
}

export function written({ tab, ...more }) {
  const query = new URLSearchParams(Object.entries(more).filter(([, value]) => value)).toString();
  return `#${tab}${query ? `?${query}` : ""}`;
}

async function until(ready) {
  for (const start = Date.now(); Date.now() - start < WAIT; ) {
    const value = ready();
    if (value) return value;
    await new Promise((later) => setTimeout(later, 100));
  }
  return null;
}

// Shows what the address says.
async function apply() {
  const asked = parsed(location.hash);
  applying = true;
  try {
    if (!(await until(() => tabs().length === TABS.length))) return;
    if (shown() !== asked.tab) tabs()[TABS.indexOf(asked.tab)].click();
    if (asked.tab === "train") (await until(() => document.querySelector("sd-jobs")))?.link(asked.run, asked.image);
    if (asked.tab === "generate") (await until(() => document.querySelector("sd-gallery")))?.link(asked.image);
    if (asked.tab === "dataset" && asked.folder) await showFolder(asked);
    if (asked.tab === "dataset" && !asked.folder) document.querySelector("sd-dataset")?.link(null);
  } finally { setTimeout(() => { applying = false; }, 200); }
}

async function showFolder({ folder, image }) {
  const there = () => document.querySelector(`sd-dataset[folder="${CSS.escape(folder)}"]`);
  if (!there()) {
    await until(() => document.querySelector("#dataset-folder input"));
    openFolder(folder);
  }
  (await until(there))?.link(image);
}

// An element shows something else: a new entry, unless it only goes on to the next image.
document.addEventListener("sd-at", ({ detail }) => {
  const before = parsed(location.hash), wanted = written(detail);
  if (applying || wanted === location.hash || shown() !== detail.tab) return;
  const opened = Boolean(detail.image);
  if (!opened && before.image && before.tab === detail.tab) {
    if (history.state?.opened) history.back(); else history.replaceState(null, "", wanted);
  } else if ((opened && before.image) || !location.hash) history.replaceState({ opened: opened && Boolean(history.state?.opened) }, "", wanted);
  else history.pushState({ opened }, "", wanted);
});

addEventListener("popstate", apply);

until(() => tabs().length === TABS.length).then(async () => {
  if (location.hash) await apply();
  new MutationObserver(() => {
    const tab = shown();
    if (!applying && tab !== parsed(location.hash).tab) history.pushState(null, "", `#${tab}`);
  }).observe(document.querySelector("#pages"), { subtree: true, attributes: true, attributeFilter: ["aria-selected"] });
});
