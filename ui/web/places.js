// Addresses of what is shown: #train, #train/JOB, #generate/IMAGE. The browser's Back and a link to a friend work.

const NAMES = ["dataset", "train", "generate", "tools"];
const tabs = () => [...document.querySelectorAll("#pages button[role=tab]")].filter((tab) => /^\d/.test(tab.textContent.trim()));
const followers = [];

// What the address says: the page, and what of it.
export function place() {
  const [page, ...rest] = location.hash.slice(1).split("/");
  return { page, what: decodeURIComponent(rest.join("/")) };
}

// Writes down where the user went; what is already there is not written twice.
export function went(page, what = "") {
  const to = `#${page}${what ? `/${encodeURIComponent(what)}` : ""}`;
  if (location.hash !== to && !(location.hash === "" && to === `#${NAMES[0]}`)) history.pushState(null, "", to);
}

// Calls back when the user goes back, forward, or opens a link.
export const onPlace = (page, follow) => followers.push([page, follow]);

function follow() {
  const { page, what } = place();
  const index = Math.max(0, NAMES.indexOf(page));
  const tab = tabs()[index];
  if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
  followers.forEach(([of, call]) => { if (of === NAMES[index]) call(what); });
}

addEventListener("popstate", follow);
const waiting = setInterval(() => {
  const list = tabs()[0]?.closest("[role=tablist]");
  if (!list) return;
  clearInterval(waiting);
  if (location.hash) follow();
  new MutationObserver(() => {
    const now = tabs().findIndex((tab) => tab.getAttribute("aria-selected") === "true");
    if (now >= 0 && NAMES[now] && place().page !== NAMES[now] && !(now === 0 && !location.hash)) went(NAMES[now]);
  }).observe(list, { attributes: true, subtree: true, attributeFilter: ["aria-selected"] });
}, 50);
