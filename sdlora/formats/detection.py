"""Which model family an adapter was made for, told from its layers and, failing that, its header."""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters.canonical import AdapterWeights

CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text that cross-attention reads, which no two of these families share."""

_HEADER_FAMILIES = (
    ("ss_base_model_version", "sdxl_", "sdxl"),
    ("ss_base_model_version", "sd_v2", "sd2"),
    ("ss_base_model_version", "sd_v1", "sd1"),
    ("modelspec.architecture", "stable-diffusion-xl", "sdxl"),
    ("modelspec.architecture", "stable-diffusion-v2", "sd2"),
    ("modelspec.architecture", "stable-diffusion-v1", "sd1"),
)


def detect_family(weights: AdapterWeights, metadata: Mapping[str, str]) -> str | None:
    """Return ``sd1``, ``sd2``, ``sdxl`` or None; what the layers say goes before what the header says."""
    if weights.updates_of("text_encoder_2"):
        return "sdxl"
    unet = weights.updates_of("unet")
    for path, update in unet.items():
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and update.shape[1] in CONTEXT_WIDTHS:
            return CONTEXT_WIDTHS[update.shape[1]]
    if any(".transformer_blocks.1." in path for path in unet):
        return "sdxl"  # the only one with several transformer blocks in one attention module
    for entry, start, family in _HEADER_FAMILIES:
        if metadata.get(entry, "").startswith(start):
            return family
    widths = {
        update.shape[1]
        for path, update in weights.updates_of("text_encoder").items()
        if path.endswith((".q_proj", ".k_proj", ".v_proj"))
    }
    return "sd2" if widths == {1024} else None  # 768 is both SD1's and SDXL's first encoder
