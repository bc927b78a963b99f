"""What other programs make of keys that their loaders do not find, and of those that are no factors."""

from __future__ import annotations

from ..adapters.canonical import ModuleKey
from ..errors import shown
from .client_facts import Facts
from .programs import PROGRAMS, name_style, part_style


def unknown_reasons(client: str, facts: Facts) -> list[str]:
    """Return what follows from keys that a client's loader does not find."""
    program, unknown = PROGRAMS[client], facts.unknown_to(client)
    if not unknown:
        return []
    few = len(unknown) <= (program.most_unknown or len(unknown))
    lost = "leaves them out" if few else f"refuses the file for more than {program.most_unknown}"
    flat = all(name_style(key, parsed).endswith("-flat") for key, parsed in unknown.items())
    if flat:
        what = "drops the text encoder" if few else "refuses the file"
        joint = "_" if facts.format == "webui" else "."
        return [f"{what}: its keys lack `text_model{joint}`; export as webui"]
    if all(part_style(key) not in ("", "lora_down") for key in unknown) and program.parts == {"lora_down"}:
        return ["knows only `lora_down` and `lora_up`, not `lora_A` and `lora_B`; export it again"]
    first = shown(next(iter(unknown)), 60)
    lost = "refuses the file" if client == "diffusers" and facts.format == "webui" else lost
    return [f"does not know {len(unknown)} of {len(facts.keys)} keys (`{first}`) and {lost}; export as webui"]


def other_reasons(client: str, facts: Facts) -> list[str]:
    """Return what follows from keys that are no factors: biases, scales, embeddings, alphas of 0."""
    reasons, keys = [], facts.file_keys
    if keys.embeddings and client != "WebUI":
        what = "refuses the file for" if client == "diffusers" else "leaves out"
        reasons.append(f"{what} the embedding that comes with it; leave it out with --drop embedding")
    if keys.stray and client == "diffusers":
        reasons.append(f"refuses the file for `{shown(keys.stray[0], 60)}`; export it again")
    lost = next((key for key in keys.stray if key.startswith("lora_")), None)
    if client == "WebUI" and lost is not None:
        reasons.append(f"loses the whole file for `{shown(lost, 60)}`; export it again")
    if facts.any_end(".scale_weight") or facts.any_end(".weight_scale"):
        reasons.append("does not know the scales of its fp8 values; export it again")
    if client == "kohya sd-scripts" and any(
        update.has_rank and update.alpha == 0.0 for update in facts.weights.updates.values()
    ):
        reasons.append("takes alpha 0 for the rank, so layers that are switched off act; export it again")
    if facts.any_part(".lora_magnitude_vector") and facts.format == "webui":
        reasons.append(
            {
                "WebUI": "loses the whole file for its `lora_magnitude_vector` keys",
                "diffusers": "refuses the file for its `lora_magnitude_vector` keys",
            }.get(client, "does not know `lora_magnitude_vector` and loads DoRA as a plain LoRA")
            + "; export it again"
        )
    scaled = any(update.has_rank and update.scale != 1.0 for update in facts.weights.updates.values())
    if client == "WebUI" and scaled and any(part_style(key).startswith("lora_A") for key in facts.keys):
        reasons.append("ignores the alphas beside `lora_A` and `lora_B`; export it again")
    return reasons + _biases(client, facts)


def _biases(client: str, facts: Facts) -> list[str]:
    """Return what becomes of differences of biases and norms, and of LoRA on embeddings."""
    updates = facts.weights.updates
    biases = [key for key in updates if key.is_bias]
    of_factors = [
        key for key, parsed in facts.file_keys.parsed.items() if parsed and parsed.part == "up_bias"
    ]
    if of_factors and client != "diffusers":
        return [f"does not know `{shown(of_factors[0], 60)}` and leaves such biases out; export it again"]
    if of_factors and facts.any_part(".lora_magnitude_vector"):
        return ["refuses the file: PEFT has no biases beside DoRA"]
    if client == "stable-diffusion.cpp" and (facts.any_end(".w_norm") or facts.any_end(".b_norm")):
        return ["does not know `w_norm` and `b_norm`; export it again"]
    if client != "WebUI":
        return []
    layers = {key: updates.get(ModuleKey(key.component, key.layer)) for key in biases}
    alone = next((key for key, update in layers.items() if update is None), None)
    if alone is not None:
        return [f"loses the whole file for `{alone.path}`, a bias without a difference of the weight"]
    parsed = {key.module: key.part for key in facts.file_keys.parsed.values() if key is not None}
    norms = next((k for k, part in parsed.items() if part == "w_norm" and k.bias not in parsed), None)
    if norms is not None:
        return [f"loses the whole file for `{norms.path}`, a `w_norm` without its `b_norm`"]
    if any("embeddings." in key.path and update.kind != "full" for key, update in updates.items()):
        return ["loses the whole file for its factors of an embedding"]
    beside = [key for key, update in layers.items() if update is not None and update.kind != "full"]
    return [f"leaves out the biases of {len(beside)} layers with factors"] if beside else []
