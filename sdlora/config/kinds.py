"""What settings mean for each kind of adapter: its usual size, what does not affect it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KindRules:
    """One kind of adapter, as its settings see it.

    Attributes:
        low_rank: whether it has up and down factors, which dropout, LoRA+ and other starts work on.
        only_for: settings of the section ``adapter`` that no other kind uses.
        no_subtracted_start: why it cannot start at the base's own weight (PiSSA, OLoRA); empty if it can.
        no_rslora: why ``adapter.scaling=rslora`` is not possible; empty if it is.
        lora_ranks: rank of a LoRA that takes as much room as one rank of this kind.
        alpha: the usual alpha; None for the rank, which gives scale 1.
        alpha_reason: why.
        rate_by_rank: whether the usual learning rate fits alpha / rank = 1; else it fits alpha = 1.
    """

    low_rank: bool = True
    only_for: tuple[str, ...] = ()
    no_subtracted_start: str = ""
    no_rslora: str = ""
    lora_ranks: int = 1
    alpha: float | None = None
    alpha_reason: str = "equal to the rank: scale 1"
    rate_by_rank: bool = True

    @property
    def follows_base(self) -> bool:
        """Whether rank and alpha that a base's author recommends, meant for a LoRA, fit this kind."""
        return self.lora_ranks == 1 and self.alpha is None


KIND_RULES: dict[str, KindRules] = {
    "lora": KindRules(),
    "dora": KindRules(no_subtracted_start="cannot be undone in a DoRA file; use adapter.kind=lora"),
    # at alpha 1, a step changes a LoHa about as much as a LoRA of scale 1
    "loha": KindRules(
        low_rank=False,
        lora_ranks=2,
        alpha=1.0,
        alpha_reason="usual for LoHa, whose factors start large",
        rate_by_rank=False,
    ),
    "lokr": KindRules(
        low_rank=False,
        only_for=("lokr_factor",),
        no_rslora="has no effect on LoKr's full factors; use standard",
    ),
}
"""A kind that can be trained has a line here and its name in :data:`sdlora.config.adapter.AdapterKind`."""
