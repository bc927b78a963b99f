"""What settings do with their images: placed for the base, captioned and held out as in training.

No weight is read: the base is used as a blueprint only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...config.schema import Config
from ...families.attention import Attention, Attentions
from ...families.base import DiffusionModel
from ...families.loading import family_blueprint, load_model
from ...families.table import FAMILIES
from ..batching.prepare import base_facts
from ..reading.measure import Progress
from .doctor import Report
from .examination import examine_data


def examine_settings(
    config: Config,
    *,
    multiple: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return the findings in the folders that settings train on, and what each image is used for.

    Args:
        config: the settings; open ones are decided as for training.
        multiple: image sides are multiples of this many px; the base's own when None.
        batch_size: also count the batches of an epoch; that of the settings when None.
        progress: called after each file.

    Raises:
        DatasetError: when a folder is missing, is a file, or holds no images.
        ModelError: for a base that cannot be used.
        ConfigError: when the resolution is smaller than the size multiple.
    """
    blueprint = _blueprint(config)
    facts = base_facts(blueprint, "cpu")
    return examine_data(
        config,
        resolution=config.data.resolution or facts.native_resolution,
        multiple=multiple or blueprint.facts.size_multiple,
        base=blueprint.base.title,
        batch_size=batch_size,
        progress=progress,
    )


def _blueprint(config: Config) -> DiffusionModel:
    """Return the base without its weights; a family's own where only that is named."""
    device = torch.device("meta")
    if config.model.base in FAMILIES and not Path(config.model.base).exists():
        usual = Attention("sdpa", "nothing is computed")
        return family_blueprint(config.model.base, dtype=torch.float32, attention=Attentions(usual, usual))
    return load_model(config.model, dtype=torch.float32, device=device)
