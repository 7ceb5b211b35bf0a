"""Triton kernels of the terms of a tile: one read of the similarities, one write of the derivative.

A program takes a block of rows and columns. Sums of a block are float32; each program adds them to
a float64 row of its own in a buffer that lives as long as the pass, so that they are neither
rounded over many tiles nor added in an order that changes, and are reduced once, at the end.

Digits: e = exp(-|z|) serves the value, max(z, 0) + log1p(e), and the derivative, 1 / (1 + e) or
e / (1 + e). Both functions are polynomials after a reduction of the argument, because the
hardware's exponential loses digits with the size of the argument, and log(1 + e) does where e is
small. Each is within 1.2e-7 of the true number, relative to it, for logits down to -87; below that
a term is 0 (the true one is smaller than the smallest normal float32).

Addresses are 32-bit within a block, and no index is divided: a block knows its row and column.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_ROUNDS_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23
_SMALLEST_EXPONENT = tl.constexpr(-87.0)


@triton.jit
def _exp_of_negative(x):
    """Exp(x) for x <= 0: 2^n * exp(r), |r| <= ln(2) / 2, by (exp(r) - 1 - r) / r^2 of degree 4."""
    is_zero = x < _SMALLEST_EXPONENT
    x = tl.where(is_zero, _SMALLEST_EXPONENT, x)
    shifted = x * _LOG2_E + _ROUNDS_TO_INTEGER
    n = shifted - _ROUNDS_TO_INTEGER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = 0.0013941212945477559 * r + 0.008363235074192822
    q = q * r + 0.04166637414536527
    q = q * r + 0.16666576646349146
    q = q * r + 0.5000000027086661
    exp_r = (q * (r * r) + r) + 1.0
    # n in the low bits of the shifted number goes to the place of the exponent.
    bits = exp_r.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.where(is_zero, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _log1p(e):
    """Log(1 + e) for 0 <= e <= 1, by (log(1 + e) - e) / e^2 of degree 8."""
    q = -0.003328101709485054 * e + 0.020249545574188232
    q = q * e - 0.05775242671370506
    q = q * e + 0.10689907521009445
    q = q * e - 0.1536124348640442
    q = q * e + 0.1969757229089737
    q = q * e - 0.24959047138690948
    q = q * e + 0.33330559730529785
    q = q * e - 0.49999934434890747
    return q * (e * e) + e


@triton.jit(do_not_specialize=["diagonal"])
def sigmoid_terms(
    similarity,
    derivative,
    sums,
    scale,
    bias,
    row_ids,
    column_ids,
    relevant,
    rows,
    columns,
    relevant_stride,
    diagonal,
    WITH_DERIVATIVE: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    ID_KINDS: tl.constexpr,
    DUPLICATES: tl.constexpr,
    HAS_RELEVANT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Softplus and sigmoid of the logits of a block, positives with their sign."""
    first = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)[:, None]
    c = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    has_row = first + r < rows
    has_column = c < columns
    inside = has_row & has_column
    base = first.to(tl.int64) * columns
    offsets = r * columns + c
    x = tl.load(similarity + base + offsets, mask=inside, other=0.0)
    z = x * tl.load(scale) + tl.load(bias)
    counted = inside
    HAS_POSITIVES: tl.constexpr = HAS_DIAGONAL or HAS_RELEVANT or (ID_KINDS > 0 and DUPLICATES == 1)
    positive = inside & False
    matches = inside & False
    if HAS_DIAGONAL:
        matches = first + r + diagonal == c
        positive = matches
    num_equal = 0.0
    if ID_KINDS > 0:
        equal = inside & False
        for kind in tl.static_range(ID_KINDS):
            row_id = tl.load(row_ids + (first + r) * ID_KINDS + kind, mask=has_row, other=0)
            column_id = tl.load(column_ids + c * ID_KINDS + kind, mask=has_column, other=0)
            equal = equal | (row_id == column_id)
        equal = equal & inside
        if HAS_DIAGONAL:
            equal = equal & (matches == 0)
        num_equal = tl.sum(tl.sum(tl.where(equal, 1.0, 0.0), axis=1), axis=0)
        if DUPLICATES == 1:
            positive = positive | equal
        if DUPLICATES == 2:
            counted = counted & (equal == 0)
    if HAS_RELEVANT:
        marks = relevant + first.to(tl.int64) * relevant_stride + r * relevant_stride + c
        positive = positive | (tl.load(marks, mask=inside, other=0) != 0)
    if HAS_POSITIVES:
        z = tl.where(positive, -z, z)
    e = _exp_of_negative(-tl.abs(z))
    value = tl.where(z < 0.0, 0.0, z) + _log1p(e)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    mine = sums + program * 4
    total = tl.sum(tl.sum(tl.where(counted, value, 0.0), axis=1), axis=0)
    tl.store(mine, tl.load(mine) + total.to(tl.float64))
    if ID_KINDS > 0:
        tl.store(mine + 3, tl.load(mine + 3) + num_equal.to(tl.float64))
    if WITH_DERIVATIVE:
        d = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
        if HAS_POSITIVES:
            d = tl.where(positive, -d, d)
        d = tl.where(counted, d, 0.0)
        tl.store(derivative + base + offsets, d.to(derivative.dtype.element_ty), mask=inside)
        by_bias = tl.sum(tl.sum(d, axis=1), axis=0)
        by_scale = tl.sum(tl.sum(d * x, axis=1), axis=0)
        tl.store(mine + 1, tl.load(mine + 1) + by_bias.to(tl.float64))
        tl.store(mine + 2, tl.load(mine + 2) + by_scale.to(tl.float64))


@triton.jit(do_not_specialize=["diagonal"])
def softmax_sums(
    similarity,
    row_parts,
    column_parts,
    positives,
    scale,
    rows,
    columns,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Log-sum-exp of the negatives of a block by rows and by columns."""
    first = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (first + r < rows)[:, None] & (c < columns)[None, :]
    block = similarity + first.to(tl.int64) * columns
    z = tl.load(block + r[:, None] * columns + c[None, :], mask=inside, other=0.0) * tl.load(scale)
    negative = inside
    if HAS_DIAGONAL:
        matches = ((first + r + diagonal)[:, None] == c[None, :]) & inside
        negative = inside & (matches == 0)
        positive = tl.sum(tl.where(matches, z, 0.0), axis=1)
        has_positive = tl.sum(tl.where(matches, 1, 0), axis=1) > 0
        tl.store(positives + first + r, positive, mask=has_positive)
    z = tl.where(negative, z, float("-inf"))
    largest = tl.max(z, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(z - shift[:, None]), axis=1)
    tl.store(
        row_parts + tl.program_id(1) * rows + first + r, tl.log(total) + shift, first + r < rows
    )
    largest = tl.max(z, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(z - shift[None, :]), axis=0)
    tl.store(column_parts + tl.program_id(0) * columns + c, tl.log(total) + shift, c < columns)


@triton.jit
def add_log_sums(parts, totals, num_parts, size, BLOCK: tl.constexpr):
    """Join the sums of all blocks of a row or column to what earlier tiles gave."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has = i < size
    largest = tl.load(totals + i, mask=has, other=0.0)
    total = tl.where(largest == float("-inf"), 0.0, 1.0)
    for part in range(num_parts):
        value = tl.load(parts + part * size + i, mask=has, other=0.0)
        above = tl.where(value > largest, value, largest)
        above = tl.where(value != value, value, above)
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = above
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(totals + i, tl.log(total) + shift, mask=has)


@triton.jit(do_not_specialize=["diagonal"])
def softmax_derivative(
    similarity,
    derivative,
    sums,
    row_sums,
    column_sums,
    positive_derivative,
    scale,
    rows,
    columns,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Derivative of both directions by the logits of a block."""
    first = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    has_row = first + r < rows
    has_column = c < columns
    inside = has_row[:, None] & has_column[None, :]
    base = first.to(tl.int64) * columns
    offsets = r[:, None] * columns + c[None, :]
    x = tl.load(similarity + base + offsets, mask=inside, other=0.0)
    z = x * tl.load(scale)
    of_row = tl.load(row_sums + first + r, mask=has_row, other=0.0)
    of_column = tl.load(column_sums + c, mask=has_column, other=0.0)
    d = tl.exp(z - of_row[:, None]) + tl.exp(z - of_column[None, :])
    if HAS_DIAGONAL:
        matches = (first + r + diagonal)[:, None] == c[None, :]
        of_positive = tl.load(positive_derivative + first + r, mask=has_row, other=0.0)
        d = tl.where(matches, of_positive[:, None], d)
    tl.store(derivative + base + offsets, d.to(derivative.dtype.element_ty), mask=inside)
    if WITH_SCALE:
        mine = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 4
        by_scale = tl.sum(tl.sum(tl.where(inside, d * x, 0.0), axis=1), axis=0)
        tl.store(mine + 2, tl.load(mine + 2) + by_scale.to(tl.float64))


@triton.jit(do_not_specialize=["diagonal"])
def gaussian(
    similarity,
    kernel,
    sums,
    row_squares,
    column_squares,
    row_parts,
    column_parts,
    rows,
    columns,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gaussian kernel of a block; sums over rows and columns of what is stored, rounded."""
    first = tl.program_id(0) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    has_row = first + r < rows
    has_column = c < columns
    inside = has_row[:, None] & has_column[None, :]
    base = first.to(tl.int64) * columns
    offsets = r[:, None] * columns + c[None, :]
    x = tl.load(similarity + base + offsets, mask=inside, other=0.0)
    of_row = tl.load(row_squares + first + r, mask=has_row, other=0.0)
    of_column = tl.load(column_squares + c, mask=has_column, other=0.0)
    distance = (of_row[:, None] + of_column[None, :]) - 2.0 * x
    # Below zero only by rounding.
    k = tl.exp(-2.0 * tl.where(distance < 0.0, 0.0, distance))
    counted = inside
    if HAS_DIAGONAL:
        counted = inside & ((first + r + diagonal)[:, None] != c[None, :])
    k = tl.where(counted, k, 0.0)
    mine = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 4
    value = tl.sum(tl.sum(k, axis=1), axis=0)
    tl.store(mine, tl.load(mine) + value.to(tl.float64))
    rounded = k.to(kernel.dtype.element_ty)
    tl.store(kernel + base + offsets, rounded, mask=inside)
    k = rounded.to(tl.float32)
    tl.store(row_parts + tl.program_id(1) * rows + first + r, tl.sum(k, axis=1), has_row)
    tl.store(column_parts + tl.program_id(0) * columns + c, tl.sum(k, axis=0), has_column)
