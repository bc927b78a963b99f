"""Which programs load an adapter file fully, and what the others leave out.

The rules are facts about those programs' loaders, each found by running it or reading it (FORMATS.md
sections 1 to 5). A file that "loads" with layers missing counts as not loaded fully.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..adapters.base import AdapterWeights
from .client_kinds import kind_reasons, magnitude_reasons
from .keys import parse_key, spellings

CLIENTS = ("WebUI", "Forge", "ComfyUI", "kohya sd-scripts", "diffusers", "stable-diffusion.cpp")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj"}
_UNSEEN_BY_KOHYA = ("conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding")


@dataclass(frozen=True)
class Support:
    """What one client makes of a file.

    Attributes:
        client: one of :data:`CLIENTS`.
        full: whether every layer takes effect at the right scale.
        reasons: why not.
    """

    client: str
    full: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    format: str
    family: str | None
    weights: AdapterWeights
    keys: tuple[str, ...]

    def any_key(self, *starts: str) -> bool:
        return any(key.startswith(starts) for key in self.keys)

    def any_part(self, *parts: str) -> bool:
        return any(part in key for key in self.keys for part in parts)

    @property
    def scaled_rank_one(self) -> bool:
        """Whether a module of rank 1 has an alpha of its own."""
        parsed = [parse_key(key) for key in self.keys if key.endswith(".alpha")]
        ranks = {key.module: self.weights.updates[key.module].rank for key in parsed if key is not None}
        return 1 in ranks.values()

    @property
    def ldm_names(self) -> bool:
        return self.any_key("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")

    @property
    def diffusers_names(self) -> bool:
        return self.any_key("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks")


def client_support(
    format: str, family: str | None, weights: AdapterWeights, keys: Iterable[str]
) -> tuple[Support, ...]:
    """Return what each client makes of a file.

    Args:
        format: the file's format, a key of :data:`sdlora.formats.READERS`.
        family: ``sd1``, ``sd2``, ``sdxl`` or None.
        weights: the adapter in it, with the alphas that the file itself holds; values are not looked at.
        keys: the file's keys, whose spelling decides for some clients.
    """
    facts = _Facts(format, family, weights, tuple(keys))
    found = []
    for client in CLIENTS:
        reasons = _FORMATS[format](client, facts)
        mixed = spellings(facts.keys)
        if len(mixed) > 1 and client not in _BY_KEY:
            reasons = [
                f"reads part of it at most: its keys mix the {' and '.join(mixed)} spellings; export it again"
            ]
        found.append(Support(client, not reasons, tuple(reasons)))
    return tuple(found)


def partial_attention(weights: AdapterWeights, component: str) -> list[str]:
    """Return the text-encoder attention blocks that have some but not all of q, k, v and out."""
    blocks: dict[str, set[str]] = {}
    for path in weights.updates_of(component):
        block, _, name = path.rpartition(".")
        if name in _TEXT_ATTENTION:
            blocks.setdefault(block, set()).add(name)
    return [block for block, present in blocks.items() if present != _TEXT_ATTENTION]


def mixed_alphas(weights: AdapterWeights) -> list[str]:
    """Return the components whose modules do not all have one alpha."""
    return [c for c in weights.components() if len({p.alpha for p in weights.updates_of(c).values()}) > 1]


def _webui(client: str, facts: _Facts) -> list[str]:
    return [*_names(client, facts), *_layers(client, facts), *kind_reasons(client, facts.weights)]


def _names(client: str, facts: _Facts) -> list[str]:
    reasons = []
    flat = facts.any_key("lora_te_encoder", "lora_te1_encoder", "lora_te2_encoder")
    if flat and client != "diffusers":
        what = "refuses the file" if client == "Forge" else "drops the text encoder"
        reasons.append(f"{what}: its keys lack `text_model_`; export it again")
    if facts.family != "sdxl" and facts.ldm_names and client in ("kohya sd-scripts", "diffusers"):
        reasons.append("does not know the original U-Net names outside SDXL; export it again")
    if facts.family != "sdxl" and facts.any_key("lora_te1_") and client == "kohya sd-scripts":
        reasons.append("expects `lora_te_` where there is one text encoder; export it again")
    if facts.family == "sdxl" and facts.diffusers_names and facts.ldm_names and client == "diffusers":
        reasons.append("loses all layers in original names when both namings are mixed; export it again")
    if facts.family == "sdxl" and client == "WebUI" and facts.any_key("lora_unet_up_blocks_0_upsamplers_0"):
        reasons.append("loses `up_blocks_0_upsamplers_0_conv` in diffusers names; export it again")
    if facts.any_part(".lora_A.", ".lora_B.") and client in _KOHYA_SUFFIXES:
        reasons.append("knows only `lora_down` and `lora_up`, not `lora_A` and `lora_B`; export it again")
    return reasons


def _layers(client: str, facts: _Facts) -> list[str]:
    reasons = []
    outer = [p for p in facts.weights.updates_of("unet") if p.split(".", 1)[0] in _UNSEEN_BY_KOHYA]
    if outer and client in ("kohya sd-scripts", "stable-diffusion.cpp"):
        reasons.append(f"leaves out `{outer[0]}`" + (f" and {len(outer) - 1} more" if len(outer) > 1 else ""))
    if client == "WebUI":
        open_clip = {"sdxl": "text_encoder_2", "sd2": "text_encoder"}.get(facts.family or "", "")
        if partial := partial_attention(facts.weights, open_clip):
            reasons.append(f"applies text attention only when q, k, v and out are all there (`{partial[0]}`)")
    if client == "diffusers" and set(facts.weights.kinds()) <= {"lora", "dora"}:
        for component in ("text_encoder", "text_encoder_2"):
            paths = facts.weights.updates_of(component)
            if paths and not any(path.endswith("out_proj") for path in paths):
                reasons.append(f"loses the attention of `{component}`, which has no `out_proj`")
        reasons += [
            f"mis-scales `{c}`, whose modules have different alphas" for c in mixed_alphas(facts.weights)
        ]
    if client == "stable-diffusion.cpp" and facts.scaled_rank_one:
        reasons.append("takes rank 1 for the input width, so those layers come out far too weak")
    return reasons


def _diffusers(client: str, facts: _Facts) -> list[str]:
    if client == "diffusers":
        return ["finds nothing without `unet.` before the names; export it again"] if _bare(facts) else []
    if client == "ComfyUI":
        reasons = magnitude_reasons(client, facts.weights)
        attention = [path for path in facts.weights.updates_of("unet") if path.endswith(_ATTENTION)]
        if attention and not facts.any_part(".processor."):
            reasons.append(
                f"loses {len(attention)} U-Net attention layers in diffusers keys; export as webui"
            )
        if not facts.any_part(".alpha") and any(one.scale != 1.0 for one in facts.weights.updates.values()):
            reasons.append("ignores the alphas, which are in the header only; export as webui")
        return reasons
    if client == "stable-diffusion.cpp":
        reasons = magnitude_reasons(client, facts.weights)
        if any(component != "unet" for component in facts.weights.components()):
            reasons.append("leaves out text encoders in diffusers keys; export as webui")
        return reasons
    return ["reads no diffusers keys; export as webui"]


def _bare(facts: _Facts) -> bool:
    return not all(key.startswith(("unet.", "text_encoder")) for key in facts.keys)


def _comfyui(client: str, facts: _Facts) -> list[str]:
    if client in _BY_KEY:
        return kind_reasons(client, facts.weights)
    return ["reads no ComfyUI keys; export as webui"]


def _lycoris(client: str, facts: _Facts) -> list[str]:
    readers = (*_BY_KEY, "stable-diffusion.cpp")
    if client in readers:
        return kind_reasons(client, facts.weights)
    return ["reads no `lycoris_` keys; export as webui"]


def _peft(client: str, facts: _Facts) -> list[str]:
    if client == "diffusers":
        return [
            "loads PEFT folders only through peft.PeftModel, one component at a time; export as diffusers"
        ]
    return ["reads no PEFT folders; export as webui"]


_BY_KEY = ("ComfyUI", "Forge")
"""They look up every key on its own, so that spellings may be mixed."""
_KOHYA_SUFFIXES = ("kohya sd-scripts", "diffusers")
_FORMATS: dict[str, Callable[[str, _Facts], list[str]]] = {
    "webui": _webui,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "lycoris": _lycoris,
    "peft": _peft,
}
