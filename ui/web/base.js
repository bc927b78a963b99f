// Shared by the page's own elements: building nodes from data (never from HTML text), asking the server.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list" && name !== "style" && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat());
  return node;
}

export async function ask(path, body, extra = {}) {
  const options = body === undefined ? {} : {
    ...extra,
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Sdlora": "1" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(`/sdlora/${path}`, options);
  } catch {
    throw new Error("the server does not answer; start it again with `sdlora ui` (running jobs continue)");
  }
  const text = await response.text();
  let value;
  try { value = JSON.parse(text); } catch { value = { error: text }; }
  if (!response.ok) throw new Error(value.error || response.statusText);
  return value;
}

export const fileUrl = (path) => `/sdlora/file?path=${encodeURIComponent(path)}`;
export const thumbUrl = (path, side = 256, version = "") =>
  `/sdlora/thumb?path=${encodeURIComponent(path)}&side=${side}&v=${version}`;

export function say(text, kind = "info") {
  let box = document.getElementById("sd-said");
  if (!box) {
    box = el("div", { id: "sd-said", role: "status", "aria-live": "polite" });
    document.body.append(box);
  }
  const note = el("p", { class: `sd-note sd-${kind}` }, text);
  box.append(note);
  setTimeout(() => note.remove(), kind === "error" ? 9000 : 3500);
}

export async function attempt(work) {
  try { return await work(); } catch (error) { say(error.message, "error"); return undefined; }
}

// A word for this tab of the browser, kept over reloads: its forms are its own. A duplicated tab brings the word
// of the first one along; a lock that the first one holds tells.
const TAB = "sdlora-tab";
const newWord = () => [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const takeWord = (word) => { sessionStorage.setItem(TAB, word); return word; };
let word = takeWord(sessionStorage.getItem(TAB) || newWord());
export const tabWord = () => word;
export const tabKnown = !navigator.locks ? Promise.resolve() : new Promise((known) => {
  navigator.locks.request(`${TAB}-${word}`, { signal: AbortSignal.timeout(3000) }, () => { known(); return new Promise(() => {}); })
    .catch(() => { word = takeWord(newWord()); known(); });
});

// Sends a value to Python through a hidden text field, as if it were typed there.
export function sendToPython(id, value) {
  const field = document.querySelector(`#${id} textarea, #${id} input`);
  if (!field) return;
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

export const button = (label, onclick, kind = "", extra = {}) =>
  el("button", { type: "button", class: `sd-button ${kind}`, onclick, ...extra }, label);

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export const bytes = (count) =>
  count === null || count === undefined ? "" : count < 2 ** 30 ? `${Math.round(count / 2 ** 20)} MiB` : `${(count / 2 ** 30).toFixed(1)} GiB`;

// An element drawn from its attributes. Gradio patches the page: it changes the attributes of an existing
// element and removes its children, so every change draws it again, when the patching is over.
export class Drawn extends HTMLElement {
  connectedCallback() { this.soon(); }
  attributeChangedCallback() { this.soon(); }
  soon() {
    if (this.waiting) return;
    this.waiting = true;
    queueMicrotask(() => { this.waiting = false; if (this.isConnected) this.render(); });
  }
}

// An element that refreshes only while it is visible, so that hidden tabs send no requests.
export class Live extends HTMLElement {
  connectedCallback() {
    this.start();
    this.timer = setInterval(() => { if (this.offsetParent !== null && !document.hidden) this.refresh(); }, this.every || 1000);
    this.refresh();
  }
  disconnectedCallback() { clearInterval(this.timer); }
  start() {}
  async refresh() {}
}
