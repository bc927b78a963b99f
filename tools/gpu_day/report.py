"""The report for people: tables of figures first, then what failed, with the ends of the logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GIB = 2**30
_PLANNED = ("encoding", "placing", "step", "validation", "previews")

Jobs = Mapping[str, Mapping[str, Any]]


def as_markdown(whole: Mapping[str, Any]) -> str:
    """Return ``report.md`` of what ``report.json`` holds."""
    jobs: Jobs = whole["jobs"]
    counts: dict[str, int] = {}
    for result in jobs.values():
        counts[result["state"]] = counts.get(result["state"], 0) + 1
    lines = ["# A day with a card", ""]
    lines += [
        f"- call {number}: {', '.join(f'{name} {value}' for name, value in call.items())}"
        for number, call in enumerate(whole["calls"], start=1)
    ]
    lines.append(f"- jobs: {', '.join(f'{count} {state}' for state, count in counts.items()) or 'none yet'}")
    if whole["left"]:
        lines.append(f"- left for another call with the same --output: {', '.join(whole['left'])}")
    for part in (_machine, _failures, _training, _memory, _exactness, _images, _drawing, _profiles, _others):
        section = list(part(jobs))
        if section:
            lines += ["", *section]
    lines += ["", "## All jobs", "", *_table(("job", "state", "s", "why"), _all(jobs)), ""]
    return "\n".join(lines)


def _all(jobs: Jobs) -> Iterator[Sequence[object]]:
    for name, result in jobs.items():
        yield name, result["state"], result.get("seconds", ""), str(result.get("why", ""))[:300]


def _machine(jobs: Jobs) -> Iterator[str]:
    facts = _answer(jobs, "doctor").get("facts")
    if not facts:
        return
    yield from ("## The machine", "")
    cards = ", ".join(f"{card['name']} {tuple(card['capability'] or ())}" for card in facts["cards"])
    yield f"- {cards or 'no card'}; driver {facts['driver']}"
    yield f"- torch {facts['torch']} (CUDA {facts['cuda_build']}), {facts['python']}"
    yield f"- {facts['cores']} cores, {facts['memory'] / GIB:.0f} GiB; {facts['system']}"
    packages = {name: version for name, version in facts["packages"].items() if version}
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    yield f"- {named or 'no optional packages'}"


def _failures(jobs: Jobs) -> Iterator[str]:
    failed = {name: result for name, result in jobs.items() if result["state"] in ("failed", "too long")}
    if not failed:
        return
    yield "## What failed"
    for name, result in failed.items():
        yield from ("", f"### {name}: {result['why'][:500]}", "", f"`{result.get('command', '')}`", "", "```")
        yield from result.get("tail", ())
        yield "```"


def _training(jobs: Jobs) -> Iterator[str]:
    rows = []
    for name, answer in _answers(jobs, "train-"):
        rows.append(
            (
                name,
                jobs[f"train-{name}"]["state"],
                answer["images_per_second"],
                _ms(answer),
                _gib(max(answer["allocated"].values(), default=None)),
                _gib(max(answer["reserved"].values(), default=None)),
                f"{answer['loss']:.4f}" if answer["loss"] is not None else "-",
            )
        )
    if rows:
        yield from ("## Training on bases of the true sizes", "")
        heads = (
            "base and path",
            "outcome",
            "images/s",
            "ms an image",
            "allocated GiB",
            "reserved GiB",
            "loss",
        )
        yield from _table(heads, rows)


def _ms(answer: Mapping[str, Any]) -> object:
    speed = answer["images_per_second"]
    return round(1000 / speed, 1) if speed else "-"


def _memory(jobs: Jobs) -> Iterator[str]:
    rows = []
    for name, answer in _answers(jobs, "train-"):
        cells = []
        for phase in _PLANNED:
            share = answer["plan_by_allocated"].get(phase)
            reserved = answer["reserved"].get(phase)
            taken = answer["allocated"].get(phase)
            cells.append("-" if share is None else f"{share:.3f} ({_gib(taken)}, {_gib(reserved)})")
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    if rows:
        yield from ("## Memory: plan divided by allocated (allocated GiB, reserved GiB)", "")
        yield from _table(("base and path", *_PLANNED), rows)


def _exactness(jobs: Jobs) -> Iterator[str]:
    rows = []
    for precision, answer in _answers(jobs, "exact-"):
        for path, seen in answer["paths"].items():
            if "loss" in seen:
                cosine = "-" if seen["cosine"] is None else f"{seen['cosine']:.5f}"
                figures = (f"{seen['loss_error']:.2e}", f"{seen['gradient_length']:.4f}", cosine)
            else:
                figures = ("-", "-", "-")
            rows.append((precision, path, *figures, seen.get("fault") or seen.get("skipped") or "ok"))
    if rows:
        yield from ("## Loss and gradient against the CPU in fp32", "")
        heads = ("format", "path", "loss off by", "gradient's length", "cosine", "outcome")
        yield from _table(heads, rows)


def _images(jobs: Jobs) -> Iterator[str]:
    answer = _answer(jobs, "images")
    if not answer:
        return
    yield from ("## Images against the CPU in fp32, mean difference of 255", "")
    names = list(next(iter(answer["by_precision"].values())))
    yield from _table(
        ("format", *names), [(p, *apart.values()) for p, apart in answer["by_precision"].items()]
    )
    yield ""
    yield from (f"- {what}: {value:.3f} of 255 apart" for what, value in answer["apart"].items())


def _drawing(jobs: Jobs) -> Iterator[str]:
    rows = [
        (
            *(name, answer["precision"], answer["side"], answer["steps"], answer["seconds_per_image"]),
            *(answer["loading_seconds"], _gib(answer.get("allocated")), _gib(answer.get("reserved"))),
        )
        for name, answer in _answers(jobs, "draw-")
    ]
    if rows:
        yield from ("## Drawing", "")
        heads = ("base and way", "format", "px", "steps", "s an image", "s to load", "allocated", "reserved")
        yield from _table(heads, rows)


def _profiles(jobs: Jobs) -> Iterator[str]:
    for name, answer in _answers(jobs, "profile-"):
        yield from (f"## Profile of {name}", "")
        yield (
            f"{answer['ms_per_step']} ms a step, {answer['launches_per_step']} launches, "
            f"the card computes {answer['card_busy']} of the time."
        )
        yield ""
        rows = [(row["name"], row["ms_per_step"], row["calls_per_step"]) for row in answer["top"]]
        yield from _table(("kernel", "ms a step", "calls a step"), rows)
        yield ""


def _others(jobs: Jobs) -> Iterator[str]:
    for name, result in jobs.items():
        answer = result.get("answer")
        if name.startswith("benchmark-") and isinstance(answer, dict):
            peer = str(answer.get("settings", {}).get("peer_script", "")).rpartition("/")[2]
            yield from (f"## {name}{f', the other one is {peer}' if peer else ''}", "")
            yield from (str(answer.get("table", answer)), "")
        elif name.startswith(("resume-", "processes-")) and isinstance(answer, dict):
            figures = ", ".join(f"{key} {value}" for key, value in answer.items() if key != "faults")
            yield from (f"## {name}", "", figures, "")


def _answers(jobs: Jobs, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name without the prefix, answer) of the jobs that gave a whole one."""
    for name, result in jobs.items():
        answer = result.get("answer")
        if name.startswith(prefix) and isinstance(answer, dict) and answer.get("skipped") is None:
            yield name.removeprefix(prefix), answer


def _answer(jobs: Jobs, name: str) -> Mapping[str, Any]:
    answer = jobs.get(name, {}).get("answer")
    return answer if isinstance(answer, dict) else {}


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _table(
    heads: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]
) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
