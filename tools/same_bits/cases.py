"""The cases: command lines that train, draw, export and rework tiny adapters, mostly on the built-in base.

``{here}`` is a case's own folder, ``{work}`` the folder of all cases, so ``{work}/lora/run`` is what the case
``lora`` trained; ``{data}`` holds eight icons, ``{mini}`` a copy of the built-in base, ``{sdxl}`` and
``{sd2}`` narrow bases of the other families.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_OTHER = re.compile(r"\{work\}/([\w+-]+)/")
_TRAINED = "{work}/%s/run/lora.safetensors"
_PROMPT = "inkicon, an icon of a bee"


class Command(NamedTuple):
    """One command line, and how it is run.

    Attributes:
        arguments: the words after ``sdlora``.
        threads: its number of threads, if another than that of the record.
        stopped: whether it is asked to stop after its first step.
    """

    arguments: tuple[str, ...]
    threads: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Case:
    """Commands run one after the other.

    Attributes:
        commands: what is run.
        copies: (from, to) files that are copied before.
        folders: made before.
        same_as: tensors of (file, other file) that must be equal.
    """

    commands: tuple[Command, ...]
    copies: tuple[tuple[str, str], ...] = ()
    folders: tuple[str, ...] = ()
    same_as: tuple[tuple[str, str], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The cases whose files this one reads."""
        texts = [word for command in self.commands for word in command.arguments]
        texts += [text for pair in (*self.copies, *self.same_as) for text in pair]
        return tuple(dict.fromkeys(name for text in texts for name in _OTHER.findall(text)))


def _train(
    *settings: str,
    folder: str = "{data}",
    base: str = "mini",
    threads: int | None = None,
    stopped: bool = False,
) -> Command:
    """Return a run of two steps; given settings replace the usual ones."""
    usual = (
        *("training.device=cpu", "training.precision=fp32", "training.steps=2", "training.batch_size=2"),
        *("training.seed=3", "adapter.rank=2", "data.validation=0", "sample.prompts=[]", "sample.steps=2"),
        "data.cache_folder={cache}",
    )
    words = ("train", folder, "--base", base, "--output", "{here}/run")
    return Command(
        (*words, *(setting for setting in usual if not _set(setting, settings)), *settings), threads, stopped
    )


def _set(setting: str, settings: tuple[str, ...]) -> bool:
    key = setting.partition("=")[0]
    cleared = key == "training.steps" and any(other.startswith("training.epochs=") for other in settings)
    return cleared or any(other.partition("=")[0] == key for other in settings)


def _trained(*settings: str, folder: str = "{data}", base: str = "mini") -> Case:
    return Case((_train(*settings, folder=folder, base=base),))


def _generate(name: str, *words: str, prompt: str = _PROMPT, steps: int = 2, base: str = "mini") -> Command:
    usual = ("--base", base, "--device", "cpu", "--seed", "5", "--steps", str(steps), "--prompt", prompt)
    precision = () if "--precision" in words else ("--precision", "fp32")
    return Command(("generate", *usual, *precision, "--output", "{here}/" + name, *words))


def _do(line: str) -> Command:
    return Command(tuple(line.split()))


def _dos(*lines: str) -> Case:
    return Case(tuple(map(_do, lines)))


def _adapter(case: str, strength: str = "") -> tuple[str, str]:
    return "--adapter", _TRAINED % case + strength


_LORA, _TEXT, _ALL = _TRAINED % "lora", _TRAINED % "text", _TRAINED % "lora-all"
_DORA, _LOHA, _LOKR = _TRAINED % "dora", _TRAINED % "loha", _TRAINED % "lokr"
_KINDS = ("lora", "dora", "loha", "lokr")
_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm": "DPM++ 2M",
    "dpm-karras": "DPM++ 2M Karras",
}
_FORMATS = ("webui", "diffusers", "peft")
_DTYPES = ("fp32", "bf16", "fp16")
_SHARES = ("sample.prompts=['inkicon, an icon of a bee', 'inkicon, an icon of a dog']", "data.validation=2")

_KIND_CASES = {
    **{kind: _trained(f"adapter.kind={kind}", "training.checkpoint_every=1") for kind in _KINDS},
    **{f"{kind}-all": _trained(f"adapter.kind={kind}", "adapter.targets=all") for kind in _KINDS},
    "lora-linear": _trained("adapter.targets=linear", "output.dtype=fp32"),
    "lokr-factor": _trained("adapter.kind=lokr", "adapter.lokr_factor=4", "adapter.alpha=1.0"),
    **{start: _trained(f"adapter.init={start}") for start in ("gaussian", "pissa", "olora")},
    "pissa-all": _trained("adapter.init=pissa", "adapter.targets=all", "training.checkpoint_every=1"),
    "rslora": _trained("adapter.scaling=rslora", "adapter.alpha=3.0", "adapter.rank=4"),
    "block-ranks": _trained(
        'adapter.block_ranks={"down_blocks.0" = 4, "mid_block" = 0, "up_blocks.1.attentions.*" = 3}',
        'optimizer.block_rates={"down_blocks.0" = 0.5}',
    ),
    "dropout": _trained("adapter.dropout=0.3"),
}
_TEXT_CASES = {
    "text": _trained("adapter.text_encoder=true", "training.checkpoint_every=1", "data.trigger_word=inkicon"),
    "text-rates": _trained(
        *("adapter.text_encoder=true", "adapter.text_encoder_rank=3", "adapter.text_encoder_alpha=1.5"),
        *("optimizer.learning_rate=1e-3", "optimizer.text_encoder_learning_rate=1e-4", "model.clip_skip=2"),
    ),
    "text-dora": _trained("adapter.kind=dora", "adapter.text_encoder=true", "adapter.targets=all"),
    "text-lokr": _trained("adapter.kind=lokr", "adapter.text_encoder=true", "output.dtype=bf16"),
    "captions-in-loop": _trained(
        *("data.shuffle_tags=true", "data.keep_tags=1", "data.tag_dropout=0.3", "data.wildcards=true"),
        *("data.encode_captions=in loop", "data.caption_dropout=0.2", "data.emphasis=true"),
        folder="{worded}",
    ),
    "captions-before": _trained(
        *("data.shuffle_tags=true", "data.tag_dropout=0.3", "data.encode_captions=before"),
        *("data.caption_lines=one", "data.caption_prefix=old, ", "data.caption_suffix=, fine"),
        folder="{worded}",
    ),
}
_OPTIMIZER_CASES = {
    "lora-plus": _trained("optimizer.lora_plus_ratio=16.0", "training.checkpoint_every=1"),
    "linear-warmup": _trained(
        *("optimizer.schedule=linear", "optimizer.warmup_steps=2", "training.steps=5"),
        *("optimizer.weight_decay=0.1", "optimizer.betas=[0.8, 0.95]", "optimizer.epsilon=1e-6"),
    ),
    "cosine-warmup": _trained("optimizer.warmup_steps=1", "training.steps=5", "data.repeats=2"),
    "constant": _trained(
        *("optimizer.schedule=constant", "optimizer.max_grad_norm=0", "training.min_snr_gamma=0"),
        *("training.noise_offset=0.1", "training.epochs=1", "training.batch_size=3", "data.top_up=true"),
    ),
    "checkpointing-accumulation": _trained(
        "training.gradient_checkpointing=true", "training.gradient_accumulation=2", "training.batch_size=3"
    ),
    "bf16": _trained("training.precision=bf16", "output.dtype=bf16"),
    "fp16": _trained("training.precision=fp16"),
    "two-threads": Case((_train("training.batch_size=4", threads=2),)),
}
_DATA_CASES = {
    "prior-empty": _trained("data.prior_preservation=0.5"),
    "prior-regularisation": _trained(
        "data.prior_preservation=0.5",
        'data.sources=[{folder = "{other}", regularisation = true, weight = 0.5}]',
        "data.trigger_word=inkicon",
    ),
    "sources": _trained(
        'data.sources=[{folder = "{other}", repeats = 2, trigger_word = "old", weight = 1.5}]',
        *("data.flip=true", "output.private=true", "output.description=what it is"),
    ),
    "masks": _trained("data.mask_folder={masks}", "data.unmasked_weight=0.2"),
    "alpha-mask": _trained("data.alpha_mask=true", "data.background=#204060", folder="{mixed}"),
    "crop-in-loop": _trained(
        *("data.crop=random", "data.variants=0", "data.colour_jitter=0.2", "data.flip=true"), folder="{mixed}"
    ),
    "crop-before": _trained(
        *("data.crop=random", "data.variants=2", "data.colour_jitter=0.2", "data.flip=true"), folder="{mixed}"
    ),
    "buckets": _trained(
        "data.more_resolutions=[96]", "training.epochs=1", "training.batch_size=4", folder="{mixed}"
    ),
    "squares": _trained("data.buckets=false", "data.upscale=false", "data.resolution=96", folder="{mixed}"),
    "cached": _trained("data.cache_folder={here}/cache", "data.flip=true"),
}
_RUN_CASES = {
    **{
        f"previews-{name}": _trained(
            *_SHARES,
            f"sample.sampler={sampler}",
            "sample.every=1",
            "training.validate_every=1",
            "sample.steps=3",
        )
        for name, sampler in _SAMPLERS.items()
    },
    "previews-text": _trained(
        *(*_SHARES, "adapter.text_encoder=true", "sample.negative_prompt=ugly", "sample.guidance=2.5"),
        *("sample.seed=9", "data.validation=0.25", "data.crop=random", "data.variants=0"),
    ),
    "uninterrupted": _trained("training.steps=4", "training.checkpoint_every=2", *_SHARES),
    "resumed": Case(
        (
            _train("training.steps=4", "training.checkpoint_every=2", *_SHARES, stopped=True),
            _do("train --resume --output {here}/run"),
        ),
        same_as=(
            ("{here}/run/lora.safetensors", _TRAINED % "uninterrupted"),
            (
                "{here}/run/checkpoints/step-000004/optimizer.safetensors",
                "{work}/uninterrupted/run/checkpoints/step-000004/optimizer.safetensors",
            ),
        ),
    ),
    "resumed-pissa": Case(
        (
            _train("adapter.init=pissa", "adapter.targets=all", stopped=True),
            _do("train --resume --output {here}/run"),
        ),
        same_as=(("{here}/run/lora.safetensors", _TRAINED % "pissa-all"),),
    ),
    "resumed-text": Case(
        (
            _train("adapter.text_encoder=true", "data.trigger_word=inkicon", stopped=True),
            _do("train --resume --output {here}/run"),
        ),
        same_as=(("{here}/run/lora.safetensors", _TRAINED % "text"),),
    ),
    **{
        f"warm-{kind}": _trained(f"adapter.kind={kind}", f"adapter.from_file={_TRAINED % kind}")
        for kind in ("dora", "loha", "lokr")
    },
    "warm-lora-all": _trained(f"adapter.from_file={_ALL}"),
    "warm-text": _trained(f"adapter.from_file={_TEXT}", "adapter.text_encoder=true"),
    "warm-tucker": _trained("adapter.from_file={tucker}"),
}
_DRAWING_CASES = {
    "draw-base": Case((_generate("plain"), _generate("sized", "--size", "96x64", "--clip-skip", "2"))),
    "draw-strengths": Case(
        (
            _generate("sweep", *_adapter("lora"), "--strengths", "0,0.7,1"),
            *(_generate(f"at-{at}", *_adapter("lora-all", f":{at}")) for at in ("0", "0.7", "1")),
        )
    ),
    "draw-two": Case(
        (
            _generate(
                "two", *_adapter("text", ":0.7:0.3"), *_adapter("dora", ":0.5"), "--negative", "ugly, grey"
            ),
            _generate("folded", *_adapter("text", ":0.7:0.3"), *_adapter("loha", ":-0.5"), "--merge"),
        )
    ),
    "draw-kinds": Case(
        (
            *(_generate(kind, *_adapter(f"{kind}-all", ":0.8")) for kind in ("dora", "loha", "lokr")),
            _generate("tucker", "--adapter", "{tucker}:0.8"),
        )
    ),
    "draw-samplers": Case(
        tuple(
            _generate(name, "--sampler", sampler, *_adapter("lora", ":1"), steps=4)
            for name, sampler in _SAMPLERS.items()
        )
    ),
    "draw-more": Case(
        (
            _generate(
                "count", "--count", "2", "--prompt", "a dog", "--guidance", "1", *_adapter("pissa", ":1")
            ),
            _generate("weighed", "--guidance", "6.5", prompt="an icon of a (bee:1.4), [grey]"),
            _generate("bf16", "--precision", "bf16", *_adapter("lora", ":1")),
            _generate("offload", "--offload", *_adapter("text", ":1")),
        )
    ),
}
_EXPORT_CASES = {
    **{
        f"export-{format}": _dos(
            *(
                f"export {{work}}/text/run --format {format} --dtype {dtype} --output {{here}}/{dtype}"
                for dtype in _DTYPES
            ),
            *(
                f"export {_TRAINED % case} --format {format} --output {{here}}/{case}"
                for case in ("dora", "loha-all", "lokr-all", "text-dora", "pissa")
            ),
            f"export {{tucker}} --format {format} --output {{here}}/tucker",
        )
        for format in _FORMATS
    },
    "export-more": Case(
        (
            _do("export {work}/previews-ddim/run --output {here}/private --private --name mine"),
            _do(
                "export {work}/previews-ddim/run --webui {here}/models/Lora --verify-images --prompt bee "
                "--no-verify"
            ),
        ),
        folders=("{here}/models/Lora",),
    ),
}
_SURGERY_CASES = {
    "merge": _dos(
        f"merge {_LORA}:0.6 {_ALL}:0.5 {_TEXT}:0.7:0.2 --output {{here}}/linear.safetensors --report",
        f"merge {_LORA} {_TEXT}:-0.4 --method ties --density 0.5 --rank 4 --dtype fp32 "
        "--output {here}/ties.safetensors",
        f"merge {_LORA} {_TEXT} --method dare --density 0.5 --seed 7 --energy 0.9 "
        "--output {here}/dare.safetensors",
        f"merge {_LORA} {_ALL} --method dare-ties --density 0.5 --rank 3 "
        "--output {here}/dare-ties.safetensors",
        f"merge {_LORA} {_ALL} --block IN01=0.5,MID=0 --energy 0.9 --output {{here}}/blocks --format peft",
    ),
    "merge-kinds": _dos(
        f"merge {_LOHA} {_LOKR} --output {{here}}/both.safetensors --rank 4",
        f"merge {_DORA} {_LORA} --output {{here}}/dora.safetensors",
        f"merge {_LOHA}:0.5 {_LOHA} --output {{here}}/loha.safetensors --format diffusers",
    ),
    "resize": _dos(
        f"resize {_ALL} --rank 1 --output {{here}}/rank.safetensors --report",
        f"resize {_TEXT} --energy 0.8 --output {{here}}/energy.safetensors --format diffusers",
        f"resize {_TRAINED % 'pissa'} --error 0.3 --output {{here}}/error.safetensors --dtype bf16",
        f"resize {_DORA} --rank 1 --output {{here}}/dora.safetensors",
        f"resize {_LOHA} --rank 1 --output {{here}}/loha.safetensors",
    ),
    **{
        f"convert-{format}": _dos(
            *(
                f"convert {_TRAINED % case} --format {format} --output {{here}}/{case}"
                + ("" if format == "peft" else ".safetensors")
                for case in ("text", "lora-all", "dora-all", "loha-all", "lokr-all", "rslora")
            )
        )
        for format in _FORMATS
    },
    "convert-back": _dos(
        "convert {work}/export-peft/fp32/lora-peft --output {here}/peft.safetensors",
        "convert {work}/convert-peft/loha-all --output {here}/loha.safetensors",
        "convert {work}/convert-diffusers/text.safetensors --output {here}/diffusers.safetensors",
        "convert {work}/convert-peft/lokr-all --output {here}/lokr.safetensors",
    ),
    "to-lora": _dos(
        f"convert {_TRAINED % 'loha-all'} --to-lora --output {{here}}/loha.safetensors --report",
        f"convert {_TRAINED % 'lokr-all'} --to-lora --output {{here}}/lokr.safetensors --rank 3",
        "convert {tucker} --to-lora --output {here}/tucker.safetensors",
        f"convert {_TRAINED % 'text-dora'} --to-lora --base {{mini}} --rank 4 "
        "--output {here}/dora.safetensors",
        f"convert {_DORA} --to-lora --output {{here}}/baseless.safetensors",
    ),
    "bake": _dos(
        f"bake {{mini}} --adapter {_ALL}:0.7 --adapter {_TEXT}:0.5:0.9 --output {{here}}/two --report",
        f"bake {{here}}/two --adapter {_ALL}:0.7 --inverse --output {{here}}/back",
        f"bake {{mini}} --adapter {_TRAINED % 'dora-all'} --block MID=0.5 --output {{here}}/dora",
    ),
    "extract": _dos(
        "extract {mini} {work}/bake/two --rank 4 --output {here}/all.safetensors --report",
        "extract {mini} {work}/bake/two --energy 0.9 --targets attention --no-text-encoders "
        "--output {here}/attention --format peft --dtype fp32",
    ),
}
_FAMILY_SETTINGS = (
    *("data.resolution=64", "adapter.text_encoder=true", "training.checkpoint_every=1", *_SHARES),
    "training.validate_every=1",
)
_SDXL, _SD2, _SDXL_DORA = _TRAINED % "sdxl", _TRAINED % "sd2", _TRAINED % "sdxl-dora"
_FAMILY_CASES = {
    "sdxl": _trained(
        *(*_FAMILY_SETTINGS, "adapter.text_encoder_2_rank=3", "optimizer.text_encoder_2_learning_rate=1e-5"),
        base="{sdxl}",
        folder="{mixed}",
    ),
    "sdxl-dora": _trained(
        "data.resolution=64", "adapter.kind=dora", "adapter.targets=all", base="{sdxl}", folder="{mixed}"
    ),
    "sdxl-second-only": _trained(
        *("data.resolution=64", "adapter.text_encoder_2=true", "training.precision=bf16"), base="{sdxl}"
    ),
    "sd2": _trained(*_FAMILY_SETTINGS, base="{sd2}", folder="{mixed}"),
    "sd2-lokr": _trained(
        *("data.resolution=64", "adapter.kind=lokr", "adapter.targets=all", "model.zero_terminal_snr=true"),
        base="{sd2}",
    ),
    "warm-sdxl": _trained(
        *("data.resolution=64", f"adapter.from_file={_SDXL}", "adapter.text_encoder=true"), base="{sdxl}"
    ),
    "draw-families": Case(
        (
            _generate("sdxl", *_adapter("sdxl", ":0.8:0.4"), "--size", "64x64", base="{sdxl}"),
            _generate("sdxl-dora", *_adapter("sdxl-dora", ":1"), "--size", "96x64", base="{sdxl}"),
            _generate("sd2", *_adapter("sd2", ":0.8"), "--size", "64x64", base="{sd2}"),
            *(
                _generate(name, "--sampler", sampler, "--size", "64x64", "--zero-terminal-snr", base="{sd2}")
                for name, sampler in _SAMPLERS.items()
            ),
        )
    ),
    **{
        f"export-families-{format}": _dos(
            *(
                f"export {_TRAINED % case} --format {format} --output {{here}}/{case}"
                for case in ("sdxl", "sdxl-dora", "sd2", "sd2-lokr")
            )
        )
        for format in _FORMATS
    },
    "rework-families": _dos(
        f"bake {{sdxl}} --adapter {_SDXL}:0.7:0.5 --output {{here}}/sdxl",
        f"bake {{sd2}} --adapter {_SD2} --output {{here}}/sd2",
        "extract {sdxl} {here}/sdxl --rank 3 --output {here}/extracted.safetensors",
        f"merge {_SDXL} {_SDXL}:-0.5 --block IN04=0.5 --output {{here}}/sum.safetensors",
        f"resize {_SD2} --rank 1 --output {{here}}/small.safetensors",
        f"convert {_SDXL_DORA} --to-lora --base {{sdxl}} --rank 2 --output {{here}}/dora.safetensors",
        "convert {work}/export-families-diffusers/sdxl/lora-diffusers.safetensors "
        "--output {here}/back.safetensors",
        f"diff {_SDXL} {_TRAINED % 'warm-sdxl'}",
        f"diff {_SDXL} {_SD2}",
        f"inspect {_SDXL}",
        f"inspect {_TRAINED % 'sd2-lokr'}",
        "inspect {sdxl}",
        "inspect {sd2}",
    ),
}
_LOOKING_CASES = {
    "diff": _dos(
        f"diff {_LORA} {_ALL} --report --picture {{here}}/map.png",
        f"diff {_LOHA} {_LOKR}",
        f"diff {_TEXT} {_TRAINED % 'text-dora'}",
    ),
    "inspect": _dos(
        *(f"inspect {_TRAINED % case}" for case in ("text", "dora-all", "loha-all", "lokr-all", "rslora")),
        "inspect {tucker}",
        f"inspect {_ALL} --chart {{here}}/norms.png",
        f"inspect {_LORA} --header",
        "inspect {work}/export-peft/fp32/lora-peft",
        "inspect mini",
        "inspect {mini}",
    ),
    "inspect-edit": Case(
        (
            _do(
                "inspect {here}/edited.safetensors --set modelspec.license=CC-BY-4.0 "
                "--remove modelspec.thumbnail"
            ),
        ),
        copies=((_TRAINED % "previews-ddim", "{here}/edited.safetensors"),),
    ),
    "check": _dos(
        "check {data} --html {here}/page.html --batch-size 2",
        "check {mixed} --base mini --trigger inkicon",
        "check {data} --base mini data.mask_folder={masks} data.validation=2 data.shuffle_tags=true",
        "check {worded} --resolution 128 --multiple 32 --flat",
        "check {mixed} --fix --output {here}/mended",
    ),
    "cache": _dos("cache --folder {work}/cached/cache"),
    "refusals": _dos(
        "train {data} --output {here}/run adapter.kind=loha adapter.dropout=0.5 optimizer.schedul=linear",
        "train {here}/nothing --output {here}/run",
        f"train {{data}} --output {{here}}/run adapter.from_file={_LOHA}",
        f"train {{data}} --output {{here}}/run adapter.from_file={_TEXT}",
        "generate --prompt bee --output {here}/images --sampler Eulr",
        f"inspect {_LORA}x",
        "merg",
        "export {work}/lora/run",
    ),
}

CASES: dict[str, Case] = {
    **_KIND_CASES,
    **_TEXT_CASES,
    **_OPTIMIZER_CASES,
    **_DATA_CASES,
    **_RUN_CASES,
    **_DRAWING_CASES,
    **_EXPORT_CASES,
    **_SURGERY_CASES,
    **_FAMILY_CASES,
    **_LOOKING_CASES,
}


def with_needs(names: list[str]) -> list[str]:
    """Return cases and all they read from, each after what it needs.

    Raises:
        KeyError: for a name that is not a case.
    """
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        for other in CASES[name].needs:
            add(other)
        ordered[name] = None

    for name in names:
        add(name)
    return list(ordered)
