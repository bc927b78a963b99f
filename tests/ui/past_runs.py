"""Runs as an earlier training left them: a job, its events and its previews, without the training."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from sdlora.config.toml import load_config, save_config


def put_run(
    home: Path,
    name: str,
    steps: int,
    *,
    prompts: int = 2,
    every: int = 10,
    status: str = "finished",
    not_before: float | None = None,
) -> str:
    """Write a run of the server's in ``home`` and return its job's id; later calls make newer jobs."""
    jobs, run = home / "runs" / ".sdlora-ui" / "jobs", home / "runs" / name
    number = len(list(jobs.glob("2026*"))) if jobs.is_dir() else 0
    job_id = f"20260101-0000{number:02d}-{number:06x}"
    (jobs / job_id).mkdir(parents=True)
    (run / "samples").mkdir(parents=True)
    config = load_config(
        values={
            "output.name": name,
            "output.folder": run,
            "training.steps": steps,
            "sample.prompts": tuple(f"prompt {chr(97 + at)} of {name}" for at in range(prompts)),
        }
    )
    save_config(config, jobs / job_id / "run.toml")
    save_config(config, run / "config.toml")
    (run / f"{name}.safetensors").touch()
    facts = {"learning_rate": 1e-4, "seconds_left": 1.0, "images_per_second": 2.0}
    events = [
        {"event": "RunStarted", "steps": steps, "first_step": 0, "expected_seconds": 1.0, "expected_bytes": 5}
    ]
    for step in range(1, steps + 1):
        loss = (0.5 / step + 0.02 * (step % 5)) * (1 + number / 4)
        events.append({"event": "StepDone", "step": step, "steps": steps, "loss": loss, **facts})
        if step % every == 0:
            files = [run / "samples" / f"step-{step:06d}-{at + 1}.png" for at in range(prompts)]
            for at, file in enumerate(files):
                Image.new("RGB", (64, 64), (step * 255 // steps, 80 * at, 120)).save(file)
            events.append({"event": "Sampled", "step": step, "files": [str(file) for file in files]})
            events.append({"event": "Validated", "step": step, "loss": 0.4 / step + 0.1})
    if status == "finished":
        adapter = str(run / f"{name}.safetensors")
        events.append({"event": "RunFinished", "adapter_file": adapter, "seconds": 9.0, "stopped": False})
    text = "".join(json.dumps(event) + "\n" for event in events)
    (jobs / job_id / "events.jsonl").write_text(text, encoding="utf-8")
    job = {"id": job_id, "name": name, "run": str(run), "created": 1.7e9 + number, "status": status}
    text = json.dumps(job | {"not_before": not_before})
    (jobs / job_id / "job.json").write_text(text, encoding="utf-8")
    return job_id
