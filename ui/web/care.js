// What keeps a data set in order: restore points, excluded images, duplicates side by side, a repaired copy.

import { ask, attempt, button, el, say, thumbUrl } from "./base.js";
import { openFolder } from "./folders.js";
import { masksFromTransparency } from "./masks.js";

const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const kib = (bytes) => `${Math.max(1, Math.round(bytes / 1024))} KiB`;

export class Care {
  constructor(owner) {
    this.owner = owner;
    const panel = (title, id, show) => {
      const body = el("div");
      const node = el("details", { class: "sd-panel", id, ontoggle: () => node.open && show(body) }, el("summary", {}, title), body);
      return node;
    };
    this.node = el("div", { class: "sd-two", id: "sd-care" }, panel("Restore points", "sd-history", (body) => this.history(body)), panel("Near duplicates", "sd-duplicates", (body) => this.duplicates(body)),
      panel("Excluded images", "sd-excluded", (body) => this.excluded(body)), panel("Repair", "sd-repair", (body) => this.repair(body)));
  }
  refresh() { for (const node of this.node.querySelectorAll("details[open]")) if (["sd-history", "sd-excluded"].includes(node.id)) node.dispatchEvent(new Event("toggle")); }
  async history(body) {
    const held = await attempt(() => ask(`workbench/history?${this.owner.where}`));
    if (!held) return;
    const back = (times) => attempt(async () => {
      await this.owner.saveAll();
      const answer = await ask("workbench/undo", { folder: this.owner.folder, times });
      say(`${plural(answer.changed, "file")} restored`);
      await this.owner.load(true);
      this.history(body);
    });
    body.replaceChildren(held.changes.length ? el("p", { class: "sd-dim" }, "Each takes back all changes down to it. Deleted and older files are kept in the folder .sdlora-bin of the data set.") : el("p", { class: "sd-dim" }, "Nothing was changed yet."),
      ...held.changes.slice(0, 100).map((change, i) => el("div", { class: "sd-row sd-apart" }, el("span", {}, change.what, change.files === null ? "" : ` (${plural(change.files, "file")})`),
        button("Back to before this", () => back(i + 1), "sd-small"))));
  }
  async excluded(body) {
    const held = await attempt(() => ask(`workbench/excluded?${this.owner.where}`));
    if (!held) return;
    const take = (names) => this.owner.changeImages("include", names).then((done) => { if (done) { this.excluded(body); this.owner.load(true); } });
    body.replaceChildren(held.images.length ? el("div", { class: "sd-row" }, button("Take all back", () => take(held.images.map((one) => one.name)))) : el("p", { class: "sd-dim" }, "No image is excluded."),
      el("div", { class: "sd-thumbs" }, held.images.slice(0, 200).map((one) => el("figure", { class: "sd-pair" }, el("img", { src: thumbUrl(one.path, 192, one.changed), loading: "lazy", alt: one.name }),
        el("figcaption", { translate: "no" }, one.name), button("Take back", () => take([one.name]), "sd-small")))));
  }
  async duplicates(body) {
    body.replaceChildren(el("p", { class: "sd-dim" }, "Comparing …"));
    const held = await attempt(() => ask(`workbench/duplicates?${this.owner.query}`));
    if (!held) { body.replaceChildren(); return; }
    const may = this.owner.state?.may_change;
    const remove = async (what, names, group) => { if (await this.owner.changeImages(what, names)) { group?.remove(); if (!group) this.duplicates(body); } };
    const others = held.groups.flatMap((group) => group.images.slice(1)).map((one) => one.edit).filter(Boolean);
    body.replaceChildren(held.groups.length ? el("div", { class: "sd-row" }, el("span", {}, plural(held.groups.length + held.more, "group")),
      may && others.length ? button("Keep the first of each, exclude the others", () => remove("exclude", others), "", { id: "sd-keep-first" }) : null) : el("p", { class: "sd-dim" }, "No two images are alike."),
      ...held.groups.map((group) => {
        const node = el("div", { class: "sd-group" }, group.images.map((one, i) => el("figure", { class: "sd-pair" }, el("img", { src: thumbUrl(one.path, 320, one.changed), loading: "lazy", alt: one.name }),
          el("figcaption", {}, el("b", { translate: "no" }, one.name), el("span", {}, ` ${one.width} × ${one.height}, ${kib(one.bytes)}`), el("div", { class: "sd-dim", translate: "no" }, one.caption)),
          may && one.edit ? el("div", { class: "sd-row" }, button("Exclude", () => remove("exclude", [one.edit], group.images.length < 3 ? node : null), "sd-small"), button("Delete", () => remove("delete", [one.edit], group.images.length < 3 ? node : null), "sd-small danger")) : null)));
        return node;
      }));
  }
  async repair(body) {
    const may = this.owner.state?.may_change;
    const state = await attempt(() => ask(`workbench/repair?${this.owner.where}`));
    if (!state) return;
    const start = (write) => attempt(async () => { await ask("workbench/repair", { folder: this.owner.folder, write }); this.repair(body); });
    const changes = (state.changes || []).map((one) => el("div", { class: "sd-indent" }, el("b", { translate: "no" }, one.name), `: ${one.what}`));
    const shown = {
      none: () => [],
      running: () => [el("div", { class: "sd-working" }, el("progress", { max: 1, value: state.total ? state.done / state.total : 0, "aria-label": "Looking at the files" }), el("span", {}, state.total ? `${state.done} of ${state.total}` : "Looking at the files …"))],
      failed: () => [el("p", { class: "sd-problem", role: "alert" }, state.error)],
      finished: () => [el("p", {}, state.write ? `The repaired copy is in ${state.shown}; ${plural(state.count, "change")}.` : state.count ? `A repaired copy would have ${plural(state.count, "change")}:` : "Nothing is to be repaired."),
        state.write ? button("Open the copy", () => openFolder(state.folder), "primary", { id: "sd-repair-open" }) : null, ...changes],
    };
    body.replaceChildren(el("p", { class: "sd-dim" }, "What sdlora check --fix does: a copy with broken files repaired or left out. The folder itself stays as it is."),
      ...(may ? [el("div", { class: "sd-row" }, button("Show what it does", () => start(false), "", { id: "sd-repair-look", disabled: state.status === "running" }), button("Make the repaired copy", () => start(true), "primary", { id: "sd-repair-write", disabled: state.status === "running" }),
        button("Masks from transparency", () => attempt(() => masksFromTransparency(this.owner)), "", { id: "sd-masks", title: "A mask for each image that is transparent somewhere" }))] : []),
      ...shown[state.status]().filter(Boolean));
    if (state.status === "running") setTimeout(() => body.isConnected && this.repair(body), 700);
  }
}
