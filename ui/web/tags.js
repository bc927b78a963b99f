// Tags of a whole data set: how often each is there, and changes in all or in chosen images, shown before they are made.

import { ask, attempt, button, el, say } from "./base.js";

const DOES = [["add", "add at the end"], ["add first", "add in front"], ["remove", "remove"], ["replace", "replace"], ["sort by name", "sort by name"],
  ["sort by frequency", "sort by frequency"], ["once", "keep the first of equal tags"], ["prune", "leave out tags that others imply"]];
const TYPED = ["add", "add first", "remove", "replace"];
const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

export class Tags {
  constructor(owner) {
    this.owner = owner;
    const field = (label, id) => el("label", { class: "sd-field" }, el("span", {}, label), el("input", { type: "text", id }));
    this.does = el("select", { id: "sd-tags-do", onchange: () => this.fit() }, DOES.map(([value, label]) => el("option", { value }, label)));
    this.scope = el("select", { id: "sd-tags-scope" }, [["all", "all images"], ["chosen", "chosen images"]].map(([value, label]) => el("option", { value }, label)));
    this.tags = field("Tags, with commas", "sd-tags-tags");
    this.put = field("By", "sd-tags-put");
    this.keep = field("Tags kept in front", "sd-tags-keep");
    this.find = el("input", { type: "search", id: "sd-tags-find", placeholder: "find a tag", "aria-label": "Find a tag", oninput: () => this.list() });
    this.bars = el("div", { class: "sd-bars" });
    this.seen = el("div", { id: "sd-tags-seen", role: "status" });
    this.count = el("summary", {}, "Tags");
    this.node = el("details", { class: "sd-panel", id: "sd-tags", ontoggle: () => this.node.open && this.refresh(true) }, this.count,
      el("div", { class: "sd-toolrow" }, el("div", { class: "sd-tool" }, el("label", { class: "sd-field" }, el("span", {}, "Do"), this.does), this.tags, this.put, this.keep,
        el("label", { class: "sd-field" }, el("span", {}, "In"), this.scope), button("Show what changes", () => this.apply(true), "", { id: "sd-tags-preview" }), button("Change", () => this.apply(false), "primary", { id: "sd-tags-apply" }))),
      this.seen, this.find, this.bars);
    this.fit();
  }
  fit() {
    const does = this.does.value;
    this.tags.hidden = !TYPED.includes(does);
    this.put.hidden = does !== "replace";
    this.keep.hidden = !["sort by name", "sort by frequency", "prune"].includes(does);
  }
  chosen(count) {
    const option = this.scope.querySelector("[value=chosen]");
    option.textContent = count ? `${count} chosen images` : "chosen images";
  }
  async refresh(force = false) {
    const version = this.owner.state?.version;
    if (!this.node.open || (!force && version === this.version)) return;
    this.version = version;
    const answer = await ask(`workbench/tags?${this.owner.where}`).catch((error) => ({ error: error.message, tags: [] }));
    this.held = answer;
    this.list();
  }
  list() {
    const { tags = [], captions = 0, error, more = 0 } = this.held || {};
    this.count.textContent = tags.length ? `Tags: ${tags.length + more} in ${plural(captions, "caption")}` : "Tags";
    if (error) { this.bars.replaceChildren(el("p", { class: "sd-dim" }, error)); return; }
    const wanted = this.find.value.trim().toLowerCase(), top = tags.length ? tags[0][1] : 1;
    const shown = tags.filter(([tag]) => tag.toLowerCase().includes(wanted)).slice(0, 300);
    this.bars.replaceChildren(...shown.map(([tag, count]) => el("div", { class: "sd-bar sd-tagbar" },
      el("button", { type: "button", class: "sd-bar-label", title: "Show the images with this tag", onclick: () => this.owner.show(`tag:${tag}`) }, el("span", { translate: "no" }, tag)),
      el("span", { class: "sd-bar-line" }, el("i", { style: `width:${Math.max(2, (100 * count) / top)}%` })), el("span", { class: "sd-bar-count" }, count),
      button("use", () => { const field = this.tags.querySelector("input"); field.value = field.value.trim() ? `${field.value}, ${tag}` : tag; }, "sd-small", { "aria-label": `Put ${tag} into the field` }))));
  }
  async apply(preview) {
    const value = (field) => field.querySelector("input").value;
    const names = this.scope.value === "chosen" ? [...this.owner.chosen] : null;
    if (names && !names.length) { say("choose images first: the boxes at the images", "error"); return; }
    const body = { folder: this.owner.folder, do: this.does.value, tags: value(this.tags), put: value(this.put), keep_first: Number(value(this.keep)) || 0, names, preview };
    await attempt(async () => {
      await this.owner.saveAll();
      const answer = await ask("workbench/tags", body);
      if (preview) {
        this.seen.replaceChildren(el("p", {}, `${plural(answer.count, "caption")} would change.`),
          ...answer.shown.map((one) => el("div", { class: "sd-indent", translate: "no" }, el("b", {}, one.image), el("div", {}, `− ${one.before}`), el("div", {}, `+ ${one.after}`))));
        return;
      }
      this.seen.replaceChildren(...answer.failed.map((text) => el("p", { class: "sd-hint warning" }, text)));
      say(`${plural(answer.changed, "caption")} changed`);
      await this.owner.load();
      this.refresh(true);
    });
  }
}
