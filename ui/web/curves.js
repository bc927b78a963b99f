// The losses of a run, and of others over it: smoothed, on a logarithmic scale, a part of the steps at a time.

import { ask, button, el, svg } from "./base.js";

const COLOURS = ["var(--sd-accent)", "#0891b2", "#d97706", "#16a34a", "#c026d3", "#78716c", "#b45309", "#0d9488"];
const MOST = COLOURS.length; // as many as the server gives at once
const HEIGHT = 220, LEFT = 50, RIGHT = 10, TOP = 8, BOTTOM = 22;
const SHORTEST = 2; // steps that a plot shows at least
const STORED = "sdlora-curves";

// Each value the mean of those before it, weighted less the longer ago they are; the first ones count as they are.
export function smoothed(points, amount) {
  let mean = 0, weight = 0;
  return points.map(([step, value]) => {
    mean = amount * mean + (1 - amount) * value;
    weight = amount * weight + (1 - amount);
    return [step, mean / weight];
  });
}

// Round values between two, for a scale.
export function ticks(low, high, logarithmic, most = 5) {
  if (logarithmic) {
    const listed = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) for (const digit of [1, 2, 5]) listed.push(digit * 10 ** power);
    const inside = listed.filter((value) => value >= low && value <= high);
    if (inside.length >= 2) return inside.filter((_, i) => i % Math.ceil(inside.length / (most + 1)) === 0);
  }
  const span = high - low || Math.abs(high) || 1, rough = span / most, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((digit) => digit * power).find((one) => one >= rough);
  const listed = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-9; value += size) listed.push(value);
  return listed;
}

class Curves extends HTMLElement {
  connectedCallback() {
    if (this.figure) return;
    const stored = JSON.parse(localStorage.getItem(STORED) || "{}");
    this.amount = Number.isFinite(stored.amount) ? stored.amount : 0.85;
    this.logarithmic = stored.logarithmic === true;
    this.others = new Map();
    this.range = null;
    const keep = () => { localStorage.setItem(STORED, JSON.stringify({ amount: this.amount, logarithmic: this.logarithmic })); this.draw(); };
    const slider = el("input", { type: "range", min: "0", max: "0.99", step: "0.01", class: "sd-smooth", oninput: (event) => { this.amount = Number(event.target.value); keep(); } });
    slider.value = String(this.amount);
    const box = el("input", { type: "checkbox", class: "sd-log-scale", onchange: (event) => { this.logarithmic = event.target.checked; keep(); } });
    box.checked = this.logarithmic;
    this.whole = button("Whole run", () => this.zoom(null), "sd-small sd-whole");
    this.list = el("details", { class: "sd-others" });
    this.plot = el("div", { class: "sd-plot" });
    this.key = el("figcaption");
    this.readout = el("output", { class: "sd-dim sd-readout" });
    this.figure = el("figure", { class: "sd-figure" }, el("div", { class: "sd-curve-tools" }, el("label", {}, "Smoothing", slider), el("label", {}, box, "Logarithmic"), this.whole, this.readout),
      this.plot, this.key, this.list);
    this.replaceChildren(this.figure);
    this.watch();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }
  // Takes what is known of the run now, and which others there are.
  show(run, jobs) {
    this.run = run;
    this.hidden = !run.losses.length;
    if (this.hidden) return;
    const known = jobs.filter((job) => job.id !== run.id && job.step > 0).reverse();
    for (const id of [...this.others.keys()]) if (!known.some((job) => job.id === id)) this.others.delete(id);
    this.listOthers(known);
    const key = JSON.stringify([run.id, run.step, run.losses.length, run.validation.length]);
    if (key === this.shown) return;
    this.shown = key;
    this.fetch();
  }
  listOthers(known) {
    const key = JSON.stringify([known.map((job) => [job.id, job.name]), [...this.others.keys()]]);
    if (key === this.listed) return;
    this.listed = key;
    this.list.hidden = !known.length;
    const active = this.list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
    this.list.replaceChildren(el("summary", {}, "Other runs in the same plot"), el("div", { class: "sd-others-list" }, known.map((job) => {
      const box = el("input", { type: "checkbox", "data-run": job.id, disabled: !this.others.has(job.id) && this.others.size >= MOST - 1, onchange: () => this.choose(job, box.checked, known) });
      box.checked = this.others.has(job.id);
      return el("label", {}, box, el("span", { translate: "no" }, job.name));
    })));
    if (active) this.list.querySelector(`[data-run="${active}"]`)?.focus();
  }
  choose(job, wanted, known) {
    if (wanted) this.others.set(job.id, job.name); else this.others.delete(job.id);
    this.listOthers(known);
    this.fetch();
  }
  zoom(range) {
    if (range) {
      const last = this.last(), length = Math.max(SHORTEST, Math.min(last, range[1] - range[0]));
      const first = Math.min(Math.max(0, range[0]), last - length);
      range = length >= last ? null : [first, first + length];
    }
    this.range = range;
    this.draw();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.fetch(), 150);
  }
  last() { return Math.max(1, ...[this.run, ...(this.curves || [])].map((one) => Math.max(one.steps, one.step || 0))); }
  // The whole run's own losses are here; others, and finer ones of a part, are asked for.
  async fetch() {
    const { run, range } = this;
    const alone = { id: run.id, name: run.name, steps: Math.max(run.steps, run.step), losses: run.losses, validation: run.validation };
    if (!range && !this.others.size) this.curves = [alone];
    else {
      const ids = [run.id, ...this.others.keys()].map((id) => `run=${encodeURIComponent(id)}`).join("&");
      // with as many steps before it, so that the smoothing does not begin at the edge
      const part = range ? `&from=${Math.floor(2 * range[0] - range[1])}&to=${Math.ceil(range[1])}` : "";
      const answer = await ask(`curves?${ids}${part}`).catch(() => null);
      if (run.id !== this.run.id || range !== this.range) return; // something else is wanted by now
      this.curves = answer?.curves || this.curves || [alone];
    }
    this.draw();
  }
  draw() {
    if (!this.curves?.length || this.dragging || !this.plot.clientWidth) return;
    const width = Math.max(260, this.plot.clientWidth);
    const [first, last] = this.range || [0, this.last()];
    const seen = (points) => points.filter(([step, value]) => step >= first && step <= last && (!this.logarithmic || value > 0));
    const lines = this.curves.map((curve, i) => ({ ...curve, colour: COLOURS[i], raw: i ? [] : seen(curve.losses), smooth: seen(smoothed(curve.losses, this.amount)), held: seen(curve.validation) }));
    const values = lines.flatMap((line) => [...line.raw, ...line.smooth, ...line.held]).map((point) => point[1]);
    const scale = (value) => (this.logarithmic ? Math.log10(value) : value);
    const low = values.length ? Math.min(...values) : 0.1, high = values.length ? Math.max(...values) : 1;
    const bottom = scale(low), span = scale(high) - bottom || 1;
    const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - (scale(value) - bottom) / span) * (HEIGHT - TOP - BOTTOM);
    const path = (points) => points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
    const label = (text, at) => svg("text", at, document.createTextNode(text));
    const heights = ticks(low, high, this.logarithmic), steps = ticks(first, last, false, Math.max(2, Math.min(8, Math.floor(width / 90)))).filter(Number.isInteger);
    this.at = { first, last, width, lines, step: (px) => first + ((px - LEFT) / (width - LEFT - RIGHT)) * (last - first) };
    const several = lines.length > 1, focused = this.plot.contains(document.activeElement);
    this.drawing = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, tabindex: "0", role: "img", "aria-label": `Loss over ${this.run.step} steps, now ${this.run.loss?.toFixed(4)}` },
      heights.map((value) => svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" })),
      heights.map((value) => label(String(Number(value.toPrecision(3))), { x: LEFT - 6, y: y(value) + 4, class: "end" })),
      steps.map((step) => label(String(step), { x: Math.min(x(step), width - RIGHT - 8), y: HEIGHT - 5, class: "middle" })),
      lines.flatMap((line) => [
        line.raw.length ? svg("path", { d: path(line.raw), class: "raw" }) : null,
        svg("path", { d: path(line.smooth), class: "smooth", style: `stroke:${line.colour}` }),
        line.held.length ? svg("path", { d: path(line.held), class: "held", style: several ? `stroke:${line.colour};stroke-dasharray:5 4` : "" }) : null,
        ...line.held.map(([step, value]) => svg("circle", { cx: x(step), cy: y(value), r: 3, class: "held", style: several ? `fill:${line.colour}` : "" }))].filter(Boolean)),
      svg("rect", { class: "part", y: TOP, height: HEIGHT - TOP - BOTTOM, width: 0 }));
    this.plot.replaceChildren(this.drawing);
    if (focused) this.drawing.focus();
    this.whole.hidden = !this.range;
    const held = lines.some((line) => line.held.length), names = JSON.stringify([lines.map((line) => line.name), held]);
    if (names === this.named) return;
    this.named = names;
    this.key.replaceChildren(...(lines.length === 1
      ? [el("i", { class: "key smooth" }), "training loss ", held ? [el("i", { class: "key held" }), "held-out images"] : null].flat().filter(Boolean)
      : [...lines.map((line) => el("span", {}, el("i", { class: "key", style: `background:${line.colour}` }), el("span", { translate: "no" }, line.name))), held ? el("span", { class: "sd-dim" }, " dots: held-out images") : ""]));
  }
  // A drag across the plot, Ctrl with the wheel, and keys choose which steps are seen.
  watch() {
    const { plot } = this;
    const px = (event) => event.clientX - plot.getBoundingClientRect().left;
    const inside = (event) => Math.min(this.at.last, Math.max(this.at.first, this.at.step(px(event))));
    plot.addEventListener("pointerdown", (event) => {
      if (!this.at || event.button) return;
      this.dragging = { x: px(event), step: inside(event) };
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      if (!this.at) return;
      this.tell(inside(event));
      if (!this.dragging) return;
      const [from, to] = [this.dragging.x, px(event)].sort((a, b) => a - b);
      const part = this.drawing.querySelector(".part");
      part.setAttribute("x", String(Math.max(LEFT, from)));
      part.setAttribute("width", String(Math.max(0, Math.min(this.at.width - RIGHT, to) - Math.max(LEFT, from))));
    });
    const end = (event) => {
      if (!this.dragging) return;
      const { x, step } = this.dragging;
      this.dragging = null;
      const far = event.type === "pointerup" && Math.abs(px(event) - x) > 6;
      if (far) this.zoom([step, inside(event)].sort((a, b) => a - b)); else this.draw();
    };
    for (const name of ["pointerup", "pointercancel"]) plot.addEventListener(name, end);
    plot.addEventListener("pointerleave", () => { if (!this.dragging) this.readout.textContent = ""; });
    plot.addEventListener("dblclick", () => this.zoom(null));
    plot.addEventListener("wheel", (event) => {
      if (!this.at || !(event.ctrlKey || event.metaKey)) return; // without them the wheel moves the page
      event.preventDefault();
      this.about(inside(event), event.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
    plot.addEventListener("keydown", (event) => {
      if (!this.at || event.ctrlKey || event.metaKey || event.altKey) return;
      const { first, last } = this.at, by = (last - first) / 4;
      const does = { "+": () => this.about((first + last) / 2, 0.5), "-": () => this.about((first + last) / 2, 2), 0: () => this.zoom(null),
        ArrowRight: () => this.range && this.zoom([first + by, last + by]), ArrowLeft: () => this.range && this.zoom([first - by, last - by]) }[event.key];
      if (!does) return;
      event.preventDefault();
      does();
    });
    plot.title = "Drag, or Ctrl and the wheel: a part of the steps. Double click: all of them. Keys: + − 0 and arrows.";
  }
  about(step, factor) {
    const { first, last } = this.at;
    this.zoom([step - (step - first) * factor, step + (last - step) * factor]);
  }
  tell(step) {
    const near = (points) => points.reduce((best, point) => (best && Math.abs(best[0] - step) <= Math.abs(point[0] - step) ? best : point), null);
    const [line] = this.at.lines, point = near(line.smooth), held = near(line.held);
    const reach = (this.at.last - this.at.first) / 40;
    this.readout.textContent = !point ? "" : held && Math.abs(held[0] - step) < reach ? `step ${point[0]}: ${point[1].toFixed(4)}, held-out images ${held[1].toFixed(4)}` : `step ${point[0]}: ${point[1].toFixed(4)}`;
  }
}

customElements.define("sd-curves", Curves);
