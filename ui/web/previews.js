// The previews of a run: a table of steps and prompts, and one of them as large as the screen, with keys.

import { button, el, fileUrl } from "./base.js";

const AHEAD = 60; // images of a prompt that are fetched at once, so that moving through the steps waits for nothing

const promptOf = (run, column) => (run.prompts || [])[column] || "";

// The table, the newest step first; `open(step, column)` shows one large.
export function previewTable(run, open) {
  if (!run.samples.length) return [];
  const rows = [...run.samples].reverse();
  const widest = rows.reduce((most, [, files]) => (files.length > most.length ? files : most), []);
  const cell = (step, file, i) => el("td", {}, el("a", { href: fileUrl(file), "aria-label": `step ${step}, ${promptOf(run, i) || "preview"}`,
    onclick: (event) => { if (event.ctrlKey || event.metaKey || event.shiftKey) return; event.preventDefault(); open(step, i); } },
    el("img", { src: fileUrl(file), alt: "", loading: "lazy" })));
  return [el("h4", {}, "Previews"), el("div", { class: "sd-scroll" }, el("table", { class: "sd-grid" },
    el("thead", {}, el("tr", {}, el("th", {}, "step"), widest.map((_, i) => el("th", { scope: "col", translate: promptOf(run, i) ? "no" : null, title: promptOf(run, i) }, promptOf(run, i) || `prompt ${i + 1}`)))),
    el("tbody", {}, rows.map(([step, files]) => el("tr", {}, el("th", { scope: "row" }, step), files.map((file, i) => cell(step, file, i))))))),
    el("p", { class: "sd-dim" }, "Click one to see it large: left and right go through the steps, up and down through the prompts.")];
}

// One preview, large: left and right are steps, up and down prompts. Steps that are drawn meanwhile join in.
export class PreviewViewer {
  constructor(told) {
    this.told = told;
    this.dialog = el("dialog", { class: "sd-viewer sd-preview", tabindex: "-1", "aria-label": "Preview" });
    this.dialog.addEventListener("close", () => { this.run = null; told(null); });
    this.dialog.addEventListener("keydown", (event) => {
      const does = { ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1), ArrowDown: () => this.prompt(1), ArrowUp: () => this.prompt(-1),
        Home: () => this.show(0, this.column), End: () => this.show(this.run.samples.length - 1, this.column) }[event.key];
      if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      does();
    });
  }
  get isOpen() { return this.dialog.open; }
  // Opens one by its step and the number of its prompt (from 0); nothing if there is none.
  open(run, step, column) {
    const row = run.samples.findIndex(([at]) => at === step);
    if (row < 0 || !run.samples[row][1][column]) return false;
    this.run = run;
    this.ahead = null;
    if (!this.dialog.isConnected) document.body.append(this.dialog);
    if (!this.dialog.open) this.dialog.showModal();
    this.show(row, column);
    this.dialog.focus();
    return true;
  }
  close() { if (this.dialog.open) this.dialog.close(); }
  step(by) { this.show(this.row + by, this.column); }
  prompt(by) { this.show(this.row, this.column + by); }
  // The same run with more previews than before: what is shown stays.
  update(run) {
    if (!this.isOpen || run.id !== this.run.id || JSON.stringify(run.samples) === JSON.stringify(this.run.samples)) return;
    const step = this.run.samples[this.row][0];
    this.run = run;
    this.ahead = null;
    const row = run.samples.findIndex(([at]) => at === step);
    this.show(row < 0 ? run.samples.length - 1 : row, this.column);
  }
  show(row, column) {
    const { samples } = this.run;
    if (!samples[row]) return;
    const files = samples[row][1];
    if (column < 0 || column >= files.length) { if (row === this.row) return; column = Math.max(0, files.length - 1); }
    if (!files[column]) return;
    Object.assign(this, { row, column });
    const step = samples[row][0], prompt = promptOf(this.run, column);
    this.told({ step, column });
    this.fetchAhead();
    if (!this.drawn) this.draw();
    this.image.src = fileUrl(files[column]);
    this.image.alt = prompt || `prompt ${column + 1}`;
    this.title.textContent = this.run.name;
    this.place.textContent = `step ${step}`;
    this.text.textContent = prompt;
    this.count.textContent = `preview ${row + 1} of ${samples.length}, prompt ${column + 1} of ${files.length}`;
    Object.assign(this.range, { max: String(samples.length - 1), value: String(row) });
    this.range.setAttribute("aria-valuetext", `step ${step}`);
    this.back.hidden = row === 0;
    this.on.hidden = row === samples.length - 1;
    this.up.disabled = column === 0;
    this.down.disabled = column === files.length - 1;
    if (!this.dialog.contains(document.activeElement)) this.dialog.focus();
  }
  // Built once and filled anew for each preview, so that the slider can be drawn along.
  draw() {
    this.drawn = true;
    this.image = el("img", { class: "sd-large", translate: "no" });
    this.title = el("strong", { translate: "no" });
    this.place = el("output", { class: "sd-value" });
    this.text = el("p", { translate: "no" });
    this.count = el("p", { class: "sd-dim" });
    this.range = el("input", { type: "range", class: "sd-range", min: "0", step: "1", "aria-label": "Move through the steps", oninput: () => this.show(Number(this.range.value), this.column) });
    this.back = button("‹", () => this.step(-1), "sd-viewer-back", { "aria-label": "Previous step" });
    this.on = button("›", () => this.step(1), "sd-viewer-on", { "aria-label": "Next step" });
    this.up = button("Previous prompt", () => this.prompt(-1), "", { title: "↑" });
    this.down = button("Next prompt", () => this.prompt(1), "", { title: "↓" });
    this.dialog.replaceChildren(el("div", { class: "sd-viewer-image" }, this.image),
      el("div", { class: "sd-viewer-side" }, this.title, el("div", { class: "sd-scrub" }, this.place, this.range), this.text, el("div", { class: "sd-row" }, this.up, this.down), this.count,
        el("p", { class: "sd-dim" }, "Left, right: steps. Up, down: prompts. Home, End: first and last step. Esc: close.")),
      this.back, this.on, button("×", () => this.dialog.close(), "sd-viewer-close", { "aria-label": "Close" }));
  }
  fetchAhead() {
    const key = `${this.run.id} ${this.column} ${this.run.samples.length}`;
    if (this.ahead?.key === key) return;
    const files = this.run.samples.slice(-AHEAD).map(([, list]) => list[this.column]).filter(Boolean);
    this.ahead = { key, images: files.map((file) => Object.assign(new Image(), { src: fileUrl(file) })) };
  }
}
