"""The loops of `cpu`, compiled by numba on first use and kept on disk: rows or latents `start` to `stop` - 1 of a call.

Arrays are C-contiguous; float32 unless a name says otherwise. No loop allocates per row or per latent more than a few
rows, and each releases the interpreter lock, so that threads of Python run them side by side.
"""

from typing import no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

BLOCK = 16
"""Latents per block in the search for the k largest."""


# Not "contract": with it, code fresh from the compiler fuses other multiplications with additions than the same code
# read back from disk, and the first run of a machine would differ from the second in the last bits.
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"}, error_model="numpy")


@intrinsic
@no_type_check
def float_of_bits(typing_context, bits):
    """Reinterpret 32 bits as a float32: a bfloat16 is the upper half of one."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
@no_type_check
def bits_of_float(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@compiled
@no_type_check
def select_bfloat16(start, stop, pre_bits, b_enc, k, chosen):
    """chosen[row, :] = the k latents with the largest positive pre-activation, -1 where there are fewer."""
    n_latents = pre_bits.shape[1]
    pre = np.empty(n_latents, np.float32)
    for row in range(start, stop):
        for latent in range(n_latents):
            pre[latent] = float_of_bits(np.uint32(pre_bits[row, latent]) << np.uint32(16)) + b_enc[latent]
        select_row(pre, k, chosen[row])


@compiled
@no_type_check
def select_float32(start, stop, product, b_enc, k, chosen):
    pre = np.empty(product.shape[1], np.float32)
    for row in range(start, stop):
        for latent in range(len(pre)):
            pre[latent] = product[row, latent] + b_enc[latent]
        select_row(pre, k, chosen[row])


@compiled
@no_type_check
def select_row(pre, k, chosen):
    """Blocks are stripes, every n_blocks-th latent: so a maximum over blocks is one over whole vectors."""
    n_latents = len(pre)
    n_blocks = (n_latents + BLOCK - 1) // BLOCK
    block_max = pre[:n_blocks].copy()
    for start in range(n_blocks, n_latents, n_blocks):
        for block in range(min(n_blocks, n_latents - start)):
            value = pre[start + block]
            block_max[block] = value if value > block_max[block] else block_max[block]

    threshold = np.float32(0)
    if n_blocks > k:
        threshold = max(threshold, np.partition(block_max, n_blocks - k)[n_blocks - k])
    candidates = np.empty(n_latents, np.int32)
    found = 0
    for block in range(n_blocks):
        if block_max[block] >= threshold:
            for latent in range(block, n_latents, n_blocks):
                if pre[latent] >= threshold and pre[latent] > 0:
                    candidates[found] = latent
                    found += 1
    candidates = np.sort(candidates[:found])
    keep_largest(candidates, pre[candidates], k, chosen)


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
def values_of_chosen(start, stop, centred, W_enc, b_enc, chosen, values):
    """The exact float32 activation of every chosen latent; a slot that is unused or not positive becomes (0, 0)."""
    width = centred.shape[1]
    for row in range(start, stop):
        for slot in range(chosen.shape[1]):
            latent = chosen[row, slot]
            value = np.float32(0)
            if latent >= 0:
                for j in range(width):
                    value += centred[row, j] * W_enc[latent, j]
                value += b_enc[latent]
            if value > 0:
                values[row, slot] = value
            else:
                values[row, slot] = 0
                chosen[row, slot] = 0


@compiled
@no_type_check
def decode_rows(start, stop, values, indices, W_dec, b_pre, out):
    width = W_dec.shape[1]
    for row in range(start, stop):
        for j in range(width):
            out[row, j] = b_pre[j]
        for slot in range(values.shape[1]):
            value = values[row, slot]
            if value != 0:
                latent = indices[row, slot]
                for j in range(width):
                    out[row, j] += value * W_dec[latent, j]


@compiled
@no_type_check
def error_and_value_gradient(start, stop, x, values, indices, W_dec, b_pre, error, value_gradient):
    """error = x_hat - x, and value_gradient = error . W_dec[latent]: d(loss)/d(activation), short of 2 / elements."""
    decode_rows(start, stop, values, indices, W_dec, b_pre, error)
    width = W_dec.shape[1]
    for row in range(start, stop):
        for j in range(width):
            error[row, j] -= x[row, j]
        for slot in range(values.shape[1]):
            total = np.float32(0)
            if values[row, slot] > 0:
                latent = indices[row, slot]
                for j in range(width):
                    total += error[row, j] * W_dec[latent, j]
            value_gradient[row, slot] = total


@compiled
@no_type_check
def sort_by_latent(values, indices, n_latents):
    """(starts, entries): entries[starts[i]:starts[i + 1]] are the flat positions at which latent i is active."""
    starts = np.zeros(n_latents + 1, np.int64)
    flat_values = values.ravel()
    flat_indices = indices.ravel()
    for position in range(len(flat_values)):
        if flat_values[position] > 0:
            starts[flat_indices[position] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    entries = np.empty(starts[n_latents], np.int64)
    cursor = starts[:-1].copy()
    for position in range(len(flat_values)):
        if flat_values[position] > 0:
            latent = flat_indices[position]
            entries[cursor[latent]] = position
            cursor[latent] += 1
    return starts, entries


@compiled
@no_type_check
def adam(weight, first, second, gradient, new1, beta2, new2, rate, root_correction, epsilon):
    """torch.optim.Adam for one row.

    new1 = 1 - beta1, new2 = 1 - beta2, rate = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t).
    """
    for j in range(len(weight)):
        first[j] += (gradient[j] - first[j]) * new1
        second[j] = second[j] * beta2 + gradient[j] * gradient[j] * new2
        weight[j] -= rate * first[j] / (np.sqrt(second[j]) / root_correction + epsilon)


@compiled
@no_type_check
def update_latents(
    start, stop, starts, entries, k, values, value_gradient, centred, error, scale,
    dead_slot, dead_W_enc, dead_W_dec,
    W_enc, W_dec, enc_first, enc_second, dec_first, dec_second,
    new1, beta2, new2, rate, root_correction, epsilon, W_enc_bits,
):  # fmt: skip
    width = W_enc.shape[1]
    enc_gradient = np.empty(width, np.float32)
    dec_gradient = np.empty(width, np.float32)
    flat_values = values.ravel()
    flat_value_gradient = value_gradient.ravel()
    for latent in range(start, stop):
        slot = dead_slot[latent]
        if slot >= 0:  # what the auxiliary loss asks of this latent, already in final units
            enc_gradient[:] = dead_W_enc[slot]
            dec_gradient[:] = dead_W_dec[slot]
        else:
            enc_gradient[:] = 0
            dec_gradient[:] = 0
        for entry in entries[starts[latent] : starts[latent + 1]]:
            row = entry // k
            to_encoder = scale * flat_value_gradient[entry]
            to_decoder = scale * flat_values[entry]
            for j in range(width):
                enc_gradient[j] += to_encoder * centred[row, j]
                dec_gradient[j] += to_decoder * error[row, j]

        direction = W_dec[latent]
        along = np.float32(0)
        for j in range(width):
            along += dec_gradient[j] * direction[j]
        for j in range(width):
            dec_gradient[j] -= along * direction[j]
        adam(
            direction, dec_first[latent], dec_second[latent], dec_gradient,
            new1, beta2, new2, rate, root_correction, epsilon,
        )  # fmt: skip
        squares = np.float32(0)
        for j in range(width):
            squares += direction[j] * direction[j]
        norm = np.sqrt(squares)
        for j in range(width):
            direction[j] /= norm

        weight = W_enc[latent]
        adam(
            weight, enc_first[latent], enc_second[latent], enc_gradient,
            new1, beta2, new2, rate, root_correction, epsilon,
        )  # fmt: skip
        round_to_bfloat16(weight, W_enc_bits[latent])


@compiled
@no_type_check
def round_to_bfloat16(row, out):
    """Round to nearest, ties to even, as torch does. (A NaN is caught before it gets here.)"""
    for j in range(len(row)):
        bits = bits_of_float(row[j])
        out[j] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
