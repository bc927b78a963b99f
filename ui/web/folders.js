// Choosing a folder among those that may be read, and adding one where only its owner can ask.

import { ask, attempt, button, el, say } from "./base.js";

const field = () => document.querySelector("#dataset-folder input");

// Opens a folder as if its path were typed.
export function openFolder(path) {
  const input = field();
  input.focus();
  input.value = path;
  input.dispatchEvent(new Event("input", { bubbles: true }));
  input.blur();
  setTimeout(() => document.querySelector("button#open-folder, #open-folder button")?.click(), 150);
}

// What is typed into the field while the page is being filled with what its tab held is not taken back by that.
let typed = null;
const note = (event) => { if (event.isTrusted && event.target.closest?.("#dataset-folder")) typed = event.target.value; };
document.addEventListener("input", note, true);
document.addEventListener("sdlora-filled", () => {
  document.removeEventListener("input", note, true);
  document.body.dataset.filled = "yes";
  setTimeout(() => { if (typed && field() && field().value !== typed) openFolder(typed); }, 300); // Gradio has drawn it by then
}, { once: true });

class Browse extends HTMLElement {
  connectedCallback() {
    this.dialog = el("dialog", { class: "sd-dialog", "aria-label": "Choose a folder" });
    this.replaceChildren(button("Browse …", () => { this.dialog.showModal(); this.show(""); }, "", { id: "browse-folders" }), this.dialog);
  }
  async show(path) {
    const turn = this.turn = {};
    const open = this.dialog.querySelector("#browse-open");
    if (open) open.style.visibility = "hidden"; // it opens the folder before, not the one that was just clicked
    const seen = await attempt(() => ask(`folders?path=${encodeURIComponent(path)}`));
    if (turn !== this.turn) return;
    if (!seen) { if (open) open.style.visibility = ""; return; }
    const count = (images) => images ? `${images} image${images === 1 ? "" : "s"}` : "";
    const line = (name, to, images) => el("button", { type: "button", class: "sd-folder", onclick: () => this.show(to), "data-path": to }, el("span", { translate: "no" }, `📁 ${name}`), el("span", { class: "sd-dim" }, count(images)));
    this.dialog.replaceChildren(el("h3", seen.shown ? { translate: "no" } : {}, seen.shown || "Folders that sdlora may use"),
      el("div", { class: "sd-folders" }, seen.up === null ? null : line("..", seen.up, 0),
        seen.folders.map((one) => line(one.name, one.path, one.images)),
        seen.more ? el("p", { class: "sd-dim" }, "and more; type the path") : null,
        seen.unnamed ? el("p", { class: "sd-dim" }, `not shown, as their names are not UTF-8: ${seen.unnamed}; rename them`) : null,
        !seen.folders.length ? el("p", { class: "sd-dim" }, "No folder inside.") : null),
      el("div", { class: "sd-row" },
        seen.path ? button(seen.images ? `Open (${count(seen.images)})` : "Open", () => { this.dialog.close(); openFolder(seen.path); }, "primary", { id: "browse-open" }) : null,
        button("Close", () => this.dialog.close())));
    this.dialog.querySelector("button")?.focus();
  }
}

class Allow extends HTMLElement {
  connectedCallback() {
    const path = this.getAttribute("path");
    const allow = () => attempt(async () => {
      const { folder } = await ask("allow", { path });
      say(`${folder} may be used from now on`);
      openFolder(folder);
    });
    this.replaceChildren(button("Use this folder", allow, "primary", { id: "allow-folder" }));
  }
}

customElements.define("sd-browse", Browse);
customElements.define("sd-allow", Allow);
