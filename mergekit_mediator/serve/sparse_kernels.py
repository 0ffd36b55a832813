"""Two kernels in Triton for sparse matrices by rows; `sparse_rows` says what they compute.

Triton is there on machines with CUDA only, so only `sparse_rows` imports this module, where it needs it.
"""

import triton
import triton.language as tl


def _add_products(
    output: tl.tensor,
    x: tl.tensor,
    tables: tl.tensor,
    tokens: tl.tensor,
    coefficients: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    slots: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    column_type: tl.constexpr,
    value_type: tl.constexpr,
) -> None:
    """Add all experts' products to one feature of every token; one program per feature.

    Args:
        output: `[count, out]`.
        x: `[in, experts * slots]`, the inputs of the tokens that use each expert.
        tables: `[experts, 4]` int64, where each expert's row starts, columns, values and scale are.
        tokens: `[experts, slots]`, the token in each slot, -1 for an empty slot.
        coefficients: `[experts, slots]` float32.
        out: the number of features.
        count: the number of tokens.
        experts: the number of experts.
        slots: the most tokens that use one expert, as a power of 2.
        padded: the number of tokens, as a power of 2.
        block: the stored values that are read at once.
        column_type: of the columns.
        value_type: of the values.
    """
    row = tl.program_id(0)
    slot = tl.arange(0, slots)
    token = tl.arange(0, padded)
    lane = tl.arange(0, block)
    total = tl.zeros([padded], dtype=tl.float32)
    for expert in range(experts):
        table = tables + expert * 4
        first = tl.load(table).to(tl.pointer_type(tl.int64))
        columns = tl.load(table + 1).to(tl.pointer_type(column_type))
        values = tl.load(table + 2).to(tl.pointer_type(value_type))
        scale = tl.load(tl.load(table + 3).to(tl.pointer_type(tl.float32)))
        start = tl.load(first + row)
        length = (tl.load(first + row + 1) - start).to(tl.int32)
        part = tl.zeros([block, slots], dtype=tl.float32)
        for begin in range(0, length, block):
            inside = begin + lane < length
            at = start + begin + lane
            column = tl.load(columns + at, mask=inside, other=0).to(tl.int32)
            value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
            place = column * (experts * slots) + expert * slots
            numbers = tl.load(
                x + place[:, None] + slot[None, :], mask=inside[:, None], other=0.0
            ).to(tl.float32)
            part += value[:, None] * numbers
        user = tl.load(tokens + expert * slots + slot)
        factor = tl.load(coefficients + expert * slots + slot) * scale
        product = tl.sum(part, axis=0) * factor
        # an empty slot may hold infinity times 0, so it is left out and not added
        chosen = user[:, None] == token[None, :]
        total += tl.sum(tl.where(chosen, product[:, None], 0.0), axis=0)
    place = token.to(tl.int64) * out + row
    used = token < count
    before = tl.load(output + place, mask=used, other=0.0).to(tl.float32)
    tl.store(output + place, (before + total).to(output.dtype.element_ty), mask=used)


def _fill(
    dense: tl.tensor,
    first: tl.tensor,
    columns: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    begin: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write the stored values of one row of a matrix; one program per row of `dense`.

    Args:
        dense: `[rows, width]`, zeros.
        first: `[out + 1]` int64, where each row starts.
        columns: `[k]`.
        values: `[k]`.
        scale: `[1]`, of the values.
        begin: the matrix's row that is the first row of `dense`.
        width: the number of columns.
        block: the stored values that are written at once.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, block)
    factor = tl.load(scale)
    start = tl.load(first + begin + row)
    length = (tl.load(first + begin + row + 1) - start).to(tl.int32)
    line = dense + row.to(tl.int64) * width
    for at in range(0, length, block):
        inside = at + lane < length
        column = tl.load(columns + start + at + lane, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + start + at + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(line + column, (value * factor).to(dense.dtype.element_ty), mask=inside)


add_products = triton.jit(_add_products)
fill = triton.jit(_fill)
COLUMN_TYPES = {2: tl.int16, 4: tl.int32}
VALUE_TYPES = {2: tl.float16, 4: tl.float32}
