"""Which programs compute which kinds of adapter, and what the others do with them (formats.md 1.1 and 3)."""

from __future__ import annotations

from ..adapters.canonical import AdapterWeights
from ..adapters.kinds import TITLES, DoRA, LoKr, TuckerPair

_LYCORIS_READERS = ("WebUI", "Forge", "ComfyUI", "stable-diffusion.cpp")


def kind_reasons(client: str, weights: AdapterWeights) -> list[str]:
    """Return what keeps a client from computing an adapter in WebUI keys right; nothing for plain LoRA."""
    reasons = []
    for kind, count in weights.kinds().items():
        if kind not in ("lora", "dora"):
            reasons += _lycoris(client, kind, count)
    doras = [update for update in weights.updates.values() if isinstance(update, DoRA)]
    if doras:
        for kind in sorted({dora.direction.kind for dora in doras} - {"lora"}):
            reasons += _lycoris(client, kind, sum(dora.direction.kind == kind for dora in doras))
        if any(dora.by_output for dora in doras):
            reasons += _dora(client, by_output=True)
        if not all(dora.by_output for dora in doras):
            reasons += _dora(client, by_output=False)
    ranks = {
        update.rank for update in weights.updates.values() if isinstance(update, LoKr) and not update.is_full
    }
    if client == "stable-diffusion.cpp" and 1 in ranks:
        reasons.append("ignores the alpha of LoKr layers of rank 1")
    return list(dict.fromkeys(reasons))


def magnitude_reasons(client: str, weights: AdapterWeights) -> list[str]:
    """Return what keeps a client that reads diffusers keys from computing a DoRA in these right."""
    if client == "diffusers" or not any(isinstance(update, DoRA) for update in weights.updates.values()):
        return []
    return ["does not know `lora_magnitude_vector` and loads DoRA as a plain LoRA"]


def _lycoris(client: str, kind: str, count: int) -> list[str]:
    if client in _LYCORIS_READERS:
        return []
    if client == "diffusers":
        return [f"refuses the whole file for its {TITLES[kind]} layers; convert it to a plain LoRA"]
    done = "fails on them" if kind == TuckerPair.kind else "leaves them out silently"
    return [f"does not read {TITLES[kind]} ({count} layers) and {done}; convert it to a plain LoRA"]


def _dora(client: str, *, by_output: bool) -> list[str]:
    if client in ("diffusers", "kohya sd-scripts", "stable-diffusion.cpp"):
        more = "; export as diffusers" if client == "diffusers" and by_output else ""
        return [f"drops `dora_scale` and loads DoRA as a plain LoRA{more}"]
    if not by_output:
        return []
    if client == "WebUI":
        return [
            "computes this DoRA wrongly: it takes norms of input columns, the file has those of output rows"
        ]
    return ["computes this DoRA differently: it divides by the norm of the base's weight alone"]
