"""What a run learns: the adapter's layers, their fp32 masters grouped by rate, and where they started.

The values of a group share their learning rate, their number format and whether they decay: usually there is
one group per component; LoRA+, rates of single blocks and DoRA's magnitudes add more. PiSSA and OLoRA start
at a part of the base's own weight. A second, frozen adapter at strength -1 subtracts it again, so the base is
never touched, and what is written is the difference of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapters.attach import attach, attached_layers, set_strengths, write_weights
from ..adapters.blocks import check_patterns, value_for
from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.random_parts import RandomParts
from ..adapters.trainable_layers import TrainedLayer, attach_for_training
from ..config.adapter import PART_KEYS
from ..config.schema import Config
from ..families.base import DiffusionModel
from ..families.facts import ComponentInfo, component_order
from .masters import MasterWeights, ParameterGroup

ADAPTER_NAME = "run"
START_NAME = "run-start"


@dataclasses.dataclass
class TrainableAdapter:
    """The adapter that a run learns.

    Attributes:
        layers: in the order of the components.
        groups: masters by learning rate.
        start: the values each group's masters started at, if these are subtracted again (PiSSA, OLoRA).
        random_parts: leaves out ranks and layers at random, if settings ask for it.
    """

    layers: list[TrainedLayer]
    groups: list[ParameterGroup]
    start: dict[str, Tensor] | None
    random_parts: RandomParts | None = None

    @property
    def strengths(self) -> Mapping[str, float]:
        """The strengths that the adapters in the model act at while it learns, by name."""
        return {ADAPTER_NAME: 1.0} | ({} if self.start is None else {START_NAME: -1.0})

    def parameters(self) -> list[Tensor]:
        """Return the parameters inside the model, in the order of the masters."""
        return [parameter for group in self.groups for parameter in group.master.parameters]

    def masters(self) -> AdapterWeights:
        """Return what was learned so far, relative to the unchanged base: fp32 copies on the CPU."""
        now = self._weights({group.name: group.master.flat.data for group in self.groups})
        return now if self.start is None else difference(now, self._weights(self.start))

    @torch.no_grad()
    def limit(self, longest: float) -> None:
        """Scale back every update whose Frobenius norm is above ``longest``, both factors alike.

        Max-norm regularisation (Srivastava et al. 2014, section 5.1) of scale * up @ down, whose squared norm
        is the sum over (up^T up) * (down down^T), so that the product itself need not be made.
        """
        factors: dict[ModuleKey, dict[str, Tensor]] = {}
        for group in self.groups:
            for (key, name), values in zip(group.slots, group.master.tensors(), strict=True):
                factors.setdefault(key, {})[name] = values
        for layer in self.layers:
            assert isinstance(layer.update, LowRankPair)
            down, up = (factors[layer.key][name] for name in ("lora_down.weight", "lora_up.weight"))
            rows, columns = down.flatten(1), up.flatten(1)  # (rank, in), (out, rank)
            norm = ((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0).sqrt() * layer.update.scale
            share = (longest / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1).sqrt()
            down.mul_(share)
            up.mul_(share)

    def freeze_text(self, model: DiffusionModel) -> None:
        """Let the text encoders learn no more."""
        for group in self.groups:
            if group.slots[0][0].component != model.info.denoiser.component:
                group.master.freeze()

    def tensors(self) -> dict[str, Tensor]:
        """Return the flat starting values by name, for checkpoints, if they are subtracted."""
        return {f"{name}.start": flat for name, flat in (self.start or {}).items()}

    def restore_start(self, model: DiffusionModel, flats: Mapping[str, Tensor]) -> None:
        """Take the starting values from a checkpoint, instead of the newly computed ones."""
        if self.start is not None:
            self.start = {name: flat.clone() for name, flat in flats.items()}
            write_weights(list(attached_layers(model, START_NAME)), self._weights(self.start))

    def _weights(self, flats: Mapping[str, Tensor]) -> AdapterWeights:
        tensors: dict[ModuleKey, dict[str, Tensor]] = {}
        for group in self.groups:
            parts = group.master.shaped(flats[group.name])
            for (key, factor), part in zip(group.slots, parts, strict=True):
                tensors.setdefault(key, {})[factor] = part.detach().cpu().clone()
        return AdapterWeights({layer.key: layer.rebuilt(tensors[layer.key]) for layer in self.layers})


def make_trainable(model: DiffusionModel, config: Config, weights: AdapterWeights) -> TrainableAdapter:
    """Put the starting adapter into a model and make its masters.

    Args:
        model: gets the adapter.
        config: final settings.
        weights: where to start, float32.

    Raises:
        ConfigError: if a pattern of ``optimizer.block_rates`` matches no layer.
        AdapterFileError: if the adapter does not fit the model.
    """
    check_patterns("optimizer.block_rates", config.optimizer.block_rates, weights.updates)
    subtracted = config.adapter.init in ("pissa", "olora")
    if subtracted:  # round first: both adapters then hold the very same numbers and cancel out exactly
        weights = weights.to(model.facts.dtype).to(torch.float32)
    layers = attach_for_training(model, weights, ADAPTER_NAME, dropout=config.adapter.dropout)
    if subtracted:
        attach(model, weights, START_NAME)
        set_strengths(model, {ADAPTER_NAME: 1.0, START_NAME: -1.0})
    layers.sort(key=lambda layer: (component_order(layer.key.component), layer.key))
    groups = _groups(config, model.info.components, layers)
    start = {group.name: group.master.flat.data.clone() for group in groups} if subtracted else None
    return TrainableAdapter(layers, groups, start, _random_parts(model, config, layers))


def _random_parts(
    model: DiffusionModel, config: Config, layers: Sequence[TrainedLayer]
) -> RandomParts | None:
    shares = {"rank_share": config.adapter.rank_dropout, "module_share": config.adapter.module_dropout}
    return RandomParts(model, ADAPTER_NAME, layers, **shares) if any(shares.values()) else None


def difference(now: AdapterWeights, start: AdapterWeights) -> AdapterWeights:
    """Return a plain LoRA that is exactly the difference of two; its rank is the sum of theirs."""
    updates: dict[ModuleKey, Update] = {}
    for key, pair in now.items():
        other = start.pairs[key]
        down = torch.cat([pair.down, other.down])
        # up now (out, 2r) and down (2r, in): up @ down = up_now @ down_now - up_start @ down_start
        up = torch.cat([pair.up, -other.up], 1)
        updates[key] = LowRankPair(down, up, pair.scale * down.shape[0])
    return AdapterWeights(updates)


def _groups(
    config: Config, infos: Mapping[str, ComponentInfo], layers: Sequence[TrainedLayer]
) -> list[ParameterGroup]:
    """Return the groups by component, in each of them the group of the plain rate first."""
    members: dict[tuple[str, bool, float], list[tuple[TrainedLayer, str]]] = {}
    for layer in layers:
        component = layer.key.component
        for factor in layer.parameters:
            plus = config.optimizer.lora_plus_ratio if factor in layer.form.up else 1.0
            times = value_for(config.optimizer.block_rates, layer.key, 1.0) * plus
            members.setdefault((component, factor in layer.form.undecayed, times), []).append((layer, factor))
    groups = []
    for component, magnitude, times in sorted(
        members, key=lambda group: (component_order(group[0]), group[1], group[2] != 1, group[2])
    ):
        rate = config.get(PART_KEYS[infos[component].part].learning_rate)
        assert rate is not None
        slots_there = members[component, magnitude, times]
        master = MasterWeights(
            [layer.parameters[factor] for layer, factor in slots_there],
            [layer.update.tensors()[factor] for layer, factor in slots_there],
        )
        full = component + (" magnitude" if magnitude else "") + (f" x{times!r}" if times != 1 else "")
        slots = tuple((layer.key, factor) for layer, factor in slots_there)
        groups.append(ParameterGroup(full, master, rate * times, slots, decays=not magnitude))
    return groups
