// Images: a strip of strengths with a slider, before and after, a grid to choose from, the gallery.

import { ask, attempt, button, Drawn, el, fileUrl, Live, say, sendToPython, thumbUrl } from "./base.js";

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
    const lines = rows.map((row, r) => el("tr", {}, el("th", { scope: "row" }, row.label), columns.map((strength, c) => {
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
    this.dialog = el("dialog", { class: "sd-dialog" });
    this.more = button("Show more", () => { this.limit += 48; this.refresh(); });
    this.replaceChildren(this.list, this.more, this.dialog);
  }
  async refresh() {
    const answer = await ask(`images?limit=${this.limit}`).catch(() => null);
    if (!answer) return;
    const key = JSON.stringify(answer);
    if (key === this.shown) return;
    this.shown = key;
    this.more.hidden = answer.total <= answer.images.length;
    this.list.replaceChildren(...(answer.images.length ? answer.images.map((image) => this.card(image))
      : [el("p", { class: "sd-dim" }, "Nothing drawn yet. Your images are kept here, each PNG with its settings.")]));
  }
  card(image) {
    return el("button", { type: "button", class: "sd-thumb", onclick: () => this.open(image), title: image.name,
      "aria-label": `Open ${image.name}` }, el("img", { src: thumbUrl(image.file, 192, image.changed), loading: "lazy", alt: "" }));
  }
  async open(image) {
    const settings = await attempt(() => ask(`settings?path=${encodeURIComponent(image.file)}`));
    const send = () => { sendToPython("import-png", JSON.stringify({ file: image.file, at: Date.now() })); this.dialog.close(); };
    this.dialog.replaceChildren(el("img", { src: fileUrl(image.file), alt: image.name, class: "sd-large" }),
      el("dl", {}, Object.entries(settings || {}).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      el("p", { class: "sd-dim" }, image.name),
      el("div", { class: "sd-row" }, settings ? button("Use these settings", send, "primary") : null,
        el("a", { class: "sd-button", href: fileUrl(image.file), download: image.name.split("/").pop() }, "Save"),
        button("Close", () => this.dialog.close())));
    this.dialog.showModal();
  }
}

customElements.define("sd-strip", Strip);
customElements.define("sd-compare", Compare);
customElements.define("sd-grid", Grid);
customElements.define("sd-gallery", Gallery);
