"""Which programs load an adapter file fully, and what the others leave out.

The rules are facts about those programs' loaders, found by running them or reading their code (formats.md
sections 1 to 5). A file that "loads" with layers missing does not count as loaded fully.
"""

from __future__ import annotations

import math
from collections import Counter

from ..adapters.canonical import AdapterWeights
from ..adapters.kinds.kind import EVERY_CLIENT
from ..errors import shown
from ..families.facts import is_text_encoder
from ..families.layer_shapes import Shape
from .client_facts import Facts as Facts
from .client_facts import Support as Support
from .client_keys import other_reasons, unknown_reasons
from .client_kinds import is_refused, kind_reasons
from .folding import CONFIG_ENTRY
from .programs import name_style

CLIENTS = EVERY_CLIENT

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_STYLES = ((".lora_A.", ".lora_B."), (".lora.down.", ".lora.up."))
_QKV = {"q_proj", "k_proj", "v_proj"}
_TEXT_ATTENTION = {*_QKV, "out_proj"}
TEXT_ATTENTION = tuple(f".{name}" for name in sorted(_TEXT_ATTENTION))
"""Endings of the attention's layers in text encoders."""
_UNSEEN_BY_KOHYA = ("conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding")


def partial_attention(weights: AdapterWeights, component: str) -> list[str]:
    """Return the text-encoder attention blocks that have some but not all of q, k, v and out."""
    blocks: dict[str, set[str]] = {}
    for path in weights.updates_of(component):
        block, _, name = path.rpartition(".")
        if name in _TEXT_ATTENTION:
            blocks.setdefault(block, set()).add(name)
    return [block for block, present in blocks.items() if present != _TEXT_ATTENTION]


def webui_reasons(client: str, facts: Facts) -> list[str]:
    """Return why a client does not load a file with WebUI keys fully."""
    return [
        *unknown_reasons(client, facts),
        *_names(client, facts),
        *other_reasons(client, facts),
        *_shapes(client, facts),
        *_layers(client, facts),
        *kind_reasons(client, facts.weights),
    ]


def hint(client: str, facts: Facts) -> str:
    """Return a warning if WebUI's two header entries make it hide the adapter beside its own checkpoints."""
    if client != "WebUI" or facts.format != "webui" or not facts.entries or facts.info is None:
        return ""
    stated = facts.entries.get("ss_base_model_version", "")
    version = "SD2" if facts.entries.get("ss_v2") == "True" else "SD1"
    version = "SDXL" if stated.startswith("sdxl_") else version
    wanted = facts.info.header.webui
    if version == wanted:
        return ""
    return (
        f"takes it for {version} by its header and hides its card beside {wanted} checkpoints; "
        "export it again"
    )


def _names(client: str, facts: Facts) -> list[str]:
    reasons = []
    if not facts.original_names and facts.ldm_names and client in ("kohya sd-scripts", "diffusers"):
        reasons.append("does not know the original U-Net names outside SDXL; export it again")
    if not facts.original_names and facts.any_key("lora_te1_") and client == "kohya sd-scripts":
        reasons.append("expects `lora_te_` where there is one text encoder; export it again")
    if facts.original_names and facts.diffusers_names and facts.ldm_names and client == "diffusers":
        reasons.append("loses all layers in original names when both namings are mixed; export it again")
    if facts.original_names and client == "kohya sd-scripts" and facts.diffusers_names and facts.ldm_names:
        reasons.append("loses the whole file where both namings are mixed; export it again")
    if facts.original_names and facts.any_key("lora_te_") and client in ("WebUI", "kohya sd-scripts"):
        reasons.append("expects `lora_te1_` where there are two text encoders; export it again")
    if facts.original_names and client == "WebUI" and facts.any_key("lora_unet_up_blocks_0_upsamplers_0"):
        reasons.append("loses `up_blocks_0_upsamplers_0_conv` in diffusers names; export it again")
    return reasons


def _shapes(client: str, facts: Facts) -> list[str]:
    """Return reasons that follow from how factors and scales are stored."""
    reasons = []
    for (_, path), (has, wanted) in facts.misfits.items():
        if math.prod(has) != math.prod(wanted):
            reasons.append(
                f"cannot use `{path}`, which is {_sides(has)} here and {_sides(wanted)} in the base; use the "
                "base it was trained on"
            )
            break
        if client in ("kohya sd-scripts", "diffusers"):
            reasons.append(
                f"refuses the file: `{path}` has factors in {len(has)} dimensions, the base in "
                f"{len(wanted)}; export it again"
            )
            break
    if facts.any_end(".scale") and client not in ("WebUI", "stable-diffusion.cpp"):
        what = "refuses the file for" if client == "diffusers" else "does not know"
        reasons.append(f"{what} its `.scale` entries; export it again")
    if client == "diffusers" and CONFIG_ENTRY in (facts.entries or {}) and facts.any_end(".alpha"):
        reasons.append(f"refuses alphas beside the header entry `{CONFIG_ENTRY}`; export it again")
    return reasons


def _sides(shape: Shape) -> str:
    return "x".join(str(side) for side in shape)


def _layers(client: str, facts: Facts) -> list[str]:
    reasons = []
    outer = [p for p in facts.weights.updates_of(facts.denoiser) if p.split(".", 1)[0] in _UNSEEN_BY_KOHYA]
    if client == "stable-diffusion.cpp" and facts.any_key(
        "lora_unet_input_blocks", "lora_unet_output_blocks"
    ):
        outer = [path for path in outer if path not in ("conv_in", "conv_out")]  # found in original names
    if outer and client in ("kohya sd-scripts", "stable-diffusion.cpp"):
        reasons.append(f"leaves out `{outer[0]}`" + (f" and {len(outer) - 1} more" if len(outer) > 1 else ""))
    if client not in BY_KEY and "text_projection" in facts.weights.updates_of("text_encoder_2"):
        reasons.append("may leave out `text_projection`; train without it")
    if client == "WebUI" and (partial := partial_attention(facts.weights, facts.open_clip)):
        reasons.append(f"applies text attention only when q, k, v and out are all there (`{partial[0]}`)")
    if client == "diffusers" and not is_refused(client, facts.weights.kinds()):
        for component in ("text_encoder", "text_encoder_2"):
            names = {path.rpartition(".")[2] for path in facts.weights.updates_of(component)}
            if names & _QKV and "out_proj" not in names:
                reasons.append(f"loses the attention of `{component}`, which has no `out_proj`")
        reasons += [
            f"mis-scales `{c}`, whose modules have different alphas"
            for c in facts.weights.components()
            if _is_misscaled(facts, c)
        ]
    if client == "stable-diffusion.cpp":
        reasons += _fused(facts)
        if facts.scaled_rank_one:
            reasons.append("takes the input width for a rank of 1, so those layers come out far too weak")
    return reasons


def _is_misscaled(facts: Facts, component: str) -> bool:
    """Tell whether diffusers gives some layers the wrong scale.

    It uses the most frequent alpha of a component for the U-Net's attention, for all layers of text encoders,
    and for layers without their own alpha (formats.md 4.3).
    """
    updates = facts.weights.updates_of(component)
    stored = {module.path for module in facts.with_alpha() if module.component == component}
    counts = Counter(updates[path].alpha for path in stored).most_common(2)
    if not counts:
        return False
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return True
    usual = counts[0][0]
    return any(
        update.alpha != usual
        for path, update in updates.items()
        if is_text_encoder(component) or path.endswith(_ATTENTION) or path not in stored
    )


def _fused(facts: Facts) -> list[str]:
    """Return what stable-diffusion.cpp loses because it may keep OpenCLIP's q, k and v as one matrix."""
    blocks: dict[str, set[str]] = {}
    for path in facts.weights.updates_of(facts.open_clip):
        block, _, name = path.rpartition(".")
        if name in _QKV:
            blocks.setdefault(block, set()).add(name)
    if not blocks:
        return []
    if facts.info is not None and facts.info.header.is_v2:
        return ["leaves out q, k and v of the text encoder where the checkpoint has them as one matrix"]
    partial = next((block for block, present in blocks.items() if present != _QKV), None)
    if partial is None:
        return []
    return [f"needs q, k and v together where the checkpoint has them as one matrix (`{partial}`)"]


def diffusers_reasons(client: str, facts: Facts) -> list[str]:
    """Return why a client does not load a file with diffusers keys fully."""
    if client == "diffusers":
        return _by_diffusers(facts) + _shapes(client, facts)
    if client in BY_KEY:
        reasons = kind_reasons(client, facts.weights, _parts_spelling(facts))
        attention = {
            parsed.module
            for key, parsed in facts.unknown_to(client).items()
            if name_style(key, parsed).endswith("-attention")
        }
        if attention and client == "ComfyUI":
            rest = {k: p for k, p in facts.unknown_to(client).items() if p.module not in attention}
            reasons.append(
                f"loses {len(attention)} U-Net attention layers in diffusers keys; export as webui"
            )
            if any(name_style(key, parsed) == "te-flat" for key, parsed in rest.items()):
                reasons.append("drops the text encoder: its keys lack `text_model.`; export as webui")
        else:
            reasons += unknown_reasons(client, facts)
        return reasons + other_reasons(client, facts) + _alphas_in_header(facts) + _shapes(client, facts)
    if client == BY_NAME:
        return by_name_reasons(client, facts)
    return ["reads no diffusers keys; export as webui"]


def by_name_reasons(client: str, facts: Facts) -> list[str]:
    """Return why stable-diffusion.cpp, which converts each name by itself, does not load a file fully."""
    unknown = facts.unknown_to(client)
    dotted = unknown and all(name_style(key, parsed) in ("te", "te-flat") for key, parsed in unknown.items())
    return [
        *kind_reasons(client, facts.weights, _parts_spelling(facts)),
        *(_alphas_in_header(facts) if facts.format == "diffusers" else []),
        *(
            ["leaves out text encoders in diffusers keys; export as webui"]
            if dotted
            else unknown_reasons(client, facts)
        ),
        *other_reasons(client, facts),
        *_shapes(client, facts),
        *_layers(client, facts),
    ]


def _parts_spelling(facts: Facts) -> str:
    """Return whose spelling a DoRA's magnitudes have in a file with dotted names."""
    return "diffusers" if facts.any_part(".lora_magnitude_vector") else "webui"


def _by_diffusers(facts: Facts) -> list[str]:
    reasons = []
    if unknown := facts.unknown_to("diffusers"):
        first = shown(next(iter(unknown)), 60)
        reasons.append(f"does not find {len(unknown)} keys (`{first}`); export it again")
    if _bare(facts):
        reasons.append(f"finds nothing without `{facts.denoiser}.` before the names; export it again")
    if foreign := [key for key in facts.keys if "lora" not in key]:
        reasons.append(f"refuses the file for its `{shown(foreign[0].rpartition('.')[2], 20)}` keys")
    reasons += _texts_in_diffusers(facts)
    if _some_biases(facts):
        reasons.append(
            "leaves layers without values: only some of them have a `lora_B.bias`; export it again"
        )
    named = [key for key in facts.keys if key.startswith(f"{facts.denoiser}.")]
    styles = [parts for parts in _STYLES if any(part in key for key in named for part in parts)]
    if len(styles) > 1:
        reasons.append("loses layers: it goes by the first key, and the file mixes `lora_A` and `lora.down`")
    settings = (facts.entries or {}).get(CONFIG_ENTRY, "")
    for component in facts.weights.components() if settings else ():
        if f'"{component}.' not in settings:
            reasons.append(f"refuses the file: the header entry `{CONFIG_ENTRY}` leaves out `{component}`")
    return reasons


def _texts_in_diffusers(facts: Facts) -> list[str]:
    """Return text encoders whose spelling diffusers cannot tell, or without a layer it takes a rank from."""
    reasons = []
    for component in filter(is_text_encoder, facts.weights.components()):
        paths = [path for path in facts.weights.updates_of(component) if not path.endswith(".bias")]
        keys = [key for key in facts.keys if key.startswith(f"{component}.")]
        attends = any(path.endswith(TEXT_ATTENTION) for path in paths)
        older = any("lora_linear_layer" in key or "to_out_lora" in key for key in keys)
        if keys and not (attends or older):
            reasons.append(f"refuses the file: `{component}` has no attention layer; export it again")
        elif keys and not any(path.endswith((*TEXT_ATTENTION, ".fc1", ".fc2")) for path in paths):
            reasons.append(f"refuses the file: `{component}` has neither attention nor MLP layers")
    return reasons


def _some_biases(facts: Facts) -> bool:
    """Tell whether some of the denoiser's layers have PEFT's bias of the second factor, but not all."""
    parts: dict[str, set[str]] = {}
    for parsed in facts.file_keys.parsed.values():
        if parsed is not None and parsed.module.component == facts.denoiser:
            parts.setdefault(parsed.module.layer, set()).add(parsed.part)
    biased = [path for path, present in parts.items() if "up_bias" in present]
    return bool(biased) and len(biased) < sum("up" in present for present in parts.values())


def _alphas_in_header(facts: Facts) -> list[str]:
    if facts.any_part(".alpha") or all(update.scale == 1.0 for update in facts.weights.updates.values()):
        return []
    return ["ignores the alphas, which are in the header only; export as webui"]


def _bare(facts: Facts) -> bool:
    return not all(key.startswith((f"{facts.denoiser}.", "text_encoder")) for key in facts.keys)


def comfyui_reasons(client: str, facts: Facts) -> list[str]:
    """Return why a client does not load a file with ComfyUI's own keys fully."""
    if client == BY_NAME:
        return by_name_reasons(client, facts)
    if client in BY_KEY:
        return [
            *unknown_reasons(client, facts),
            *other_reasons(client, facts),
            *_shapes(client, facts),
            *kind_reasons(client, facts.weights),
        ]
    return ["reads no ComfyUI keys; export as webui"]


def lycoris_reasons(client: str, facts: Facts) -> list[str]:
    """Return why a client does not load a file with LyCORIS wrapper keys fully."""
    if client == BY_NAME:
        return by_name_reasons(client, facts)
    if client in BY_KEY:
        return [
            *unknown_reasons(client, facts),
            *other_reasons(client, facts),
            *_shapes(client, facts),
            *kind_reasons(client, facts.weights),
        ]
    return ["reads no `lycoris_` keys; export as webui"]


def peft_reasons(client: str, facts: Facts) -> list[str]:
    """Return why a client does not load a PEFT folder fully."""
    if client == "diffusers":
        return [
            "loads PEFT folders only through peft.PeftModel, one component at a time; export as diffusers"
        ]
    return ["reads no PEFT folders; export as webui"]


BY_KEY = ("ComfyUI", "Forge")
"""Clients that look up every key by itself, so that spellings may be mixed."""
BY_NAME = "stable-diffusion.cpp"
"""Converts every name by itself, so that spellings may be mixed as well."""
