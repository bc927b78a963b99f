// Everything the page adds to Gradio.
import "./dataset.js";
import "./device.js";
import "./folders.js";
import "./jobs.js";
import "./images.js";
import "./links.js";
import "./notify.js";
import "./prompts.js";
import "./words.js";
import "./terms.js";
import { button, sendToPython, tabKnown, tabWord } from "./base.js";

// Gradio's sliders react only to a released pointer; arrow keys must count as well.
document.addEventListener("keyup", (event) => {
  if (event.target.matches?.('input[type="range"]') && /^(Arrow|Page|Home|End)/.test(event.key)) {
    event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
});

// The name of Gradio's drop areas for screen readers must be what stands on them.
const unname = () => document.querySelectorAll("button.upload-container[aria-label]").forEach((one) => one.removeAttribute("aria-label"));
new MutationObserver(unname).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label"] });

// A focused Gradio dropdown keeps its old text when its value is set, e.g. by a dropped image.
document.addEventListener(
  "change",
  (event) => {
    if (event.target.matches?.('input[type="file"]')) document.activeElement?.blur();
  },
  true,
);

// Light or dark: the system's setting, until someone presses the button.
const STORED = "sdlora-theme";
const isDark = () => document.body.classList.contains("dark");
class Theme extends HTMLElement {
  connectedCallback() {
    const asked = new URLSearchParams(location.search).get("__theme");
    const stored = asked || localStorage.getItem(STORED);
    if (stored === "dark" || stored === "light") document.body.classList.toggle("dark", stored === "dark");
    this.button = button("", () => {
      document.body.classList.toggle("dark");
      localStorage.setItem(STORED, isDark() ? "dark" : "light");
      this.show();
    }, "sd-theme");
    this.replaceChildren(this.button);
    this.show();
  }
  show() {
    const other = isDark() ? "light" : "dark";
    this.button.textContent = isDark() ? "☀" : "☾";
    this.button.setAttribute("aria-label", `Switch to the ${other} look`);
    this.button.title = `Switch to the ${other} look`;
  }
}
customElements.define("sd-theme", Theme);

// Tells the server which tab this is, as soon as the page is there: it then fills in what the forms held.
tabKnown.then(() => {
  const waiting = setInterval(() => {
    if (!document.querySelector("#tab-word textarea, #tab-word input")) return;
    clearInterval(waiting);
    sendToPython("tab-word", tabWord());
  }, 50);
});
