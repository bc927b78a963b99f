"""Every operation of adapter surgery against plain float64 arithmetic on whole weight matrices.

``python -m tools.surgery_reference`` runs the operations as the command line does, on files: adapters for
every seventh of the 1052 layers of SDXL (``--every 1`` for all; true names, sides an eighth of the true ones)
and a whole checkpoint of such shapes in the original layout. The references know no factors: they add, cut
(full SVD) and round dense float64 matrices. Each row gives the largest relative Frobenius error of a module,
and what rounding each stored factor once to the file's number format allows; for cuts also the excess over
the best possible error of that rank (Eckart and Young). Exit code 1 if a row is beyond what is allowed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.adapters.kinds.dora import DoRA
from sdlora.families.ldm import StoredKey, by_key, text_key_map, unet_key_map
from sdlora.families.table import family_info
from sdlora.formats import names
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.surgery.bake import bake_checkpoint
from sdlora.surgery.convert import convert_adapter
from sdlora.surgery.diff import diff_adapters
from sdlora.surgery.extract import extract_adapter
from sdlora.surgery.merge import merge_adapters
from sdlora.surgery.methods import layer_seed
from sdlora.surgery.resize import resize_adapter
from tools.adapter_matrix import DTYPES, kinds_of, layers_of, random_lora, shrunk, true_shapes

Dense = dict[ModuleKey, Tensor]
FAMILY = "sdxl"
RANK = 3


def dense(weights: AdapterWeights) -> Dense:
    """Return every dW as a float64 matrix (out, in * kh * kw)."""
    products = {}
    for module, update in weights.all_items():
        if isinstance(update, LowRankPair):
            product = update.up.flatten(1).double() @ update.down.flatten(1).double()
            products[module] = product * (update.alpha / update.rank)
        else:
            products[module] = update.to(torch.float64).delta().flatten(1)
    return products


def scaled(terms: Dense, factor: Callable[[ModuleKey], float]) -> Dense:
    """Return every matrix times its module's factor."""
    return {module: matrix * factor(module) for module, matrix in terms.items()}


def added(*sums: Dense) -> Dense:
    """Return the sum of updates; a missing one counts as zero."""
    total: Dense = {}
    for terms in sums:
        for module, matrix in terms.items():
            total[module] = total[module] + matrix if module in total else matrix
    return total


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank, by the full SVD."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


class Checks:
    """Compares results with references, prints rows and counts failures."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.num_rows = self.num_failures = 0

    def layers(self) -> dict[ModuleKey, tuple[int, ...]]:
        """Return the layers that adapters are made for, with their shapes."""
        chosen = list(layers_of(FAMILY, "all").items())[:: self.every]
        assert {len(shape) for _, shape in chosen} == {2, 4}, "linear layers and convolutions"
        return dict(chosen)

    def row(self, label: str, error: float, allowed: float, more: str = "") -> None:
        """Print one comparison."""
        self.num_rows += 1
        failed = not error <= allowed
        self.num_failures += failed
        mark = "FAILED " if failed else ""
        print(f"  {label:<54} {mark}{error:.1e} (allowed {allowed:.1e}){more}", flush=True)

    def adapter(self, label: str, path: Path, wanted: Dense, dtype: str) -> None:
        """Compare an adapter file with dense updates."""
        actual = dense(read_adapter(path).weights)
        assert set(actual) == set(wanted), f"{label}: other modules"
        worst = max(float((actual[m] - wanted[m]).norm() / wanted[m].norm()) for m in wanted)
        # a row of k products of two rounded numbers, no cancellation within a factor
        self.row(label, worst, rounding(dtype), f"; {len(actual)} modules")

    def cut(self, label: str, path: Path, whole: Dense, dtype: str) -> None:
        """Compare a cut adapter with the best there is at each module's rank."""
        weights = read_adapter(path).weights
        actual = dense(weights)
        assert set(actual) == set(whole), f"{label}: other modules"
        excess = 0.0
        for module, matrix in whole.items():
            values = torch.linalg.svdvals(matrix)
            best = float(values[weights.updates[module].rank :].norm() / values.norm())
            reached = float((actual[module] - matrix).norm() / values.norm())
            excess = max(excess, (max(reached**2 - best**2, 0.0)) ** 0.5)
        ranks = sorted({pair.rank for pair in weights.updates.values()})
        more = f"; rank {ranks[0]} to {ranks[-1]}, {len(actual)} modules"
        self.row(f"{label}: beyond the best of its rank", excess, rounding(dtype), more)


def rounding(dtype: str) -> float:
    """Return the relative error of a product whose factors were each rounded once, and a little room."""
    return 2.5 * torch.finfo(DTYPES[dtype]).eps / 2


def saved(folder: Path, name: str, weights: AdapterWeights, dtype: str) -> Path:
    """Write an adapter in WebUI's format."""
    path = folder / f"{name}.safetensors"
    info = AdapterInfo(family=FAMILY, name=name)
    write_adapter(AdapterFile(weights, info), "webui", path, DTYPES[dtype], family_info(FAMILY))
    return path


def merging(checks: Checks, folder: Path, dtype: str) -> None:
    """Exact sums, cut sums, TIES and DARE."""
    shapes = checks.layers()
    first = random_lora(shapes, DTYPES[dtype])
    other = AdapterWeights(
        {m: LowRankPair(p.down.flip(0) * 0.7, p.up * -1.3, 1.7) for m, p in first.items() if hash_of(m) % 3}
    ).to(DTYPES[dtype])
    files = [saved(folder, "one", first, dtype), saved(folder, "other", other, dtype)]
    sources = [(files[0], 0.8), (files[1], {"unet": -0.3, "text_encoder": 0.1, "text_encoder_2": 0.25})]
    a = scaled(dense(first), lambda m: 0.8 * (0.5 if m.path.startswith("up_blocks.1") else 1.0))
    b = scaled(dense(other), lambda m: {"unet": -0.3, "text_encoder": 0.1}.get(m.component, 0.25))
    blocks = [{"up_blocks.1": 0.5}, {}]
    total, out = added(a, b), folder / "merged.safetensors"
    merge_adapters(sources, out, blocks=blocks, overwrite=True)
    checks.adapter(f"merge, by component and block, {dtype}", out, total, dtype)
    merge_adapters(sources, out, blocks=blocks, rank=RANK, overwrite=True)
    checks.cut(f"merge --rank {RANK}, {dtype}", out, total, dtype)
    merge_adapters(sources, out, blocks=blocks, energy=0.9, overwrite=True)
    checks.cut(f"merge --energy 0.9, {dtype}", out, total, dtype)
    for method in ("ties", "dare", "dare-ties"):
        merge_adapters(
            sources, out, blocks=blocks, method=method, density=0.3, rank=10**4, dtype="fp32", overwrite=True
        )
        actual, worst, num_close = dense(read_adapter(out).weights), 0.0, 0
        for module in total:
            terms = {place: t[module] for place, t in enumerate((a, b)) if module in t}
            wanted, close = by_method(method, terms, module)
            num_close += int(close.sum())
            difference = (actual[module] - wanted).masked_fill(close, 0.0)
            worst = max(worst, float(difference.norm() / wanted.norm()))
        label = f"merge --method {method} --density 0.3, {dtype} -> fp32"
        # whole updates are float32 there
        checks.row(label, worst, 1e-6, f"; {len(total)} modules, {num_close} entries on the border left out")


def hash_of(module: ModuleKey) -> int:
    """Return a number that is the same in every process."""
    return sum(map(ord, module.path))


def by_method(method: str, terms: Mapping[int, Tensor], module: ModuleKey) -> tuple[Tensor, Tensor]:
    """Return TIES or DARE on dense matrices, written from the papers, and where rounding decides.

    An entry as large as the border of trimming, or a sum of nearly nothing, goes one way or the other by the
    last digit; such entries are counted and not compared.
    """
    kept = []
    close = torch.zeros_like(next(iter(terms.values())), dtype=torch.bool)
    for place, term in terms.items():
        if method == "ties":
            border = term.abs().flatten().sort(descending=True).values[max(1, round(0.3 * term.numel())) - 1]
            close |= (term.abs() / border - 1).abs() < 1e-5
            kept.append(term * (term.abs() >= border))
        else:
            generator = torch.Generator().manual_seed(layer_seed(0, module, place))
            kept.append(term * (torch.rand(term.shape, generator=generator) < 0.3) / 0.3)
    stack = torch.stack(kept)
    if method == "dare":
        return stack.sum(0), torch.zeros_like(close)
    if len(kept) > 1:
        close |= (stack.sum(0).abs() < 1e-5 * stack.abs().amax(0)) & (stack != 0).any(0)
    agree = (torch.sign(stack) == torch.sign(stack.sum(0))) & (stack != 0)
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1), close


def resizing(checks: Checks, folder: Path, dtype: str) -> None:
    """Cuts to a rank, an energy share and an error."""
    weights = random_lora(checks.layers(), DTYPES[dtype])
    source, out, whole = saved(folder, "whole", weights, dtype), folder / "small.safetensors", dense(weights)
    for setting in ({"rank": RANK}, {"energy": 0.8}, {"error": 0.4}):
        resize_adapter(source, out, overwrite=True, **setting)  # type: ignore[arg-type]
        label = ", ".join(f"--{key} {value}" for key, value in setting.items())
        checks.cut(f"resize {label}, {dtype}", out, whole, dtype)
        smallest = read_adapter(out).weights
        for module, matrix in whole.items():
            squares = torch.linalg.svdvals(matrix).square()
            allowed = {"energy": 0.2, "error": 0.16}.get(next(iter(setting)))
            if allowed is not None:
                tails = squares.flip(0).cumsum(0).flip(0) / squares.sum()
                least = max(1, int((tails > allowed).sum()))
                assert smallest.updates[module].rank == least, f"{label}: {module} could have rank {least}"


def checkpoint(folder: Path, dtype: str) -> tuple[Path, dict[ModuleKey, StoredKey]]:
    """Write random weights of SDXL's layout; return the file and where each matrix lies."""
    shapes = {m: shrunk(shape) for m, shape in true_shapes(FAMILY).items()}
    info, generator = family_info(FAMILY), torch.Generator().manual_seed(7)
    key_map: dict[ModuleKey, StoredKey] = {}
    tensors: dict[str, Tensor] = {}
    for component in ("unet", *(encoder_info.component for encoder_info in info.text_encoders)):
        own_names = {
            m.path.removeprefix(names.TEXT_PREFIX) + ".weight": m for m in shapes if m.component == component
        }
        encoder = next(
            (encoder_info for encoder_info in info.text_encoders if encoder_info.component == component), None
        )
        stored_keys = unet_key_map(own_names) if encoder is None else text_key_map(own_names, encoder)
        key_map |= {own_names[name]: place for name, place in stored_keys.items()}
        for key, inside in by_key(stored_keys).items():
            first = shapes[own_names[inside[0]]]
            shape = tuple(reversed(first)) if stored_keys[inside[0]].transposed else first
            tensors[key] = torch.randn(shape[0] * len(inside), *shape[1:], generator=generator) * 0.05
    path = folder / f"model-{dtype}.safetensors"
    save_file({key: tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}, path)
    return path, key_map


def matrices(
    path: Path, key_map: Mapping[ModuleKey, StoredKey], shapes: Mapping[ModuleKey, Sequence[int]]
) -> Dense:
    """Return the float64 matrix of every module of a checkpoint."""
    stored = load_file(path)
    return {m: key_map[m].take(stored[key_map[m].key], shapes[m]).double().flatten(1) for m in shapes}


def beyond_rounding(actual: Tensor, exact: Tensor, sizes: Tensor, dtype: torch.dtype) -> float:
    """Return by how much a value is further from the exact one than rounding to nearest brings it.

    Relative to ``sizes``, what was added up without signs: the sum itself is of float32.
    """
    numbers = torch.finfo(dtype)
    exponent = exact.abs().clamp(min=numbers.smallest_normal).log2().floor()
    half_unit = torch.exp2(exponent) * (numbers.eps / 2)
    return float((((actual - exact).abs() - half_unit) / sizes).max().clamp(min=0.0))


def baking(checks: Checks, folder: Path, dtype: str) -> None:
    """Into a checkpoint, rounded once to its format; out of it again; extracted from it."""
    weights = random_lora(checks.layers(), torch.float32)
    lora = saved(folder, "baked-in", weights, "fp32")
    base, key_map = checkpoint(folder, dtype)
    shapes = {m: shrunk(shape) for m, shape in true_shapes(FAMILY).items() if m in weights.updates}
    before, update = matrices(base, key_map, shapes), scaled(dense(weights), lambda m: 0.8)
    out = folder / "model-baked.safetensors"
    bake_checkpoint(base, [(lora, 0.8)], out, overwrite=True)
    after, number = matrices(out, key_map, shapes), DTYPES[dtype]
    worst = 0.0
    for module in shapes:
        pair = weights.pairs[module]
        unsigned = pair.up.flatten(1).double().abs() @ pair.down.flatten(1).double().abs()
        sizes = before[module].abs() + unsigned * (0.8 * pair.scale)
        exact = before[module] + update[module]
        worst = max(worst, beyond_rounding(after[module], exact, sizes, number))
    same = sum(int((after[m] == (before[m] + update[m]).to(number).double()).sum()) for m in shapes)
    share = same / sum(matrix.numel() for matrix in after.values())
    checks.row(
        f"bake into {dtype}: beyond rounding to nearest, of |W| + |dW|",
        worst,
        8 * torch.finfo(torch.float32).eps,
        f"; {100 * share:.3f} % of the values of {len(shapes)} matrices as float64 rounds them",
    )
    untouched, rest = load_file(base), load_file(out)
    changed = {key_map[m].key for m in shapes}
    assert all(torch.equal(rest[key], untouched[key]) for key in untouched if key not in changed)
    undone = folder / "model-undone.safetensors"
    bake_checkpoint(out, [(lora, 0.8)], undone, inverse=True, overwrite=True)
    again = matrices(undone, key_map, shapes)
    worst = max(
        float(((again[m] - before[m]).abs() / (before[m].abs() + update[m].abs()).clamp(min=1e-3)).max())
        for m in shapes
    )
    checks.row(f"bake --inverse in {dtype}: relative to |W| + |dW|", worst, 2 * torch.finfo(number).eps)
    extracting(checks, folder, (base, out), after, before, dtype)


def extracting(
    checks: Checks, folder: Path, files: tuple[Path, Path], after: Dense, before: Dense, dtype: str
) -> None:
    """The difference of two checkpoints, cut; the reference is the full SVD of the stored difference."""
    again = folder / "extracted.safetensors"
    extract_adapter(*files, again, rank=8, targets="all", dtype="fp32", overwrite=True)
    actual, excess, ratio = dense(read_adapter(again).weights), 0.0, 1.0
    for module, matrix in actual.items():
        difference = after[module] - before[module]
        values = torch.linalg.svdvals(difference)
        best = float(values[8:].norm() / values.norm())
        reached = float((matrix - difference).norm() / values.norm())
        excess = max(excess, reached - best)
        ratio = max(ratio, reached / best if best > 1e-5 else 1.0)
    more = f"; error up to {ratio:.4f} times the best possible, {len(actual)} modules"
    # randomised: within a hundredth of the norm of the best there is
    checks.row(f"extract --rank 8, {dtype}: beyond the best of its rank", excess, 1e-2, more)


def converting(checks: Checks, folder: Path) -> None:
    """Number formats, and other kinds as plain LoRA."""
    shapes = checks.layers()
    weights = random_lora(shapes, torch.float32)
    source, whole = saved(folder, "source", weights, "fp32"), dense(weights)
    for dtype in ("fp32", "fp16", "bf16"):
        for format in ("webui", "diffusers", "peft"):
            out = folder / (f"converted-{dtype}" if format == "peft" else f"converted-{dtype}.safetensors")
            convert_adapter(source, out, format=format, dtype=dtype, overwrite=True)  # type: ignore[arg-type]
            checks.adapter(f"convert fp32 webui -> {format} {dtype}", out, whole, dtype)
    by_kind: dict[str, dict[ModuleKey, Update]] = {}
    for module, shape in list(shapes.items())[::7]:
        for kind, update in kinds_of(shape).items():
            by_kind.setdefault(kind, {})[module] = update
    for kind, updates in by_kind.items():
        adapter = AdapterWeights(updates)
        if any(isinstance(kind_update, DoRA) for kind_update in updates.values()):
            continue
        path, out = saved(folder, "kind", adapter, "fp16"), folder / "plain.safetensors"
        convert_adapter(path, out, to_lora=True, dtype="fp32", overwrite=True)
        checks.adapter(f"convert --to-lora {kind}, fp16 -> fp32", out, dense(adapter), "fp32")


def comparing(checks: Checks, folder: Path) -> None:
    """Cosines, norms and distances."""
    shapes = checks.layers()
    first = random_lora(shapes, torch.float32)
    other = AdapterWeights({m: LowRankPair(p.down + p.down.flip(0), p.up, 3.1) for m, p in first.items()})
    difference = diff_adapters(saved(folder, "a", first, "fp32"), saved(folder, "b", other, "fp32"))
    a, b, worst = dense(first), dense(other), 0.0
    for module, likeness in difference.modules.items():
        x, y = a[module], b[module]
        cosine = float((x * y).sum() / (x.norm() * y.norm()))
        assert likeness.cosine is not None
        worst = max(worst, abs(likeness.cosine - cosine), abs(likeness.norm / float(x.norm()) - 1))
        worst = max(worst, abs(likeness.other_norm / float(y.norm()) - 1))
        worst = max(worst, abs(likeness.distance / float((x - y).norm()) - 1))
    checks.row("diff: cosine, norms, distance", worst, 1e-6, f"; {len(difference.modules)} modules")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparisons; return 1 if any is beyond what is allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--every", type=int, default=7, help="take every Nth layer; 1 for all, which takes long"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    checks, started = Checks(options.every), time.perf_counter()
    print("largest relative Frobenius error of a module, unless a row says otherwise")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in DTYPES:
            merging(checks, folder, dtype)
            resizing(checks, folder, dtype)
        for dtype in DTYPES:
            baking(checks, folder, dtype)
        converting(checks, folder)
        comparing(checks, folder)
    seconds = time.perf_counter() - started
    print(f"\n{checks.num_rows} rows, {checks.num_failures} failures, {seconds:.0f} s")
    return 1 if checks.num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
