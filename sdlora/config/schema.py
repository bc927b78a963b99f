"""The settings of a run: what exists, what is allowed, and how they are read and written.

One frozen typed tree serves the command line, Python and the UI. The docstring under a field is its
help text everywhere (TOML comment, ``--help``, reference page). ``None`` means "follow the data": such
settings are filled in by :mod:`sdlora.config.defaults`, with a reason that is shown before training starts.
:mod:`sdlora.config.toml` reads and writes the tree; what contradicts itself in it is found by
:mod:`sdlora.config.contradictions`. This package imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from ..number_formats import Precision as Precision
from .adapter import AdapterConfig as AdapterConfig
from .adapter import Targets as Targets
from .data import DataConfig
from .judge import JudgeConfig
from .prompt_lines import PromptLine, read_line
from .section import (
    Dropout,
    FileName,
    GivenPath,
    ModelSource,
    NamesFiles,
    NonNegative,
    NonNegativeFloat,
    OnlyFor,
    Positive,
    PositiveFloat,
    Section,
)

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "adamw_schedulefree", "came"]
Schedule = Literal[
    "cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "rex", "inverse_sqrt"
]
_SWITCHES: Mapping[str, Recompute] = {"true": "blocks", "false": "nothing"}
USUAL_SCHEDULE: Schedule = "cosine"
"""The schedule if the user gives none and the optimizer needs no other."""
AverageOfWeights = Literal["none", "ema", "tail"]
AverageViews = Literal["both", "average"]
ExportedWeights = Literal["better", "average", "learned"]
Recompute = Literal["nothing", "norms", "gates", "projections", "blocks"]
Loss = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
LossWeighting = Literal["min_snr", "soft_min_snr", "debiased"]
TimestepDistribution = Literal["uniform", "logit_normal", "low_noise", "high_noise"]
TrackerName = Literal["tensorboard", "wandb"]
WandbMode = Literal["offline", "online"]
SamplerName = Literal[
    "DDIM",
    "Euler",
    "Euler a",
    "DPM++ 2M",
    "DPM++ 2M Karras",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Karras",
    "DPM++ SDE Karras",
    "UniPC",
    "LCM",
    "Heun",
    "Euler trailing",
]
PredictionType = Literal["epsilon", "v_prediction"]
AttentionName = Literal["auto", "sdpa", "xformers"]
BaseFormat = Literal["full", "fp8", "nf4"]
Quantisation = Literal["fp8", "nf4"]
AutoencoderWay = Literal["whole", "banded"]


class ModelConfig(Section):
    """Which base model is adapted."""

    base: ModelSource = "mini"
    """The base: `mini` (ships with sdlora), a diffusers folder, a .safetensors file, or a hub id."""
    family: str | None = None
    """Family of the base (e.g. `sd1`), for a file whose header contradicts its weights; read from the base
    when left open."""
    prediction_type: PredictionType | None = None
    """What the U-Net predicts; read from the base when left open."""
    zero_terminal_snr: bool | None = None
    """Whether the base's noise schedule ends in pure noise (v-prediction only); read from the base when
    left open."""
    vae: ModelSource | None = None
    """Another autoencoder instead of the base's own: a .safetensors file, a folder, or a hub id."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Use the n-th last layer of the CLIP text encoder (1 = the last, as the base was trained); SD1 only."""


_ADAMS = ("adamw", "adamw8bit", "adamw_schedulefree")


class OptimizerConfig(Section):
    """How the adapter's weights follow the gradient."""

    name: OptimizerName = "adamw"
    """What makes steps of gradients: `adamw`, the usual one; `adamw8bit` in a quarter of its memory;
    `adafactor` in next to none; `lion`, half its memory at a third of the rate; `prodigy`, which finds the
    rate itself, one for all components; `adamw_schedulefree`, which needs no schedule, so that a run can end
    at any step; `came`, in half its memory, for large batches."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the U-Net's adapter; for `prodigy` a factor on what it finds, usually 1."""
    text_encoder_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the text encoder's adapter; a fifth of the U-Net's when left open."""
    text_encoder_2_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the second text encoder's adapter; as the first one's when left open."""
    betas: Annotated[tuple[Dropout, Dropout], OnlyFor((*_ADAMS, "lion"))] = (0.9, 0.99)
    """Decay rates of AdamW's running mean and variance, or of Lion's two means."""
    epsilon: Annotated[PositiveFloat, OnlyFor(_ADAMS)] = 1e-8
    """AdamW's guard against division by zero."""
    d_coef: Annotated[PositiveFloat, OnlyFor(("prodigy",))] = 1.0
    """Factor on Prodigy's estimate of the rate: 2 if it learns too little, 0.5 if too much."""
    d0: Annotated[PositiveFloat | None, OnlyFor(("prodigy",))] = None
    """Rate from which Prodigy looks for a higher one; a tenth of AdamW's when left open."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    schedule: Schedule | None = None
    """How the learning rate falls after the warm-up: in half a `cosine` (when left open), a straight line
    (`linear`) or not at all (`constant`); `cosine_with_restarts` jumps up again, `polynomial` falls with
    `schedule_power`, `rex` (Chen et al. 2021) stays high longest and suits short runs, `inverse_sqrt` never
    ends (for runs whose length is not known)."""
    schedule_cycles: Annotated[Positive, OnlyFor(("cosine_with_restarts",), "schedule")] = 1
    """Number of cosines of equal length in `cosine_with_restarts`."""
    schedule_power: Annotated[PositiveFloat, OnlyFor(("polynomial",), "schedule")] = 1.0
    """Exponent of `polynomial`: 1 is a straight line, 2 falls early, 0.5 late."""
    schedule_floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the peak rate that the schedule falls to instead of to zero, e.g. 0.1 for a run that may be
    continued later."""
    lora_plus_ratio: PositiveFloat = 1.0
    """The up factors (B) learn this many times as fast as the down factors (A). LoRA+ (Hayou et al.
    2024) recommends 16 with a lower learning rate."""
    block_rates: dict[str, PositiveFloat] = Field(default={})
    """Factors on the learning rate of single blocks, e.g. `{"mid_block" = 0.5}`; patterns as in
    `adapter.block_ranks`."""
    warmup_steps: NonNegative | None = None
    """Steps over which the learning rate rises from zero."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the run's steps over which the learning rate rises, instead of `warmup_steps`."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients longer than this are shortened to it; 0 switches clipping off."""

    max_update_norm: PositiveFloat | None = None
    """Longest that the update of a layer may become (Frobenius norm; kohya's `scale_weight_norms`): it is
    scaled back after each step, against single layers that burn. 1 is usual; no limit when left open."""
    text_encoder_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which text encoders learn no more; 0.3 to 0.5 guards words against being
    forgotten."""

    def warmup(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of ``steps``; the settings must be final."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_share is not None, "settings must be final"
        return round(self.warmup_share * steps)


class TrainingConfig(Section):
    """Length, batch, precision and objective."""

    steps: Positive | None = None
    """Optimizer steps of the run."""
    epochs: Positive | None = None
    """Passes over the images, instead of steps."""
    batch_size: Positive | None = None
    """Images per micro-batch and process."""
    gradient_accumulation: Positive = 1
    """Micro-batches per optimizer step."""
    precision: Precision | None = None
    """Number format of the frozen base; the adapter's master weights are always fp32."""
    base_format: BaseFormat | None = None
    """How the frozen U-Net is kept while training: in `training.precision` (`full`), or in half or a quarter
    of the memory, to be computed with in `training.precision` all the same: in 8 bits (`fp8`) or 4 (`nf4`).
    What is learned fits the rounded base, the more so the coarser it is; the adapter file is as ever."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes every random choice: a run repeats exactly on the same machine."""
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")] | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`; the fastest one present when left open."""
    attention: AttentionName = "auto"
    """How attention is computed: torch's own (`sdpa`), `xformers`, or the fastest one here (`auto`)."""
    loss: Loss = "l2"
    """How an error counts: squared (`l2`), or less where it is large, so that odd images pull less (`huber`,
    `smooth_l1`; Khrapov et al. 2024)."""
    huber_c: Annotated[PositiveFloat, OnlyFor(("huber", "smooth_l1"), "loss")] = 0.1
    """Size of the errors that count as large, at the noisiest timestep; smaller is more robust."""
    huber_schedule: Annotated[HuberSchedule, OnlyFor(("huber", "smooth_l1"), "loss")] = "snr"
    """Where that size goes from 1, for little noise, to `huber_c`: with the signal-to-noise ratio (`snr`),
    with the timestep (`exponential`), or it is `constant`."""
    loss_weighting: LossWeighting = "min_snr"
    """How timesteps count: `min_snr` (Hang et al. 2023), the same without a corner (`soft_min_snr`; Crowson
    et al. 2024), or `debiased` (Yu et al. 2023), which stresses much noise, so shapes and colours."""
    min_snr_gamma: Annotated[NonNegativeFloat, OnlyFor(("min_snr", "soft_min_snr"), "loss_weighting")] = 5.0
    """Limit of the signal-to-noise weight (Hang et al. 2023); 0 weighs all timesteps alike."""
    timestep_distribution: TimestepDistribution = "uniform"
    """Which timesteps are trained most: all alike (`uniform`), those in the middle (`logit_normal`; Esser et
    al. 2024), with much noise (`high_noise`, for composition), or with little (`low_noise`, for texture)."""
    min_timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Least noise that is trained on, in thousandths of the base's timesteps."""
    max_timestep: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Where the trained timesteps end, in thousandths; 1000 is all of them."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Size of a constant added per channel to the noise, which helps very dark or bright styles."""
    multires_noise_iterations: Annotated[int, Field(ge=0, le=10)] = 0
    """Levels of coarser noise added to the noise (Whitaker 2023), for dark, bright and large-scale styles;
    6 is usual, 0 adds none."""
    multires_noise_discount: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of each coarser level in the level before it; 0.1 is little, 0.8 much."""
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of further noise in the denoiser's input alone (Ning et al. 2023), against the errors that add
    up in drawing; 0.1 is usual."""
    average: AverageOfWeights = "none"
    """Whether an average of the adapter over the steps is kept, which is often calmer than where the steps
    end: one that forgets (`ema`), or that of the last steps, all alike (`tail`)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1), OnlyFor(("ema",), "average")] = 0.99
    """Share of the `ema` average that stays at each step; 0.99 looks back over about 100 steps. The first
    steps count more, as (1 + step) / (10 + step) is smaller then."""
    average_share: Annotated[float, Field(gt=0, le=1), OnlyFor(("tail",), "average")] = 0.25
    """Last share of the run that the `tail` average goes over; before it, the weights are as learned."""
    average_views: Annotated[AverageViews, OnlyFor(("ema", "tail"), "average")] = "both"
    """Whether validation and previews show the weights as learned, too (`both`), or the `average` alone."""
    export_weights: Annotated[ExportedWeights, OnlyFor(("ema", "tail"), "average")] = "better"
    """Which weights go into the adapter file: the `average`, those as `learned`, or the `better` ones: the
    average unless judging finds the others surely better. Checkpoints hold the average but for `learned`."""
    memory: Annotated[str, Field(pattern=r"^(auto|max|\d+(\.\d+)? ?([GM]i?B?))$")] = "auto"
    """How much memory the run may take on its card: what is free there (`auto`), a size (`8GB`), or any
    (`max`). Where it would take more, settings that were left open are decided so that it fits, those first
    that add the least work. On a CPU `auto` decides nothing."""
    recompute: Recompute | None = None
    """What a step computes again for the backward pass instead of keeping it, which takes less memory, and
    the more work the later in this list: `nothing`; outputs of `norms` and SiLU; also those of `gates` (GELU
    and its product) and of attentions to the text; also those of `projections` (q, k, v, the gates' inputs,
    the sums between attentions); whole `blocks`, of which only the input is kept. The numbers stay the same,
    bit for bit. At every rung but `nothing` a text encoder that learns is computed layer by layer again, and
    a CPU takes a batch whole."""
    recompute_blocks: NonNegative | None = None
    """How many of the denoiser's blocks are at the rung that `training.recompute` names, those first that
    save the most memory for the work; the others are one rung below. All of them when left open."""
    autoencoder: AutoencoderWay | None = None
    """How images are encoded and decoded: `whole`, or from 256 px up in bands of rows with the rest in main
    memory (`banded`), which is slower and takes 0.2 GiB at any size; the result differs by rounding only.
    With `banded`, previews are drawn one at a time, too."""
    offload_blocks: NonNegative | None = None
    """How many of the denoiser's blocks have their frozen weights in main memory, from where they come to the
    card just before they are used, forward and backward: the largest ones. The numbers stay the same."""
    fast: Annotated[str, Field(pattern=r"^(auto|off|[a-z]+(, *[a-z]+)*)$")] = "auto"
    """Faster ways to compute a step, each used only if it agrees with the reference on the run's first batch:
    all that are possible (`auto`), none (`off`), or some by name: `blocks`, `lora`, `joint`,
    `kernels`."""
    checkpoint_every: Positive | None = None
    """Steps between resumable checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept."""
    validate_every: Positive | None = None
    """Steps between measurements on the held-out images."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_name(cls, values: Any) -> Any:
        """Take `gradient_checkpointing` of earlier versions: `true` meant whole blocks, `false` nothing."""
        if not isinstance(values, Mapping) or "gradient_checkpointing" not in values:
            return values
        rest = {name: value for name, value in values.items() if name != "gradient_checkpointing"}
        old = _SWITCHES.get(str(values["gradient_checkpointing"]).lower())
        if old is None:
            raise ValueError("`gradient_checkpointing` is the old name of `recompute`, and true or false")
        if (rest.get("recompute") or old) != old:
            raise ValueError(
                f"`gradient_checkpointing` is the old name of `recompute={old}`, but `recompute` is "
                f"{rest['recompute']}: leave the old one out"
            )
        return {**rest, "recompute": old}

    @property
    def rung(self) -> Recompute:
        """What is computed again; nothing, if that was left open."""
        return self.recompute or "nothing"


class SampleConfig(Section):
    """Preview images during training."""

    prompts: tuple[str, ...] | None = None
    """What the previews show; taken from the captions when left open, `[]` for no previews. `<lora:NAME:0.8>`
    in one adds another adapter, or this one (by `output.name`) at another strength."""
    prompt_file: GivenPath | None = None
    """A file of prompts instead, one a line, with kohya's options: `a cat --n blurry --w 512 --s 30`."""
    prompt_options: bool | None = None
    """Whether `sample.prompts` have these options, too: `--w --h --d` (seed) `--am` (strength) `--n --l --s
    --ss`."""
    adapter_folder: GivenPath | None = None
    """Where `<lora:NAME:0.8>` in prompts is looked for, before the folder that holds the run folder: a folder
    of runs, a WebUI's, any folder of adapters."""
    negative_prompt: str = ""
    """What the previews should avoid."""
    every: Positive | None = None
    """Steps between previews; one always shows where the run starts, and one where it ends."""
    steps: Positive = 20
    """Denoising steps."""
    guidance: NonNegativeFloat | None = None
    """Guidance scale; the base's recommended one when left open."""
    sampler: SamplerName = "DPM++ 2M Karras"
    """The sampler."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of the first prompt's noise; the next prompts count on."""

    @property
    def lines(self) -> list[PromptLine]:
        """The prompts with their options.

        Raises:
            ConfigError: for an option that says nothing clear.
        """
        given = self.prompts or ()
        return [read_line(text) if self.prompt_options else PromptLine(text) for text in given]


class OutputConfig(Section):
    """What is written, and where."""

    folder: GivenPath | None = None
    """The run folder; `runs/NAME` when left open."""
    name: Annotated[FileName, Field(max_length=100)] = "lora"
    """Name of the adapter and of its file."""
    dtype: Precision = "fp16"
    """Number format of the exported adapter file."""
    description: str = ""
    """Free text stored in the adapter file."""
    license: str = ""
    """Licence of the adapter, stored in the file."""
    trackers: tuple[TrackerName, ...] = ()
    """Programs that follow the run, as `["tensorboard"]`: TensorBoard (`tensorboard --logdir RUN/trackers`),
    Weights & Biases (`wandb`); losses, rates, gradient norm, validation, previews, memory and speed."""
    tracker_project: Annotated[str, Field(min_length=1, max_length=100)] = "sdlora"
    """Project that W&B files the run under."""
    wandb_mode: WandbMode = "offline"
    """Whether W&B keeps the run in its folder (`offline`; `wandb sync` sends it later) or sends it while
    training (`online`, after `wandb login`)."""
    presets: tuple[str, ...] = ()
    """Presets that settings were taken from (`sdlora train --preset NAME`): only a note."""
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
    judge: JudgeConfig = JudgeConfig()
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

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in optimizer steps, from steps or epochs (one of them is set)."""
        if self.training.epochs is not None:
            return self.training.epochs * steps_per_epoch
        assert self.training.steps is not None
        return self.training.steps


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting as (dotted key, pydantic field), in the order of declaration."""
    for section, kind in sections().items():
        for name, field in kind.model_fields.items():
            yield f"{section}.{name}", field


def sections() -> dict[str, type[Section]]:
    """Return the sections of the settings by name."""
    kinds: dict[str, type[Section]] = {}
    for name, info in Config.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        kinds[name] = info.annotation
    return kinds


def choices_of(field: FieldInfo) -> list[str]:
    """Return the words that a setting may be, empty where it is not a choice of words."""
    values = [value for part in (field.annotation, *get_args(field.annotation)) for value in get_args(part)]
    return [value for value in values if isinstance(value, str)]


def names_files(field: FieldInfo) -> bool:
    """Return whether a setting's text may be the path of a file or folder."""
    return any(isinstance(mark, NamesFiles) for mark in (*field.metadata, *_marks(field.annotation)))


def _marks(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _marks(part)
