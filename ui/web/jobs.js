// The queue and the selected run: progress, curves, previews, log.

import { ask, attempt, button, bytes, Drawn, duration, el, Live, say, sendToPython } from "./base.js";
import "./curves.js";
import { PreviewViewer, previewTable } from "./previews.js";

const WORDS = { waiting: "waiting", running: "training", stopping: "stopping after this step", stopped: "stopped", finished: "finished", failed: "failed" };
const LIVE = ["running", "stopping"];

// A time in seconds since 1970 as this browser's clock shows it, and as a field takes it.
const moment = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
const localTime = (seconds) => new Date((seconds - new Date(seconds * 1000).getTimezoneOffset() * 60) * 1000).toISOString().slice(0, 16);

class Jobs extends Live {
  start() {
    this.every = 1000;
    this.boxes = { queue: el("div", { class: "sd-queue" }), detail: el("div", { class: "sd-run" }) };
    this.dialog = el("dialog", { class: "sd-dialog" });
    this.heading = el("div", { class: "sd-row sd-apart sd-queue-head" }, el("h3", {}, "Queue"), el("sd-notify"));
    this.replaceChildren(this.heading, this.boxes.queue, this.boxes.detail, this.dialog);
    this.keys = {};
    this.viewer ??= new PreviewViewer((at) => this.at(at && `${at.step}-${at.column + 1}`));
  }
  at(image) { this.dispatchEvent(new CustomEvent("sd-at", { bubbles: true, detail: { tab: "train", run: this.selected, image } })); }
  async refresh() {
    if (this.asking) return;
    this.asking = true;
    try {
      const { jobs } = await ask("jobs");
      this.dispatchEvent(new CustomEvent("sd-jobs-seen", { bubbles: true, detail: jobs }));
      const newest = jobs.length ? jobs[jobs.length - 1].id : null;
      if (newest !== this.newest) { this.newest = newest; this.selected = this.linked || newest; this.linked = null; }
      if (!jobs.some((job) => job.id === this.selected)) this.selected = newest;
      this.drawQueue(jobs);
      if (this.selected) this.drawRun(await ask(`jobs/${this.selected}`), jobs);
      else this.fill("detail", "none", [el("div", { class: "sd-none" }, el("strong", {}, "No training yet"), el("p", { class: "sd-dim" }, "Choose a folder and a name, then press Start training. Its curves and previews appear here; it continues when this page is closed."))]);
      this.lost = false;
    } catch (error) {
      if (!this.lost) this.fill("queue", error.message, [el("p", { class: "sd-problem", role: "alert" }, error.message)]);
      this.lost = true;
      this.drawn = null;
      this.keys = {};
    } finally { this.asking = false; }
  }
  // Shows a run, also one that a link names before the queue is known.
  select(id) {
    if (!this.newest) this.linked = id;
    this.selected = id;
    this.refresh();
  }
  // What an address says: a run, and perhaps one of its previews as STEP-PROMPT; nothing closes what is open.
  link(id, image) {
    this.asked = image ? { id, image } : null;
    if (!image) this.viewer.close();
    if (id) this.select(id);
  }
  openLinked(run) {
    if (this.asked?.id !== run.id) return;
    const [step, number] = this.asked.image.split("-").map(Number);
    this.asked = null;
    if (!this.viewer.open(run, step, number - 1)) say(`step ${step}: there is no such preview (any more)`, "error");
  }
  // Redraws only what changed, so that a focused button or an open log stays as it is.
  fill(where, key, children) {
    if (this.keys[where] === key) return;
    this.keys[where] = key;
    const target = this.boxes[where] || this.parts[where];
    const active = target.contains(document.activeElement) ? document.activeElement.dataset.what : null;
    target.replaceChildren(...children);
    if (active) target.querySelector(`[data-what="${active}"]`)?.focus();
  }
  drawQueue(jobs) {
    const rank = (job) => (LIVE.includes(job.status) ? 0 : job.status === "waiting" ? 1 : 2);
    const shown = [...jobs].sort((a, b) => rank(a) - rank(b) || (rank(a) === 1 ? a.order - b.order : b.created - a.created));
    this.heading.hidden = !jobs.length;
    this.fill("queue", JSON.stringify([shown, this.selected]), shown.map((job) => this.line(job, shown.filter((one) => one.status === "waiting"))));
  }
  line(job, waiting) {
    const share = job.steps ? job.step / job.steps : 0;
    const state = job.waits && job.status === "waiting" ? `waiting until ${moment(job.not_before)}` : job.behind ? `waiting for ${job.behind}, started in a shell` : job.status !== "running" ? WORDS[job.status] : job.finishing ? "finishing" : job.started ? "training"
      : job.preparing ? `preparing ${job.preparing[0]} of ${job.preparing[1]}` : "starting";
    const place = waiting.indexOf(job);
    const mover = (label, by, sign, can) => button(sign, () => attempt(async () => { await ask(`jobs/${job.id}/move`, { by }); await this.refresh(); }), "sd-small", { "data-what": `move${by}-${job.id}`, "aria-label": label, title: label, disabled: !can });
    const left = LIVE.includes(job.status) && job.seconds_left && !job.finishing ? `${duration(job.seconds_left)} left` : "";
    return el("div", { class: `sd-job ${job.status} ${job.id === this.selected ? "on" : ""}`, "data-job": job.id },
      el("button", { type: "button", class: "sd-job-name", "data-what": `open-${job.id}`, "aria-expanded": String(job.id === this.selected),
        onclick: () => { this.select(job.id); this.at(null); } },
        el("strong", { translate: "no" }, job.name), el("span", { class: `sd-chip ${job.status}` }, state), el("span", { class: "sd-dim" }, left)),
      el("progress", { value: share, max: 1, "aria-label": `Progress of ${job.name}` }), waiting.length > 1 && place >= 0
        ? el("span", { class: "sd-movers" }, mover(`Start ${job.name} earlier`, -1, "↑", place > 0), mover(`Start ${job.name} later`, 1, "↓", place < waiting.length - 1))
        : el("span", { class: "sd-count" }, job.steps ? `${job.step} / ${job.steps}` : ""));
  }
  drawRun(run, jobs) {
    if (this.drawn !== run.id) {
      this.drawn = run.id;
      this.keys = { queue: this.keys.queue };
      this.parts = Object.fromEntries(["head", "actions", "tiles", "curve", "previews", "facts"].map((name) => [name, el("div", { class: `sd-${name}` })]));
      this.boxes.detail.replaceChildren(...Object.values(this.parts));
      this.parts.curve.append(this.curves = el("sd-curves"));
    }
    this.fill("head", JSON.stringify([run.status, run.error, run.notes]), [
      run.error ? el("p", { class: "sd-problem", role: "alert" }, run.error) : null,
      run.status === "finished" ? el("p", { class: "sd-done", role: "status" }, `Done: ${run.shown_adapter}`) : null].filter(Boolean));
    this.fill("actions", `${run.status}${run.started}${run.reported}${run.not_before}`, this.actions(run));
    this.curves.show(run, jobs);
    this.fill("previews", JSON.stringify(run.samples), previewTable(run, (step, column) => this.viewer.open(run, step, column)));
    this.viewer.update(run);
    this.openLinked(run);
    this.fill("tiles", JSON.stringify([run.memory, run.step, run.status, run.seconds_left, run.validation.length, run.best]), this.tiles(run));
    this.fill("facts", JSON.stringify([run.rate, run.command, run.status, run.images_per_second]), this.facts(run));
  }
  actions(run) {
    const act = (what, extra = {}) => () => attempt(async () => { await ask(`jobs/${run.id}/${what}`, extra); await this.refresh(); });
    const can = (label, what, kind = "") => button(label, act(what), kind, { "data-what": what });
    const ended = ["stopped", "failed", "finished"].includes(run.status);
    const report = run.reported ? el("a", { class: "sd-button", href: `/sdlora/jobs/${run.id}/report?lang=${document.documentElement.lang}`, target: "_blank", rel: "noopener", "data-what": "report", title: run.best.reason }, "Report") : null;
    if (run.shell) return [el("div", { class: "sd-row" }, run.status === "running" ? [can("Stop and save", "stop", "primary"), can("Preview now", "sample"), can("Save now", "save")] : null, report, el("span", { class: "sd-dim" }, "started in a shell"))];
    return [el("div", { class: "sd-row" },
      run.status === "waiting" ? [button("Start now", () => this.startNow(run), "primary", { "data-what": "start" }), can("Remove from the queue", "stop")] : null,
      run.status === "running" ? [can("Stop and save", "stop", "primary"), run.started ? can("Preview now", "sample") : null, run.started ? can("Save now", "save") : null] : null,
      run.status === "stopping" ? can("Stop without saving", "kill", "danger") : null,
      run.status === "stopped" ? can("Resume", "resume", "primary") : null,
      run.status === "failed" ? can("Try again", "resume", "primary") : null,
      run.status === "finished" ? button("Try it out", () => sendToPython("try-run", JSON.stringify({ id: run.id, at: Date.now() })), "primary", { "data-what": "try" }) : null,
      run.status === "finished" ? button("Export", () => sendToPython("export-run", JSON.stringify({ id: run.id, at: Date.now() })), "", { "data-what": "export" }) : null,
      button("Clone", () => sendToPython("clone-run", JSON.stringify({ id: run.id, at: Date.now() })), "", { "data-what": "clone" }),
      report,
      button("Log", () => this.showLog(run), "", { "data-what": "log" }),
      ended || run.status === "waiting" ? button("Delete", () => this.confirmDelete(run), "danger", { "data-what": "delete" }) : null),
    run.status === "waiting" ? this.startField(run) : null, run.status === "finished" ? this.moreField(run) : null].filter(Boolean);
  }
  startNow(run) {
    return attempt(async () => {
      const { status } = await ask(`jobs/${run.id}/start`, {});
      if (status === "waiting") say("another run trains; this one is the next");
      await this.refresh();
    });
  }
  // When a waiting run may start by itself.
  startField(run) {
    const field = el("input", { type: "datetime-local", "data-what": "until", id: "sd-until" });
    if (run.not_before) field.value = localTime(run.not_before);
    const set = (until) => attempt(async () => { await ask(`jobs/${run.id}/wait`, { until }); await this.refresh(); });
    const chosen = () => { const until = new Date(field.value).getTime() / 1000; if (Number.isFinite(until)) set(until); else say("choose a date and a time first", "error"); };
    return el("div", { class: "sd-row sd-end" }, el("label", { class: "sd-field" }, "Not before", field), button("Set the time", chosen, "", { "data-what": "wait" }),
      run.not_before ? button("As soon as it can", () => set(null), "", { "data-what": "no-wait" }) : null);
  }
  // A finished run goes on for more steps than it was to make.
  moreField(run) {
    const field = el("input", { type: "number", min: "1", step: "1", "data-what": "more-steps", id: "sd-more-steps" });
    field.value = String(Math.max(1, Math.round(run.step / 4)));
    const go = () => attempt(async () => {
      await ask(`jobs/${run.id}/extend`, { steps: Math.round(Number(field.value)) });
      await this.refresh();
    });
    return el("div", { class: "sd-row sd-end" }, el("label", { class: "sd-field" }, "Steps more", field),
      button("Train on", go, "", { "data-what": "extend", title: "From where it ended, with its settings; the learning rate follows the schedule of a run that long" }));
  }
  // Follows the log while it is open, and stays at its end unless the user scrolled up.
  async showLog(run) {
    const text = el("pre", { class: "sd-log", translate: "no", tabindex: "0" }, "…");
    this.dialog.replaceChildren(el("h3", {}, `Log of ${run.name}`), text, el("div", { class: "sd-row" }, button("Close", () => this.dialog.close())));
    this.dialog.showModal();
    while (this.dialog.open && text.isConnected) {
      const answer = await ask(`jobs/${run.id}/log`).catch((error) => ({ text: error.message }));
      const said = answer.text || "(empty so far)";
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      if (text.textContent !== said) { text.textContent = said; if (atEnd) text.scrollTop = text.scrollHeight; }
      await new Promise((later) => setTimeout(later, 1000));
    }
  }
  confirmDelete(run) {
    const also = el("input", { type: "checkbox", id: "sd-also" });
    const remove = () => attempt(async () => {
      await ask(`jobs/${run.id}/delete`, { with_run: also.checked, confirmed: true });
      this.dialog.close();
      this.drawn = null;
      await this.refresh();
    });
    this.dialog.replaceChildren(el("h3", {}, `Delete the job ${run.name}?`),
      el("p", {}, "It is removed from the queue. The run folder stays, unless you tick this box:"),
      el("label", { class: "sd-check" }, also, ` also delete ${run.shown_run} with its checkpoints and adapter, for good`),
      el("div", { class: "sd-row" }, button("Delete", remove, "danger", { id: "sd-confirm" }), button("Keep it", () => this.dialog.close())));
    this.dialog.showModal();
  }
  tiles(run) {
    const tile = (value, what) => value ? el("div", { class: "sd-fact" }, el("strong", {}, value), el("span", {}, what)) : null;
    const live = LIVE.includes(run.status);
    const held = run.validation.length ? run.validation[run.validation.length - 1][1] : null;
    const tiles = [live && run.started ? tile(duration(run.seconds_left), "left") : tile(run.seconds ? duration(run.seconds) : "", "took"),
      tile(run.steps ? `${run.step} / ${run.steps}` : "", "steps"), tile(run.loss?.toFixed(4), "loss, last 20 steps"),
      tile(held === null ? "" : held.toFixed(4), "loss on held-out images"),
      tile(run.best ? `${run.best.step} at ${run.best.strength}` : "", "best step, at strength"),
      tile(run.against_base ? run.against_base.map((value) => (value > 0 ? "+" : "") + value.toFixed(4)).join(" … ") : "", "against the base alone (90 %)"),
      live ? tile(bytes(run.memory?.process), "memory") : null, live ? tile(bytes(run.memory?.gpu), "GPU memory") : null].filter(Boolean);
    return tiles.length ? [el("div", { class: "sd-facts" }, tiles)] : [];
  }
  facts(run) {
    const pair = (name, value) => value ? [el("dt", {}, name), el("dd", {}, value)] : [];
    const reasons = run.defaults.map(([key, value, reason, label]) => el("tr", {}, el("th", { scope: "row", title: key }, label), el("td", { translate: "no" }, String(value)), el("td", {}, reason)));
    const open = this.parts.facts.querySelector("details")?.open ?? false;
    return [el("details", { class: "sd-panel", open }, el("summary", {}, "Settings, speed and the shell command"),
      el("dl", {}, pair("shell command", el("code", { translate: "no" }, run.command)), pair("run folder", el("code", { translate: "no" }, run.shown_run)),
        pair("learning rate", run.rate?.toPrecision(3)), pair("speed", LIVE.includes(run.status) && run.images_per_second ? `${run.images_per_second.toFixed(1)} images/s` : ""),
        pair("memory expected", bytes(run.expected_bytes))),
      reasons.length ? el("div", { class: "sd-scroll" }, el("table", { class: "sd-reasons" }, el("tbody", {}, reasons))) : null)];
  }
}

// The settings that differ from automatic, each with a button that takes it back.
class Changed extends Drawn {
  static observedAttributes = ["data"];
  render() {
    const listed = JSON.parse(this.getAttribute("data") || "[]");
    const reset = (key) => () => sendToPython("reset-setting", JSON.stringify({ key, at: Date.now() }));
    this.replaceChildren(el("div", { class: "sd-panel" },
      el("div", { class: "sd-row sd-apart" }, el("strong", {}, `Set by you (${listed.length})`), button("All automatic", reset("all"), "", { id: "reset-all" })),
      el("ul", { class: "sd-set" }, listed.map(({ key, label, value }) => el("li", {}, el("span", {}, `${label}: `, el("b", value === "" ? {} : { translate: "no" }, value === "" ? "none" : value)),
        button("Automatic", reset(key), "sd-small", { "data-reset": key, "aria-label": `${label}: automatic again` }))))));
  }
}

customElements.define("sd-changed", Changed);
customElements.define("sd-jobs", Jobs);
