// Stands in the page's head, before all else: which language the page is read in, chosen before, or the browser's.
(() => {
  const known = { en: "en", zh: "zh-CN" };
  const asked = [...(navigator.languages || [navigator.language || ""])].map((tag) => tag.slice(0, 2).toLowerCase());
  let kept = null;
  try { kept = localStorage.getItem("sdlora-language"); } catch { /* a browser that keeps nothing */ }
  window.sdloraLanguage = document.documentElement.lang = Object.values(known).includes(kept) ? kept : known[asked.find((tag) => tag in known)] || "en";
  // Gradio has translations of its own for a few of its words; there is one translator here, which begins from English.
  for (const [name, value] of [["language", "en"], ["languages", Object.freeze(["en"])]])
    Object.defineProperty(navigator, name, { configurable: true, get: () => value });
})();
