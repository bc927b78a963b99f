"""Kernels in Triton: group norm and SiLU of images in both layouts, forward and backward.

Imported only where one of them is launched (:mod:`.kernels`), as Triton need not be installed. All is
computed in float32, whatever the tensors' format. Neither widths of the model nor sizes of images are
compiled in: there are many.

A large image is gone over in chunks, one program each: there are only 32 groups, and a card has more
processors than that. What the chunks find is put together by a second kernel (Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl

_NOT_SPECIALISED = ["chunks", "groups", "width"]


@triton.jit
def _begin(pixels, channels, groups, width, LAST: tl.constexpr):
    """Return the image, the first channel of the group, and where the group's memory begins."""
    image = (tl.program_id(0) // groups).to(tl.int64)
    channel = (tl.program_id(0) % groups) * width
    first = image * channels * pixels + channel * (1 if LAST else pixels)
    return image, channel, first


@triton.jit
def _places(at, pixels, channels, width, LAST: tl.constexpr):
    """Return for the elements of a group their channel in it, and how far their memory is from its first."""
    if LAST:
        channel = at % width
        place = (at // width).to(tl.int64) * channels + channel
    else:
        channel = at // pixels
        place = at.to(tl.int64)
    return channel, place


@triton.jit
def _as_tokens(at, image, begin, channel, place, pixels, channels, TOKENS: tl.constexpr):
    """Return where elements of images with channels first are in (B, h w, C), if they are to be there."""
    if TOKENS:
        place = (image * pixels + at % pixels) * channels + begin + channel
    return place


@triton.jit
def _values(x, shift, place, which, inside, SHIFT: tl.constexpr):
    """Return elements in float32, with what is added to their channel; 0 outside."""
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + which, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _through_silu(gradient, normed, SILU: tl.constexpr):
    """Return the gradient before SiLU, if there is one."""
    if SILU:
        share = tl.sigmoid(normed)
        gradient = gradient * share * (1.0 + normed * (1.0 - share))
    return gradient


@triton.jit
def _store_normed(value, mean, rstd, weight, bias, out, place, which, inside, SILU: tl.constexpr):
    normed = (value - mean) * rstd
    normed = normed * tl.load(weight + which, mask=inside, other=0.0).to(tl.float32)
    normed += tl.load(bias + which, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        normed = normed * tl.sigmoid(normed)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _shares(g, value, mean, rstd, weight, bias, place, which, inside, SILU: tl.constexpr):
    """Return the gradient of the normed values and those values, of elements; both 0 outside."""
    normed = tl.where(inside, (value - mean) * rstd, 0.0)
    factor = tl.load(weight + which, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + which, mask=inside, other=0.0).to(tl.float32)
    return _through_silu(gradient, normed * factor + offset, SILU) * factor, normed


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_norm(
    x,
    shift,
    weight,
    bias,
    out,
    means,
    rstds,
    pixels,
    channels,
    groups,
    epsilon,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm of x (B, C, h, w), plus ``shift`` (B, C) if there is one, by one program a group; then SiLU."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    size, total = pixels * width, tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        channel, place = _places(at, pixels, channels, width, LAST)
        total += _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
    mean = tl.sum(total, 0) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        channel, place = _places(at, pixels, channels, width, LAST)
        value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
        off = tl.where(at < size, value - mean, 0.0)
        total += off * off
    rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / size + epsilon)
    tl.store(means + tl.program_id(0), mean)
    tl.store(rstds + tl.program_id(0), rstd)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        channel, place = _places(at, pixels, channels, width, LAST)
        value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
        place = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
        _store_normed(value, mean, rstd, weight, bias, out, place, begin + channel, at < size, SILU)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_chunks(
    x,
    shift,
    partial,
    pixels,
    channels,
    groups,
    chunks,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean of each chunk of a group, and the sum of the squares around it: (B * groups, chunks, 2)."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    size = pixels * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, place = _places(at, pixels, channels, width, LAST)
    value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
    count = tl.minimum(BLOCK, size - tl.program_id(1) * BLOCK)
    mean = tl.sum(value, 0) / count
    off = tl.where(at < size, value - mean, 0.0)
    where = partial + (tl.program_id(0) * chunks + tl.program_id(1)) * 2
    tl.store(where, mean)
    tl.store(where + 1, tl.sum(off * off, 0))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_norm_of_chunks(
    x,
    shift,
    weight,
    bias,
    partial,
    out,
    means,
    rstds,
    pixels,
    channels,
    groups,
    chunks,
    epsilon,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The same as :func:`group_norm`, by one program a chunk, of what :func:`group_chunks` put out."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    size, where = pixels * width, partial + tl.program_id(0) * chunks * 2
    mean, squares = 0.0, 0.0
    for start in range(0, chunks, TOGETHER):
        each = start + tl.arange(0, TOGETHER)
        count = tl.maximum(tl.minimum(BLOCK, size - each * BLOCK), 0)
        mean += tl.sum(tl.load(where + each * 2, mask=each < chunks, other=0.0) * count, 0) / size
    for start in range(0, chunks, TOGETHER):
        each = start + tl.arange(0, TOGETHER)
        count = tl.maximum(tl.minimum(BLOCK, size - each * BLOCK), 0)
        off = tl.load(where + each * 2, mask=each < chunks, other=0.0) - mean
        within = tl.load(where + each * 2 + 1, mask=each < chunks, other=0.0)
        squares += tl.sum(within + tl.where(each < chunks, off * off * count, 0.0), 0)
    rstd = 1.0 / tl.sqrt(squares / size + epsilon)
    if tl.program_id(1) == 0:
        tl.store(means + tl.program_id(0), mean)
        tl.store(rstds + tl.program_id(0), rstd)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, place = _places(at, pixels, channels, width, LAST)
    value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
    place = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
    _store_normed(value, mean, rstd, weight, bias, out, place, begin + channel, at < size, SILU)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_norm_backward(
    g,
    x,
    shift,
    weight,
    bias,
    means,
    rstds,
    out,
    pixels,
    channels,
    groups,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of x, by one program a group."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    mean, rstd = tl.load(means + tl.program_id(0)), tl.load(rstds + tl.program_id(0))
    size = pixels * width
    plain, along = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        channel, place = _places(at, pixels, channels, width, LAST)
        value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
        source = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
        share, normed = _shares(g, value, mean, rstd, weight, bias, source, begin + channel, at < size, SILU)
        plain += share
        along += share * normed
    both, slope = tl.sum(plain, 0) / size, tl.sum(along, 0) / size
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        channel, place = _places(at, pixels, channels, width, LAST)
        value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
        source = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
        share, normed = _shares(g, value, mean, rstd, weight, bias, source, begin + channel, at < size, SILU)
        of_x = (share - both - normed * slope) * rstd
        tl.store(out + first + place, of_x.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_chunks_backward(
    g,
    x,
    shift,
    weight,
    bias,
    means,
    rstds,
    partial,
    pixels,
    channels,
    groups,
    chunks,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums, for each chunk, of the normed values' gradient, and of it times them: (B * groups, chunks, 2)."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    mean, rstd = tl.load(means + tl.program_id(0)), tl.load(rstds + tl.program_id(0))
    size = pixels * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, place = _places(at, pixels, channels, width, LAST)
    value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
    source = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
    share, normed = _shares(g, value, mean, rstd, weight, bias, source, begin + channel, at < size, SILU)
    where = partial + (tl.program_id(0) * chunks + tl.program_id(1)) * 2
    tl.store(where, tl.sum(share, 0))
    tl.store(where + 1, tl.sum(share * normed, 0))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def group_norm_of_chunks_backward(
    g,
    x,
    shift,
    weight,
    bias,
    means,
    rstds,
    partial,
    out,
    pixels,
    channels,
    groups,
    chunks,
    width,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The same as :func:`group_norm_backward`, by one program a chunk."""
    image, begin, first = _begin(pixels, channels, groups, width, LAST)
    mean, rstd = tl.load(means + tl.program_id(0)), tl.load(rstds + tl.program_id(0))
    size, where = pixels * width, partial + tl.program_id(0) * chunks * 2
    both, slope = 0.0, 0.0
    for start in range(0, chunks, TOGETHER):
        each = start + tl.arange(0, TOGETHER)
        both += tl.sum(tl.load(where + each * 2, mask=each < chunks, other=0.0), 0) / size
        slope += tl.sum(tl.load(where + each * 2 + 1, mask=each < chunks, other=0.0), 0) / size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, place = _places(at, pixels, channels, width, LAST)
    value = _values(x, shift, first + place, image * channels + begin + channel, at < size, SHIFT)
    source = _as_tokens(at, image, begin, channel, first + place, pixels, channels, TOKENS)
    share, normed = _shares(g, value, mean, rstd, weight, bias, source, begin + channel, at < size, SILU)
    of_x = (share - both - normed * slope) * rstd
    tl.store(out + first + place, of_x.to(out.dtype.element_ty), mask=at < size)
