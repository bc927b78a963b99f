"""The commands for captions: a model writes them, tags are counted and changed, either is undone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, without_controls
from .arguments import path_argument, source_argument

if TYPE_CHECKING:
    from ..data.captioning.caption import Captioned, CaptionSettings
    from ..data.captioning.tags import TagEdit, TagFolder

Result = tuple[dict[str, Any], int]
_SHOWN = 8
_MOST_SHOWN = 20


def declare_caption(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora caption``."""
    parser.add_argument("folder", type=path_argument, help="folder of images")
    parser.add_argument(
        "--model",
        type=source_argument,
        metavar="NAME",
        help="what writes the captions: the folder or hub id of a transformers model (BLIP, BLIP-2, "
        "Florence-2, Qwen-VL, ...; safetensors), or of a tagger (its .onnx file with the list of its tags)",
    )
    words = parser.add_argument_group("captions")
    words.add_argument("--prefix", default="", metavar="TEXT", help="text in front of each")
    words.add_argument("--trigger", metavar="WORD", help="word in front of each that lacks it")
    words.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest caption in CLIP's tokens (75 fill one window)"
    )
    words.add_argument(
        "--keep-first",
        type=int,
        default=0,
        metavar="N",
        help="with --overwrite: the first N comma-separated parts of the old caption stay in front",
    )
    words.add_argument("--overwrite", action="store_true", help="also replace captions that are there")
    texts = parser.add_argument_group("models that write texts")
    texts.add_argument("--prompt", metavar="TEXT", help="what the model is asked; its usual question else")
    texts.add_argument("--new-tokens", type=int, default=128, metavar="N", help="most that it writes (128)")
    texts.add_argument("--beams", type=int, default=1, metavar="N", help="beams of its search (1)")
    texts.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="number format; half on cards when left out"
    )
    tags = parser.add_argument_group("taggers")
    tags.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="P",
        help="least probability: 0.35, or of a category character=0.85, or artist=off; may be repeated",
    )
    tags.add_argument("--blacklist", action="append", default=[], metavar="TAGS", help="tags left out: a,b,c")
    tags.add_argument("--underscores", action="store_true", help="keep underscores instead of spaces")
    tags.add_argument("--order", help="of the tags: confidence (the default), category, name or list")
    tags.add_argument("--tag-list", type=path_argument, metavar="FILE", help="the tagger's CSV of tags")
    tags.add_argument(
        "--pixels", help="what the tagger's input holds, if its files do not say (bgr-255, ...)"
    )
    _declare_work(parser)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the fastest when left out")
    parser.add_argument("--preview", action="store_true", help="only show the captions of 8 images")
    parser.usage = "sdlora caption FOLDER --model NAME [options] | sdlora caption FOLDER --undo"


def declare_tags(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora tags``."""
    parser.add_argument("folder", type=path_argument, help="folder of images with captions")
    parser.add_argument(
        "--replace", nargs=2, action="append", default=[], metavar=("TAG", "BY"), help="put a tag for another"
    )
    parser.add_argument("--remove", action="append", default=[], metavar="TAGS", help="remove tags: a,b,c")
    parser.add_argument("--add", action="append", default=[], metavar="TAGS", help="add tags at the end")
    parser.add_argument("--add-first", action="append", default=[], metavar="TAGS", help="add tags in front")
    parser.add_argument("--once", action="store_true", help="keep only the first of equal tags")
    parser.add_argument(
        "--prune", action="store_true", help="leave out tags that others imply (white shirt: shirt)"
    )
    parser.add_argument(
        "--implications", type=path_argument, metavar="CSV", help="further implications for --prune"
    )
    parser.add_argument("--sort", choices=("name", "frequency"), help="sort the tags")
    parser.add_argument(
        "--keep-first", type=int, default=0, metavar="N", help="tags that --sort and --prune leave in front"
    )
    parser.add_argument("--top", type=int, default=50, metavar="N", help="list the N commonest tags (50)")
    _declare_work(parser)
    parser.usage = "sdlora tags FOLDER [changes] | sdlora tags FOLDER --undo"


def _declare_work(parser: argparse.ArgumentParser) -> None:
    """Declare what both commands have in common."""
    parser.add_argument("--flat", action="store_true", help="leave out subfolders")
    parser.add_argument(
        "--follow-links", action="store_true", help="also take what links lead to outside the folder"
    )
    parser.add_argument("--column", metavar="NAME", help="column of metadata files with the caption")
    parser.add_argument("--yes", action="store_true", help="write without asking")
    parser.add_argument("--undo", action="store_true", help="take back what these commands changed last")


def run_caption(options: argparse.Namespace) -> Result:
    """Run ``sdlora caption``: show eight captions, ask, write all; the exit code is 1 if an image failed."""
    from ..data.captioning.caption import Captioning

    if options.undo:
        return _undo(options)
    if not options.model:
        raise ConfigError("sdlora caption: name the model with --model (a folder, an .onnx file or a hub id)")
    settings = _settings(options)
    with Captioning(options.folder, settings) as work:
        for note in work.notes[:_MOST_SHOWN]:
            _say(f"note: {note}")
        _say(_plan(work))
        sure = options.yes and not options.preview
        shown: list[Captioned] = []
        if work.todo and not sure:
            shown = _previewed(work)
        preview = [asdict(captioned) for captioned in shown]
        wanted = sure or (
            not options.preview and bool(work.todo) and _agreed(f"caption all {len(work.todo)}")
        )
        if not wanted:
            if work.todo:
                _say("nothing was written" + ("" if options.preview else "; --yes writes without asking"))
            return {
                "folder": str(options.folder),
                "written": 0,
                "todo": len(work.todo),
                "preview": preview,
            }, 0
        with _bar("captioning") as progress:
            report = work.run(progress)
    print(f"{options.folder}: {report.written} captions written, {report.kept} kept (--undo takes it back)")
    for problem in list(report.failed.values())[:_MOST_SHOWN]:
        _say(f"not captioned: {problem}")
    if len(report.failed) > _MOST_SHOWN:
        _say(f"and {len(report.failed) - _MOST_SHOWN} more; --json lists all")
    return {**report.to_dict(), "preview": preview}, 1 if report.failed else 0


def run_tags(options: argparse.Namespace) -> Result:
    """Run ``sdlora tags``: list the tags, or show what an edit changes, ask, and write it."""
    from ..data.captioning.tags import TagFolder

    if options.undo:
        return _undo(options)
    edit = _edit(options)
    tags = TagFolder(
        options.folder,
        recursive=not options.flat,
        follow_links=options.follow_links,
        column=options.column,
    )
    for note in tags.notes[:_MOST_SHOWN]:
        _say(f"note: {note}")
    if edit.changes_nothing:
        return _frequencies(tags, options.top)
    changes = tags.changes(edit)
    print(f"{options.folder}: {len(changes)} of {tags.num_captions} captions change")
    for change in changes[:_SHOWN]:
        print(f"  {change.image}\n    - {_line(change.before)}\n    + {_line(change.after)}")
    if len(changes) > _SHOWN:
        print(f"  and {len(changes) - _SHOWN} more")
    result: dict[str, Any] = {
        "folder": str(options.folder),
        "changes": [asdict(change) for change in changes],
        "written": 0,
        "failed": [],
    }
    if not changes or not (options.yes or _agreed(f"change these {len(changes)} captions")):
        if changes:
            _say("nothing was written; --yes writes without asking")
        return result, 0
    failed = tags.apply(changes, "tags: " + " ".join(options.words[1:]))
    for problem in failed[:_MOST_SHOWN]:
        _say(f"not changed: {problem}")
    result |= {"written": len(changes) - len(failed), "failed": failed}
    print(f"{result['written']} captions changed (sdlora tags {options.folder} --undo takes it back)")
    return result, 1 if failed else 0


def _settings(options: argparse.Namespace) -> CaptionSettings:
    from ..data.captioning.caption import CaptionSettings
    from ..data.captioning.onnx_tagger import PIXELS
    from ..data.captioning.tag_lists import ORDERS, TagChoice, thresholds_of
    from ..data.captioning.wording import Wording

    order = options.order or ORDERS[0]
    if order not in ORDERS:
        raise ConfigError(f"--order {order}: choose one of {', '.join(ORDERS)}")
    if options.pixels is not None and options.pixels not in PIXELS:
        raise ConfigError(f"--pixels {options.pixels}: choose one of {', '.join(PIXELS)}")
    if options.keep_first and not options.overwrite:
        raise ConfigError("--keep-first keeps parts of the old caption: it belongs to --overwrite")
    trigger = (options.trigger or "").strip() or None
    return CaptionSettings(
        model=options.model,
        prompt=options.prompt,
        new_tokens=options.new_tokens,
        beams=options.beams,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
        wording=Wording(options.prefix, trigger, options.max_tokens, options.keep_first),
        tags=TagChoice(
            thresholds_of(options.threshold), _tags(options.blacklist), options.underscores, order
        ),
        tag_list=options.tag_list,
        pixels=options.pixels,
        overwrite=options.overwrite,
        recursive=not options.flat,
        follow_links=options.follow_links,
        column=options.column,
    )


def _edit(options: argparse.Namespace) -> TagEdit:
    from ..data.captioning.tags import TagEdit, read_implications

    if options.implications is not None and not options.prune:
        raise ConfigError("--implications belongs to --prune")
    if options.keep_first < 0 or options.top < 1:
        raise ConfigError("--keep-first takes 0 or more, --top 1 or more")
    return TagEdit(
        replace=dict(options.replace),
        remove=_tags(options.remove),
        add=_tags(options.add),
        add_first=_tags(options.add_first),
        once=options.once,
        prune=options.prune,
        implications=read_implications(options.implications) if options.implications else {},
        sort=options.sort,
        keep_first=options.keep_first,
    )


def _tags(words: Sequence[str]) -> tuple[str, ...]:
    from ..data.captioning.wording import tags_of

    return tuple(tag for word in words for tag in tags_of(word))


def _frequencies(tags: TagFolder, top: int) -> Result:
    print(f"{tags.folder}: {len(tags.counts)} tags in {tags.num_captions} captions")
    for tag, count in list(tags.counts.items())[:top]:
        print(f"{count:6}  {without_controls(tag)}")
    if len(tags.counts) > top:
        print(f"        and {len(tags.counts) - top} more (--top N)")
    return {"folder": str(tags.folder), "captions": tags.num_captions, "tags": tags.counts}, 0


def _plan(work: Any) -> str:
    text = f"{len(work.todo)} images to caption, {work.kept} keep their caption"
    if work.empty:
        text += f" ({work.empty} of these an empty one; --overwrite replaces it)"
    if work.continued:
        text += f"; {work.continued} were done before it was interrupted, and are left as they are"
    return text


def _previewed(work: Any) -> list[Captioned]:
    with _bar("preview") as progress:
        shown: list[Captioned] = work.preview(progress=progress)
    for captioned in shown:
        print(f"{without_controls(captioned.image)}: {captioned.caption or captioned.problem}")
        if captioned.before:
            print(f"    instead of: {_line([captioned.before])}")
    return shown


def _undo(options: argparse.Namespace) -> Result:
    from ..data.captioning.restore import undo

    undone = undo(Path(options.folder))
    print(f"{options.folder}: {len(undone.restored)} files are as they were before: {undone.what}")
    for name in undone.kept[:_MOST_SHOWN]:
        _say(f"kept, as it was changed since: {name}")
    return {"folder": str(options.folder), **asdict(undone)}, 0


def _agreed(what: str) -> bool:
    """Ask a person; without a terminal the answer is no."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _line(lines: Sequence[str]) -> str:
    text = without_controls(" | ".join(part for line in lines for part in line.splitlines()))
    return text if len(text) <= 300 else text[:297] + "..."


def _bar(what: str) -> Any:
    from .display import image_bar

    return image_bar(what)


def _say(text: str) -> None:
    print(without_controls(text), file=sys.stderr)
