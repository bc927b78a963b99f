// One image of a data set, large, with the keyboard: arrows, e edits, x excludes, Delete, r turns, m mask, f focus.

import { ask, attempt, button, el, say, thumbUrl } from "./base.js";
import { MaskEditor } from "./masks.js";

const SIDE = 1024;
const lines = (text) => text.split("\n");
export const tagsOf = (line) => line.split(",").map((tag) => tag.split(/\s+/).filter(Boolean).join(" ")).filter(Boolean);

// The tags of a caption, each with a button that removes it, and a field for another one.
export function chips(text, change, readOnly) {
  const put = (at, tags) => change(lines(text).map((line, i) => (i === at ? tags.join(", ") : line)).join("\n"));
  return lines(text).map((line, at) => {
    const tags = tagsOf(line);
    const add = el("input", { type: "text", class: "sd-chip-add", placeholder: "add a tag", "aria-label": "Add a tag" });
    add.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !add.value.trim()) return;
      event.preventDefault();
      put(at, [...tags, ...tagsOf(add.value)]);
    });
    return el("div", { class: "sd-chips" }, tags.map((tag, i) => el("span", { class: "sd-tagchip" }, el("span", { translate: "no" }, tag),
      readOnly ? null : el("button", { type: "button", "aria-label": `Remove the tag ${tag}`, title: "Remove this tag", onclick: () => put(at, tags.filter((_, j) => j !== i)) }, "×"))),
      readOnly ? null : add);
  });
}

export class Viewer {
  constructor(owner) {
    this.owner = owner;
    this.dialog = el("dialog", { class: "sd-viewer", tabindex: "-1", "aria-label": "Image" });
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    this.dialog.addEventListener("close", () => { this.editor = null; owner.viewed(null); });
  }
  get isOpen() { return this.dialog.open; }
  get card() { return this.owner.cards.get(this.name); }
  open(name) {
    if (!this.dialog.isConnected) document.body.append(this.dialog);
    this.name = name;
    this.focusing = false;
    this.editor = null;
    if (!this.dialog.open) this.dialog.showModal();
    this.draw();
    this.dialog.focus();
    this.owner.viewed(name);
    for (const next of [this.neighbour(1), this.neighbour(-1)]) if (next?.data.path) new Image().src = thumbUrl(next.data.path, SIDE, next.data.changed);
  }
  neighbour(by) {
    const names = [...this.owner.cards.keys()];
    return this.owner.cards.get(names[names.indexOf(this.name) + by]);
  }
  async step(by) {
    const next = this.neighbour(by);
    if (next) { this.open(next.data.name); return; }
    if (!(await this.owner.turnPage(by))) return;
    const names = [...this.owner.cards.keys()];
    if (names.length) this.open(by > 0 ? names[0] : names[names.length - 1]);
  }
  key(event) {
    const typing = event.target.matches?.("textarea, input:not([type=checkbox]):not([type=range])");
    if (typing) {
      if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); event.target.blur(); this.dialog.focus(); }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (this.editor) { this.editor.key(event); return; }
    const may = this.owner.state?.may_change && this.card?.data.edit;
    const does = {
      ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1), e: () => this.text?.focus(),
      x: may && (() => this.change("exclude")), Delete: may && (() => this.change("delete")), r: may && (() => this.turn(1)), R: may && (() => this.turn(3)),
      m: may && (() => this.paint()), f: may && (() => this.pick()), " ": () => this.owner.choose(this.name, !this.owner.chosen.has(this.name)),
    }[event.key];
    if (!does || event.target.matches?.("input[type=range]") || (event.key === " " && event.target.matches?.("button, a, summary"))) return;
    event.preventDefault();
    does();
  }
  // Removes the image from the data set, and shows the next one.
  async change(what) {
    const gone = this.name;
    const next = this.neighbour(1) || this.neighbour(-1);
    if (!(await this.owner.changeImages(what, [gone]))) return;
    if (next && this.owner.cards.has(next.data.name)) this.open(next.data.name);
    else this.dialog.close();
  }
  async turn(quarters) {
    const answer = await this.owner.changeImages("turn", [this.name], { quarters });
    if (answer?.anew?.length) say("turned; this file had to be compressed again, the original is in the bin");
  }
  pick() { this.focusing = !this.focusing; this.draw(); }
  async paint() {
    const held = await attempt(() => ask(`workbench/mask?${this.owner.about}&name=${encodeURIComponent(this.card.data.edit)}`));
    if (!held) return;
    if (!held.inside) { say("the masks of these settings lie in another folder; open that one", "error"); return; }
    this.editor = new MaskEditor(this.owner, this.card.data, held, () => { this.editor = null; this.draw(); this.dialog.focus(); });
    this.draw();
  }
  async focusAt(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const point = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) => Math.min(1, Math.max(0, share)));
    this.focusing = false;
    await this.setFocus(point);
  }
  async setFocus(point) {
    if (await this.owner.changeImages("focus", [this.name], { point })) { this.card.data.focus = point; this.draw(); }
  }
  update() { if (this.isOpen && !this.editor && this.card && !this.dialog.querySelector("textarea:focus, .sd-chip-add:focus")) this.draw(); }
  draw() {
    const card = this.card;
    if (!card) { this.dialog.close(); return; }
    const { data } = card, may = this.owner.state?.may_change && data.edit;
    const shown = this.editor ? this.editor.node : this.large(data);
    const side = el("div", { class: "sd-viewer-side" }, el("div", { class: "sd-row" }, el("strong", { translate: "no" }, data.name), el("span", { class: "sd-dim" }, data.width ? `${data.width} × ${data.height}` : "")),
      this.caption(card), data.findings.filter((one) => one.kind !== "no caption file").map((one) => el("p", { class: `sd-hint ${one.severity}` }, one.what)),
      may && !this.editor ? el("div", { class: "sd-row" }, button("Exclude", () => this.change("exclude"), "", { title: "x", "data-do": "exclude" }), button("Delete", () => this.change("delete"), "danger", { title: "Delete", "data-do": "delete" }),
        button("Turn", () => this.turn(1), "", { title: "r; R turns the other way", "data-do": "turn" }), button("Mask", () => this.paint(), "", { title: "m", "data-do": "mask" }),
        button(this.focusing ? "Click into the image" : "Focus", () => this.pick(), this.focusing ? "primary" : "", { title: "f: the point that a crop keeps", "data-do": "focus" }),
        data.focus ? button("No focus", () => this.setFocus(null), "", { "data-do": "no-focus" }) : null) : null,
      el("label", { class: "sd-check" }, el("input", { type: "checkbox", checked: this.owner.chosen.has(this.name), onchange: (event) => this.owner.choose(this.name, event.target.checked) }), " chosen"),
      el("p", { class: "sd-dim" }, "Arrows: next image. e: caption. x: exclude. Delete: to the bin. r: turn. m: mask. f: focus. Space: choose. Esc: close."));
    this.dialog.replaceChildren(shown, side, button("‹", () => this.step(-1), "sd-viewer-back", { "aria-label": "Previous image" }),
      button("›", () => this.step(1), "sd-viewer-on", { "aria-label": "Next image" }), button("×", () => this.dialog.close(), "sd-viewer-close", { "aria-label": "Close" }));
    if (!this.dialog.contains(document.activeElement)) this.dialog.focus(); // what had the focus was drawn anew
  }
  large(data) {
    if (!data.path) return el("div", { class: "sd-viewer-image" }, el("span", { class: "sd-broken" }, "cannot be read"));
    const image = el("img", { src: thumbUrl(data.path, SIDE, data.changed), alt: data.caption || data.name, translate: "no", draggable: false });
    const [left, top, right, bottom] = data.crop || [0, 0, 1, 1];
    const frame = el("div", { class: `sd-viewer-frame ${this.focusing ? "focusing" : ""}`, style: data.width ? `--aspect:${data.width / data.height}` : "" }, image,
      data.crop && (left > 0 || top > 0 || right < 1 || bottom < 1) ? el("span", { class: "sd-crop", style: `left:${left * 100}%;top:${top * 100}%;right:${100 - right * 100}%;bottom:${100 - bottom * 100}%` }) : null,
      data.focus ? el("span", { class: "sd-focus", style: `left:${data.focus[0] * 100}%;top:${data.focus[1] * 100}%` }) : null);
    if (this.focusing) frame.addEventListener("click", (event) => this.focusAt(event));
    return el("div", { class: "sd-viewer-image" }, frame);
  }
  caption(card) {
    if (card.text.hidden) return null;
    const write = (value) => { card.text.value = value; card.text.dispatchEvent(new Event("input")); };
    const tags = el("div");
    const showTags = () => tags.replaceChildren(...chips(card.text.value, (value) => { write(value); this.text.value = value; showTags(); tags.querySelector("input")?.focus(); }, card.text.readOnly));
    this.text = el("textarea", { rows: 4, spellcheck: false, "aria-label": `Caption of ${card.data.name}`, translate: "no" });
    this.text.value = card.text.value;
    this.text.readOnly = card.text.readOnly;
    this.text.addEventListener("focus", () => card.text.dispatchEvent(new Event("focus")));
    this.text.addEventListener("input", () => { write(this.text.value); showTags(); });
    this.text.addEventListener("blur", () => card.save());
    showTags();
    return el("div", {}, this.text, tags);
  }
}
