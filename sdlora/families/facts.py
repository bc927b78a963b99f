"""What a family declares about itself; plain data, without torch.

A family's components are its denoiser and its text encoders. They have the names of diffusers' pipelines,
where text encoders are called ``text_encoder``, ``text_encoder_2``, ...: so if only an adapter's module is
known, the name alone tells role and order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config.adapter import AdaptedPart

AUTOENCODER = "vae"
"""Name of the component that encodes and decodes images; it gets no adapter."""
WEBUI_STRENGTHS = {"te": "text encoders", "unet": "denoiser"}
"""What WebUI calls the two strengths of an adapter in a prompt, and whose they are."""
_TEXT_ENCODER = "text_encoder"


def is_text_encoder(component: str) -> bool:
    """Tell whether a component of that name is a text encoder; every other one is a denoiser."""
    return component.startswith(_TEXT_ENCODER)


def component_order(component: str) -> tuple[bool, str]:
    """Return the key that sorts components: the denoiser first, then the text encoders by number."""
    return is_text_encoder(component), component


@dataclass(frozen=True, kw_only=True)
class ComponentInfo:
    """Declared facts about a component that can be adapted.

    Attributes:
        component: its name among the model's components and in diffusers folders.
        targets: preset -> endings of module paths that get a LoRA.
        file_prefix: prefix of its keys in WebUI's format.
        part: which settings give its adapter's rank, alpha and learning rate.
    """

    component: str
    targets: Mapping[str, tuple[str, ...]]
    file_prefix: str
    part: AdaptedPart


@dataclass(frozen=True, kw_only=True)
class DenoiserInfo(ComponentInfo):
    """Declared facts about a family's denoiser.

    Attributes:
        title: what users call it.
        diffusers_class: class of diffusers that it is built with.
        channels: of its input, the latents.
        config: settings in its config of a diffusers folder; no other family has this combination.
        context_width: width of the text states that its cross-attention reads, in the true models; 0 if it
            has no cross-attention that distinguishes families.
        module_path: a part of module paths that only this family has, if there is one.
        webui_names: whose block names WebUI-format keys have.
        conv_projections: whether ``proj_in`` and ``proj_out`` are 1x1 convolutions, not linear layers.
    """

    part: AdaptedPart = "denoiser"
    title: str
    diffusers_class: str
    channels: int = 4
    config: Mapping[str, Any] = field(default_factory=dict)
    context_width: int = 0
    module_path: str = ""
    webui_names: Literal["diffusers", "ldm"] = "diffusers"
    conv_projections: bool = False


@dataclass(frozen=True, kw_only=True)
class TextEncoderInfo(ComponentInfo):
    """Declared facts about one of a family's text encoders.

    Attributes:
        tokenizer: name of its tokenizer's folder.
        width: of its states, in the true models.
        checkpoint_prefix: beginning of its keys in an LDM-layout checkpoint; empty if there are none.
        checkpoint_layout: whose names follow: transformers' (``clip``) or OpenCLIP's.
        projected: whether a projection also gives one vector for the whole caption.
        pad_token: token that short captions are padded with, if the files do not say it.
    """

    tokenizer: str
    width: int
    checkpoint_prefix: str = ""
    checkpoint_layout: Literal["clip", "openclip"] = "clip"
    projected: bool = False
    pad_token: str = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class HeaderWords:
    """What the headers of adapter files call a family.

    Attributes:
        version: value of ``ss_base_model_version``.
        v_version: the same for bases that predict v, where that differs.
        version_start: what the value begins with in files of any program.
        is_v2: value of ``ss_v2``.
        architecture: value of ``modelspec.architecture``.
        v_architecture: the same for bases that predict v, where that differs.
        webui: value of ``sd version`` in WebUI's sidecar.
    """

    version: str
    v_version: str = ""
    version_start: str
    is_v2: bool = False
    architecture: str
    v_architecture: str = ""
    webui: str = "Unknown"

    @property
    def versions(self) -> tuple[str, ...]:
        """All values of ``ss_base_model_version``."""
        return (self.version, self.v_version) if self.v_version else (self.version,)

    @property
    def architectures(self) -> tuple[str, ...]:
        """All values of ``modelspec.architecture``."""
        return (self.architecture, self.v_architecture) if self.v_architecture else (self.architecture,)

    @property
    def architecture_start(self) -> str:
        """What ``modelspec.architecture`` begins with in files of any program: three words at most."""
        return "-".join(self.architecture.split("-")[:3]).partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class FamilyInfo:
    """Declared facts about a family, read by loading, adapters, formats and commands.

    Attributes:
        name: short name used in settings and files.
        title: what users call it.
        denoiser: what takes the noise away.
        text_encoders: in the order of their states.
        header: what files of adapters call it.
        predictions: names of the prediction types its bases may have, the usual one first.
        adapter_format: the file format a run writes its adapter in.
        diffusers_loader: class of diffusers that loads its adapters.
        assets: folder of the component configs that single files leave out; empty if there are none.
        clip_skip: whether an earlier layer of the text encoder may be used.
        resolutions: prediction type -> px that its single files were trained at, if these differ.
        prediction_probe: checkpoint key of a vector whose spread distinguishes v-prediction from epsilon.
    """

    name: str
    title: str
    denoiser: DenoiserInfo
    text_encoders: tuple[TextEncoderInfo, ...]
    header: HeaderWords
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    adapter_format: str = "webui"
    diffusers_loader: str = "StableDiffusionLoraLoaderMixin"
    assets: str = ""
    clip_skip: bool = False
    resolutions: Mapping[str, int] = field(default_factory=dict)
    prediction_probe: str = ""

    def __post_init__(self) -> None:
        if is_text_encoder(self.denoiser.component) or not all(
            is_text_encoder(encoder.component) for encoder in self.text_encoders
        ):
            raise ValueError(f"{self.name}: text encoders, and only they, are named {_TEXT_ENCODER}...")

    @property
    def components(self) -> Mapping[str, ComponentInfo]:
        """All components by name, the denoiser first."""
        return {component.component: component for component in (self.denoiser, *self.text_encoders)}

    @property
    def targets(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """Component -> preset -> endings of module paths that get a LoRA."""
        return {name: component.targets for name, component in self.components.items()}

    @property
    def file_prefixes(self) -> Mapping[str, str]:
        """Component -> prefix of WebUI-format keys."""
        return {name: component.file_prefix for name, component in self.components.items()}
