// How busy, full and hot the machine and its cards are; asked for only while it can be seen.

import { ask, el, Live } from "./base.js";

const degrees = (value) => (value === null || value === undefined ? "" : `${Math.round(value)} °C`);
const percent = (value) => `${Math.round(value)} %`;
const both = ({ used, total }) => [used ?? 0, total].map((count) => (count / 2 ** 30).toFixed(total < 100 * 2 ** 30 ? 1 : 0)).join(" / ").concat(" GiB");

class Device extends Live {
  start() {
    this.every = 3000;
    this.hidden = true;
  }
  async refresh() {
    if (this.asking) return;
    this.asking = true;
    const state = await ask("device").catch(() => null);
    this.asking = false;
    if (state?.memory) this.show(state);
    else if (state && !this.shown) setTimeout(() => this.refresh(), 700); // the first look is under way
  }
  show({ load, memory, shared, disk, temperature, cards }) {
    const key = JSON.stringify([load, memory, disk, temperature, cards]);
    if (key === this.shown) return;
    this.shown = key;
    this.hidden = false;
    const part = (name, share, text, warm = "") => el("div", { class: `sd-gauge ${share > 0.95 ? "full" : ""}` }, el("span", {}, name),
      el("div", { class: "sd-bar-line" }, el("i", { style: `width:${Math.min(100, Math.round(100 * share))}%` })), el("b", {}, [text, warm].filter(Boolean).join(", ")));
    const ofCard = (card) => [
      card.load === null && card.temperature === null ? null : part(named(card), (card.load ?? 0) / 100, card.load === null ? "" : percent(card.load), degrees(card.temperature)),
      card.total ? part("its memory", (card.used ?? 0) / card.total, both(card)) : null];
    const named = (card) => el("span", { translate: "no" }, card.name);
    this.replaceChildren(...[part("processor", load / 100, percent(load), degrees(temperature)), part(shared ? "memory, the GPU's, too" : "memory", memory.used / memory.total, both(memory)),
      ...cards.flatMap(ofCard), disk ? part("disk", disk.used / disk.total, both(disk)) : null].filter(Boolean));
  }
}

customElements.define("sd-device", Device);
