// The previews' prompts as a table: prompt, seed, size and strength of each. The lines of the setting below it stay
// what counts; what a line has besides (negative prompt, guidance, steps, sampler) is kept behind it.

import { Live, button, el, sendToPython } from "./base.js";

const COLUMNS = [["d", "Seed", "1"], ["w", "Width, px", "8"], ["h", "Height, px", "8"], ["am", "Strength", "any"]];
const OPTION = /\s--([A-Za-z]+)(?=\s|$)/;
const LINES = "#set-sample-prompts textarea, #set-sample-prompts input";

export function readLine(line) {
  const [prompt, ...parts] = line.split(OPTION), row = { prompt: prompt.trim(), options: [] };
  for (let i = 0; i < parts.length; i += 2) row.options.push([parts[i].toLowerCase(), (parts[i + 1] || "").trim()]);
  return row;
}
export const writeLine = ({ prompt, options }) =>
  [prompt.trim(), ...options.filter(([, value]) => value !== "").map(([name, value]) => `--${name} ${value}`)].join(" ");

class Prompts extends Live {
  every = 700;
  start() {
    this.body = el("tbody");
    this.empty = el("p", { class: "sd-dim" }, "Taken from the captions; add a row to choose what is shown.");
    this.table = el("table", { class: "sd-prompts" }, el("thead", {}, el("tr", {}, ["Prompt", ...COLUMNS.map(([, label]) => label)].map((label) => el("th", { scope: "col" }, label)), el("td"))), this.body);
    this.replaceChildren(el("h4", { "aria-level": "3" }, "What previews show"), this.empty, this.table,
      button("Add a prompt", () => { this.rows.push({ prompt: "", options: [] }); this.draw(); this.body.lastElementChild.querySelector("input").focus(); }, "", { "data-what": "add-prompt" }));
    this.rows = [];
  }
  // What the setting holds now, unless it is what this table sent, or somebody types here.
  async refresh() {
    const text = document.querySelector(LINES)?.value ?? "";
    if (text === this.shown || this.body.contains(document.activeElement)) return;
    this.shown = text;
    this.rows = text.trim() === "[]" ? [] : text.split("\n").filter((line) => line.trim()).map(readLine);
    this.draw();
  }
  draw() {
    this.empty.hidden = this.rows.length > 0;
    this.table.hidden = !this.rows.length;
    this.body.replaceChildren(...this.rows.map((row, number) => el("tr", {},
      el("td", {}, this.field(row, "prompt", "Prompt", { type: "text" })),
      COLUMNS.map(([name, label, step]) => el("td", {}, el("span", { class: "sd-col", "aria-hidden": "true" }, label), this.field(row, name, label, { type: "number", step, min: name === "am" ? null : "0", placeholder: name === "am" ? "1" : "auto" }))),
      el("td", {}, button("✕", () => { this.rows.splice(number, 1); this.draw(); this.send(); }, "sd-small", { "aria-label": "Remove this prompt", title: "Remove this prompt" })))));
  }
  field(row, name, label, more) {
    const known = row.options.find(([option]) => option === name);
    const input = el("input", { "aria-label": label, "data-column": name, translate: "no", ...more, onchange: () => {
      if (name === "prompt") row.prompt = input.value;
      else if (known) known[1] = input.value;
      else row.options = [...row.options.filter(([option]) => option !== name), [name, input.value]];
      this.send();
    } });
    input.value = name === "prompt" ? row.prompt : known ? known[1] : "";
    return input;
  }
  send() {
    const lines = this.rows.filter((row) => row.prompt.trim()).map(writeLine);
    this.shown = lines.join("\n");
    sendToPython("preview-rows", JSON.stringify({ lines, at: Date.now() }));
  }
}
customElements.define("sd-prompts", Prompts);
