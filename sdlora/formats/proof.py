"""Proof that a written adapter file holds what it should: every update compared, element by element.

Updates are compared in float32. The allowed difference is not a guess: it follows from rounding each
factor once to the file's number format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey, Update, WrappedUpdate
from ..adapters.kinds.table import kind_of
from ..errors import AdapterFileError
from ..families.layer_shapes import Shape
from ..files import replacing
from . import adapter_files, folding
from .base_shapes import BaseShapes
from .clients import Support
from .support import client_support
from .table import FORMATS

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Proof:
    """The result of comparing a written adapter with its source.

    Attributes:
        num_modules: modules compared, which is all of them.
        num_keys: tensors in the file or files.
        largest_difference: largest absolute difference of any element of any update.
        relative_difference: largest difference in a module over the largest |scale| |up| |down| in it.
        tolerance: relative difference that rounding to the number format allows.
        read_by: the readers the file was loaded through.
    """

    num_modules: int
    num_keys: int
    largest_difference: float
    relative_difference: float
    tolerance: float
    read_by: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {**asdict(self), "read_by": list(self.read_by)}


@dataclass(frozen=True)
class Written:
    """An adapter in its place.

    Attributes:
        files: all files written.
        proof: the comparison; None if none was asked for.
        model_hash: SHA-256 of the tensor data, as WebUI and kohya hash adapters.
        clients: which programs load it fully.
    """

    files: tuple[Path, ...]
    proof: Proof | None
    model_hash: str
    clients: tuple[Support, ...]


def write_proven(
    adapter: AdapterFile,
    format: str,
    target: Path,
    dtype: torch.dtype,
    info: FamilyInfo,
    *,
    verify: bool = True,
    base: Mapping[ModuleKey, Shape] | None = None,
) -> Written:
    """Write an adapter under a temporary name, prove it, and only then put it into its place.

    Args:
        adapter: what to write.
        format: a key of :data:`sdlora.formats.table.FORMATS`, one that is written.
        target: the file or the folder; an existing adapter is replaced.
        dtype: number format of the factors.
        info: the family.
        verify: read it back and compare every update.
        base: shapes of the layers of the base that it is for; those of its family when None.

    Raises:
        AdapterFileError: when the format cannot hold it, or the proof fails (then no file is left).
        OutputError: when the place cannot be written.
    """
    shapes = BaseShapes.of_adapter(adapter.weights, info.name, base)
    weights = folding.without_zero_alphas(shapes.applied(adapter.weights))
    adapter = replace(adapter, weights=weights)
    with replacing(target) as temporary:
        try:
            written = adapter_files.write_adapter(adapter, format, temporary, dtype, info)
            back = adapter_files.OpenAdapter(temporary)
            proof: Proof | None = None
            if verify:
                proof, clients = prove(adapter.weights, back, dtype, info, shapes)
            else:
                clients = support_of(back, info, shapes)
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(temporary), str(target))) from error
        model_hash = back.data_hash()
        FORMATS[format].code().make_room(target)
    files = tuple(target / file.relative_to(temporary) if file != temporary else target for file in written)
    return Written(files, proof, model_hash, clients)


def support_of(written: adapter_files.OpenAdapter, info: FamilyInfo, base: BaseShapes) -> tuple[Support, ...]:
    """Return what each client makes of a written adapter."""
    outline = written.outline
    return client_support(
        written.format, info.name, outline.weights, written.keys, outline.info.metadata, base
    )


def prove(
    weights: AdapterWeights,
    written: adapter_files.OpenAdapter,
    dtype: torch.dtype,
    info: FamilyInfo,
    base: BaseShapes | None = None,
) -> tuple[Proof, tuple[Support, ...]]:
    """Read a written adapter back and compare every module with what it should be.

    It is also loaded by the program its format names (diffusers itself, or PEFT), into layers of the base's
    own shapes, unless that is known to misread such adapters (then the second result says so).

    Raises:
        AdapterFileError: when a module is missing, stored in other dimensions than its layer's, or differs by
            more than rounding.
    """
    base = base or BaseShapes.of_adapter(weights, info.name)
    clients = support_of(written, info, base)
    path, back = written.path, base.applied(written.read().weights)
    _check_dimensions(written, base)
    largest, relative = compare(weights, back, dtype, str(path))
    readers = ["sdlora"]
    other = FORMATS[written.format].code().read_back
    misread = {support.client for support in clients if not support.full}
    if other is not None and other.program not in misread:
        readers.append(other.program)
        seen = other.load(path, base.applied(written.outline.weights), info)
        # what it holds in the very same numbers has been compared already
        same = {
            key
            for key, update in seen.all_items()
            if key in back.updates and _identical(update, back.updates[key])
        }
        where = f"{path} (read by {other.program})"
        more = compare(_without(weights, same), _without(seen, same), dtype, where)
        largest, relative = max(largest, more[0]), max(relative, more[1])
    tolerance = relative_rounding(dtype, max(weights.ranks()))
    proof = Proof(len(back), len(written.keys.names), largest, relative, tolerance, tuple(readers))
    return proof, clients


def _check_dimensions(written: adapter_files.OpenAdapter, base: BaseShapes) -> None:
    """Refuse factors in other dimensions than their layer's: some programs reshape them, others do not."""
    for (component, path), (has, wanted) in base.stored_otherwise(written.outline.weights).items():
        if math.prod(has) == math.prod(wanted):
            raise AdapterFileError(
                f"{written.path}: `{component}.{path}` has factors in {len(has)} dimensions, the base in "
                f"{len(wanted)}; this is a fault of sdlora, please report it"
            )


def compare(
    wanted: AdapterWeights, written: AdapterWeights, dtype: torch.dtype, where: str
) -> tuple[float, float]:
    """Return the largest absolute and relative difference between two adapters' updates.

    Raises:
        AdapterFileError: when a module is missing or added, or an element differs by more than rounding
            both factors to ``dtype`` can cause.
    """
    wanted, written = _without_zero_biases(wanted), _without_zero_biases(written)
    missing = set(wanted.updates) ^ set(written.updates)
    if missing:
        first = min(missing)
        raise AdapterFileError(
            f"{where}: {len(missing)} modules are not the same as in the source, the first is "
            f"`{first.component}.{first.path}`; this is a fault of sdlora, please report it"
        )
    with _one_thread():
        return _compare_modules(wanted, written, dtype, where)


def _without_zero_biases(weights: AdapterWeights) -> AdapterWeights:
    """Return an adapter without what changes no bias: PEFT's files have a bias for all layers or for none."""
    zeros = {key for key, update in weights.updates.items() if key.is_bias and folding.is_zero(update)}
    return _without(weights, zeros)


def _compare_modules(
    wanted: AdapterWeights, written: AdapterWeights, dtype: torch.dtype, where: str
) -> tuple[float, float]:
    largest = relative = 0.0
    for module, update in wanted.all_items():
        other = written.updates[module]
        if other.kind != update.kind or _shapes(other) != _shapes(update):
            raise AdapterFileError(
                f"{where}: module `{module.component}.{module.path}` is {other.kind} of {_shapes(other)} "
                f"instead of {update.kind} of {_shapes(update)}; this is a fault of sdlora, please report it"
            )
        difference, allowed, tolerable = largest_difference(update, other, dtype, divided=module.is_bias)
        if not difference <= allowed:  # so that NaN fails, too
            raise AdapterFileError(
                f"{where}: the update of `{module.component}.{module.path}` differs by {difference:.3g} "
                f"from the source, rounding allows {allowed:.3g}; nothing was kept. This is a fault of "
                "sdlora, please report it"
            )
        largest = max(largest, difference)
        relative = max(relative, difference / tolerable * relative_rounding(dtype, update.rank))
    return largest, relative


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the blocks are small, and threads that wait for each other on a busy machine
    took 8 times the processor time (267 million elements, 2 busy cores: 41 s against 5 s)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _largest_of(wanted: LowRankPair, written: LowRankPair, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return (difference, allowed, tolerable): of the worst element, or the largest of the module.

    Works on blocks of rows that stay in the processor's cache, as whole updates of large layers do not.
    """
    if _identical(wanted, written):
        return 0.0, math.inf, 1.0
    ours, theirs = _scaled_factors(wanted), _scaled_factors(written)
    if all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)):
        return 0.0, math.inf, 1.0  # the scale is only elsewhere; multiplying out would add rounding errors
    bound_up, bound_down = rounding_bound(written, dtype)
    num_rows = max(1, _BLOCK_ELEMENTS // ours[1].shape[1])
    largest = tolerable = 0.0
    for start in range(0, len(ours[0]), num_rows):
        rows = slice(start, start + num_rows)
        # two products of the same kind: a fused multiply-subtract rounds differently on some processors, so
        # that equal factors would differ
        difference = (theirs[0][rows] @ theirs[1]).sub_(ours[0][rows] @ ours[1]).abs_()
        bound = bound_up[rows] @ bound_down
        if not bool((difference <= bound).all()):
            worst = int((difference - bound).argmax())
            return float(difference.flatten()[worst]), float(bound.flatten()[worst]), 1.0
        largest, tolerable = max(largest, float(difference.max())), max(tolerable, float(bound.max()))
    return largest, math.inf, tolerable


def largest_difference(
    wanted: Update, written: Update, dtype: torch.dtype, *, divided: bool = False
) -> tuple[float, float, float]:
    """Return (difference, allowed, tolerable) of one module, as :func:`_largest_of` does.

    What is not a plain pair is compared factor by factor, as files hold these factors unscaled and unfolded:
    each value may differ by one rounding, and the scale must be equal. What PEFT's files hold ``divided`` by
    the scale (biases) is divided and multiplied again in float32, two roundings more.
    """
    if isinstance(wanted, LowRankPair) and isinstance(written, LowRankPair):
        return _largest_of(wanted, written, dtype)
    if _identical(wanted, written):
        return 0.0, math.inf, 1.0
    theirs = written.tensors()
    if isinstance(wanted, WrappedUpdate) and isinstance(written, WrappedUpdate):
        of_direction = largest_difference(wanted.direction, written.direction, dtype)
        if not of_direction[0] <= of_direction[1]:
            return of_direction
        inner = wanted.direction.tensors()
        on_top = [(tensor, theirs[n]) for n, tensor in wanted.tensors().items() if n not in inner]
        other = _of_factors(on_top, dtype, 1)
        return (
            other
            if of_direction[0] / of_direction[2] <= other[0] / other[2] or not other[0] <= other[1]
            else of_direction
        )
    if wanted.scale != written.scale:
        return abs(wanted.scale - written.scale), 0.0, 1.0
    if kind_of(wanted).alpha_is_bound and not math.isclose(wanted.alpha, written.alpha, rel_tol=1e-6):
        return abs(wanted.alpha - written.alpha), 0.0, 1.0
    return _of_factors(
        [(factor, theirs[name]) for name, factor in wanted.tensors().items()],
        dtype,
        wanted.rank,
        more=torch.finfo(torch.float32).eps if divided else 0.0,
    )


def _of_factors(
    factors: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype, rank: int, more: float = 0.0
) -> tuple[float, float, float]:
    numbers = torch.finfo(dtype)
    unit, half_step = numbers.eps / 2, numbers.smallest_normal * numbers.eps / 2
    largest = tolerable = 0.0
    for ours, theirs in factors:
        difference = (ours.float() - theirs.float()).abs()
        bound = ours.float().abs() * (unit * (1 + unit) + more) + half_step
        if not bool((difference <= bound).all()):
            worst = int((difference - bound).argmax())
            return float(difference.flatten()[worst]), float(bound.flatten()[worst]), 1.0
        largest = max(largest, float(difference.max()))
        # in the same terms as for a whole update, whose bound is relative_rounding times the largest value
        tolerable = max(tolerable, float(ours.abs().max()) * relative_rounding(dtype, rank))
    return largest, math.inf, tolerable or 1.0


def _scaled_factors(pair: LowRankPair) -> tuple[Tensor, Tensor]:
    """Return (up * alpha / rank, down) as float32 matrices; their product is dW."""
    return pair.up.flatten(1).float() * pair.scale, pair.down.flatten(1).float()


def _identical(update: Update, other: Update) -> bool:
    def same(ours: Tensor, theirs: Tensor) -> bool:
        wide = torch.promote_types(ours.dtype, theirs.dtype)
        return torch.equal(ours.to(wide), theirs.to(wide))

    mine, theirs = update.tensors(), other.tensors()
    return (
        update.kind == other.kind
        and update.scale == other.scale
        and (not kind_of(update).alpha_is_bound or update.alpha == other.alpha)
        and mine.keys() == theirs.keys()
        and all(same(mine[name], theirs[name]) for name in mine)
    )


def _shapes(update: Update) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in update.tensors().items()}


def _without(weights: AdapterWeights, modules: set[ModuleKey]) -> AdapterWeights:
    return AdapterWeights({key: update for key, update in weights.all_items() if key not in modules})


def relative_rounding(dtype: torch.dtype, rank: int) -> float:
    """Return the relative difference of an update that rounding both factors to ``dtype`` can cause.

    ``(1 + u)**2 - 1`` with unit roundoff u = eps / 2 (Higham 2002, section 2.2), plus what computing the two
    updates in float32 to compare them costs: (rank + 3) * eps32 for both together (section 3.1).
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * unit + unit**2 + (rank + 3) * torch.finfo(torch.float32).eps


def rounding_bound(pair: LowRankPair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return matrices (out, rank + 2) and (rank + 2, in) whose product bounds the difference of each element.

    Every stored value x stands for a number within ``u |x| + tiny / 2`` of it, where tiny is the smallest
    subnormal number. Expanding the product of the two factors gives the bound: the relative part times
    ``|scale| |up| |down|``, plus sums of rows and columns for the absolute part.
    """
    numbers = torch.finfo(dtype)
    unit, half_step = numbers.eps / 2, numbers.smallest_normal * numbers.eps / 2
    up, down = (factor.abs() for factor in _scaled_factors(pair))
    # the scale is in `up` in some formats, outside it in others
    of_up = half_step * max(1.0, abs(pair.scale))
    least = of_up * half_step * pair.rank + torch.finfo(torch.float32).smallest_normal
    by_row = (1 + unit) * half_step * up.sum(1, keepdim=True) + least
    left = torch.cat(
        [up * relative_rounding(dtype, pair.rank), torch.full_like(by_row, (1 + unit) * of_up), by_row], 1
    )
    return left, torch.cat([down, down.sum(0, keepdim=True), torch.ones_like(down[:1])], 0)
