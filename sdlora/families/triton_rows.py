"""Kernels in Triton: add with layer norm, and GEGLU, forward and backward; see :mod:`.triton_images`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_norm(
    x,
    more,
    weight,
    bias,
    total,
    out,
    means,
    rstds,
    width,
    x_stride,
    more_stride,
    total_stride,
    epsilon,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm of each row (N, C) of x, or of x + more, which is written to ``total``; one program a row.

    Strides are those between rows; ``total`` may be one of the two.
    """
    at, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    inside, place = at < width, row * width + at
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(more + row * more_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # the sum that others see is what is normed
        tl.store(total + row * total_stride + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    off = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 0) / width + epsilon)
    tl.store(means + tl.program_id(0), mean)
    tl.store(rstds + tl.program_id(0), rstd)
    normed = off * rstd * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward(
    g,
    past,
    x,
    weight,
    means,
    rstds,
    out,
    width,
    g_stride,
    past_stride,
    x_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """The gradient of rows x, plus that of what goes past the norm; strides are those between rows."""
    at, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    inside = at < width
    mean, rstd = tl.load(means + row), tl.load(rstds + row)
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(inside, (value - mean) * rstd, 0.0)
    share = tl.load(g + row * g_stride + at, mask=inside, other=0.0).to(tl.float32)
    share *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    both, slope = tl.sum(share, 0) / width, tl.sum(share * normed, 0) / width
    of_x = (share - both - normed * slope) * rstd
    of_x += tl.load(past + row * past_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, of_x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu(both, out, width, BLOCK: tl.constexpr):
    """``a * gelu(b)`` of the halves of rows (N, 2C), by one program a piece of a row."""
    at, row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    inside = at < width
    plain = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + at, (plain * gate * share).to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward(g, both, out, width, BLOCK: tl.constexpr):
    """The gradients of both halves, beside each other."""
    at, row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    inside = at < width
    plain = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + row * width + at, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    of_plain, of_gate = gradient * gate * share, gradient * plain * slope
    tl.store(out + row * 2 * width + at, of_plain.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * width + width + at, of_gate.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _wide_by_narrow(
    wide,
    wide_stride,
    width,
    narrow,
    narrow_stride,
    ranks,
    rows,
    piece,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return wide^T narrow, (columns of a piece of wide, ranks), and which columns and ranks these are."""
    column, rank = piece * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column[None, :] < width)
        left = tl.load(wide + row * wide_stride + column[None, :], mask=inside, other=0.0)
        inside = (row < rows) & (rank[None, :] < ranks)
        right = tl.load(narrow + row * narrow_stride + rank[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    return total, column[:, None], rank[None, :]


@triton.jit
def _add(total, to, place, inside):
    there = tl.load(to + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + place, (there + total).to(to.dtype.element_ty), mask=inside)


@triton.jit
def _add_of_up(
    g,
    inner,
    of_up,
    rows,
    width,
    g_stride,
    inner_stride,
    scale,
    program,
    RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    pieces = tl.cdiv(width, COLUMNS)
    layer = program // pieces
    total, column, rank = _wide_by_narrow(
        g + layer * width,
        g_stride,
        width,
        inner + layer * RANK,
        inner_stride,
        RANK,
        rows,
        program % pieces,
        UP_RANK,
        COLUMNS,
        ROWS,
    )
    place = (layer * width + column) * RANK + rank
    _add(total * scale, of_up, place, (column < width) & (rank < RANK))


@triton.jit
def _add_of_down(
    of_inner,
    x,
    of_down,
    rows,
    width,
    of_inner_stride,
    x_stride,
    program,
    RANKS: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    total, column, rank = _wide_by_narrow(
        x, x_stride, width, of_inner, of_inner_stride, RANKS, rows, program, DOWN_RANK, COLUMNS, ROWS
    )
    _add(total, of_down, rank * width + column, (column < width) & (rank < RANKS))


@triton.jit
def lora_gradients(
    g,
    inner,
    of_inner,
    x,
    of_up,
    of_down,
    rows,
    out_width,
    in_width,
    g_stride,
    inner_stride,
    of_inner_stride,
    x_stride,
    scale,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the gradients of A and B of layers beside each other to those that are there.

    The first programs take columns of g for ``of_up`` (n, out, rank), the others columns of x for ``of_down``
    (n rank, in); each goes over all rows, so the sums have one order.
    """
    program, ups = tl.program_id(0), LAYERS * tl.cdiv(out_width, COLUMNS)
    if program < ups:
        _add_of_up(
            g,
            inner,
            of_up,
            rows,
            out_width,
            g_stride,
            inner_stride,
            scale,
            program,
            RANK,
            UP_RANK,
            COLUMNS,
            ROWS,
        )
    else:
        _add_of_down(
            of_inner,
            x,
            of_down,
            rows,
            in_width,
            of_inner_stride,
            x_stride,
            program - ups,
            LAYERS * RANK,
            DOWN_RANK,
            COLUMNS,
            ROWS,
        )
