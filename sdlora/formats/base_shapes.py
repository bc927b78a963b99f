"""The shapes of the layers that an adapter is for: the true model's, a given base's, or one of another width.

A file's own shapes prove nothing, since factors may be stored in the wrong number of dimensions: the WebUIs
reshape them, kohya and diffusers refuse the file (formats.md 1.2). So proofs and what is said of other
programs go by these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from ..families.layer_shapes import Shape, kernel_of, true_shapes


@dataclass(frozen=True)
class BaseShapes:
    """What shape each layer of a base has.

    Attributes:
        family: its family's name; None if that is not known, so that nothing is.
        is_true: whether its layers are as wide as the true model's; else only the kernels are known.
        given: the shapes of a base that is at hand.
    """

    family: str | None
    is_true: bool = False
    given: Mapping[ModuleKey, Shape] | None = None

    @staticmethod
    def of_adapter(
        weights: AdapterWeights, family: str | None, given: Mapping[ModuleKey, Shape] | None = None
    ) -> BaseShapes:
        """Return the shapes of the base that an adapter is for.

        It is the true model if at least half of the layers have its sides; adapters of small models of the
        same build have few.
        """
        if family is None or given is not None:
            return BaseShapes(family, given is not None, given)
        known = [
            (update.shape, true)
            for module, update in weights.updates.items()
            if (true := true_shapes(family).get(module.component, {}).get(module.path)) is not None
        ]
        fitting = sum(_is_same_layer(shape, true) for shape, true in known)
        return BaseShapes(family, bool(known) and 2 * fitting >= len(known))

    def wanted(self, module: ModuleKey, shape: Shape) -> Shape | None:
        """Return the shape of a layer's weight; None if the base has no such layer.

        Args:
            module: the layer.
            shape: of the update, which tells the sides where only the kernel is known.
        """
        if self.given is not None:
            return self.given.get(module)
        if self.family is None:
            return shape
        known = true_shapes(self.family)
        if self.is_true and known.get(module.component):
            return known[module.component].get(module.path)
        return _with_kernel(shape, kernel_of(self.family, module.component, module.path))

    def fits(self, module: ModuleKey, update: Update) -> bool:
        """Tell whether an update is one of the layer, in the layer's own dimensions."""
        return self.wanted(module, update.shape) in (update.shape, None)

    def applied(self, weights: AdapterWeights) -> AdapterWeights:
        """Return an adapter with every update in its layer's own dimensions.

        What is of another layer stays as it is: whoever is to use it says so.
        """
        updates: dict[ModuleKey, Update] = {}
        for module, update in weights.updates.items():
            wanted = self.wanted(module, update.shape)
            try:
                updates[module] = update if wanted is None else update.in_shape(wanted)
            except ValueError:
                updates[module] = update
        return AdapterWeights(updates)

    def stored_otherwise(self, weights: AdapterWeights) -> dict[ModuleKey, tuple[Shape, Shape]]:
        """Return the plain pairs that a file stores in another shape than their layer's: (has, wanted)."""
        return {
            module: (update.shape, wanted)
            for module, update in weights.all_items()
            if isinstance(update, LowRankPair)
            and (wanted := self.wanted(module, update.shape)) is not None
            and wanted != update.shape
        }


def as_in_base(weights: AdapterWeights, family: str | None) -> AdapterWeights:
    """Return an adapter with every update in its layer's own dimensions, as far as its family tells them."""
    return BaseShapes.of_adapter(weights, family).applied(weights)


def _is_same_layer(shape: Shape, true: Shape) -> bool:
    """Tell whether two shapes hold as many values and rows, whatever their number of dimensions."""
    return shape[:1] == true[:1] and math.prod(shape) == math.prod(true)


def _with_kernel(shape: Shape, kernel: tuple[int, int] | None) -> Shape:
    """Return an update's shape with the kernel that its layer has, where it holds as many values."""
    if len(shape) not in (2, 4):
        return shape
    size = math.prod(kernel) if kernel else 1
    if (len(shape) == 4 and tuple(shape[2:]) not in ((1, 1), kernel)) or (len(shape) == 4 and size > 1):
        return shape  # of another kernel, or of this one already
    return shape if shape[1] % size else (shape[0], shape[1] // size, *(kernel or ()))
