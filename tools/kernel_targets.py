"""``python -m tools.kernel_targets``: the Triton kernels compiled for cards that need not be here.

Each is compiled as a run of SDXL would have it, for every card that is named; reported are the registers of a
thread, what of it spills into memory, and the shared memory of a program.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdlora.families import kernel_operations as kernels

TARGETS = {75: "fp16", 80: "bf16", 86: "bf16", 89: "bf16", 90: "bf16", 120: "bf16"}
"""Compute capability (times ten) -> the number format it is compiled for; Turing has no bfloat16."""
_POINTERS = {
    *("x", "g", "shift", "weight", "bias", "out", "past", "more", "total", "both"),
    *("inner", "of_inner", "of_up", "of_down"),
}
_PRECISE = {"partial", "means", "rstds"}
_LEFT_OPEN = {"groups", "chunks", "rows", "scale"}  # what nothing is assumed of


@dataclass(frozen=True)
class Compiled:
    """A kernel on a card: registers of a thread, bytes of it in memory, bytes of shared memory."""

    kernel: str
    target: int
    registers: int
    spilled: int
    shared: int

    def render(self) -> str:
        """Return registers (and what is spilled) and shared memory."""
        return f"{self.registers}{f' + {self.spilled} B' if self.spilled else ''} / {self.shared}"


def forms() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Yield each kernel with what is compiled in, and its warps."""
    images, rows = kernels._images(), kernels._rows()
    norm: Any = kernels._form(torch.empty(1, 640, 8, 8, device="meta"), None, 32)
    fixed = {"BLOCK": norm["BLOCK"], "SHIFT": True, "SILU": True, "TOKENS": False}
    chunked = {"TOGETHER": kernels.TOGETHER}
    names = ("group_norm", "group_norm_backward", "group_chunks", "group_norm_of_chunks")
    for name in (*names, "group_chunks_backward", "group_norm_of_chunks_backward"):
        for last in (False, True):
            kernel = getattr(images, name)
            given = {**fixed, **chunked, "LAST": last}
            taken = {key: value for key, value in given.items() if key in kernel.arg_names}
            yield kernel, taken, norm["num_warps"]
    row = kernels._of_rows(1280)
    yield rows.layer_norm, {"ADD": True, "BLOCK": row["BLOCK"]}, row["num_warps"]
    yield rows.layer_norm, {"ADD": False, "BLOCK": row["BLOCK"]}, row["num_warps"]
    yield rows.layer_norm_backward, {"BLOCK": row["BLOCK"]}, row["num_warps"]
    for kernel in (rows.geglu, rows.geglu_backward):
        yield kernel, {"BLOCK": kernels._OF_GATES["BLOCK"]}, kernels._OF_GATES["num_warps"]
    for layers, rank in ((1, 16), (3, 16), (1, 64)):
        yield rows.lora_gradients, kernels._of_gradients(layers, rank), 4


def compiled(kernel: Any, constants: dict[str, Any], warps: int, target: int, dtype: str) -> Compiled:
    """Compile a kernel for a card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    left_open = _LEFT_OPEN | ({"width"} if "LAST" in constants else set())
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        absent = constants.get("ADD") is False and name in ("more", "total")
        if name in constants or absent:
            signature[name], values[name] = "constexpr", constants.get(name)
            continue
        is_pointer = name in _POINTERS | _PRECISE
        signature[name] = f"*{'fp32' if name in _PRECISE else dtype}" if is_pointer else "i32"
        if name in ("epsilon", "scale"):
            signature[name] = "fp32"
        elif name not in left_open:
            attributes[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps, "num_stages": 2 if "RANK" in constants else 3, "enable_fp_fusion": True},
    )
    registers, spilled = _resources(binary.asm["cubin"])
    layout = {True: ", channels last", False: ", channels first", None: ""}[constants.get("LAST")]
    title = kernel.fn.__name__ + layout
    if "RANK" in constants:
        title += f", {constants['LAYERS']} of rank {constants['RANK']}"
    if "ADD" in constants:
        title += ", sum" if constants["ADD"] else ", no sum"
    return Compiled(title, target, registers, spilled, binary.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack of a compiled kernel, as NVIDIA's own tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert match is not None, told
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_targets", description=__doc__)
    parser.add_argument("target", nargs="*", type=int, help=f"some of {', '.join(map(str, TARGETS))}")
    given = parser.parse_args(arguments)
    targets = given.target or list(TARGETS)
    print("| kernel | " + " | ".join(f"sm_{t}, {TARGETS[t]}" for t in targets) + " |")
    print("|---|" + "---|" * len(targets))
    for kernel, constants, warps in forms():
        used = [
            target for target in targets if target >= 80 or "RANK" not in constants
        ]  # as can_multiply says
        row = {target: compiled(kernel, constants, warps, target, TARGETS[target]) for target in used}
        title = next(iter(row.values())).kernel if row else kernel.fn.__name__
        cells = (row[target].render() if target in row else "not used" for target in targets)
        print(f"| {title}, {warps} warps | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
