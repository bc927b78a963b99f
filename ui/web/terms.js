// The terms of the field, each explained once, where it first stands on the page: on hover, with the keyboard, on a tap.

import { el } from "./base.js";

const label = (id) => `#${id} [data-testid=block-info], #${id} label > span`;
const TERMS = {
  adapter: [label("adapter-0"), "A LoRA: a small file of changes to a base model, which teaches it a style or a subject. It works with the base that it was trained on and that base's relatives."],
  rank: [label("set-adapter-rank"), "How much room the changes have in each layer. More learns more detail, needs more memory and makes a larger file."],
  strength: [label("strength-0"), "How much of the LoRA is added to the base: 0 is the base alone, 1 is as trained; less is weaker, more exaggerates."],
  sweep: [label("strip"), "One image at each of several strengths, everything else the same, to choose the strength that looks best."],
  bake: ["#bake-box button.label-wrap > span:first-child", "A new checkpoint whose weights hold the LoRA already, for programs that load none. The strength can no longer be changed."],
};

const box = el("div", { id: "sd-explained", role: "tooltip", hidden: true });
let shown = null;

function show(term) {
  shown = term;
  box.textContent = TERMS[term.dataset.term][1];
  box.hidden = false;
  const { left, bottom } = term.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${bottom + box.offsetHeight + 8 < innerHeight ? bottom + 6 : Math.max(8, bottom - box.offsetHeight - 30)}px`;
}

function hide() {
  box.hidden = true;
  shown = null;
}

// Gradio makes a part of the page when it is first unfolded, and may make it again.
function mark() {
  if (!box.isConnected) document.body.append(box);
  if (shown && !shown.isConnected) hide();
  for (const [name, [where]] of Object.entries(TERMS)) {
    const term = document.querySelector(where);
    if (!term || term.dataset.term) continue;
    term.dataset.term = name;
    term.classList.add("sd-term");
    term.setAttribute("aria-describedby", "sd-explained");
    const inside = term.closest("button, summary"); // what has the keyboard's focus already
    if (!inside) term.tabIndex = 0;
    for (const [event, act] of [["mouseenter", show], ["mouseleave", hide], ["focus", show], ["blur", hide]])
      (event.startsWith("mouse") || !inside ? term : inside).addEventListener(event, () => act(term));
  }
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("scroll", () => { if (shown) hide(); }, { passive: true, capture: true });
setInterval(() => { if (!document.hidden) mark(); }, 700);
