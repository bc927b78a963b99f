"""Settings of the adapter: its kind, where it is put, its size and its start.

Read as the section ``adapter`` of :class:`sdlora.config.schema.Config`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from .section import Dropout, GivenPath, PositiveFloat, Section

Targets = Literal["attention", "linear", "all"]
AdapterKind = Literal["lora", "dora", "loha", "lokr"]
"""The kinds in :data:`sdlora.config.kinds.KIND_RULES`."""
Scaling = Literal["standard", "rslora"]
Initialisation = Literal["default", "gaussian", "pissa", "olora"]
AdaptedPart = Literal["denoiser", "text_encoder", "text_encoder_2"]
"""A component of a base as settings name it; each family says which of its components that is."""


class PartKeys(NamedTuple):
    """The dotted keys of one part's adapter; ``switch`` is None for a part that is always adapted."""

    switch: str | None
    rank: str
    alpha: str
    learning_rate: str


PART_KEYS: dict[AdaptedPart, PartKeys] = {
    "denoiser": PartKeys(None, "adapter.rank", "adapter.alpha", "optimizer.learning_rate"),
    "text_encoder": PartKeys(
        "adapter.text_encoder",
        "adapter.text_encoder_rank",
        "adapter.text_encoder_alpha",
        "optimizer.text_encoder_learning_rate",
    ),
    "text_encoder_2": PartKeys(
        "adapter.text_encoder_2",
        "adapter.text_encoder_2_rank",
        "adapter.text_encoder_2_alpha",
        "optimizer.text_encoder_2_learning_rate",
    ),
}


class AdapterConfig(Section):
    """The LoRA: what it is made of, which layers get it and how large it is."""

    kind: AdapterKind = "lora"
    """What each layer's update is made of: two low-rank factors (`lora`), these and a learned size of
    every row of the weight (`dora`), the product of two low-rank matrices element by element (`loha`), or
    a Kronecker product (`lokr`). Every program reads `lora`."""
    targets: Targets = "attention"
    """U-Net layers that get a LoRA: attention projections (`attention`), every linear layer of the
    transformer blocks (`linear`), or these and the convolutions (`all`)."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank of the update of each layer; higher learns more detail and makes a larger file."""
    alpha: PositiveFloat | None = None
    """The update is multiplied by alpha / rank; equal to the rank when left open (for `loha` 1)."""
    scaling: Scaling = "standard"
    """How alpha counts: divided by the rank (`standard`) or by its square root (`rslora`,
    Kalajdzievski 2023), which keeps high ranks learning; files hold the alpha that gives the same."""
    init: Initialisation = "default"
    """Where the factors start: A uniform and B zero (`default`), A normal with deviation 1 / rank and B
    zero (`gaussian`), or at the largest singular vectors (`pissa`, Meng et al. 2024) or an orthonormal
    basis (`olora`, Buyukakyuz 2024) of the base's weight; these two are subtracted again, so the file
    holds the difference from the base, at twice the rank."""
    block_ranks: dict[str, Annotated[int, Field(ge=0, le=1024)]] = Field(default={})
    """Ranks of single blocks, e.g. `{"down_blocks.0" = 4, "up_blocks.1.attentions.*" = 32}`; an
    asterisk is any one name, the longest pattern wins, alpha / rank stays, and 0 leaves the block out."""
    lokr_factor: Annotated[int, Field(ge=2)] | None = None
    """Side of LoKr's small factor; near the square root of the layer's sides when left open."""
    from_file: GivenPath | None = None
    """Continue from this adapter file: its layers, ranks and alphas are taken."""
    dropout: Dropout = 0.0
    """Share of the adapter's inputs set to zero in training."""
    rank_dropout: Dropout = 0.0
    """Share of the ranks left out in training, drawn for each image and layer of the U-Net, so that no rank
    relies on another one; 0.1 to 0.3 against learning few images by heart."""
    module_dropout: Dropout = 0.0
    """Share of the layers whose whole update is left out in training, drawn for each image, in the U-Net;
    0.1 against an adapter that works only in one piece."""
    text_encoder: bool = False
    """Also adapt the text encoder (of SDXL: both, unless `adapter.text_encoder_2` says otherwise)."""
    text_encoder_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank in the text encoder; as in the U-Net when left open."""
    text_encoder_alpha: PositiveFloat | None = None
    """Alpha in the text encoder; equal to its rank when left open."""
    text_encoder_2: bool | None = None
    """Also adapt the base's second text encoder (SDXL); as `adapter.text_encoder` when left open."""
    text_encoder_2_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank in the second text encoder; as in the U-Net when left open."""
    text_encoder_2_alpha: PositiveFloat | None = None
    """Alpha in the second text encoder; equal to its rank when left open."""

    def adapts(self, part: AdaptedPart) -> bool:
        """Return whether that part of the base gets an adapter."""
        second = self.text_encoder if self.text_encoder_2 is None else self.text_encoder_2
        return {"denoiser": True, "text_encoder": self.text_encoder, "text_encoder_2": second}[part]

    def rank_and_alpha(self, part: AdaptedPart) -> tuple[int, float]:
        """Return rank and alpha of that part's adapter, or else the denoiser's; these must be set by then."""
        chosen = [getattr(self, key.partition(".")[2]) for key in PART_KEYS[part][1:3]]
        rank, alpha = chosen[0] or self.rank, chosen[1] or self.alpha
        assert rank is not None and alpha is not None, "settings must be resolved first"
        return rank, alpha

    @property
    def adapts_text(self) -> bool:
        """Whether any text encoder gets an adapter; captions must then be encoded in every step."""
        return self.text_encoder or bool(self.text_encoder_2)
