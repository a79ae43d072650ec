"""Triton kernels of the tiled losses: from a tile of scores to what a sweep makes of it, without storing the scores.

Each program makes one block of scores of a tile, either as the product of unit rows (`FROM_SCORES` false) or by reading
scores that a library product made, and then

- `softmax_statistics`: the largest score and the sum of exponentials above it, of every row and column of the block,
- `softmax_weights`: the weights G, the sum of the row and the column softmax,
- `sigmoid_weights`: the sum of softplus and of the weights G = sigmoid, and these weights.

Products accumulate in float32. A block writes only what is its own: no atomics, so that results never vary from run to
run. Scores of the softmaxes are in bits (base-2 logarithms), t = factor * cosine, and a t is never rounded by itself:
fma(cosine, factor, -base) rounds the difference alone, which is small where it counts.

Shape suffixes: r rows and c columns of the tile, d width, n and m blocks over rows and over columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's block: blocks of `GROUP` rows of blocks run together, so that what they read stays in L2."""
    program = tl.program_id(0)
    of_rows, of_columns = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    first = program // (GROUP * of_columns) * GROUP
    size = min(of_rows - first, GROUP)
    within = program % (GROUP * of_columns)
    return first + within % size, within // size


@triton.jit
def _scores(
    x,
    y,
    scores,
    row,
    column,
    rows,
    columns,
    width,
    FROM_SCORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ y.T of rows and columns `row` and `column`, float32; beyond the last ones, anything."""
    # Beyond the tile the last row or column is read again: no mask is needed, and nothing outside is touched.
    row = tl.minimum(row, rows - 1).to(tl.int64)
    column = tl.minimum(column, columns - 1).to(tl.int64)
    if FROM_SCORES:
        total = tl.load(scores + row[:, None] * columns + column[None, :])
    else:
        k = tl.arange(0, BLOCK_WIDTH)
        x_at = x + row[:, None] * width + k[None, :]
        y_at = y + column[None, :] * width + k[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            if EVEN_WIDTH:
                of_x, of_y = tl.load(x_at), tl.load(y_at)
            else:
                left = width - start
                of_x = tl.load(x_at, mask=k[None, :] < left, other=0.0)
                of_y = tl.load(y_at, mask=k[:, None] < left, other=0.0)
            total = tl.dot(of_x, of_y, total, input_precision=PRECISION)
            x_at += BLOCK_WIDTH
            y_at += BLOCK_WIDTH
    return total


@triton.jit(do_not_specialize=["diagonal"])
def softmax_statistics(
    x,
    y,
    scores,
    row_largest,
    row_sum,
    column_largest,
    column_sum,
    rows,
    columns,
    width,
    factor,
    diagonal,
    WITHOUT_SELF: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of each row in each block, max_j t_ij and sum_j 2**(t_ij - max); of each column, over i; t = factor * x_i . y_j.

    Args:
        x, y: (r, d), (c, d), in the operands' precision; not read if FROM_SCORES.
        scores: (r, c) float32, x @ y.T; read only if FROM_SCORES.
        row_largest, row_sum: (m, r) float32, written.
        column_largest, column_sum: (n, c) float32, written if BY_COLUMN.
        diagonal: row i is column i + diagonal; such scores count as -inf if WITHOUT_SELF.
    """
    block_row, block_column = _block(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    score = _scores(
        x,
        y,
        scores,
        row,
        column,
        rows,
        columns,
        width,
        FROM_SCORES,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
        EVEN_WIDTH,
        PRECISION,
    )
    counts = (row < rows)[:, None] & (column < columns)[None, :]
    if WITHOUT_SELF:
        counts = counts & (row[:, None] + diagonal != column[None, :])
    score = tl.where(counts, score, float("-inf"))

    largest = factor * tl.max(score, 1)
    base = tl.where(largest == float("-inf"), 0.0, largest)  # a row without a score: no -inf less -inf
    total = tl.sum(tl.exp2(tl.fma(score, factor, -base[:, None])), 1)
    at = block_column.to(tl.int64) * rows + row
    tl.store(row_largest + at, largest, mask=row < rows)
    tl.store(row_sum + at, total, mask=row < rows)
    if BY_COLUMN:
        largest = factor * tl.max(score, 0)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(tl.exp2(tl.fma(score, factor, -base[None, :])), 0)
        at = block_row.to(tl.int64) * columns + column
        tl.store(column_largest + at, largest, mask=column < columns)
        tl.store(column_sum + at, total, mask=column < columns)


@triton.jit(do_not_specialize=["diagonal"])
def softmax_weights(
    x,
    y,
    scores,
    near_row,
    row_factor,
    near_column,
    column_factor,
    weights,
    rows,
    columns,
    width,
    factor,
    diagonal,
    WITHOUT_SELF: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """G_ij = row_factor_i 2**(t_ij - near_row_i) + column_factor_j 2**(t_ij - near_column_j); t = factor * x_i . y_j.

    Args:
        near_row, row_factor: (r,) float32: 2**near / factor is the row's sum of 2**t, in more than float32's precision.
        near_column, column_factor: (c,), likewise.
        weights: (r, c), in the operands' precision, written.
        x, y, scores, diagonal, WITHOUT_SELF: as in `softmax_statistics`.
    """
    block_row, block_column = _block(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    score = _scores(
        x,
        y,
        scores,
        row,
        column,
        rows,
        columns,
        width,
        FROM_SCORES,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
        EVEN_WIDTH,
        PRECISION,
    )
    in_rows, in_columns = row < rows, column < columns
    if WITHOUT_SELF:
        # What is computed beyond the last row and column is these again.
        own = tl.minimum(row, rows - 1)[:, None] + diagonal == tl.minimum(column, columns - 1)[None, :]
        score = tl.where(own, float("-inf"), score)
    nothing = float("inf")  # of rows and columns beyond the last: 2**-inf
    row_lse = tl.load(near_row + row, mask=in_rows, other=nothing)[:, None]
    column_lse = tl.load(near_column + column, mask=in_columns, other=nothing)[None, :]
    of_row = tl.load(row_factor + row, mask=in_rows, other=0.0)[:, None]
    of_column = tl.load(column_factor + column, mask=in_columns, other=0.0)[None, :]
    g = tl.exp2(tl.fma(score, factor, -row_lse)) * of_row + tl.exp2(tl.fma(score, factor, -column_lse)) * of_column
    at = weights + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, g.to(weights.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def sigmoid_weights(
    x,
    y,
    scores,
    softplus_sum,
    weight_sum,
    weights,
    rows,
    columns,
    width,
    factor,
    bias,
    gain,
    WEIGHTS: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Per block, the sums of softplus(l) and of G = sigmoid(l), and gain * G; l = factor * x_i . y_j + bias.

    Args:
        softplus_sum, weight_sum: (n * m,) float32, written; the second if WEIGHTS.
        weights: (r, c), in the operands' precision, written if WEIGHTS.
        x, y, scores: as in `softmax_statistics`.
    """
    block_row, block_column = _block(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    logit = bias + factor * _scores(
        x,
        y,
        scores,
        row,
        column,
        rows,
        columns,
        width,
        FROM_SCORES,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
        EVEN_WIDTH,
        PRECISION,
    )
    counts = (row < rows)[:, None] & (column < columns)[None, :]
    logit = tl.where(counts, logit, float("-inf"))  # softplus and sigmoid of which are 0
    small = tl.exp(-tl.abs(logit))  # in [0, 1]
    # log(1 + e): most logits are so negative that 1 + e keeps few of e's digits; there, its series.
    log_of = tl.where(small < 0.01, small * (1.0 - small * (0.5 - small * 0.33333333)), tl.log(1.0 + small))
    tl.store(softplus_sum + tl.program_id(0), tl.sum(tl.maximum(logit, 0.0) + log_of))
    if WEIGHTS:
        g = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
        tl.store(weight_sum + tl.program_id(0), tl.sum(g))
        at = weights + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(at, (gain * g).to(weights.dtype.element_ty), mask=counts)
