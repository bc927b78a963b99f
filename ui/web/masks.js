// A mask painted over an image with a soft brush: red is left out of training. It is kept as its opacity.

import { ask, attempt, button, el, fileUrl, thumbUrl } from "./base.js";
import { sendToPython, say } from "./base.js";

const SIDE = 1024;
const MOST_TEXT = 900_000; // of a request with JSON the server takes 1 MiB
const UNDO = 20;
const loaded = (url) => new Promise((done, fail) => { const image = new Image(); image.onload = () => done(image); image.onerror = () => fail(new Error("the image cannot be shown")); image.src = url; });

export class MaskEditor {
  constructor(owner, data, held, close) {
    Object.assign(this, { owner, data, held, close, out: true, history: [] });
    const scale = Math.min(1, SIDE / Math.max(data.width, data.height));
    const [width, height] = [data.width, data.height].map((side) => Math.max(1, Math.round(side * scale)));
    this.canvas = el("canvas", { width, height, class: "sd-mask", "aria-label": "Mask: red is left out of training" });
    this.canvas.width = width;
    this.canvas.height = height;
    this.paint = this.canvas.getContext("2d", { willReadFrequently: true });
    const slider = (label, id, min, max, value) => el("label", { class: "sd-field" }, el("span", {}, label), el("input", { type: "range", id, min: String(min), max: String(max), value: String(value) }));
    this.mode = button("Paint: leave out", () => this.swap(), "primary", { id: "mask-mode" });
    const make = (label, work, id) => button(label, () => attempt(async () => { this.keep(); await work(); }), "", { id });
    this.frame = el("div", { class: "sd-viewer-frame painting", style: `--aspect:${width / height}` }, el("img", { src: thumbUrl(data.path, SIDE, data.changed), alt: "", draggable: false }), this.canvas);
    this.node = el("div", { class: "sd-viewer-image" }, el("div", { class: "sd-mask-tools" }, this.mode, slider("Brush", "mask-size", 4, 300, 80), slider("Soft edge", "mask-soft", 0, 100, 50),
      make("Leave out all", () => this.fill(255), "mask-all"), make("Train on all", () => this.fill(0), "mask-none"), make("Swap", () => this.invert(), "mask-invert"),
      make("From transparency", () => this.fromTransparency(), "mask-alpha"), make("Plain background", () => this.fromBackground(), "mask-background"),
      button("Undo stroke", () => this.back(), "", { id: "mask-back" }), button("Save mask", () => this.save(), "primary", { id: "mask-save" }),
      held.path ? button("Remove mask", () => this.remove(), "danger", { id: "mask-remove" }) : null, button("Cancel", () => this.close(), "", { id: "mask-cancel" })), this.frame);
    this.canvas.addEventListener("pointerdown", (event) => { this.canvas.setPointerCapture(event.pointerId); this.keep(); this.last = null; this.stroke(event); });
    this.canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) this.stroke(event); });
    if (held.path) attempt(async () => this.take(await loaded(`${fileUrl(held.path)}&v=${held.changed}`)));
  }
  get size() { return Number(this.node.querySelector("#mask-size").value); }
  get soft() { return Number(this.node.querySelector("#mask-soft").value) / 100; }
  swap() { this.out = !this.out; this.mode.textContent = this.out ? "Paint: leave out" : "Paint: train on"; }
  key(event) {
    const size = this.node.querySelector("#mask-size");
    const does = { p: () => this.swap(), "[": () => { size.value = String(this.size - 10); }, "]": () => { size.value = String(this.size + 10); }, z: () => this.back(), s: () => this.save() }[event.key];
    if (event.key === "Escape") { event.preventDefault(); this.close(); } else if (does) { event.preventDefault(); does(); }
  }
  keep() { this.history.push(this.pixels()); if (this.history.length > UNDO) this.history.shift(); }
  back() { const before = this.history.pop(); if (before) this.paint.putImageData(before, 0, 0); }
  pixels() { return this.paint.getImageData(0, 0, this.canvas.width, this.canvas.height); }
  stroke(event) {
    const box = this.canvas.getBoundingClientRect(), scale = this.canvas.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale, radius = (this.size * scale) / 2;
    const from = this.last || [x, y], far = Math.hypot(x - from[0], y - from[1]), steps = Math.max(1, Math.ceil(far / Math.max(1, radius / 4)));
    this.paint.globalCompositeOperation = this.out ? "source-over" : "destination-out";
    for (let i = 1; i <= steps; i++) this.dab(from[0] + ((x - from[0]) * i) / steps, from[1] + ((y - from[1]) * i) / steps, radius);
    this.paint.globalCompositeOperation = "source-over";
    this.last = [x, y];
  }
  dab(x, y, radius) {
    const edge = this.paint.createRadialGradient(x, y, 0, x, y, radius);
    edge.addColorStop(0, "#d6336c");
    edge.addColorStop(Math.min(0.99, 1 - this.soft), "#d6336c");
    edge.addColorStop(1, "#d6336c00");
    this.paint.fillStyle = edge;
    this.paint.beginPath();
    this.paint.arc(x, y, radius, 0, 2 * Math.PI);
    this.paint.fill();
  }
  // Writes how much each pixel is left out, 0 to 255.
  put(left) {
    const pixels = this.pixels();
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([214, 51, 108, left(i / 4)], i);
    this.paint.putImageData(pixels, 0, 0);
  }
  fill(value) { this.put(() => value); }
  invert() { const old = this.pixels().data; this.put((i) => 255 - old[4 * i + 3]); }
  read(image) {
    const { width, height } = this.canvas;
    const apart = el("canvas", { width, height });
    apart.width = width;
    apart.height = height;
    const context = apart.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  }
  take(image) { const grey = this.read(image); this.put((i) => 255 - grey[4 * i]); }
  async fromTransparency() { const seen = this.read(await loaded(`${fileUrl(this.data.path)}&v=${this.data.changed}`)); this.put((i) => 255 - seen[4 * i + 3]); }
  // Leaves out what is of the border's colour and joined to the border.
  fromBackground() {
    const { width, height } = this.canvas, seen = this.read(this.frame.querySelector("img"));
    const left = new Uint8Array(width * height), waiting = [];
    const near = (a, b) => Math.abs(seen[4 * a] - seen[4 * b]) + Math.abs(seen[4 * a + 1] - seen[4 * b + 1]) + Math.abs(seen[4 * a + 2] - seen[4 * b + 2]) <= 36;
    const corner = 0, reach = (i) => { if (!left[i] && near(i, corner)) { left[i] = 255; waiting.push(i); } };
    for (let x = 0; x < width; x++) { reach(x); reach((height - 1) * width + x); }
    for (let y = 0; y < height; y++) { reach(y * width); reach(y * width + width - 1); }
    while (waiting.length) {
      const i = waiting.pop(), x = i % width;
      if (x > 0) reach(i - 1);
      if (x < width - 1) reach(i + 1);
      if (i >= width) reach(i - width);
      if (i < width * (height - 1)) reach(i + width);
    }
    this.put((i) => left[i]);
  }
  text(scale) {
    const apart = el("canvas");
    apart.width = Math.max(1, Math.round(this.canvas.width * scale));
    apart.height = Math.max(1, Math.round(this.canvas.height * scale));
    const context = apart.getContext("2d", { willReadFrequently: true });
    context.drawImage(this.canvas, 0, 0, apart.width, apart.height);
    const pixels = context.getImageData(0, 0, apart.width, apart.height);
    for (let i = 0; i < pixels.data.length; i += 4) { const value = 255 - pixels.data[i + 3]; pixels.data.set([value, value, value, 255], i); }
    context.putImageData(pixels, 0, 0);
    return apart.toDataURL("image/png");
  }
  async save() {
    let png = this.text(1);
    for (let scale = 0.5; png.length > MOST_TEXT && scale > 0.1; scale /= 2) png = this.text(scale);
    const answer = await this.owner.changeImages("mask", [this.data.name], { png });
    if (!answer) return;
    useMasks(answer.masks, this.held.used);
    this.close();
  }
  async remove() { if (await this.owner.changeImages("mask", [this.data.name], { png: null })) this.close(); }
}

// Has the training form read the folder of masks, unless it names one.
export function useMasks(folder, used) {
  if (used) return;
  sendToPython("use-masks", JSON.stringify({ folder, at: Date.now() }));
  say("mask saved; the training settings use this folder of masks from now on");
}

export async function masksFromTransparency(owner) {
  const { names } = await ask(`workbench/names?${owner.query}`);
  const answer = await owner.changeImages("masks", names);
  if (!answer) return;
  if (!answer.changed) { say("no image without a mask is transparent"); return; }
  const held = await ask(`workbench/mask?${owner.about}&name=x`);
  useMasks(answer.masks, held.used);
}
