// The data set: images, captions edited in place, the doctor's findings, crops, buckets, tags.

import { ask, attempt, button, duration, el, Live, say, tabWord, thumbUrl } from "./base.js";
import { Care } from "./care.js";
import { Tags } from "./tags.js";
import { Viewer } from "./viewer.js";

const PAGE = 60;
const SAVE_AFTER = 250; // ms without a key press
const WRITTEN = ["txt", "caption", "metadata"];
const tidy = (text) => text.split("\n").map((line) => line.split(/\s+/).filter(Boolean).join(" ")).filter(Boolean).join("\n");
const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

class DataSet extends Live {
  static observedAttributes = ["folder", "trigger", "resolution"];
  // Another folder or other options: Gradio changed the attributes and removed the children.
  attributeChangedCallback(name) {
    if (!this.parts) return;
    if (name === "folder") { this.parts.findings.replaceChildren(); this.parts.charts.replaceChildren(); }
    if (this.asked) return;
    this.asked = true;
    queueMicrotask(() => {
      this.asked = false;
      this.flush();
      this.state = null;
      this.page = 0;
      this.cards = new Map();
      this.parts.tools.replaceChildren();
      this.parts.captioner.replaceChildren();
      this.parts.care.replaceChildren();
      this.tags = null;
      this.chosen.clear();
      if (this.isConnected) this.load();
    });
  }
  start() {
    this.every = 2000;
    this.page = 0;
    this.only = "";
    this.cards = new Map();
    this.chosen = new Set();
    this.viewer = new Viewer(this);
    this.flush = () => this.cards.forEach((card) => card.save(true));
    addEventListener("pagehide", this.flush);
    document.addEventListener("visibilitychange", this.flush);
    this.parts = Object.fromEntries(["summary", "findings", "charts", "tools", "captioner", "care", "choosing", "cards", "pages"].map((name) => [name, el("div", { class: `sd-${name}` })]));
  }
  disconnectedCallback() {
    super.disconnectedCallback();
    this.flush();
    if (this.viewer.isOpen) this.viewer.dialog.close();
    this.viewer.dialog.remove();
    removeEventListener("pagehide", this.flush);
    document.removeEventListener("visibilitychange", this.flush);
  }
  get folder() { return this.getAttribute("folder"); }
  get where() { return `folder=${encodeURIComponent(this.folder)}`; }
  // The folder with what decides about its images: the trigger word, and this tab's settings of a run.
  get about() { return `${this.where}&trigger=${encodeURIComponent(this.trigger)}&tab=${tabWord()}`; }
  // what is being typed counts before the server has told it to the page
  get trigger() { return (document.querySelector("#dataset-trigger input, #dataset-trigger textarea")?.value ?? this.getAttribute("trigger") ?? "").trim(); }
  get query() {
    const part = (name) => encodeURIComponent(this.getAttribute(name) || "");
    return `${this.about}&resolution=${part("resolution")}&page=${this.page}&only=${encodeURIComponent(this.only)}`;
  }
  saveAll() { return Promise.all([...this.cards.values()].map((card) => card.save())); }
  // Called regularly: checks whether another tab or program changed the folder.
  async refresh() {
    if (!this.folder || this.loading) return;
    if (!this.state) { await this.load(); return; }
    this.cards.forEach((card) => card.save());
    this.captioner?.refresh();
    const now = await ask(`dataset/progress?${this.about}`).catch(() => null);
    // a large folder is not looked at again all the time while captions are typed
    const rested = performance.now() - this.last > 8 * this.took;
    if (now && now.version && now.version !== this.state.version && rested) await this.load(true);
    if (this.state) this.tags?.refresh();
  }
  // What is shown already is known to the server: only with `anew` does it look at all files again.
  async load(anew = false) {
    const query = this.query, began = performance.now();
    this.loading = true;
    const waiting = this.state ? null : setInterval(() => this.showReading(), 400);
    if (!this.state) this.replaceChildren(this.reading(null));
    const state = await ask(`dataset?${query}&known=${anew || !this.state ? "" : this.state.version}&at=${encodeURIComponent(this.at || "")}`).catch((error) => ({ error: error.message }));
    clearInterval(waiting);
    if (query !== this.query) return this.load(anew);
    this.loading = false;
    if (state.error) {
      this.state = null;
      this.replaceChildren(el("p", { class: "sd-problem", role: "alert" }, state.error));
      return;
    }
    if (anew || !this.state) { this.took = performance.now() - began; this.last = performance.now(); }
    this.page = state.page;
    this.at = "";
    if (!this.state) { this.replaceChildren(...Object.values(this.parts)); this.viewed(null); }
    this.state = state;
    this.draw(state);
  }
  async showReading() {
    const now = await ask(`dataset/progress?${this.where}`).catch(() => null);
    if (this.loading && !this.state && now && now.progress) this.replaceChildren(this.reading(now.progress));
  }
  reading(progress) {
    const [done, total] = progress || [0, 0];
    return el("div", { class: "sd-working", role: "status" },
      el("progress", { max: 1, value: total ? done / total : 0, "aria-label": "Reading the images" }),
      el("span", {}, total ? `Reading the images: ${done} of ${total}` : "Reading the images …"));
  }
  draw(state) {
    const put = (name, ...nodes) => this.parts[name].replaceChildren(...nodes.filter(Boolean));
    put("summary", this.summary(state));
    put("findings", this.findings(state));
    if (!this.tags) { this.tags = new Tags(this); this.shapes = el("div"); put("charts", el("div", { class: "sd-two" }, this.shapes, this.tags.node)); }
    this.shapes.replaceChildren(this.charts(state));
    if (!this.parts.care.firstChild) { this.care = new Care(this); put("care", this.care.node); }
    this.care.refresh();
    if (!this.parts.tools.firstChild) put("tools", this.toolbar(state));
    if (!this.parts.captioner.firstChild) { this.captioner = new Captioner(this, state.trigger || ""); put("captioner", this.captioner.node); }
    this.drawTools(state);
    const old = this.cards;
    this.cards = new Map(state.cards.map((card) => [card.name, old.get(card.name) || new Card(this)]));
    state.cards.forEach((card) => this.cards.get(card.name).update(card));
    const nodes = [...this.cards.values()].map((card) => card.node);
    const shown = [...this.parts.cards.children];
    if (nodes.length !== shown.length || nodes.some((node, i) => node !== shown[i])) this.parts.cards.replaceChildren(...nodes);
    if (!nodes.length) put("cards", el("p", { class: "sd-dim sd-none" }, "No image of this kind."));
    put("pages", this.pages(state));
    put("choosing", this.choosing(state));
    this.viewer.update();
    this.openLinked();
  }
  // Images to be changed together; those on other pages stay chosen.
  choose(name, on) {
    if (on) this.chosen.add(name); else this.chosen.delete(name);
    this.cards.get(name)?.showChosen();
    if (this.state) this.parts.choosing.replaceChildren(this.choosing(this.state));
  }
  chooseAll(names, on) { names.forEach((name) => (on ? this.chosen.add(name) : this.chosen.delete(name))); this.cards.forEach((card) => card.showChosen()); this.parts.choosing.replaceChildren(this.choosing(this.state)); }
  choosing(state) {
    const names = [...this.chosen], may = state.may_change && names.length;
    this.tags.chosen(names.length);
    const every = () => attempt(async () => this.chooseAll((await ask(`workbench/names?${this.query}&known=${state.version}`)).names, true));
    const does = (what, extra) => () => this.changeImages(what, names, extra);
    return el("div", { class: "sd-row sd-chosen" }, el("strong", {}, names.length ? `${plural(names.length, "image")} chosen` : "Choose images to change them together"),
      button(state.matching > PAGE ? `Choose all ${state.matching}` : "Choose all", every, "sd-small", { id: "sd-choose-all" }),
      names.length ? button("Choose none", () => this.chooseAll(names, false), "sd-small", { id: "sd-choose-none" }) : null,
      may ? button("Exclude", does("exclude"), "sd-small", { id: "sd-chosen-exclude" }) : null, may ? button("Turn", does("turn", { quarters: 1 }), "sd-small", { id: "sd-chosen-turn" }) : null,
      may ? button("Delete", does("delete"), "sd-small danger", { id: "sd-chosen-delete" }) : null,
      this.only.startsWith("tag:") ? el("span", {}, el("b", { class: "sd-chip held", translate: "no" }, this.only.slice(4)), " ", button("Show all images", () => this.show(""), "sd-small", { id: "sd-show-all" })) : null,
      state.may_change ? null : el("span", { class: "sd-dim" }, "Images can be changed only where nobody else can reach the server."));
  }
  // Shows images of one kind; see the list beside Undo.
  show(only) {
    this.only = only;
    this.page = 0;
    const choose = this.querySelector("#sd-only");
    if (choose) choose.value = only.startsWith("tag:") ? "" : only;
    return this.load().then(() => this.parts.choosing.scrollIntoView({ block: "start" }));
  }
  async turnPage(by) {
    const last = Math.ceil((this.state?.matching || 0) / PAGE) - 1;
    if (this.page + by < 0 || this.page + by > last) return false;
    this.page += by;
    await this.load();
    return true;
  }
  // Changes image files, each change a restore point; returns the server's answer, nothing if it failed.
  changeImages(what, names, extra = {}) {
    return attempt(async () => {
      await this.saveAll();
      const answer = await ask(`workbench/images/${what}?tab=${tabWord()}`, { folder: this.folder, names, ...extra });
      this.showUndo(answer.undo);
      if (what === "delete" || what === "exclude") {
        names.forEach((name) => this.chosen.delete(name));
        say(what === "delete" ? "moved to the bin; Undo takes it back" : "excluded; the panel of excluded images takes it back");
        await this.load();
      } else if (what === "turn") await this.load(true);
      return answer;
    });
  }
  // Says in the address which image is open, so that a link leads to it.
  viewed(name) { this.dispatchEvent(new CustomEvent("sd-at", { bubbles: true, detail: { tab: "dataset", folder: this.folder, image: name } })); }
  link(name) {
    if (!name && this.viewer.isOpen) this.viewer.dialog.close();
    this.linked = name ? { folder: this.folder, name } : null;
    if (this.state) this.openLinked();
  }
  openLinked() {
    const wanted = this.linked;
    if (!wanted || wanted.folder !== this.folder) return;
    if (this.cards.has(wanted.name)) { this.linked = null; this.viewer.open(wanted.name); return; }
    if (wanted.looked) { this.linked = null; say(`${wanted.name}: there is no such image here (any more)`, "error"); return; }
    wanted.looked = true;
    this.at = wanted.name;
    this.load();
  }
  summary(state) {
    const fact = (value, what) => el("div", { class: "sd-fact" }, el("strong", {}, value), el("span", {}, what));
    const { error, warning, note } = state.counts;
    const verdict = error ? ["bad", "Not ready"] : warning ? ["soso", "Ready, with warnings"] : ["good", "Ready to train"];
    return el("div", { class: "sd-facts" },
      el("div", { class: `sd-fact sd-verdict ${verdict[0]}` }, el("strong", {}, verdict[1]),
        el("span", {}, [plural(error, "error"), plural(warning, "warning"), plural(note, "note")].join(", "))),
      fact(state.num_images, state.num_unusable ? `images, ${state.num_unusable} more cannot be used` : "images"),
      fact(state.num_captions, "with a written caption"), fact(state.held_out, "held out to measure progress"),
      fact(state.buckets.length, state.buckets.length === 1 ? "shape after cropping" : "shapes after cropping"));
  }
  findings(state) {
    if (!state.findings.length) return null;
    const count = state.findings.reduce((sum, group) => sum + group.count, 0);
    const open = this.parts.findings.querySelector("details")?.open ?? state.counts.error > 0;
    return el("details", { class: "sd-panel", open }, el("summary", {}, `What the doctor found (${count})`),
      state.findings.map((group) => el("div", { class: "sd-finding" }, el("b", { class: `sd-chip ${group.severity}` }, group.severity), ` ${group.kind}`, el("span", { class: "sd-dim" }, ` × ${group.count}`),
        group.first.map((one) => el("div", { class: "sd-indent" }, el("span", { class: "sd-names" }, one.where), ": ", el("span", {}, one.what))),
        group.count > group.first.length ? el("div", { class: "sd-indent sd-dim" }, `and ${group.count - group.first.length} more, shown at the images`) : null,
        el("div", { class: "sd-indent sd-dim" }, `→ ${group.fix}`))));
  }
  charts(state) {
    const most = Math.max(1, ...state.buckets.map((bucket) => bucket.count));
    const wide = matchMedia("(min-width: 900px)").matches;
    const open = this.shapes?.querySelector("details")?.open ?? wide;
    const bar = (label, count, share) => el("div", { class: "sd-bar" }, el("span", { class: "sd-bar-label", translate: "no", title: label }, label),
      el("span", { class: "sd-bar-line" }, el("i", { style: `width:${Math.max(2, 100 * share)}%` })), el("span", { class: "sd-bar-count" }, count));
    return el("details", { class: "sd-panel", open }, el("summary", {}, `Shapes at ${state.resolution} px`),
      el("div", { class: "sd-bars", tabindex: "0" }, state.buckets.map((bucket) => bar(`${bucket.width} × ${bucket.height}`, bucket.count, bucket.count / most))));
  }
  toolbar(state) {
    const field = (label, id, value = "") => el("label", { class: "sd-field" }, el("span", {}, label), el("input", { type: "text", id, value }));
    const read = (id) => this.querySelector(`#${id}`).value;
    const post = (path, body, done) => attempt(async () => {
      await this.saveAll();
      const answer = await ask(`captions/${path}`, { folder: this.folder, ...body });
      say(done(answer.changed));
      document.activeElement?.closest?.(".sd-card") && document.activeElement.blur();
      await this.load(path === "undo");
    });
    const captions = (count) => plural(count, "caption");
    const choose = el("select", { id: "sd-only", onchange: () => { this.show(choose.value); } },
      [["", "all images"], ["findings", "with findings"], ["held", "held out"], ["uncaptioned", "without a written caption"]].map(([value, label]) => el("option", { value }, label)));
    return el("div", { class: "sd-toolrow" },
      el("div", { class: "sd-tool" }, field("Find in captions", "sd-find"), field("Replace with", "sd-put"),
        button("Replace in all", () => post("replace", { find: read("sd-find"), put: read("sd-put") }, (n) => `${captions(n)} changed`), "", { id: "sd-replace" })),
      el("div", { class: "sd-tool" }, field("Trigger word", "sd-trigger", state.trigger || ""),
        button("Put in front of all", () => post("trigger", { word: read("sd-trigger") }, (n) => `put in front of ${captions(n)}`), "", { id: "sd-add-trigger" })),
      el("div", { class: "sd-tool" }, el("label", { class: "sd-field" }, el("span", {}, "Show"), choose),
        button("Undo", () => post("undo", {}, (n) => `${captions(n)} restored`), "", { id: "sd-undo" })));
  }
  drawTools(state) { this.showUndo(state.undo); }
  showUndo(count) {
    const undo = this.querySelector("#sd-undo");
    undo.disabled = !count;
    undo.textContent = count ? `Undo (${count})` : "Undo";
  }
  pages(state) {
    if (state.matching <= PAGE) return null;
    const last = Math.ceil(state.matching / PAGE) - 1;
    const go = (to) => () => { this.page = to; this.load().then(() => this.parts.tools.scrollIntoView()); };
    return el("nav", { class: "sd-row", "aria-label": "Pages of images" }, button("Previous", go(this.page - 1), "", { disabled: this.page === 0 }),
      el("span", {}, `${this.page + 1} of ${last + 1}`), button("Next", go(this.page + 1), "", { disabled: this.page >= last }));
  }
}

// Captions by a model: the same as `sdlora caption`, done by the server whether the page is open or not.
class Captioner {
  constructor(owner, trigger) {
    this.owner = owner;
    const field = (label, name, placeholder, value = "") => el("label", { class: "sd-field" }, el("span", {}, label), el("input", { type: "text", id: `sd-caption-${name}`, placeholder, value }));
    this.over = el("input", { type: "checkbox", id: "sd-caption-overwrite" });
    this.buttons = ["preview", "start", "stop"].map((what, i) => button(["Show 8 captions", "Caption all", "Stop"][i], () => this.act(what), what === "start" ? "primary" : "", { id: `sd-caption-${what}` }));
    this.status = el("div", { id: "sd-caption-status", role: "status" });
    this.node = el("details", { class: "sd-panel", id: "sd-caption" }, el("summary", {}, "Caption with a model"),
      el("p", { class: "sd-dim" }, "A transformers model (BLIP, Florence-2, Qwen-VL, …) or an ONNX tagger (WD14, …): its folder or hub id. Captions that are there are kept, and Undo takes all of it back."),
      el("div", { class: "sd-toolrow" },
        el("div", { class: "sd-tool" }, field("Model", "model", "folder or owner/name"), field("Prompt", "prompt", "its usual question")),
        el("div", { class: "sd-tool" }, field("Put in front", "prefix", "nothing"), field("Trigger word", "trigger", "none", trigger), field("Longest, in tokens", "max_tokens", "no limit")),
        el("div", { class: "sd-tool" }, field("Tagger's thresholds", "threshold", "0.35 character=0.85"), field("Tags left out", "blacklist", "none"))),
      el("label", { class: "sd-check" }, this.over, " replace captions that are there"),
      el("div", { class: "sd-row" }, this.buttons), this.status);
    this.show({ status: "none" });
    this.refresh();
  }
  act(what) {
    const body = { folder: this.owner.folder, overwrite: this.over.checked };
    for (const input of this.node.querySelectorAll("input[type=text]")) body[input.id.replace("sd-caption-", "")] = input.value;
    return attempt(async () => {
      await this.owner.saveAll();
      this.show(await ask(`captioning/${what}`, body));
    });
  }
  async refresh() {
    const state = await ask(`captioning?${this.owner.where}`).catch(() => null);
    if (state) this.show(state);
  }
  show(state) {
    const shown = JSON.stringify(state);
    if (shown === this.shown) return;
    this.shown = shown;
    const busy = ["running", "stopping"].includes(state.status);
    if (busy) this.node.open = true;
    this.buttons.forEach((control, i) => { control.disabled = i === 2 ? state.status !== "running" : busy; });
    const failed = Object.values(state.failed || {});
    const rate = state.images_per_second ? `, ${state.images_per_second.toFixed(1)} images/s, ${duration(state.seconds_left)} left` : "";
    const parts = {
      none: () => [],
      running: () => [el("div", { class: "sd-working" }, el("progress", { max: 1, value: state.total ? state.done / state.total : 0, "aria-label": "Captioning" }),
        el("span", {}, state.total && state.done ? `${state.note}: ${state.done} of ${state.total}${rate}` : `${state.note} …`))],
      stopped: () => [el("p", {}, "Stopped; “Caption all” continues. What was written can be undone.")],
      failed: () => [el("p", { class: "sd-problem", role: "alert" }, state.error)],
      finished: () => state.preview
        ? [el("p", {}, `${plural(state.todo, "image")} to caption, ${state.kept} keep theirs. Nothing is written yet:`),
          el("dl", {}, state.preview.flatMap((one) => [el("dt", { translate: "no" }, one.image), el("dd", one.caption ? { translate: "no" } : {}, one.caption || one.problem)]))]
        : [el("p", {}, `${plural(state.written, "caption")} written, ${state.kept} kept.`),
          failed.slice(0, 20).map((text) => el("p", { class: "sd-hint warning" }, text)),
          failed.length > 20 ? el("p", { class: "sd-dim" }, `and ${failed.length - 20} more`) : null],
    };
    this.status.replaceChildren(...parts[state.status === "stopping" ? "running" : state.status]().flat().filter(Boolean));
  }
}

// One image. Its caption is saved while the user types; a failed save is tried again.
class Card {
  constructor(owner) {
    this.owner = owner;
    this.parts = { image: el("div", { class: "sd-image" }), meta: el("div", { class: "sd-meta" }), hints: el("div", { class: "sd-hints" }) };
    this.text = el("textarea", { rows: 2, spellcheck: false });
    this.mark = el("span", { class: "sd-saved", role: "status" });
    this.text.addEventListener("focus", () => { this.typing = `${Date.now()}-${Math.random()}`; });
    this.text.addEventListener("input", () => { clearTimeout(this.timer); this.mark.textContent = "…"; this.timer = setTimeout(() => this.save(), SAVE_AFTER); });
    this.text.addEventListener("blur", () => this.save());
    this.box = el("input", { type: "checkbox", class: "sd-choose-box", onclick: (event) => this.choose(event) });
    this.large = el("button", { type: "button", class: "sd-open", onclick: () => this.owner.viewer.open(this.data.name) }, this.parts.image);
    this.node = el("article", { class: "sd-card" }, this.box, this.large, this.parts.meta, this.text, this.parts.hints);
  }
  // With shift, all between this and the last one that was chosen.
  choose(event) {
    const names = [...this.owner.cards.keys()], here = names.indexOf(this.data.name), last = names.indexOf(this.owner.lastChosen);
    const between = event.shiftKey && last >= 0 ? names.slice(Math.min(here, last), Math.max(here, last) + 1) : [this.data.name];
    this.owner.lastChosen = this.data.name;
    this.owner.chooseAll(between.filter((name) => this.owner.cards.get(name).data.edit), this.box.checked);
  }
  showChosen() { this.box.checked = this.owner.chosen.has(this.data.name); this.node.classList.toggle("chosen", this.box.checked); }
  get dirty() { return this.data && this.data.edit && this.text.value !== this.data.caption; }
  update(data) {
    const keep = this.dirty || tidy(this.text.value) === (data.caption ?? "");
    if (!this.dirty && keep) data = { ...data, caption: this.text.value }; // keep the spaces the user is typing
    const image = `${data.path}|${data.changed}|${JSON.stringify(data.crop)}`;
    if (image !== this.image) { this.image = image; this.parts.image.replaceChildren(this.frame(data)); }
    if (!keep) this.text.value = data.caption ?? "";
    this.data = this.dirty ? { ...data, caption: this.data.caption } : data;
    this.text.hidden = !data.path || (data.edit === null && data.source === "none");
    this.text.readOnly = data.source === "metadata" || data.edit === null;
    this.text.title = !this.text.readOnly ? "" : data.edit === null ? "This image is in another folder: open that one to edit its caption" : "This caption is in a metadata file of the folder";
    this.text.setAttribute("aria-label", `Caption of ${data.name}`);
    this.text.dataset.name = data.name;
    this.text.setAttribute("translate", "no");
    this.box.setAttribute("aria-label", `Choose ${data.name}`);
    this.box.hidden = !data.edit;
    this.large.setAttribute("aria-label", `Open ${data.name}`);
    this.showChosen();
    this.node.classList.toggle("held", data.held);
    this.parts.meta.replaceChildren(el("span", { class: "sd-name", title: data.name, translate: "no" }, data.name),
      data.width ? el("span", {}, `${data.width} × ${data.height}`) : "",
      data.held ? el("b", { class: "sd-chip held", title: "Not trained on: its loss shows whether the LoRA learns or memorises" }, "held out") : "",
      data.path && data.source !== "none" && !WRITTEN.includes(data.source) ? el("b", { class: "sd-chip", title: "No caption file: typing here makes one" }, `from ${data.source}`) : "", this.mark);
    this.parts.hints.replaceChildren(...data.findings.filter((one) => one.kind !== "no caption file").map((one) => el("p", { class: `sd-hint ${one.severity}` }, one.what,
      one.severity === "note" ? "" : el("span", { class: "sd-fix" }, ` → ${one.fix}`))));
  }
  frame(data) {
    if (!data.path) return el("span", { class: "sd-broken", role: "img", "aria-label": `${data.name} cannot be shown` }, "cannot be read");
    const shown = el("img", { src: thumbUrl(data.path, 320, data.changed), loading: "lazy", translate: "no", alt: data.caption || data.name });
    if (!data.crop) { // not measured, as it cannot be used as it is
      const frame = el("div", { class: "sd-frame", style: "--aspect:1" }, shown);
      shown.addEventListener("load", () => frame.style.setProperty("--aspect", shown.naturalWidth / shown.naturalHeight));
      return frame;
    }
    const [left, top, right, bottom] = data.crop;
    const whole = left <= 0 && top <= 0 && right >= 1 && bottom >= 1;
    const crop = el("span", { class: `sd-crop ${whole ? "whole" : ""}`, title: `trained as ${data.bucket[1]} × ${data.bucket[0]} px`,
      style: `left:${left * 100}%;top:${top * 100}%;right:${100 - right * 100}%;bottom:${100 - bottom * 100}%` });
    return el("div", { class: "sd-frame", style: `--aspect:${data.width / data.height}` }, shown, crop);
  }
  async save(leaving = false) {
    clearTimeout(this.timer);
    if (!this.dirty) { if (this.mark.textContent === "…") this.mark.textContent = ""; return; }
    if (this.saving && !leaving) { await this.saving; return this.dirty ? this.save() : undefined; }
    const value = this.text.value, body = { folder: this.owner.folder, texts: { [this.data.edit]: value }, typing: this.typing };
    this.saving = ask("captions/set", body, { keepalive: leaving });
    try {
      const answer = await this.saving;
      this.data.caption = value;
      this.mark.textContent = this.dirty ? "…" : "saved";
      this.mark.classList.remove("failed");
      if (this.owner.isConnected) this.owner.showUndo(answer.undo);
    } catch (error) {
      if (!this.mark.classList.contains("failed")) say(`${this.data.name}: ${error.message}`, "error");
      this.mark.textContent = "not saved";
      this.mark.classList.add("failed");
    } finally { this.saving = null; }
  }
}

customElements.define("sd-dataset", DataSet);
