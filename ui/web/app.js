// Everything the page adds to Gradio.
import "./dataset.js";
import "./jobs.js";
import "./pictures.js";
