"""What a base model is, by a file's header or a folder's configs alone, in milliseconds.

Nothing is guessed silently: every fact about family and prediction type says where it was read, and facts
that contradict each other are an error unless the user decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config.schema import PredictionType
from ..errors import ModelError, shown
from ..files import list_files
from ..tensor_file import Header
from .base_files import read_json
from .facts import FamilyInfo
from .ldm import UNET_PREFIX, VAE_PREFIX
from .table import FAMILIES
from .weights import TensorSource, checked_header

_FIRST_CONV = f"{UNET_PREFIX}input_blocks.0.0.weight"
_CONTEXT = ".attn2.to_k.weight"
_PROBE_LIMIT = 0.09
_DENOISERS = ("unet", "transformer")  # their names in diffusers' pipelines
_FLOW = "flow"

# markers of other kinds of files, the most specific ones first
_OTHER_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_", ".lora_A.", "hada_", "lokr_", "oft_"), "an adapter file, not a base model"),
    (("time_stack", "motion_modules", "temporal_transformer", "time_mixer"), "a video model"),
    (("control_model.", "controlnet_", "input_hint_block", "controlnet_cond_embedding"), "a ControlNet"),
    (("img_attn_qkv", "txt_attn_qkv"), "a video model (Hunyuan)"),
    (("joint_blocks.",), "an SD3 checkpoint, which this version does not train"),
    (("double_blocks.", "double_stream_modules"), "a Flux checkpoint, which this version does not train"),
    (
        ("edm_vpred.", "edm_mean"),
        "an EDM-trained checkpoint (Playground 2.5), which this version does not train",
    ),
    (("emb_params", "string_to_param"), "a textual-inversion embedding, not a base model"),
)
_IMAGE_CHANNELS = {
    5: "a depth-to-image",
    7: "an upscaler",
    8: "an instruct-pix2pix",
    9: "an inpainting",
}


@dataclass(frozen=True)
class Evidence:
    """A statement: where it was read, and what it says."""

    where: str
    value: Any


@dataclass(frozen=True)
class Recognised:
    """What a base model is.

    Attributes:
        path: the file or folder.
        layout: ``file`` (one LDM-layout checkpoint) or ``folder`` (diffusers).
        family: name of the family, by the weights.
        families: evidence for the family, that of the weights first.
        title: what people call it.
        predictions: evidence for the prediction type; without any, the family's default.
        terminal_snr: evidence for whether the noise schedule ends in pure noise.
        missing: parts it lacks: ``vae``, ``text_encoder``.
        formats: number format -> share of the U-Net's tensors, e.g. ``{"float16": 1.0}``.
        has_ema: whether it also holds averaged weights (which are not used).
        num_bytes: size on disk.
        short_hash: the 8 hex digits that older WebUIs show for a checkpoint; "" for a folder.
        stated_hash: SHA-256 in its header, if there is one.
        metadata: text entries of its header.
    """

    path: Path
    layout: Literal["file", "folder"]
    family: str
    families: tuple[Evidence, ...]
    title: str
    predictions: tuple[Evidence, ...]
    terminal_snr: tuple[Evidence, ...] = ()
    missing: tuple[str, ...] = ()
    formats: Mapping[str, float] | None = None
    has_ema: bool = False
    num_bytes: int = 0
    short_hash: str = ""
    stated_hash: str = ""
    metadata: Mapping[str, str] | None = None

    def check_family(self, override: str | None = None) -> None:
        """Refuse a base if its header or the user names another family than that of its weights.

        Raises:
            ModelError: naming both sides.
        """
        if override is None:
            self._agreed(self.families, "family")
        elif override != self.family:
            where = self.families[0].where
            raise ModelError(
                f"{self.path}: model.family={override}, but {where} says {self.family}; leave it out"
            )

    def prediction_type(self, override: PredictionType | None = None) -> str:
        """Return the prediction type: the user's, or else the one that the base states.

        Raises:
            ModelError: if the base says two things, naming both.
        """
        if override is not None:
            return override
        return str(self._agreed(self.predictions, "prediction_type"))

    def zero_terminal_snr(self, override: bool | None = None) -> bool:
        """Return whether the noise schedule is rescaled to end in pure noise.

        Raises:
            ModelError: if the base says two things, naming both.
        """
        if override is not None:
            return override
        return bool(self.terminal_snr) and bool(self._agreed(self.terminal_snr, "zero_terminal_snr"))

    def _agreed(self, evidence: Sequence[Evidence], setting: str) -> Any:
        values = {statement.value for statement in evidence}
        if len(values) > 1:
            statements = "; ".join(f"{statement.where} says {statement.value}" for statement in evidence)
            raise ModelError(
                f"{self.path}: contradicts itself: {statements}. Say which is right: model.{setting}=..."
            )
        return evidence[0].value


def recognise(path: Path) -> Recognised:
    """Return what the base model at ``path`` (a diffusers folder or one checkpoint file) is.

    Reads the header and at most two small tensors of a file, the configs of a folder.

    Raises:
        ModelError: for anything that is not a base model of a known family, saying what it is.
    """
    return _recognise_folder(path) if path.is_dir() else _recognise_file(path)


def is_checkpoint(header: Header) -> bool:
    """Tell whether a file holds a whole model's or a component's weights rather than an adapter's."""
    return any(
        key.startswith((UNET_PREFIX, VAE_PREFIX, "cond_stage_model.", "conditioner."))
        for key in header.tensors
    )


# --- one file ------------------------------------------------------------------------------------------


def _recognise_file(path: Path) -> Recognised:
    header = checked_header(path)
    family, missing = _family_of_keys(path, header)
    unet = [spec for key, spec in header.tensors.items() if key.startswith(UNET_PREFIX)]
    formats = Counter(str(spec.dtype).removeprefix("torch.") for spec in unet)
    return Recognised(
        path=path,
        layout="file",
        family=family.name,
        families=_families(header, family, whole="text_encoder" not in missing),
        title=header.metadata.get("modelspec.title") or path.stem,
        predictions=_predictions(path, header, family),
        terminal_snr=_terminal_snr(header),
        missing=missing,
        formats={name: count / len(unet) for name, count in formats.most_common()},
        has_ema=any(key.startswith("model_ema.") for key in header.tensors),
        num_bytes=header.num_bytes,
        short_hash=short_hash(path),
        stated_hash=header.metadata.get("modelspec.hash_sha256", "").removeprefix("0x").lower(),
        metadata=header.metadata,
    )


def _family_of_keys(path: Path, header: Header) -> tuple[FamilyInfo, tuple[str, ...]]:
    """Return the family and the missing parts; raise a ModelError that names any other kind of file."""
    kind = _other_kind(header)
    if kind:
        raise ModelError(f"{path}: {kind}; give a text-to-image checkpoint of {_titles()}")
    family, text = None, False
    for family_class in FAMILIES.values():
        encoders = [_starts(header.tensors, e.checkpoint_prefix) for e in family_class.info.text_encoders]
        if any(encoders):
            family, text = family_class.info, all(encoders)
    family = family or _family_of_width(path, header)
    vae = _starts(header.tensors, VAE_PREFIX)
    return family, tuple(name for name, there in (("vae", vae), ("text_encoder", text)) if not there)


def _other_kind(header: Header) -> str | None:
    keys = header.tensors
    for markers, kind in _OTHER_KINDS:
        if any(marker in key for key in keys for marker in markers):
            return kind
    if any(len(spec.shape) == 5 for spec in keys.values()):  # convolutions over time, too
        return "a video model"
    if _FIRST_CONV not in keys:
        return _without_unet(header)
    channels = keys[_FIRST_CONV].shape[1] if len(keys[_FIRST_CONV].shape) == 4 else 0
    if channels != 4:
        return f"{_IMAGE_CHANNELS.get(channels, f'a {channels}-channel')} checkpoint"
    # the refiner has only the larger text encoder, in the place of the first
    if _starts(keys, "conditioner.embedders.0.model."):
        return "an SDXL refiner checkpoint"
    return None


def _without_unet(header: Header) -> str:
    keys = header.tensors
    if _starts(keys, "conditioner.embedders.0.model.") and not _starts(keys, UNET_PREFIX):
        return "an SDXL refiner checkpoint"
    if _starts(keys, "decoder.") or _starts(keys, VAE_PREFIX):
        return "a VAE alone (model.vae takes it)"
    if _starts(keys, "down_blocks."):
        return "the U-Net of a diffusers folder (give the folder that holds model_index.json)"
    if _starts(keys, "text_model."):
        return "a text encoder alone"
    return "holds no Stable Diffusion U-Net"


def _family_of_width(path: Path, header: Header) -> FamilyInfo:
    """Return the family by the width that its cross-attention reads, for files without text encoders."""
    widths = {spec.shape[-1] for key, spec in header.tensors.items() if key.endswith(_CONTEXT)}
    for family in FAMILIES.values():
        if widths == {family.info.denoiser.context_width}:
            return family.info
    raise ModelError(f"{path}: its U-Net fits no known family; give a checkpoint with its text encoder")


def _families(header: Header, family: FamilyInfo, *, whole: bool) -> tuple[Evidence, ...]:
    """Return the families that the weights and the header (e.g. `stable-diffusion-v1`) name."""
    weights = "its text encoders' keys" if whole else "the width of its cross-attention"
    evidence = [Evidence(weights, family.name)]
    stated = header.metadata.get("modelspec.architecture", "")
    for family_class in FAMILIES.values():
        if stated.lower().startswith(family_class.info.header.architecture_start):
            evidence.append(Evidence("the header's modelspec.architecture", family_class.info.name))
    return tuple(evidence)


def _predictions(path: Path, header: Header, family: FamilyInfo) -> tuple[Evidence, ...]:
    evidence: list[Evidence] = []
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("v", "v_prediction", "v-prediction"):
        evidence.append(Evidence("the header's modelspec.prediction_type", "v_prediction"))
    elif stated in ("eps", "epsilon"):
        evidence.append(Evidence("the header's modelspec.prediction_type", "epsilon"))
    if "v_pred" in header.tensors:
        evidence.append(Evidence("the marker key `v_pred`", "v_prediction"))
    if "768-v" in header.metadata.get("modelspec.architecture", ""):
        evidence.append(Evidence("the header's modelspec.architecture", "v_prediction"))
    if not evidence and family.prediction_probe in header.tensors:
        evidence.append(_probed(path, family.prediction_probe))
    return tuple(evidence) or (Evidence(f"nothing ({family.title} usually has it)", "epsilon"),)


def _probed(path: Path, key: str) -> Evidence:
    """Distinguish the two kinds of a family by the spread of one norm's bias, as ComfyUI does."""
    (_, bias), *_ = TensorSource([path]).read([key])
    spread = float(torch.std(bias.float(), unbiased=False))
    value = "v_prediction" if spread > _PROBE_LIMIT else "epsilon"
    return Evidence(f"the spread of `{key}` ({spread:.3f}; v above {_PROBE_LIMIT})", value)


def _terminal_snr(header: Header) -> tuple[Evidence, ...]:
    evidence = []
    if "ztsnr" in header.tensors:
        evidence.append(Evidence("the marker key `ztsnr`", True))
    stated = header.metadata.get("ss_zero_terminal_snr", "")
    if stated in ("True", "False"):
        evidence.append(Evidence("the header's ss_zero_terminal_snr", stated == "True"))
    return tuple(evidence)


def short_hash(path: Path) -> str:
    """Return the first 8 hex digits of the SHA-256 of 64 KiB at 1 MiB, which old WebUIs show as the hash."""
    with path.open("rb") as stream:
        stream.seek(0x100000)
        return hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


def _starts(keys: Mapping[str, object], prefix: str) -> bool:
    return bool(prefix) and any(key.startswith(prefix) for key in keys)


# --- a folder ------------------------------------------------------------------------------------------


def _recognise_folder(folder: Path) -> Recognised:
    index = read_json(folder / "model_index.json")
    name = shown(index.get("_class_name", "model"))
    known = dict.fromkeys(family.info.denoiser.component for family in FAMILIES.values())
    there = [component for component in known if (folder / component / "config.json").is_file()]
    foreign = [component for component in _DENOISERS if component in index and component not in known]
    if foreign or not there:
        missing = " or ".join(f"{component}/config.json" for component in known)
        what = f"a {name} folder" if foreign else f"holds no {missing}"
        raise ModelError(f"{folder}: {what}; give a folder of {_titles()}")
    family = _family_of_configs(folder, there[0], index)
    scheduler = _scheduler_config(folder, family)
    prediction = _prediction_of(scheduler)
    if prediction not in family.predictions:
        raise ModelError(f"{folder}: predicts `{shown(prediction)}`, which this version does not train")
    weights = list_files(folder / there[0], ".safetensors")
    rescaled = bool(scheduler.get("rescale_betas_zero_snr", False))
    return Recognised(
        path=folder,
        layout="folder",
        family=family.name,
        families=(Evidence(f"{there[0]}/config.json", family.name),),
        title=folder.name,
        predictions=(Evidence("scheduler/scheduler_config.json", prediction),),
        terminal_snr=(Evidence("scheduler/scheduler_config.json", rescaled),),
        formats=None,
        num_bytes=sum(file.stat().st_size for file in weights),
    )


def _family_of_configs(folder: Path, component: str, index: Mapping[str, Any]) -> FamilyInfo:
    config = read_json(folder / component / "config.json")
    infos = [family.info for family in FAMILIES.values() if family.info.denoiser.component == component]
    channels = config.get("in_channels", infos[0].denoiser.channels)
    if not isinstance(channels, int) or channels not in {info.denoiser.channels for info in infos}:
        named = _IMAGE_CHANNELS.get(channels) if isinstance(channels, int) else None
        kind = named or f"a {shown(channels)}-channel"
        raise ModelError(f"{folder}: {kind} model; give a text-to-image model")
    built_as = str(config.get("_class_name", ""))
    if "motion" in built_as.lower() or "SpatioTemporal" in built_as:
        raise ModelError(f"{folder}: a video model; give a text-to-image model")
    for info in infos:
        if all(config.get(key, default) == default for key, default in info.denoiser.config.items()):
            if not (folder / info.text_encoders[0].component).is_dir():
                raise ModelError(
                    f"{folder}: has no text_encoder (an SDXL refiner?); give a text-to-image model"
                )
            return info
    raise ModelError(
        f"{folder}: a {shown(index.get('_class_name', 'model'))} folder; give a folder of {_titles()}"
    )


def _scheduler_config(folder: Path, family: FamilyInfo) -> Mapping[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ModelError(
            f"{folder}: holds no scheduler/scheduler_config.json; check that the download is complete"
        )
    config: Mapping[str, Any] = read_json(file)
    if _prediction_of(config) == _FLOW and _FLOW not in family.predictions:
        raise ModelError(f"{folder}: a flow-matching model, which this version does not train")
    return config


def _prediction_of(scheduler: Mapping[str, Any]) -> str:
    """Return the prediction type in a scheduler's config; its class tells flow matching."""
    if "FlowMatch" in str(scheduler.get("_class_name", "")):
        return _FLOW
    return str(scheduler.get("prediction_type", "epsilon"))


def _titles() -> str:
    return ", ".join(family.info.title for family in FAMILIES.values())
