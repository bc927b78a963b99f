// The page in another language. Texts come from Gradio, from HTML that Python writes, from our own elements and from
// the program's messages, so they are translated where they are shown: text by text, by the one table of a language.
//
// A key of the table is a text, or a pattern: {0} to {9} stand for numbers, {a} to {z} for anything, which is kept as
// it is, and {A} to {Z} for something that is in the table itself. What a user wrote is inside of translate="no", or of
// .sd-names, where only the table's part `names` counts.

import { Table } from "./table.js";

const STORED = "sdlora-language";
const TABLES = { "zh-CN": "/sdlora/web/zh-CN.json" };
const LANGUAGES = { en: "English", "zh-CN": "中文" };
const ATTRIBUTES = ["placeholder", "title", "aria-label", "aria-valuetext", "alt"];
const UNTOUCHED = "[translate=no], script, style, textarea, .file-preview";
const NAMES = ".sd-names :is(li, input, th), :is(th, span).sd-names";
const tables = {};
let table = null;

// What stands somewhere in English, and what is shown instead of it.
const texts = new WeakMap();
const attributes = new WeakMap();
const added = new WeakMap();

function translated(text, node) {
  if (!table || !/[A-Za-z]/.test(text)) return null;
  return table.find(text, Boolean(node.closest(NAMES)));
}

// What is shown outside of the page, as in a notification, in the page's language.
export const translation = (text) => table?.find(text, false) ?? text;

function ofText(node) {
  const parent = node.parentElement;
  if (!parent || parent.closest(UNTOUCHED)) return;
  if (parent.tagName === "CODE") return;
  if (hasCode(parent)) { ofSentence(parent); return; }
  put(node, texts, node.data, (value) => { node.data = value; });
}

function put(node, held, now, write) {
  let entry = held.get(node);
  if (!entry || (now !== entry.shown && now !== entry.source)) held.set(node, entry = { source: now, shown: now }); // it was written anew
  const wanted = translated(entry.source, node.parentElement || node) ?? entry.source;
  entry.shown = wanted;
  if (now !== wanted) write(wanted);
}

// A sentence with `code` in it is one text, though it is several nodes; they stay, and what is in them is exchanged.
const hasCode = (element) => [...element.children].some((child) => child.tagName === "CODE") && [...element.children].every((child) => child.tagName === "CODE");
const written = (nodes) => nodes.map((node) => node.nodeType === Node.TEXT_NODE ? node.data : `\`${node.textContent}\``).join("");

function ofSentence(element) {
  let entry = added.get(element);
  const nodes = () => [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE || node.nodeType === Node.ELEMENT_NODE);
  const now = written(nodes());
  if (!entry || (now !== entry.shown && now !== entry.source)) {
    entry?.spare.forEach((node) => node.remove());
    added.set(element, entry = { source: written(nodes()), shown: "", spare: [] });
  }
  const wanted = translated(entry.source, element) ?? entry.source;
  if (wanted !== written(nodes())) write(element, wanted.split("`"), entry);
  entry.shown = written(nodes());
}

function write(element, parts, entry) {
  const codes = [...element.children];
  if (codes.length !== (parts.length - 1) / 2) return;
  codes.forEach((code, i) => { if (code.textContent !== parts[2 * i + 1]) code.textContent = parts[2 * i + 1]; });
  for (let i = 0; i <= codes.length; i += 1) {
    const between = [];
    for (let node = i ? codes[i - 1].nextSibling : element.firstChild; node && node !== codes[i]; node = node.nextSibling)
      if (node.nodeType === Node.TEXT_NODE) between.push(node);
    if (!between.length && parts[2 * i]) {
      between.push(document.createTextNode(""));
      entry.spare.push(between[0]);
      element.insertBefore(between[0], codes[i] || null);
    }
    between.forEach((node, k) => { node.data = k ? "" : parts[2 * i]; });
  }
}

function ofAttributes(element, names = ATTRIBUTES) {
  const field = element.matches("textarea, input"); // what is typed is no text of the page, its label is
  if ((field ? element.parentElement : element)?.closest(UNTOUCHED)) return;
  for (const name of names) {
    const now = element.getAttribute(name);
    if (now === null) continue;
    const held = attributes.get(element) || attributes.set(element, {}).get(element);
    const one = { get: () => held[name], set: (_, entry) => { held[name] = entry; } };
    put(element, one, now, (value) => element.setAttribute(name, value));
  }
  if (element.matches("input[role=listbox], input[role=combobox]")) ofChoice(element);
}

// What a list shows as chosen is a value, which Gradio reads again: it reads what it wrote, the user sees its translation.
const VALUE = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
function ofChoice(input) {
  if (Object.hasOwn(input, "value")) { input.value = input.value; return; } // shown anew in the language of now
  let entry = null;
  Object.defineProperty(input, "value", {
    configurable: true,
    get() { const now = VALUE.get.call(this); return entry && now === entry.shown ? entry.source : now; },
    set(source) {
      const text = String(source ?? "");
      entry = { source: text, shown: translated(text, this) ?? text };
      if (VALUE.get.call(this) !== entry.shown) VALUE.set.call(this, entry.shown);
    },
  });
  input.value = VALUE.get.call(input);
}

function walk(root) {
  if (root.nodeType === Node.TEXT_NODE) { ofText(root); return; }
  if (root.nodeType !== Node.ELEMENT_NODE) return;
  const nodes = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  for (let node = root; node; node = nodes.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE) ofText(node);
    else ofAttributes(node);
  }
}

const watcher = new MutationObserver((records) => {
  for (const record of records) {
    if (record.type === "characterData") ofText(record.target);
    else if (record.type === "attributes") ofAttributes(record.target, [record.attributeName]);
    else record.addedNodes.forEach((node) => { if (node.isConnected) walk(node); });
  }
});

let spoken = window.sdloraLanguage || "en";
export const language = () => spoken;

// Shows the page in a language that is known, and keeps that choice.
export async function speak(tag) {
  localStorage.setItem(STORED, tag);
  await show(tag);
}

async function show(tag) {
  if (tag in TABLES && !tables[tag]) {
    const answer = await fetch(TABLES[tag]).catch(() => null);
    if (answer?.ok) tables[tag] = new Table(await answer.json());
  }
  document.documentElement.lang = spoken = tag;
  table = tables[tag] || null;
  walk(document.body);
  document.dispatchEvent(new Event("sdlora-language"));
}

// The switch in the page's head: to the next language, and written in that one.
class Language extends HTMLElement {
  connectedCallback() {
    this.draw();
    document.addEventListener("sdlora-language", this.drawn = () => this.draw());
  }
  disconnectedCallback() { document.removeEventListener("sdlora-language", this.drawn); }
  draw() {
    const tags = Object.keys(LANGUAGES), next = tags[(tags.indexOf(language()) + 1) % tags.length];
    const button = this.querySelector("button") || this.appendChild(document.createElement("button"));
    Object.assign(button, { type: "button", className: "sd-button sd-language", translate: false, lang: next,
      textContent: LANGUAGES[next], onclick: () => speak(next) });
  }
}
customElements.define("sd-language", Language);

// Gradio writes its own language there.
new MutationObserver(() => { if (document.documentElement.lang !== spoken) document.documentElement.lang = spoken; })
  .observe(document.documentElement, { attributeFilter: ["lang"] });
watcher.observe(document.documentElement, { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES });
if (language() in TABLES) show(language());
