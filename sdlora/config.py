"""The settings of a run: what exists, what is allowed, and how they are read and written.

One frozen typed tree serves the command line, Python and the UI. The docstring under a field is its
help text everywhere (TOML comment, ``--help``, reference page). ``None`` means "follow the data": such
settings are filled in by :mod:`sdlora.plan`, with a reason that is printed before training starts.
This module imports no torch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from .adapter_config import AdapterConfig as AdapterConfig
from .adapter_config import Targets as Targets
from .adapter_config import adapter_contradictions
from .data_config import DataConfig, data_contradictions
from .errors import ConfigError
from .files import write_text
from .section import Dropout, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]
SamplerName = Literal["DDIM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras"]
PredictionType = Literal["epsilon", "v_prediction"]
AttentionName = Literal["auto", "sdpa", "xformers"]
FamilyName = Literal["sd1", "sd2", "sdxl"]


class ModelConfig(Section):
    """Which base model is adapted."""

    base: str = "mini"
    """The base: `mini` (ships with sdlora), a diffusers folder, a .safetensors file, or a hub id."""
    family: FamilyName | None = None
    """Which family the base is of, where its header contradicts its weights; read from the base when left
    open."""
    prediction_type: PredictionType | None = None
    """What the U-Net predicts; read from the base when left open."""
    zero_terminal_snr: bool | None = None
    """Whether the base's noise schedule ends in pure noise (v-prediction only); read from the base when
    left open."""
    vae: str | None = None
    """Another autoencoder instead of the base's own: a .safetensors file, a folder, or a hub id."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Use the n-th last layer of the CLIP text encoder (1 = the last, as the base was trained); SD1 only."""


class OptimizerConfig(Section):
    """How the adapter's weights follow the gradient."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the U-Net's adapter."""
    text_encoder_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the text encoder's adapter; a fifth of the U-Net's when left open."""
    text_encoder_2_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the second text encoder's adapter; as the first one's when left open."""
    betas: tuple[Dropout, Dropout] = (0.9, 0.99)
    """Decay rates of AdamW's running mean and variance."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    lora_plus_ratio: PositiveFloat = 1.0
    """The up factors (B) learn this many times as fast as the down factors (A); LoRA+ (Hayou et al.
    2024) recommends 16 with a lower learning rate."""
    block_rates: dict[str, PositiveFloat] = Field(default={})
    """Factors on the learning rate of single blocks, e.g. `{"mid_block" = 0.5}`; patterns as in
    `adapter.block_ranks`."""
    warmup_steps: NonNegative | None = None
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients longer than this are shortened to it; 0 switches clipping off."""


class TrainingConfig(Section):
    """Length, batch, precision and objective."""

    steps: Positive | None = None
    """Optimizer steps of the run."""
    epochs: Positive | None = None
    """Passes over the pictures, instead of steps."""
    batch_size: Positive | None = None
    """Pictures per micro-batch and process."""
    gradient_accumulation: Positive = 1
    """Micro-batches per optimizer step."""
    precision: Precision | None = None
    """Number format of the frozen base; the adapter's master weights are always fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes every random choice: a run repeats exactly on the same machine."""
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")] | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`; the fastest one present when left open."""
    attention: AttentionName = "auto"
    """How attention is computed: torch's own (`sdpa`), `xformers`, or the fastest one here (`auto`)."""
    min_snr_gamma: NonNegativeFloat = 5.0
    """Limit of the signal-to-noise weight (Hang et al. 2023); 0 weighs all timesteps alike."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Size of a constant added per channel to the noise, which helps very dark or bright styles."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, far less memory."""
    checkpoint_every: Positive | None = None
    """Steps between resumable checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept."""
    validate_every: Positive | None = None
    """Steps between measurements on the held-out pictures."""


class SampleConfig(Section):
    """Preview images during training."""

    prompts: tuple[str, ...] | None = None
    """What the previews show; taken from the captions when left open, `[]` for no previews."""
    negative_prompt: str = ""
    """What the previews should avoid."""
    every: Positive | None = None
    """Steps between previews; one is always made before the first and after the last step."""
    steps: Positive = 20
    """Denoising steps."""
    guidance: NonNegativeFloat | None = None
    """Guidance scale; the base's recommended one when left open."""
    sampler: SamplerName = "DPM++ 2M Karras"
    """The sampler."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of the first prompt's noise; the next prompts count on."""


class OutputConfig(Section):
    """What is written, and where."""

    folder: Path | None = None
    """The run folder; `runs/NAME` when left open."""
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r'^[^\\/:*?"<>|\x00-\x1f]+$')] = "lora"
    """Name of the adapter and of its file."""
    dtype: Precision = "fp16"
    """Number format of the exported adapter file."""
    description: str = ""
    """Free text stored in the adapter file."""
    license: str = ""
    """Licence of the adapter, stored in the file."""
    private: bool = False
    """Keep folder names, captions, tags, prompts and file names out of the adapter file and its card."""


class Config(Section):
    """Everything one training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sample: SampleConfig = SampleConfig()
    output: OutputConfig = OutputConfig()

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with dotted keys replaced, e.g. ``{"training.steps": 300}`` (validated)."""
        tree = self.model_dump(exclude_unset=True)
        for key, value in values.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        return type(self).model_validate(tree)

    def get(self, key: str) -> Any:
        """Return the value of a dotted key."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting as (dotted key, pydantic field), in the order of declaration."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for name, field in info.annotation.model_fields.items():
            yield f"{section}.{name}", field


def load_config(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read settings from a TOML file, then ``key=value`` texts, then ready values (last one wins).

    Args:
        file: TOML file with the sections of :class:`Config`.
        overrides: texts such as ``training.steps=40``; the value is TOML, or else a plain string.
        values: dotted key to value, as the command line's own flags give them; ``None`` is skipped.

    Raises:
        ConfigError: naming every unknown key, bad value and contradiction at once.
    """
    problems: list[str] = []
    tree = _read_toml(file) if file else {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or key.count(".") != 1:
            hint = _nearest(key)
            problems.append(f"`{text}`: settings are given as section.name=value{hint}")
            continue
        _put(tree, key, _parse_value(value), problems)
    for key, value in (values or {}).items():
        if value is not None:
            _put(tree, key, value, problems)
    config, more = _validate(tree)
    problems += more
    if problems:
        raise ConfigError(_listing(problems, file))
    assert config is not None
    return config


def save_config(config: Config, file: Path) -> None:
    """Write all set values as TOML, each under its help text; unset ones are left out."""
    lines: list[str] = []
    for section in Config.model_fields:
        lines.append(f"[{section}]")
        values = getattr(config, section).model_dump(mode="json", exclude_none=True)
        tables: list[str] = []
        for name, field in type(getattr(config, section)).model_fields.items():
            if name in values:
                help_text = f"# {' '.join((field.description or '').split())}"
                if _is_tables(values[name]):  # tables end the section they stand in, so they come last
                    tables.append(help_text)
                    tables += [f"[[{section}.{name}]]\n{tomli_w.dumps(one).strip()}" for one in values[name]]
                else:
                    lines += [help_text, toml_line(name, values[name])]
        lines += [*tables, ""]
    write_text(file, "\n".join(lines))


def toml_line(name: str, value: Any) -> str:
    """Return one setting as TOML; a table on one line, as a header would start another section."""
    if not isinstance(value, dict):
        return tomli_w.dumps({name: value}).strip()
    inner = ", ".join(tomli_w.dumps({key: one}).strip() for key, one in value.items())
    return f"{name} = {{ {inner} }}" if inner else f"{name} = {{}}"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such settings file; check the path after --config") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error}); give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}; mend that line") from None


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # an unquoted string, as shells leave it: output.name=my-style


def _put(tree: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    section, _, name = key.partition(".")
    group = tree.setdefault(section, {})
    if not isinstance(group, dict):
        problems.append(f"`{section}` is a section, not a value")
        return
    group[name] = value


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Validate; on errors validate the rest again, so that contradictions show in the same report."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()]
        rest = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
        for item in error.errors():
            location = item["loc"]
            if len(location) >= 2 and isinstance(rest.get(str(location[0])), dict):
                rest[str(location[0])].pop(str(location[1]), None)
            else:
                rest.pop(str(location[0]), None)
        with suppress(ValidationError):  # the first report already names what is wrong
            problems += contradictions(Config.model_validate(rest))
        return None, problems
    return config, contradictions(config)


def component_keys(component: str) -> tuple[str, str, str]:
    """Return the keys of rank, alpha and learning rate of one component's adapter."""
    prefix = "" if component == "unet" else f"{component}_"
    return f"adapter.{prefix}rank", f"adapter.{prefix}alpha", f"optimizer.{prefix}learning_rate"


def contradictions(config: Config) -> list[str]:
    """Return what cannot be meant together, or would silently have no effect."""
    found: list[str] = []
    if config.training.steps is not None and config.training.epochs is not None:
        found.append("`training.steps` and `training.epochs` both fix the length: give one of them")
    for component in ("text_encoder", "text_encoder_2"):
        if not config.adapter.adapts(component):
            found += [
                f"`{key}` has no effect without `adapter.{component}=true`"
                for key in component_keys(component)
                if config.get(key) is not None
            ]
    if config.model.zero_terminal_snr and config.model.prediction_type == "epsilon":
        found.append("`model.zero_terminal_snr=true` needs `model.prediction_type=v_prediction`")
    found += adapter_contradictions(config)
    if config.sample.prompts == ():
        for name in ("every", "guidance"):
            if getattr(config.sample, name) is not None:
                found.append(f"`sample.{name}` has no effect with `sample.prompts=[]`")
    if config.data.validation == 0 and config.training.validate_every is not None:
        found.append("`training.validate_every` has no effect with `data.validation=0`")
    found += data_contradictions(config.data)
    if config.adapter.adapts_text and config.data.encode_captions is not None:
        found.append("`data.encode_captions` has no effect with `adapter.text_encoder=true`")
    steps, warmup = config.training.steps, config.optimizer.warmup_steps
    if steps is not None and warmup is not None and warmup >= steps:
        found.append(
            f"`optimizer.warmup_steps={warmup}` must be below `training.steps={steps}`, "
            "or the full learning rate is never reached"
        )
    return found


def _explain(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location[:2])
    if len(location) > 2:  # inside a table of a list: data.sources[1].weight
        key += "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in location[2:])
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"`{key}` is not a setting{_nearest(key)}"
    message = str(item["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    if kind == "literal_error":
        choices = _choices(key)
        close = difflib.get_close_matches(str(given), choices, 1)
        message = "must be one of " + ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else "")
    elif kind == "string_pattern_mismatch" and key == "output.name":
        message = 'must not hold any of \\ / : * ? " < > |'
    return f"`{key}={given}`: {message}"


def _choices(key: str) -> list[str]:
    annotation = dict(fields())[key].annotation
    found = [value for part in (annotation, *get_args(annotation)) for value in get_args(part)]
    return [value for value in found if isinstance(value, str)]


def _nearest(key: str) -> str:
    known = [name for name, _ in fields()]
    if "[" in key:
        return _nearest_in_table(key)
    close = difflib.get_close_matches(key, known, 1, cutoff=0.6)
    if not close:
        wanted = key.rpartition(".")[2]
        by_name = {name.partition(".")[2]: name for name in known}
        close = [by_name[name] for name in difflib.get_close_matches(wanted, list(by_name), 1, cutoff=0.6)]
    return f"; did you mean `{close[0]}`?" if close else "; see `sdlora train --help` for all settings"


def _nearest_in_table(key: str) -> str:
    """Return a hint for a key such as ``data.sources[1].wieght``."""
    table, _, wanted = key.rpartition(".")
    annotation = dict(fields())[table.partition("[")[0]].annotation
    known = list(get_args(annotation)[0].model_fields)
    close = difflib.get_close_matches(wanted, known, 1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; it may have {', '.join(known)}"


def _listing(problems: list[str], file: Path | None) -> str:
    where = f" in {file} and the command line" if file else ""
    if len(problems) == 1:
        return f"settings{where}: {problems[0]}"
    return f"{len(problems)} problems with the settings{where}:\n" + "\n".join(f"  - {p}" for p in problems)
