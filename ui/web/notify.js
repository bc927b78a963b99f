// Tells when a run ends: in the page's title, and as a notification of the browser where that was asked for.

import { ask, button, say } from "./base.js";
import { translation } from "./words.js";

const STORED = "sdlora-notify";
const EVERY = 10_000; // ms between two looks while the runs are not on the screen
const BUSY = ["running", "stopping", "waiting"];
const ENDS = { finished: ["✓", "The run is finished"], failed: ["✗", "The run failed"] };

const plain = document.title;
let statuses = null; // of the jobs, as they were seen last
let seenAt = 0;
let news = ""; // what ended while nobody looked

const possible = () => "Notification" in window && isSecureContext;
const wanted = () => possible() && Notification.permission === "granted" && localStorage.getItem(STORED) === "on";
const watched = () => !document.hidden && document.hasFocus();

function seen(jobs) {
  seenAt = Date.now();
  for (const job of jobs) if (statuses && BUSY.includes(statuses.get(job.id)) && ENDS[job.status]) tell(job);
  statuses = new Map(jobs.map((job) => [job.id, job.status]));
  const live = jobs.find((job) => job.status === "running" && job.steps);
  if (watched()) news = "";
  document.title = news || (live ? `${Math.floor((100 * live.step) / live.steps)} % ${live.name}` : plain);
}

function tell(job) {
  const [sign, text] = ENDS[job.status];
  if (!watched()) news = `${sign} ${job.name}`;
  if (!wanted()) return;
  // several tabs show one notification together: those with the same tag replace each other
  const note = new Notification(job.name, { body: translation(text), tag: job.id, icon: "/sdlora/web/icon.svg" });
  note.onclick = () => { window.focus(); location.hash = `#train?run=${job.id}`; note.close(); };
}

document.addEventListener("sd-jobs-seen", ({ detail }) => seen(detail));
for (const [target, name] of [[window, "focus"], [document, "visibilitychange"]]) target.addEventListener(name, () => { if (news && watched()) { news = ""; document.title = plain; } });
async function look() {
  const busy = statuses === null || [...statuses.values()].some((status) => BUSY.includes(status));
  if (!busy || Date.now() - seenAt < EVERY / 2) return;
  const answer = await ask("jobs").catch(() => null);
  if (answer) seen(answer.jobs);
}
setInterval(look, EVERY);

// The button that asks the browser for its permission; nothing asks for it by itself.
class Notify extends HTMLElement {
  connectedCallback() { this.draw(); }
  draw() {
    this.hidden = !possible();
    const on = wanted();
    this.replaceChildren(button("Tell me when a run ends", () => this.toggle(), `sd-small ${on ? "primary" : ""}`, { "aria-pressed": String(on), "data-what": "notify" }));
  }
  async toggle() {
    if (wanted()) localStorage.setItem(STORED, "off");
    else if ((await Notification.requestPermission()) === "granted") localStorage.setItem(STORED, "on");
    else say("the browser does not allow this page to notify you; the page's title tells anyway", "error");
    this.draw();
  }
}

customElements.define("sd-notify", Notify);
