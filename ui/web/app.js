// Everything the page adds to Gradio.
import "./dataset.js";
import "./jobs.js";
import "./pictures.js";

// Gradio's sliders hear only a pointer being let go; arrow keys must count as well.
document.addEventListener("keyup", (event) => {
  if (event.target.matches?.('input[type="range"]') && /^(Arrow|Page|Home|End)/.test(event.key)) {
    event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
});
