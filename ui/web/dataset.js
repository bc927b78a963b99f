// The data set: pictures with their captions edited in place, what the doctor finds, crops, buckets, tags.

import { ask, attempt, button, el, say, thumbUrl } from "./base.js";

const PAGE = 60;

class DataSet extends HTMLElement {
  connectedCallback() {
    this.page = 0;
    this.only = "";
    this.saving = new Map();
    this.load();
  }
  get folder() { return this.getAttribute("folder"); }
  get query() {
    const part = (name) => encodeURIComponent(this.getAttribute(name) || "");
    return `dataset?folder=${part("folder")}&trigger=${part("trigger")}&resolution=${part("resolution")}&page=${this.page}&only=${this.only}`;
  }
  async load() {
    if (!this.folder) return;
    if (!this.state) this.replaceChildren(el("p", { class: "sd-dim", role: "status" }, "Reading the pictures …"));
    const state = await ask(this.query).catch((error) => ({ error: error.message }));
    if (state.error) { this.replaceChildren(el("p", { class: "sd-problem", role: "alert" }, state.error)); return; }
    this.state = state;
    this.draw();
  }
  draw() {
    const state = this.state;
    this.replaceChildren(this.summary(state), this.findings(state), this.charts(state), this.toolbar(state),
      el("div", { class: "sd-cards" }, state.cards.map((card) => this.card(card))), this.pages(state));
  }
  summary(state) {
    const fact = (value, what) => el("div", { class: "sd-fact" }, el("strong", {}, value), el("span", {}, what));
    return el("div", { class: "sd-facts" }, fact(state.num_images, "pictures"), fact(state.num_captions, "with a caption file"),
      fact(state.held_out, "held out to measure progress"), fact(state.buckets.length, "shapes after cropping"),
      el("div", { class: `sd-fact sd-verdict ${state.counts.error ? "bad" : state.counts.warning ? "soso" : "good"}` },
        el("strong", {}, state.counts.error ? "Not ready" : state.counts.warning ? "Can be trained" : "Ready to train"),
        el("span", {}, `${state.counts.error} errors, ${state.counts.warning} warnings, ${state.counts.note} notes`)));
  }
  findings(state) {
    if (!state.findings.length) return null;
    const groups = new Map();
    for (const one of state.findings) groups.set(`${one.severity}|${one.kind}`, [...(groups.get(`${one.severity}|${one.kind}`) || []), one]);
    return el("details", { class: "sd-panel", open: state.counts.error > 0 }, el("summary", {}, "What the doctor found"),
      [...groups].map(([key, members]) => {
        const [severity, kind] = key.split("|");
        return el("div", { class: "sd-finding" }, el("b", { class: `sd-chip ${severity}` }, severity), ` ${kind} (${members.length}): `,
          members.slice(0, 4).map((one) => el("div", { class: "sd-indent" }, `${one.where}: ${one.what}`)),
          members.length > 4 ? el("div", { class: "sd-indent sd-dim" }, `and ${members.length - 4} more, shown at the pictures`) : null,
          el("div", { class: "sd-indent sd-dim" }, `→ ${members[0].fix}`));
      }));
  }
  charts(state) {
    const most = Math.max(1, ...state.buckets.map((bucket) => bucket.count));
    const top = Math.max(1, ...state.tags.map((tag) => tag[1]));
    const bar = (label, count, share) => el("div", { class: "sd-bar" }, el("span", { class: "sd-bar-label", title: label }, label),
      el("span", { class: "sd-bar-line" }, el("i", { style: `width:${Math.max(2, 100 * share)}%` })), el("span", {}, count));
    return el("div", { class: "sd-two" },
      el("details", { class: "sd-panel" }, el("summary", {}, `Shapes at ${state.resolution} px (${state.buckets.length})`),
        state.buckets.map((bucket) => bar(`${bucket.width} × ${bucket.height}`, bucket.count, bucket.count / most))),
      el("details", { class: "sd-panel" }, el("summary", {}, `Words in the captions (${state.num_tags})`),
        state.tags.map(([tag, count]) => bar(tag, count, count / top))));
  }
  toolbar(state) {
    const field = (label, id, value = "") => el("label", { class: "sd-field" }, el("span", {}, label), el("input", { type: "text", id, value }));
    const read = (id) => this.querySelector(`#${id}`).value;
    const post = (path, body, done) => attempt(async () => {
      const answer = await ask(`captions/${path}`, { folder: this.folder, ...body });
      say(done(answer.changed));
      await this.load();
    });
    const plural = (count) => `${count} caption${count === 1 ? "" : "s"}`;
    return el("div", { class: "sd-tools" }, field("Find", "sd-find"), field("Replace with", "sd-put"),
      button("Replace in all", () => post("replace", { find: read("sd-find"), put: read("sd-put") }, (n) => `${plural(n)} changed`)),
      field("Trigger word", "sd-trigger", state.trigger || ""),
      button("Put in front", () => post("trigger", { word: read("sd-trigger") }, (n) => `put in front of ${plural(n)}`)),
      button(state.undo ? `Undo (${state.undo})` : "Undo", () => post("undo", {}, (n) => `${plural(n)} as before`), "", { disabled: !state.undo, id: "sd-undo" }),
      el("label", { class: "sd-field" }, el("span", {}, "Show"), this.filter(state)));
  }
  filter(state) {
    const options = [["", `all ${state.num_images}`], ["findings", "with findings"], ["held", "held out"], ["uncaptioned", "without a caption file"]];
    const choose = el("select", { onchange: () => { this.only = choose.value; this.page = 0; this.load(); } },
      options.map(([value, label]) => el("option", { value, selected: value === this.only }, label)));
    return choose;
  }
  card(card) {
    const [left, top, right, bottom] = card.crop;
    const crop = el("span", { class: "sd-crop", title: `trained as ${card.bucket[1]} × ${card.bucket[0]} px`,
      style: `left:${left * 100}%;top:${top * 100}%;right:${100 - right * 100}%;bottom:${100 - bottom * 100}%` });
    const text = el("textarea", { rows: 2, "aria-label": `Caption of ${card.name}`, "data-name": card.name, spellcheck: false });
    text.value = card.caption;
    const mark = el("span", { class: "sd-saved", role: "status" });
    text.addEventListener("input", () => this.soon(card, text, mark));
    text.addEventListener("blur", () => this.save(card, text, mark));
    return el("article", { class: `sd-card ${card.held ? "held" : ""}` },
      el("div", { class: "sd-picture" }, el("div", { class: "sd-frame", style: `aspect-ratio:${card.width}/${card.height}` },
        el("img", { src: thumbUrl(card.path, 320, card.changed), loading: "lazy", alt: card.caption }), crop)),
      el("div", { class: "sd-meta" }, el("span", { class: "sd-name", title: card.name }, card.name),
        el("span", {}, `${card.width} × ${card.height}`), card.held ? el("b", { class: "sd-chip held" }, "held out") : null, mark),
      text, card.findings.map((one) => el("p", { class: `sd-hint ${one.severity}`, title: one.fix }, one.what)));
  }
  soon(card, text, mark) {
    clearTimeout(this.saving.get(card.name));
    mark.textContent = "…";
    this.saving.set(card.name, setTimeout(() => this.save(card, text, mark), 700));
  }
  async save(card, text, mark) {
    clearTimeout(this.saving.get(card.name));
    if (text.value === card.caption) { mark.textContent = ""; return; }
    const value = text.value;
    const answer = await attempt(() => ask("captions/set", { folder: this.folder, texts: { [card.name]: value } }));
    if (!answer) { mark.textContent = "not saved"; return; }
    card.caption = value;
    mark.textContent = "saved";
    const undo = this.querySelector("#sd-undo");
    undo.disabled = !answer.undo;
    undo.textContent = answer.undo ? `Undo (${answer.undo})` : "Undo";
  }
  pages(state) {
    if (state.matching <= PAGE) return null;
    const last = Math.ceil(state.matching / PAGE) - 1;
    const go = (to) => () => { this.page = to; this.load(); this.scrollIntoView(); };
    return el("nav", { class: "sd-row", "aria-label": "Pages of pictures" }, button("Previous", go(this.page - 1), "", { disabled: this.page === 0 }),
      el("span", {}, `${this.page + 1} of ${last + 1}`), button("Next", go(this.page + 1), "", { disabled: this.page >= last }));
  }
}

customElements.define("sd-dataset", DataSet);
