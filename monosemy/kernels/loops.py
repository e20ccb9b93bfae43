"""The loops of `cpu`, compiled by numba on first use and kept on disk: rows or latents `start` to `stop` - 1 of a call.

Arrays are C-contiguous; float32 unless a name says otherwise. No loop allocates per row or per latent more than a few
rows, and each releases the interpreter lock, so that threads of Python run them side by side.
"""

from typing import no_type_check

import numpy as np

from monosemy.compiled import bfloat16_of_float, compiled, float_of_bfloat16

N_BLOCKS = 512
"""Blocks that a row of pre-activations is cut into, at least, where it is long enough; fewer than twice that."""


# ---------------------------------------------------------------------------------------------------------------------
# Encode
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@no_type_check
def quantize_rows(start, stop, rows, codes_int8, scales):
    """rows ~ codes x scales, the largest element of a row being 127 steps."""
    width = rows.shape[1]
    for row in range(start, stop):
        largest = np.float32(0)
        for j in range(width):
            largest = max(largest, abs(rows[row, j]))
        scale = largest / np.float32(127)
        scales[row] = scale
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for j in range(width):
            codes_int8[row, j] = np.int8(np.rint(rows[row, j] * inverse))


@compiled
@no_type_check
def select_int32(product_int32, row_scales, scale, bias, n_candidates, chosen_int32):
    """chosen[row, :] = the latents with the largest positive scale x product + bias / row scale, -1 where there are
    fewer. (The row's own scale does not change their order.)"""
    pre = padded(product_int32.shape[1])
    for row in range(product_int32.shape[0]):
        inverse = np.float32(1) / (row_scales[row] if row_scales[row] > 0 else np.float32(1))
        for latent in range(product_int32.shape[1]):
            pre[latent] = np.float32(product_int32[row, latent]) * scale[latent] + bias[latent] * inverse
        select_row(pre, n_candidates, chosen_int32[row])


@compiled
@no_type_check
def select_bfloat16(product_bits, scale, bias, n_candidates, chosen_int32):
    """The same for a product in bfloat16, whose rows have no scale."""
    pre = padded(product_bits.shape[1])
    for row in range(product_bits.shape[0]):
        for latent in range(product_bits.shape[1]):
            pre[latent] = float_of_bfloat16(product_bits[row, latent]) * scale[latent] + bias[latent]
        select_row(pre, n_candidates, chosen_int32[row])


@compiled
@no_type_check
def select_float32(product, scale, bias, n_candidates, chosen_int32):
    pre = padded(product.shape[1])
    for row in range(product.shape[0]):
        for latent in range(product.shape[1]):
            pre[latent] = product[row, latent] * scale[latent] + bias[latent]
        select_row(pre, n_candidates, chosen_int32[row])


@compiled
@no_type_check
def block_depth(n_latents):
    """Elements of a block, a power of 2."""
    depth = 1
    while n_latents >= 2 * depth * N_BLOCKS:
        depth *= 2
    return depth


@compiled
@no_type_check
def padded(n_latents):
    """A row of pre-activations, filled up to whole blocks with minus infinity."""
    depth = block_depth(n_latents)
    return np.full((n_latents + depth - 1) // depth * depth, -np.inf, np.float32)


@compiled
@no_type_check
def select_row(pre, n_candidates, chosen):
    """Block b is a stripe: every n_blocks-th element from b. So the maxima of all blocks come of folding the row in
    half until n_blocks numbers are left, each time a maximum of whole vectors."""
    depth = block_depth(len(pre))
    n_blocks = len(pre) // depth
    block_max = pre
    if depth > 1:
        half = len(pre) // 2
        block_max = np.empty(half, np.float32)
        for i in range(half):
            block_max[i] = pre[i] if pre[i] > pre[i + half] else pre[i + half]
        while half > n_blocks:
            half //= 2
            for i in range(half):
                block_max[i] = block_max[i] if block_max[i] > block_max[i + half] else block_max[i + half]
        block_max = block_max[:n_blocks]

    threshold = threshold_of(block_max, n_candidates)
    blocks, n_found = np.empty(n_blocks + 1, np.int32), 0
    for block in range(n_blocks):  # no branches: each would be predicted wrongly half of the time
        blocks[n_found] = block
        n_found += block_max[block] >= threshold
    blocks = blocks[:n_found]
    candidates, n_found = np.empty(len(blocks) * depth + 1, np.int32), 0
    for first in range(0, len(pre), n_blocks):
        for block in blocks:
            candidates[n_found] = first + block
            n_found += (pre[first + block] >= threshold) & (pre[first + block] > 0)
    candidates = candidates[:n_found]
    keep_largest(candidates, pre[candidates], n_candidates, chosen)


@compiled
@no_type_check
def threshold_of(block_max, n_wanted):
    """A number that at least `n_wanted` of the maxima reach, and few more; 0 if fewer are positive. By bisection: to
    count is a matter of a few vectors, to sort is not."""
    low, high = np.float32(0), np.float32(0)
    for value in block_max:
        high = value if value > high else high
    if len(block_max) <= n_wanted:
        return low
    for _ in range(24):
        middle = (low + high) * np.float32(0.5)
        n_reaching = np.int32(0)
        for value in block_max:
            n_reaching += np.int32(value >= middle)
        if n_reaching >= n_wanted:
            low = middle
            if n_reaching <= n_wanted + n_wanted // 16:
                break
        else:
            high = middle
    return low


@compiled
@no_type_check
def keep_largest(candidates, values, k, chosen):
    """The k candidates of largest value, in ascending order of latent; of equal ones the lowest latents."""
    chosen[:] = -1
    if len(candidates) <= k:
        chosen[: len(candidates)] = candidates
        return
    kth = np.partition(values, len(values) - k)[len(values) - k]
    larger = 0
    for value in values:
        larger += value > kth
    equal_left = k - larger
    slot = 0
    for position in range(len(candidates)):
        if values[position] > kth or (values[position] == kth and equal_left > 0):
            equal_left -= values[position] == kth
            chosen[slot] = candidates[position]
            slot += 1


@compiled
@no_type_check
def values_of_chosen(centred, W_enc, b_enc, norms, candidates_int32, indices_int32, values):
    """Of every row's candidates, the k whose exact float32 activation x norm is largest, with their activations; a slot
    that is unused or not positive becomes (0, 0)."""
    width = centred.shape[1]
    n_candidates = candidates_int32.shape[1]
    exact = np.empty(n_candidates, np.float32)
    ranked = np.empty(n_candidates, np.float32)
    places = np.arange(n_candidates).astype(np.int32)
    for row in range(len(centred)):
        found = 0
        for slot in range(n_candidates):
            latent = candidates_int32[row, slot]
            if latent < 0:
                break
            value = np.float32(0)
            for j in range(width):
                value += centred[row, j] * W_enc[latent, j]
            exact[slot] = value + b_enc[latent]
            ranked[slot] = exact[slot] * norms[latent]
            found += 1
        keep_largest(places[:found], ranked[:found], values.shape[1], indices_int32[row])
        for slot in range(values.shape[1]):
            place = indices_int32[row, slot]
            if place >= 0 and exact[place] > 0:
                values[row, slot] = exact[place]
                indices_int32[row, slot] = candidates_int32[row, place]
            else:
                values[row, slot] = 0
                indices_int32[row, slot] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@no_type_check
def decode_rows(start, stop, values, indices_int32, W_dec, bias, out):
    width = W_dec.shape[1]
    for row in range(start, stop):
        for j in range(width):
            out[row, j] = bias[j]
        for slot in range(values.shape[1]):
            value = values[row, slot]
            if value != 0:
                latent = indices_int32[row, slot]
                for j in range(width):
                    out[row, j] += value * W_dec[latent, j]


@compiled
@no_type_check
def decode_prefixes(start, stop, row_starts, latents_int32, values, W_dec, group_int32, out):
    """out[row, group, :] = sum of value x W_dec[latent] over the row's entries in that group."""
    width = W_dec.shape[1]
    for row in range(start, stop):
        out[row] = 0
        for entry in range(row_starts[row], row_starts[row + 1]):
            latent, value = latents_int32[entry], values[entry]
            group = group_int32[latent]
            for j in range(width):
                out[row, group, j] += value * W_dec[latent, j]


@compiled
@no_type_check
def value_gradients(start, stop, row_starts, latents_int32, errors, W_dec, group_int32, gradients):
    """gradients[entry] = errors[row, group of latent] . W_dec[latent]"""
    width = W_dec.shape[1]
    for row in range(start, stop):
        for entry in range(row_starts[row], row_starts[row + 1]):
            latent = latents_int32[entry]
            group = group_int32[latent]
            total = np.float32(0)
            for j in range(width):
                total += errors[row, group, j] * W_dec[latent, j]
            gradients[entry] = total


@compiled
@no_type_check
def errors_and_gradients(
    start, stop, row_starts, latents_int32, values, W_dec, group_int32, base, scale, errors, squared, gradients
):
    """Both loops above and what lies between, while the decoder rows of a row are in cache. With e[h] = (reconstruction
    by groups up to h) - base: errors[row, g] = scale x (sum of e[h] over h >= g), and squared[row, g] = |e[g]|^2."""
    n_groups, width = errors.shape[1], errors.shape[2]
    for row in range(start, stop):
        decode_prefixes(row, row + 1, row_starts, latents_int32, values, W_dec, group_int32, errors)
        for group in range(1, n_groups):
            for j in range(width):
                errors[row, group, j] += errors[row, group - 1, j]
        for group in range(n_groups):
            total = np.float32(0)
            for j in range(width):
                error = errors[row, group, j] - base[row, j]
                total += error * error
                errors[row, group, j] = error * scale
            squared[row, group] = total
        for group in range(n_groups - 2, -1, -1):
            for j in range(width):
                errors[row, group, j] += errors[row, group + 1, j]
        value_gradients(row, row + 1, row_starts, latents_int32, errors, W_dec, group_int32, gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Update
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@no_type_check
def order_by_latent(latents_int32, n_latents):
    """(starts, order): order[starts[i]:starts[i + 1]] are the entries of latent i, in their order."""
    starts = np.zeros(n_latents + 1, np.int64)
    for entry in range(len(latents_int32)):
        starts[latents_int32[entry] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    order = np.empty(len(latents_int32), np.int64)
    cursor = starts[:-1].copy()
    for entry in range(len(latents_int32)):
        latent = latents_int32[entry]
        order[cursor[latent]] = entry
        cursor[latent] += 1
    return starts, order


@compiled
@no_type_check
def adam(weight, first, second, gradient, new1, beta2, new2, rate, root_correction, epsilon, keep):
    """AdamW for one row; `step.AdamNumbers` says what the numbers are."""
    for j in range(len(weight)):
        first[j] += (gradient[j] - first[j]) * new1
        second[j] = second[j] * beta2 + gradient[j] * gradient[j] * new2
        weight[j] = weight[j] * keep - rate * first[j] / (np.sqrt(second[j]) / root_correction + epsilon)


@compiled
@no_type_check
def round_rows_to_bfloat16(start, stop, rows, out_bits):
    for row in range(start, stop):
        for j in range(rows.shape[1]):
            out_bits[row, j] = bfloat16_of_float(rows[row, j])


@compiled
@no_type_check
def update_latents(
    start, stop, starts, input_rows_int32, error_rows_int32, values, gradients, inputs, errors,
    known_slots_int32, known_W_enc, known_W_dec,
    W_enc, W_dec, enc_first, enc_second, dec_first, dec_second,
    new1, beta2, new2, rate, root_correction, epsilon, keep, unit, copy_int8, copy_scales, copy_bits,
):  # fmt: skip
    """The copy of W_enc that has rows follows: in bytes, or in bfloat16."""
    enc_gradient = np.empty(W_enc.shape[1], np.float32)
    dec_gradient = np.empty(W_dec.shape[1], np.float32)
    for latent in range(start, stop):
        slot = known_slots_int32[latent]
        if slot >= 0:
            enc_gradient[:] = known_W_enc[slot]
            dec_gradient[:] = known_W_dec[slot]
        else:
            enc_gradient[:] = 0
            dec_gradient[:] = 0
        for entry in range(starts[latent], starts[latent + 1]):
            input_row, to_encoder = input_rows_int32[entry], gradients[entry]
            for j in range(len(enc_gradient)):
                enc_gradient[j] += to_encoder * inputs[input_row, j]
            error_row, to_decoder = error_rows_int32[entry], values[entry]
            for j in range(len(dec_gradient)):
                dec_gradient[j] += to_decoder * errors[error_row, j]

        direction = W_dec[latent]
        if unit:
            along = np.float32(0)
            for j in range(len(direction)):
                along += dec_gradient[j] * direction[j]
            for j in range(len(direction)):
                dec_gradient[j] -= along * direction[j]
        adam(
            direction, dec_first[latent], dec_second[latent], dec_gradient,
            new1, beta2, new2, rate, root_correction, epsilon, keep,
        )  # fmt: skip
        if unit:
            squares = np.float32(0)
            for j in range(len(direction)):
                squares += direction[j] * direction[j]
            inverse = np.float32(1) / np.sqrt(squares)
            for j in range(len(direction)):
                direction[j] *= inverse
        adam(
            W_enc[latent], enc_first[latent], enc_second[latent], enc_gradient,
            new1, beta2, new2, rate, root_correction, epsilon, keep,
        )  # fmt: skip
        if len(copy_int8) > 0:
            quantize_rows(latent, latent + 1, W_enc, copy_int8, copy_scales)
        if len(copy_bits) > 0:
            round_rows_to_bfloat16(latent, latent + 1, W_enc, copy_bits)
