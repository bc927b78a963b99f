// Images: a strip of strengths with a slider, before and after, a grid to choose from, the gallery.

import { ask, button, Drawn, el, fileUrl, Live, say, sendToPython, thumbUrl } from "./base.js";

const given = (element) => JSON.parse(element.getAttribute("data") || "{}");

// All images of the strip lie on top of each other; the slider only changes which one is visible.
class Strip extends Drawn {
  static observedAttributes = ["data"];
  render() {
    const { images, strengths, chosen, total } = given(this);
    if (!images || !images.length) return;
    const old = this.images || new Map();
    this.images = new Map(images.map((image, i) => [image.file, old.get(image.file) ||
      el("img", { src: fileUrl(image.file), alt: `strength ${strengths[i]}`, decoding: "sync", draggable: false })]));
    const elements = [...this.images.values()];
    const value = el("output", { class: "sd-value" });
    const range = el("input", {
      type: "range", min: "0", max: String(images.length - 1), step: "1",
      "aria-label": "Scrub through the strengths", class: "sd-range",
    });
    const ticks = images.map((_, i) => button(String(strengths[i]), () => this.show(i), "sd-tick",
      { "aria-label": `Show strength ${strengths[i]}` }));
    this.show = (index) => {
      elements.forEach((element, i) => element.classList.toggle("on", i === index));
      ticks.forEach((tick, i) => tick.classList.toggle("on", i === index));
      range.value = String(index);
      range.setAttribute("aria-valuetext", `strength ${strengths[index]}`);
      value.textContent = `strength ${strengths[index]}`;
      this.dataset.shown = String(strengths[index]);
    };
    range.addEventListener("input", () => this.show(Number(range.value)));
    const more = total > images.length ? el("p", { class: "sd-dim" }, `${images.length} of ${total} drawn`) : "";
    this.replaceChildren(el("div", { class: "sd-stack" }, elements),
      el("div", { class: "sd-scrub" }, value, range), el("div", { class: "sd-ticks" }, ticks), more);
    const nearest = strengths.slice(0, images.length).reduce((best, strength, i) =>
      Math.abs(strength - (chosen ?? 1)) < Math.abs(strengths[best] - (chosen ?? 1)) ? i : best, 0);
    this.show(nearest);
  }
}

class Compare extends Drawn {
  static observedAttributes = ["data"];
  render() {
    const { before, after, labels } = given(this);
    if (!before || !after) return;
    const top = el("img", { src: fileUrl(after), alt: labels[1], class: "sd-after" });
    const range = el("input", { type: "range", min: "0", max: "100", value: "50", step: "1",
      "aria-label": "Move the line between before and after", class: "sd-cut" });
    const frame = el("div", { class: "sd-compare" }, el("img", { src: fileUrl(before), alt: labels[0] }), top,
      el("span", { class: "sd-tag left" }, labels[0]), el("span", { class: "sd-tag right" }, labels[1]),
      el("span", { class: "sd-line" }), range);
    const cut = () => frame.style.setProperty("--cut", `${range.value}%`);
    range.addEventListener("input", cut);
    cut();
    this.replaceChildren(frame);
  }
}

class Grid extends Drawn {
  static observedAttributes = ["data"];
  render() {
    const { rows, columns, cells } = given(this);
    if (!rows) return;
    const head = el("tr", {}, el("th", {}), columns.map((strength) => el("th", { scope: "col" }, strength)));
    const lines = rows.map((row, r) => el("tr", {}, el("th", { scope: "row", class: "sd-names" }, row.label), columns.map((strength, c) => {
      const cell = cells[`${r},${c}`];
      if (!cell) return el("td", {}, el("div", { class: "sd-empty" }));
      const choose = () => {
        sendToPython("chosen-cell", JSON.stringify({ file: row.file, strength, at: Date.now() }));
        say(`${row.label} at strength ${strength} is set`);
      };
      return el("td", {}, el("button", { type: "button", class: "sd-cell", onclick: choose,
        "aria-label": `Use ${row.label} at strength ${strength}` }, el("img", { src: fileUrl(cell), alt: "" })));
    })));
    this.replaceChildren(el("div", { class: "sd-scroll" }, el("table", { class: "sd-grid" }, el("thead", {}, head), el("tbody", {}, lines))),
      el("p", { class: "sd-dim" }, "Click an image to use its checkpoint and strength."));
  }
}

class Gallery extends Live {
  start() {
    this.every = 4000;
    this.list = el("div", { class: "sd-thumbs" });
    this.shown = "";
    this.limit = 48;
    this.viewer = new DrawnViewer((image) => this.at(image));
    this.more = button("Show more", () => { this.limit += 48; this.refresh(); });
    this.replaceChildren(this.list, this.more);
  }
  at(image) { this.dispatchEvent(new CustomEvent("sd-at", { bubbles: true, detail: { tab: "generate", image: image && image.name } })); }
  async refresh() {
    const answer = await ask(`images?limit=${this.limit}`).catch(() => null);
    if (!answer) return;
    const key = JSON.stringify(answer);
    if (key === this.shown) return;
    this.shown = key;
    this.images = answer.images;
    this.more.hidden = answer.total <= answer.images.length;
    this.list.replaceChildren(...(answer.images.length ? answer.images.map((image) => this.card(image))
      : [el("p", { class: "sd-dim" }, "Nothing drawn yet. Your images are kept here, each PNG with its settings.")]));
  }
  card(image) {
    return el("button", { type: "button", class: "sd-thumb", onclick: () => this.viewer.open(this.images, image), title: image.name,
      "aria-label": `Open ${image.name}` }, el("img", { src: thumbUrl(image.file, 192, image.changed), loading: "lazy", alt: "" }));
  }
  // Opens an image by its name, as a link does; nothing closes what is open.
  async link(name) {
    if (!name) { this.viewer.close(); return; }
    const { images } = await ask("images?limit=1000").catch(() => ({ images: [] }));
    const image = images.find((one) => one.name === name);
    if (image) this.viewer.open(images, image); else say(`${name}: there is no such image (any more)`, "error");
  }
}

// A drawn image as large as the screen: arrows go on, u uses its settings, s saves it, Esc closes.
class DrawnViewer {
  constructor(told) {
    this.told = told;
    this.dialog = el("dialog", { class: "sd-viewer", tabindex: "-1", "aria-label": "Drawn image" });
    this.dialog.addEventListener("close", () => told(null));
    this.dialog.addEventListener("keydown", (event) => {
      const does = { ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1), Home: () => this.show(0), End: () => this.show(this.images.length - 1), u: () => this.use(), s: () => this.dialog.querySelector("a[download]")?.click() }[event.key];
      if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      does();
    });
  }
  open(images, image) {
    if (!this.dialog.isConnected) document.body.append(this.dialog);
    this.images = images;
    if (!this.dialog.open) this.dialog.showModal();
    this.show(images.indexOf(image));
    this.dialog.focus();
  }
  close() { if (this.dialog.open) this.dialog.close(); }
  step(by) { this.show(this.place + by); }
  use() {
    if (!this.settings) return;
    sendToPython("import-png", JSON.stringify({ file: this.images[this.place].file, at: Date.now() }));
    this.close();
  }
  async show(place) {
    if (place < 0 || place >= this.images.length) return;
    this.place = place;
    const image = this.images[place], last = this.images.length - 1;
    this.settings = null;
    this.told(image);
    const facts = el("dl"), use = button("Use these settings", () => this.use(), "primary", { title: "u", disabled: true });
    const shown = el("img", { src: fileUrl(image.file), alt: image.name, class: "sd-large" });
    this.dialog.replaceChildren(el("div", { class: "sd-viewer-image" }, shown),
      el("div", { class: "sd-viewer-side" }, el("p", { class: "sd-dim", translate: "no" }, image.name), el("div", { class: "sd-row" }, use,
        el("a", { class: "sd-button", href: fileUrl(image.file), download: image.name.split("/").pop(), title: "s" }, "Save"), button("Close", () => this.close())), facts,
        el("p", { class: "sd-dim" }, `${place + 1} of ${last + 1}. Arrows: other images. u: use these settings. s: save. Esc: close.`)),
      place > 0 ? button("‹", () => this.step(-1), "sd-viewer-back", { "aria-label": "Previous image" }) : "", place < last ? button("›", () => this.step(1), "sd-viewer-on", { "aria-label": "Next image" }) : "");
    if (!this.dialog.contains(document.activeElement)) this.dialog.focus();
    const settings = await ask(`settings?path=${encodeURIComponent(image.file)}`).catch(() => null);
    if (this.place !== place || !settings) return;
    this.settings = settings;
    use.disabled = false;
    facts.replaceChildren(...Object.entries(settings).flatMap(([name, value]) => [el("dt", {}, name), el("dd", { translate: "no" }, value)]));
  }
}

// An image that was just drawn opens large when it is clicked.
const alone = new DrawnViewer(() => {});
document.addEventListener("click", (event) => {
  const image = event.target.closest?.("#drawn img, #extra .sd-stack img.on, #extra a > img");
  const file = image && new URL(image.src).searchParams.get("path");
  if (!file) return;
  event.preventDefault();
  const all = [...document.querySelectorAll("#drawn img, #extra .sd-stack img, #extra a > img")].filter((one) => one === image || one.closest("#drawn, #extra") === image.closest("#drawn, #extra"));
  const images = all.map((one) => new URL(one.src).searchParams.get("path")).filter(Boolean).map((path) => ({ file: path, name: path.split(/[\\/]/).slice(-2).join("/") }));
  alone.open(images, images.find((one) => one.file === file));
});

// The adapters with what their files say, to be searched; one that is chosen goes into the first field.
class Adapters extends HTMLElement {
  connectedCallback() {
    this.dialog = el("dialog", { class: "sd-dialog sd-wide", "aria-label": "Adapters" });
    this.replaceChildren(button("Browse adapters", () => this.open(), "", { id: "browse-adapters" }), this.dialog);
  }
  async open() {
    const find = el("input", { type: "search", class: "sd-find", placeholder: "find by name, trigger word or base", "aria-label": "Find an adapter", oninput: () => this.list(find.value) });
    this.cards = el("div", { class: "sd-adapters" }, el("p", { class: "sd-dim" }, "…"));
    this.dialog.replaceChildren(el("div", { class: "sd-row sd-apart" }, el("h3", {}, "Adapters"), button("Close", () => this.dialog.close())), find, this.cards);
    this.dialog.showModal();
    const answer = await ask("adapters").catch((error) => ({ adapters: [], error: error.message }));
    this.known = answer.adapters;
    if (answer.error) say(answer.error, "error");
    this.list(find.value);
  }
  list(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = (this.known || []).filter((one) => words.every((word) => `${one.label} ${one.trigger} ${one.base}`.toLowerCase().includes(word)));
    this.cards.replaceChildren(...found.slice(0, 200).map((one) => this.card(one)), found.length ? "" : el("p", { class: "sd-dim" }, "No adapter of this name. Train one, or drop a file onto the page."));
  }
  card(one) {
    const use = (word) => {
      sendToPython("chosen-cell", JSON.stringify({ file: one.path, strength: one.strength ?? 1, at: Date.now() }));
      if (word) addToPrompt(one.trigger);
      this.dialog.close();
    };
    return el("figure", { class: "sd-adapter" }, one.preview ? el("img", { src: thumbUrl(one.preview, 256, one.changed), loading: "lazy", alt: "" }) : el("div", { class: "sd-empty" }),
      el("figcaption", {}, el("b", { translate: "no" }, one.label), one.trigger ? el("div", {}, "trigger word: ", el("span", { translate: "no" }, one.trigger)) : null,
        one.strength ? el("div", {}, `recommended strength: ${one.strength}`) : null, one.base ? el("div", { class: "sd-dim", translate: "no" }, one.base) : null),
      el("div", { class: "sd-row" }, button("Use", () => use(false), "sd-small primary"), one.trigger ? button("Use with its trigger word", () => use(true), "sd-small") : null));
  }
}

// Puts a trigger word in front of the prompt, unless it is there.
function addToPrompt(word) {
  const prompt = document.querySelector("#prompt textarea");
  if (!prompt || prompt.value.toLowerCase().includes(word.toLowerCase())) return;
  sendToPython("prompt", prompt.value.trim() ? `${word}, ${prompt.value}` : word);
}

// A file that is dropped anywhere on the drawing page goes to the area for its kind.
const AREAS = { safetensors: "#drop-adapter", png: "#import-file" };
document.addEventListener("dragover", (event) => { if (document.querySelector("#draw")?.offsetParent && event.dataTransfer?.types.includes("Files")) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files[0], area = file && AREAS[file.name.split(".").pop().toLowerCase()];
  const input = area && document.querySelector(`${area} input[type=file]`);
  if (!input || !document.querySelector("#draw")?.offsetParent || event.target.closest?.("#drop-adapter, #import-file")) return;
  event.preventDefault();
  const held = new DataTransfer();
  held.items.add(file);
  input.files = held.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});

customElements.define("sd-adapters", Adapters);
customElements.define("sd-strip", Strip);
customElements.define("sd-compare", Compare);
customElements.define("sd-grid", Grid);
customElements.define("sd-gallery", Gallery);
