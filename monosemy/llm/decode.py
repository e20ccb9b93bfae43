"""One token more for each text, compiled for the CPU: what a step of generation costs when the weights are read once.

At one position per text a layer is a few products of a matrix with a handful of vectors. Reading the matrices is most
of the work, and PyTorch reads them at a third of the memory's speed and spends as long again between its operations.

1. Threads of Python enter `run_layers_loop` together, outside the interpreter lock; each owns a share of every
   matrix's rows and of the heads, and they meet at a barrier wherever one needs what another computed.
2. Weights and cached keys and values stay where PyTorch holds them, float32 or bfloat16; what is computed is float32.
3. `unembed_loop` does the same for the final product, over the vocabulary.

`llama` is the reference: the same arithmetic, for any number of positions, on any device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from monosemy.compiled import bfloat16_of_float, compiled, float_of_bfloat16

if TYPE_CHECKING:
    from monosemy.llm.layout import KeyValueCache, Positions

MOST_THREADS = 16
SPINS = 2000
"""Looks at a barrier before a thread lets others have its core."""

sched_yield = types.ExternalFunction("sched_yield", types.int32())

# ---------------------------------------------------------------------------------------------------------------------
# What numba lacks
# ---------------------------------------------------------------------------------------------------------------------


def pointer_to(result: types.Type) -> Any:
    """The intrinsic that reads an address as an array of `result`."""

    @intrinsic
    @no_type_check
    def read(typing_context, address, index):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(result).as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return result(types.int64, types.int64), generate

    return read


def writer_to(value: types.Type) -> Any:
    """The intrinsic that writes to an address, as to an array of `value`."""

    @intrinsic
    @no_type_check
    def write(typing_context, address, index, item):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(value).as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, value), generate

    return write


read_float, read_bits = pointer_to(types.float32), pointer_to(types.uint16)
write_float, write_bits = writer_to(types.float32), writer_to(types.uint16)


@intrinsic
@no_type_check
def multiply_add(typing_context, a, b, c):
    """a * b + c, fused where the processor can: said outright, since leaving it to the optimiser gives other bits
    fresh than from the cache."""

    def generate(context, builder, signature, arguments):
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, arguments, fastmath=("reassoc", "nsz"))

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
@no_type_check
def arrive(typing_context, address):
    """Count one more at a barrier."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
@no_type_check
def arrived(typing_context, address):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), generate


# ---------------------------------------------------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------------------------------------------------


@compiled
@no_type_check
def meet(barrier, threads, times):
    """Wait until every thread has come here for the `times`-th time."""
    arrive(barrier)
    spins = 0
    while arrived(barrier) < threads * times:
        spins += 1
        if spins > SPINS:
            sched_yield()


@compiled
@no_type_check
def load_row(address, bfloat16, first, rows, which):
    """rows[which] = the elements from `first` on. (No slice: numba counts references to each, atomically.)"""
    if bfloat16:
        for i in range(rows.shape[1]):
            rows[which, i] = float_of_bfloat16(read_bits(address, first + i))
    else:
        for i in range(rows.shape[1]):
            rows[which, i] = read_float(address, first + i)


@compiled
@no_type_check
def store_row(address, bfloat16, first, row):
    """The elements from `first` on = row."""
    for i in range(len(row)):
        if bfloat16:
            write_bits(address, first + i, bfloat16_of_float(row[i]))
        else:
            write_float(address, first + i, row[i])


@compiled
@no_type_check
def dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total = multiply_add(a[i], b[i], total)
    return total


@compiled
@no_type_check
def dots(rows, x, products):
    """products[i, text] = rows[i] . x[text] for two rows, four texts at a time: what was loaded serves often."""
    text = 0
    while text + 4 <= len(x):
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(rows.shape[1]):
            a = multiply_add(rows[0, i], x[text, i], a)
            b = multiply_add(rows[0, i], x[text + 1, i], b)
            c = multiply_add(rows[0, i], x[text + 2, i], c)
            d = multiply_add(rows[0, i], x[text + 3, i], d)
            e = multiply_add(rows[1, i], x[text, i], e)
            f = multiply_add(rows[1, i], x[text + 1, i], f)
            g = multiply_add(rows[1, i], x[text + 2, i], g)
            h = multiply_add(rows[1, i], x[text + 3, i], h)
        products[0, text], products[0, text + 1], products[0, text + 2], products[0, text + 3] = a, b, c, d
        products[1, text], products[1, text + 1], products[1, text + 2], products[1, text + 3] = e, f, g, h
        text += 4
    while text < len(x):
        a = b = np.float32(0)
        for i in range(rows.shape[1]):
            a = multiply_add(rows[0, i], x[text, i], a)
            b = multiply_add(rows[1, i], x[text, i], b)
        products[0, text], products[1, text] = a, b
        text += 1


@compiled
@no_type_check
def multiply(weight, bias, bfloat16, start, stop, x, added, out):
    """out[:, start:stop] = x @ weight[start:stop].T (+ bias); on top of what is there if `added`."""
    rows, shift = np.zeros((2, x.shape[1]), np.float32), np.zeros((2, 1), np.float32)
    products = np.empty((2, len(x)), np.float32)
    for first in range(start, stop, 2):
        last = min(first + 2, stop)
        for number in range(first, last):
            load_row(weight, bfloat16, number * x.shape[1], rows, number - first)
            if bias:
                load_row(bias, bfloat16, number, shift, number - first)
        dots(rows, x, products)
        for number in range(first, last):
            for text in range(len(x)):
                value = products[number - first, text] + shift[number - first, 0]
                out[text, number] = out[text, number] + value if added else value


@compiled
@no_type_check
def multiply_gated(weight, bias, bfloat16, start, stop, x, out):
    """out[:, start:stop] = silu(gate) * up, with the rows of `up` below all of those of `gate` in `weight`."""
    rows, shift = np.empty((2, x.shape[1]), np.float32), np.zeros((2, 1), np.float32)
    products = np.empty((2, len(x)), np.float32)
    for number in range(start, stop):
        for half in range(2):
            place = half * out.shape[1] + number
            load_row(weight, bfloat16, place * x.shape[1], rows, half)
            if bias:
                load_row(bias, bfloat16, place, shift, half)
        dots(rows, x, products)
        for text in range(len(x)):
            gate, up = products[0, text] + shift[0, 0], products[1, text] + shift[1, 0]
            out[text, number] = gate / (np.float32(1) + np.exp(-gate)) * up


@compiled
@no_type_check
def normalize(x, weight, bfloat16, epsilon, out):
    """out = x / rms(x) * weight."""
    scale, size = np.empty_like(x[:1]), x.shape[1]
    load_row(weight, bfloat16, 0, scale, 0)
    for text in range(len(x)):
        inverse = np.float32(1) / np.sqrt(dot(x[text], x[text]) / np.float32(size) + epsilon)
        for i in range(size):
            out[text, i] = x[text, i] * inverse * scale[0, i]


@compiled
@no_type_check
def rotate_head(head, cosine, sine):
    """Turn each pair (i, i + half); the first half of `sine` comes negated."""
    half = len(head) // 2
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cosine[i] + second * sine[i]
        head[half + i] = second * cosine[half + i] + first * sine[half + i]


@compiled
@no_type_check
def attend(query, keys, values, bfloat16, offset, begin, end, real, scores, row, out):
    """out = the values of positions `begin` to `end` - 1 that are `real`, mixed by the softmax of their keys."""
    scale = np.float32(1) / np.sqrt(np.float32(len(query)))
    largest = np.float32(-np.inf)
    for position in range(begin, end):
        if real[position] or position == end - 1:  # padding sees itself
            load_row(keys, bfloat16, offset + position * len(query), row, 0)
            scores[position] = dot(query, row[0]) * scale
            largest = max(largest, scores[position])
    total = np.float32(0)
    out[:] = 0
    for position in range(begin, end):
        if real[position] or position == end - 1:
            weight = np.exp(scores[position] - largest)
            total += weight
            load_row(values, bfloat16, offset + position * len(query), row, 0)
            for i in range(len(out)):
                out[i] += weight * row[0, i]
    out /= total


@compiled
@no_type_check
def run_layers_loop(thread, threads, barrier, weights, shape, epsilon, cached, real, cosine, sine, work):
    """The layers whose tensors lie at `weights`, on work's `hidden`, in place; every thread calls it with its number.

    weights[layer]: addresses in the order of `LayerWeights`, 0 where there is no bias. shape: (bfloat16, heads,
    kv_heads, head_dim, position, window). cached: addresses of keys and values, elements from one layer to the next,
    and positions of a text.
    """
    hidden, heads, mixed, active = work
    bfloat16, n_heads, n_kv_heads, head_dim, position, window = shape
    keys, values, layer_elements, capacity = cached
    texts, group, times = len(hidden), n_heads // n_kv_heads, 0
    normed, row, scores = np.empty_like(hidden), np.empty((1, head_dim), np.float32), np.empty(position + 1, np.float32)
    first = max(0, position + 1 - window) if window else 0

    for layer in range(len(weights)):
        at = weights[layer]
        normalize(hidden, at[0], bfloat16, epsilon, normed)
        rows = heads.shape[1]
        multiply(at[1], at[2], bfloat16, rows * thread // threads, rows * (thread + 1) // threads, normed, False, heads)
        times += 1
        meet(barrier, threads, times)

        for item in range(thread, texts * n_kv_heads, threads):
            text, shared = item // n_kv_heads, item % n_kv_heads
            offset = layer * layer_elements + item * capacity * head_dim
            key = heads[text, (n_heads + shared) * head_dim : (n_heads + shared + 1) * head_dim]
            value = heads[text, (n_heads + n_kv_heads + shared) * head_dim :][:head_dim]
            rotate_head(key, cosine[text], sine[text])
            store_row(keys, bfloat16, offset + position * head_dim, key)
            store_row(values, bfloat16, offset + position * head_dim, value)
            for head in range(shared * group, (shared + 1) * group):
                query = heads[text, head * head_dim : (head + 1) * head_dim]
                rotate_head(query, cosine[text], sine[text])
                out = mixed[text, head * head_dim : (head + 1) * head_dim]
                attend(query, keys, values, bfloat16, offset, first, position + 1, real[text], scores, row, out)
        times += 1
        meet(barrier, threads, times)

        rows = hidden.shape[1]
        begin, end = rows * thread // threads, rows * (thread + 1) // threads
        multiply(at[3], at[4], bfloat16, begin, end, mixed, True, hidden)
        times += 1
        meet(barrier, threads, times)

        normalize(hidden, at[5], bfloat16, epsilon, normed)
        rows = active.shape[1]
        multiply_gated(at[6], at[7], bfloat16, rows * thread // threads, rows * (thread + 1) // threads, normed, active)
        times += 1
        meet(barrier, threads, times)

        multiply(at[8], at[9], bfloat16, begin, end, active, True, hidden)
        times += 1
        meet(barrier, threads, times)


@compiled
@no_type_check
def unembed_loop(thread, threads, norm, weight, bfloat16, epsilon, hidden, logits):
    """logits = unembedding of the normed `hidden`; every thread writes its own share of the vocabulary."""
    normed, rows = np.empty_like(hidden), logits.shape[1]
    normalize(hidden, norm, bfloat16, epsilon, normed)
    multiply(weight, 0, bfloat16, rows * thread // threads, rows * (thread + 1) // threads, normed, False, logits)


# ---------------------------------------------------------------------------------------------------------------------
# From PyTorch
# ---------------------------------------------------------------------------------------------------------------------


class LayerWeights(NamedTuple):
    """The tensors of one layer, in the order that `run_layers_loop` wants."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Weights:
    """The tensors of all layers, and where they are: asking each again at every step costs a millisecond."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self.layers = layers
        table = [[0 if tensor is None else tensor.data_ptr() for tensor in layer] for layer in layers]
        self.addresses = np.array(table, np.int64)


def run_layers(
    hidden: Float[Tensor, "text 1 d_model"], weights: Weights, start: int, stop: int, epsilon: float,
    window: int | None, positions: Positions, cache: KeyValueCache,
) -> Float[Tensor, "text 1 d_model"]:  # fmt: skip
    """What `Llama.run_layers` gives for layers `start` to `stop` - 1; fills the cache's next position."""
    texts, layer, (n_kv_heads, head_dim) = len(hidden), weights.layers[0], (cache.keys.shape[2], cache.keys.shape[4])
    sizes = (hidden.shape[2], len(layer.qkv), layer.output.shape[1], layer.down.shape[1])
    work = tuple(np.empty((texts, size), np.float32) for size in sizes)
    work[0][:] = hidden[:, 0].float().numpy()
    cosine, sine = (
        table[:, 0, 0].float().expand(texts, -1).contiguous().numpy() for table in (positions.cosine, positions.sine)
    )
    n_heads = layer.output.shape[1] // head_dim
    shape = (hidden.dtype == torch.bfloat16, n_heads, n_kv_heads, head_dim, cache.length, window or 0)
    cached = (cache.keys[start:].data_ptr(), cache.values[start:].data_ptr(), cache.keys.stride(0), cache.capacity)
    barrier = np.zeros(1, np.int64)
    call(
        thread_count(), run_layers_loop, barrier.ctypes.data, weights.addresses[start:stop], shape,
        np.float32(epsilon), cached, cache.real.numpy(), cosine, sine, work,
    )  # fmt: skip
    return torch.from_numpy(work[0])[:, None].to(hidden.dtype)


def unembed(
    hidden: Float[Tensor, "text 1 d_model"], norm: Tensor, epsilon: float, unembedding: Tensor
) -> Float[Tensor, "text 1 vocabulary"]:
    """What `Llama.unembed` gives, from the weights of the final norm and the unembedding."""
    logits = np.empty((len(hidden), len(unembedding)), np.float32)
    call(
        thread_count(), unembed_loop, norm.data_ptr(), unembedding.data_ptr(), hidden.dtype == torch.bfloat16,
        np.float32(epsilon), hidden[:, 0].float().numpy(), logits,
    )  # fmt: skip
    return torch.from_numpy(logits)[:, None]


def thread_count() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)


def call(threads: int, loop: Any, *arguments: Any) -> None:
    """Run `loop(thread, threads, *arguments)` on every thread; this one is the first."""
    with one_at_a_time:  # two calls, each with some of the threads that both want, would wait for ever
        others = [pool(os.getpid()).submit(loop, thread, threads, *arguments) for thread in range(1, threads)]
        loop(0, threads, *arguments)
        for other in others:
            other.result()


one_at_a_time = Lock()


@cache
def pool(process: int) -> ThreadPoolExecutor:
    """Threads that wait for work; a forked process needs its own."""
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="decode")
