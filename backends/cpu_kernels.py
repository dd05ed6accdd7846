"""The two networks on the CPU, in Numba. nnabla's own CPU kernels use one core and no vector instructions.

The formulas are those of gpu.py; tests/test_network.py compares the two. A network's weights come as one vector (pack)
with the weight normalisation folded in, and `sizes`, (in, out) of each affine layer. All arrays are float32. The rows
are cut into blocks, one for each core or more. A block's whole pass through a network is one function compiled by
Numba: NumPy would need many passes over each layer, and the cores would wait for one another between them.
"""
import os
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import Callable, List, NamedTuple, Optional, Tuple

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  compiled products use its BLAS, which limit_blas_threads must find
from threadpoolctl import threadpool_limits

from backends import architecture
from backends.architecture import SOFTPLUS_BETA
from tracing.compiling import inlined

ROOT_HALF = np.float32(0.5 ** 0.5)
BLOCK = 1 << 17         # values of a layer computed together (512 rows at least), so that they stay in the cache
MIN_PER_CORE = 1 << 12  # values; with fewer, a second core saves less than it takes to hand over
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def limit_blas_threads() -> None:
    """Make BLAS use one thread, for the whole process: here, each core computes its own block of rows.

    BLAS's threads would speed up the products alone, and spin between them on the cores that the blocks need.
    """
    threadpool_limits(1, user_api="blas")


@lru_cache(maxsize=None)
def helpers() -> List[SimpleQueue]:
    """Start a thread beside the caller's for each further core, and return the queues of their work."""
    queues = [SimpleQueue() for _ in range(CORES - 1)]
    for queue in queues:
        Thread(target=help_out, args=(queue,), daemon=True).start()
    return queues


def help_out(queue: SimpleQueue) -> None:
    """Do the work that on_all_cores sends, for ever."""
    while True:
        numbers, function, args, done = queue.get()
        for number in numbers:
            try:
                function(number, *args)
                done.put(None)
            except BaseException as error:
                done.put(error)
        del numbers, function, args, done       # or the arrays would live until the next call


def on_all_cores(function: Callable, split: "Split", *args) -> None:
    """Call function(number, split, *args) for the number of each block, on all cores.

    Each thread takes the next number when it is free. So the caller waits only for blocks that have been begun. Where
    other programs keep the cores busy, it does the others' blocks itself. Threads that each have a fixed share (OpenMP)
    wait for the slowest there, up to 10 ms at a time. The function must write each block's results to a place of its
    own, so that they do not depend on the thread.
    """
    numbers, done, own = iter(range(split.blocks)), SimpleQueue(), 0
    for queue in helpers()[:split.blocks - 1]:
        queue.put((numbers, function, (split, *args), done))
    for number in numbers:
        function(number, split, *args)
        own += 1
    for _ in range(split.blocks - own):
        error = done.get()
        if error:
            raise error


# Compiled at the first call and cached beside this file. Compiled code releases the interpreter's lock. fastmath may
# neither reorder sums nor assume that there is no NaN or infinity, which train.py checks for.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})


encoded_bands = numba.extending.register_jitable(architecture.encoded_bands)
has_skip = numba.extending.register_jitable(architecture.has_skip)
inverse_slope = numba.extending.register_jitable(architecture.inverse_slope)


@compiled
def write(values: np.ndarray, out: np.ndarray) -> None:
    """Write an array (N, C) to another. Assigned to a slice, it would be 20 times the code, in all that call it."""
    for row in range(len(values)):
        for column in range(values.shape[1]):
            out[row, column] = values[row, column]


@compiled
def encode(x: np.ndarray, bands: int) -> np.ndarray:
    """Return gamma(x) (N, 3 + 6 bands) of x (N, 3): x, then sin and cos of 2^k x for k < bands, as in NeRF.

    Both come from their series about the nearest multiple of pi / 2, exact to float32's last digits while |2^k x| <
    1000.
    """
    f = np.float32
    columns = np.empty((3 + 6 * bands, len(x)), f)      # transposed, so that the inner loop uses vector instructions
    write(x.T, columns[:3])
    for k in range(bands):
        for c in range(3):
            sines, cosines = columns[3 + 6 * k + c], columns[6 + 6 * k + c]
            for row in range(len(x)):
                angle = columns[c, row] * f(2 ** k)
                quarters = np.floor(angle * f(2 / np.pi) + f(0.5))
                rest = angle - quarters * f(1.5703125) - quarters * f(4.837512969970703e-4) - quarters * f(7.549790e-8)
                q = rest * rest
                sine = rest + rest * q * (f(-1 / 6) + q * (f(1 / 120) + q * (f(-1 / 5040) + q * f(1 / 362880))))
                cosine = f(1) + q * (f(-1 / 2) + q * (f(1 / 24) + q * (f(-1 / 720) + q * f(1 / 40320))))
                quarter = np.int32(quarters)
                if quarter & 1:
                    sine, cosine = cosine, -sine
                if quarter & 2:
                    sine, cosine = -sine, -cosine
                sines[row], cosines[row] = sine, cosine
    out = np.empty((len(x), len(columns)), f)
    write(columns.T, out)
    return out


@compiled
def encode_derivative(encoded: np.ndarray, out: np.ndarray) -> None:
    """Write the derivative (N, columns) of each column of gamma(x) with respect to the coordinate that it encodes to
    out."""
    for row in range(len(encoded)):
        freq = np.float32(1.0)
        out[row, :3] = freq
        for s in range(3, encoded.shape[1], 6):
            for c in range(s, s + 3):
                out[row, c] = freq * encoded[row, c + 3]        # sin' = cos
                out[row, c + 3] = -freq * encoded[row, c]       # cos' = -sin
            freq *= np.float32(2.0)


@compiled
def affine(packed: np.ndarray, sizes: np.ndarray, layer: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return W (in, out) and b (out,) of a layer, as views of the packed weights."""
    start = 0
    for k in range(layer):
        start += (sizes[k, 0] + 1) * sizes[k, 1]
    middle = start + sizes[layer, 0] * sizes[layer, 1]
    return packed[start:middle].reshape((sizes[layer, 0], sizes[layer, 1])), packed[middle:middle + sizes[layer, 1]]


IN, OUT = 0, 1


@compiled
def part(flat: np.ndarray, rows: int, sizes: np.ndarray, side: int, layer: int) -> np.ndarray:
    """Return a layer's array (rows, sizes[layer, side]) as a view of `flat`, which holds all layers' arrays in
    order."""
    start = 0
    for k in range(layer):
        start += rows * sizes[k, side]
    return flat[start:start + rows * sizes[layer, side]].reshape((rows, sizes[layer, side]))


@compiled
def softplus(z: np.ndarray, b: np.ndarray, scale: np.float32, h: np.ndarray, slope: Optional[np.ndarray]) -> None:
    """Write scale * softplus(z + b), with beta = 100, to the first columns of h, and its derivative (without scale) to
    slope, unless slope is None.

    softplus(v) = max(v, 0) + log(1 + e) with e = exp(-|v|). exp(a) is exp(a / 16)^16. Both functions come from their
    series, exact to float32's last digits. e is never below 2e-9.
    """
    f = np.float32
    for row in range(z.shape[0]):
        for column in range(z.shape[1]):
            v = (z[row, column] + b[column]) * f(SOFTPLUS_BETA)
            a = -abs(v)
            a = (a if a > f(-20.0) else f(-20.0)) * f(1 / 16)
            e = f(1) + a * (f(1) + a * (f(1 / 2) + a * (f(1 / 6) + a * (f(1 / 24) + a * (f(1 / 120) + a * (
                f(1 / 720) + a * f(1 / 5040)))))))
            e *= e
            e *= e
            e *= e
            e *= e
            u = e / (f(2) + e)
            q = u * u       # log(1 + e) = 2 artanh(u)
            log = f(2) * u * (f(1) + q * (f(1 / 3) + q * (f(1 / 5) + q * (f(1 / 7) + q * (f(1 / 9) + q * f(1 / 11))))))
            h[row, column] = (f(0.5) * (v + abs(v)) + log) * (f(1 / SOFTPLUS_BETA) * scale)     # NaN stays NaN
            if slope is not None:
                one = f(1) / (f(1) + e)
                slope[row, column] = one if v > 0 else e * one


@compiled
def join(encoded: np.ndarray, h: np.ndarray) -> None:
    """Write gamma(x) / sqrt(2) to the last columns of a skip layer's input, [h, gamma(x)] / sqrt(2)."""
    first = h.shape[1] - encoded.shape[1]
    for row in range(len(h)):
        for column in range(encoded.shape[1]):
            h[row, first + column] = encoded[row, column] * ROOT_HALF


@compiled
def add_encoded(back: np.ndarray, scale: np.float32, grad_encoded: np.ndarray) -> None:
    """Add the part of gamma(x), the last columns of a derivative with respect to [h, gamma(x)] * scale, to
    grad_encoded."""
    first = back.shape[1] - grad_encoded.shape[1]
    for row in range(len(back)):
        for column in range(grad_encoded.shape[1]):
            grad_encoded[row, column] += back[row, first + column] * scale


# --- blocks of rows ---------------------------------------------------------------------------------------------------

class Split(NamedTuple):
    """How N rows, and M others that go with them, are cut into blocks, each with its share of both."""
    num_rows: int
    num_others: int
    blocks: int


class Block(NamedTuple):
    """The rows of a block, and its other rows."""
    first: int
    rows: int
    first_other: int
    others: int


def split_rows(num_rows: int, width: int, num_others: int = 0) -> Split:
    """Return the Split of rows of that width: as many blocks for each core, on as many cores as have enough to do."""
    total = num_rows + num_others
    cores = min(max(total * width // MIN_PER_CORE, 1), CORES)
    rounds = max(-(-total // (cores * max(BLOCK // width, 512))), 1)
    return Split(num_rows, num_others, cores * rounds)


@compiled
def block_of(split: Split, number: int) -> Block:
    """Return the block of that number."""
    (rows, others, blocks), after = split, number + 1
    first, first_other = rows * number // blocks, others * number // blocks
    return Block(first, rows * after // blocks - first, first_other, others * after // blocks - first_other)


# --- the implicit network ---------------------------------------------------------------------------------------------

class Weights(NamedTuple):
    """A network's weights, normalised."""
    packed: np.ndarray      # all W and b in one vector, as `affine` reads them
    sizes: np.ndarray       # (in, out) of each layer, an array (L, 2)


@compiled
def last_hidden(x: np.ndarray, net: Weights, inputs: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Return the input of the implicit network's last layer at x (N, 3).

    inputs and slopes, flat as in Kept, receive the inputs of all layers and the derivatives of the softplus after all
    but the last, unless they are empty.
    """
    rows, sizes, count, keep = len(x), net.sizes, len(net.sizes), len(inputs) > 0
    h = encoded = encode(x, encoded_bands(sizes[0, IN]))
    if keep:
        write(encoded, part(inputs, 2 * rows, sizes, IN, 0)[:rows])
    for layer in range(count - 1):
        w, b = affine(net.packed, sizes, layer)
        z = np.dot(h, w)
        scale = ROOT_HALF if has_skip(layer + 1, count) else np.float32(1.0)
        if keep:
            h = part(inputs, 2 * rows, sizes, IN, layer + 1)[:rows]
            softplus(z, b, scale, h, part(slopes, rows, sizes, OUT, layer))
        else:
            h = np.empty((rows, sizes[layer + 1, IN]), np.float32)
            softplus(z, b, scale, h, None)
        if has_skip(layer + 1, count):
            join(encoded, h)
    return h


def implicit_sdf(x: np.ndarray, net: Weights) -> np.ndarray:
    """Return the sdf (N,) at x (N, 3), without computing features or normals."""
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    on_all_cores(sdf_block, split_rows(len(x), net.sizes[-1, IN]), x, net, out)
    return out


@compiled
def sdf_block(number: int, split: Split, x: np.ndarray, net: Weights, out: np.ndarray) -> None:
    """Do one block of implicit_sdf."""
    block = block_of(split, number)
    rows = slice(block.first, block.first + block.rows)
    out[rows] = sdf_values(x[rows], net)


@compiled
def sdf_values(x: np.ndarray, net: Weights) -> np.ndarray:
    """Return the sdf (N,) at x (N, 3), on one core."""
    w, b = affine(net.packed, net.sizes, len(net.sizes) - 1)
    w, nothing = w[:, 0].copy(), np.empty(0, np.float32)
    values = np.dot(last_hidden(x, net, nothing, nothing), w)
    for row in range(len(x)):
        values[row] += b[0]
    return values


class Kept(NamedTuple):
    """What the forward pass keeps of a block's N rows for the backward pass.

    Flat arrays hold the arrays of all layers in order, see `part`. The lower half of `inputs` and the upper half of
    `grad_zs` belong to the backward pass.
    """
    inputs: np.ndarray          # flat, of each layer (2 rows, in): its inputs, then their tangents
    grad_zs: np.ndarray         # flat, of each layer (2 rows, out): the loss's gradient with respect to z, then the
                                # sdf's, the deltas
    slopes: np.ndarray          # flat, of all layers but the last (rows, out): the derivative of softplus
    derivative: np.ndarray      # (N, columns): the derivative of gamma(x)
    normal_encoded: np.ndarray  # (N, columns): d sdf / d gamma


@compiled
def new_kept(rows: int, sizes: np.ndarray) -> Kept:
    """Return the Kept of so many rows, not yet filled."""
    total_in, total_out, columns, f = sizes[:, IN].sum(), sizes[:, OUT].sum(), sizes[0, IN], np.float32
    return Kept(np.empty(2 * rows * total_in, f), np.empty(2 * rows * total_out, f),
                np.empty(rows * (total_out - sizes[-1, OUT]), f), np.empty((rows, columns), f),
                np.empty((rows, columns), f))


def implicit_forward(x: np.ndarray, net: Weights) -> Tuple[np.ndarray, np.ndarray]:
    """Return the implicit network's sdf and feature (N, 1 + F) and the sdf's gradient, the normal (N, 3), not
    normalised, at x (N, 3)."""
    x, rows = np.ascontiguousarray(x, np.float32), len(x)
    output, normals = np.empty((rows, net.sizes[-1, OUT]), np.float32), np.empty((rows, 3), np.float32)
    on_all_cores(implicit_forward_block, split_rows(rows, net.sizes[-1, IN]), x, net, output, normals)
    return output, normals


@compiled
def implicit_forward_block(number: int, split: Split, x: np.ndarray, net: Weights, output: np.ndarray,
                           normals: np.ndarray) -> None:
    """Do one block of implicit_forward."""
    block = block_of(split, number)
    rows = slice(block.first, block.first + block.rows)
    z, normal = forward_block(x[rows], net, new_kept(block.rows, net.sizes))
    write(z, output[rows])
    write(normal, normals[rows])


@compiled
def forward_block(x: np.ndarray, net: Weights, kept: Kept) -> Tuple[np.ndarray, np.ndarray]:
    """Return the last layer's z (N, 1 + F) and the normal (N, 3) of a block's points x (N, 3), and fill its Kept."""
    rows, sizes, count = len(x), net.sizes, len(net.sizes)
    h = last_hidden(x, net, kept.inputs, kept.slopes)
    w, b = affine(net.packed, sizes, count - 1)
    z, delta = np.dot(h, w), part(kept.grad_zs, 2 * rows, sizes, OUT, count - 1)[rows:]
    back, scale = np.empty((rows, len(w)), np.float32), np.float32(1.0)
    for row in range(rows):
        for column in range(len(b)):
            z[row, column] += b[column]
            delta[row, column] = 1.0 if column == 0 else 0.0        # the sdf is the first column of z
        for column in range(len(w)):
            back[row, column] = w[column, 0]
    # d sdf / d z, from the last layer but one down.
    kept.normal_encoded[:] = 0.0
    for layer in range(count - 2, -1, -1):
        slope = part(kept.slopes, rows, sizes, OUT, layer)
        delta = part(kept.grad_zs, 2 * rows, sizes, OUT, layer)[rows:]
        for row in range(rows):
            for column in range(delta.shape[1]):
                delta[row, column] = slope[row, column] * (back[row, column] * scale)
        back = np.dot(delta, affine(net.packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            add_encoded(back, scale, kept.normal_encoded)
    encoded, normal = part(kept.inputs, 2 * rows, sizes, IN, 0)[:rows], np.empty((rows, 3), np.float32)
    encode_derivative(encoded, kept.derivative)
    for row in range(rows):
        for c in range(3):
            total = np.float32(0.0)
            for column in range(c, encoded.shape[1], 3):
                total += kept.normal_encoded[row, column] * kept.derivative[row, column]
            normal[row, c] = total
    return z, normal


class Gradients(NamedTuple):
    """A loss's gradients with respect to N points' sdf and normals, and to the S hits, the first rows.

    Where the surface moves, a hit moves along its ray: x0 - (sdf - sdf0) / (n0 . v) v (the paper's equation 3).
    """
    sdf: np.ndarray             # (N, 1); carry_block_back adds the part of the hits that move
    normals: np.ndarray         # (N, 3)
    hits: np.ndarray            # (S, 3); carry_block_back adds the part of their normals and features
    hit_normals: np.ndarray     # (S, 3)
    hit_features: np.ndarray    # (S, F)
    moves: np.ndarray           # (S, 3): -v / (n0 . v), no gradient


@compiled
def find_weight_gradients(rows: int, kept: Kept, sizes: np.ndarray, grad_packed: np.ndarray) -> None:
    """Write a block's gradients with respect to the packed weights (P,), once its gradients have been carried back."""
    for layer in range(len(sizes)):
        # inputs^T grad_z + tangents^T deltas is one product, since they lie below one another.
        grad_z = part(kept.grad_zs, 2 * rows, sizes, OUT, layer)
        grad_w, grad_b = affine(grad_packed, sizes, layer)
        np.dot(part(kept.inputs, 2 * rows, sizes, IN, layer).T, grad_z, grad_w)
        sum_rows(grad_z[:rows], grad_b)


@compiled
def carry_block_back(kept: Kept, net: Weights, grads: Gradients) -> None:
    """Write the gradients with respect to z and the inputs' tangents of a block to its Kept, and add to grads."""
    rows, hits = len(grads.sdf), len(grads.hits)
    grad_output, grad_normals = np.zeros((rows, net.sizes[-1, OUT]), np.float32), grads.normals.copy()
    if hits:
        write(grads.hit_features, grad_output[:hits, 1:])
        grad_encoded = carry_back(kept, net, grad_output[:hits], grads.hit_normals)
        encoded, moved = part(kept.inputs, 2 * rows, net.sizes, IN, 0), grads.hits
        moved += grad_position(encoded, kept.derivative, kept.normal_encoded, grad_encoded, grads.hit_normals)
        for row in range(hits):
            for c in range(3):
                grads.sdf[row, 0] += moved[row, c] * grads.moves[row, c]
                grad_normals[row, c] += grads.hit_normals[row, c]
    write(grads.sdf, grad_output[:, :1])
    carry_back(kept, net, grad_output, grad_normals)


@compiled
def carry_back(kept: Kept, net: Weights, grad_output: np.ndarray, grad_normal: np.ndarray) -> np.ndarray:
    """Carry gradients with respect to the first M rows' output (M, 1 + F) and normal (M, 3) back through the layers.

    sum(grad_normal * normal) is the sdf's derivative along grad_normal. So its own gradient is the backward pass of a
    forward (tangent) pass, in which d sdf / d z, known already, is the derivative with respect to every tangent of z.

    Writes the gradients with respect to the z of all layers and the tangents of their inputs to kept. Returns the
    gradient with respect to gamma (M, columns).
    """
    sizes, count, (rows, columns), used = net.sizes, len(net.sizes), kept.derivative.shape, len(grad_output)
    # The tangents of each layer's input along grad_normal, and what they add to the gradient with respect to z.
    tangent = tangent_encoded = part(kept.inputs, 2 * rows, sizes, IN, 0)[rows:rows + used]
    for row in range(used):
        for column in range(columns):
            tangent_encoded[row, column] = kept.derivative[row, column] * grad_normal[row, column % 3]
    for layer in range(count - 1):
        tangent_z = np.dot(tangent, affine(net.packed, sizes, layer)[0])
        slope, grad_z = part(kept.slopes, rows, sizes, OUT, layer), part(kept.grad_zs, 2 * rows, sizes, OUT, layer)
        bend, delta = grad_z[:used], grad_z[rows:]
        tangent = part(kept.inputs, 2 * rows, sizes, IN, layer + 1)[rows:rows + used]
        scale = ROOT_HALF if has_skip(layer + 1, count) else np.float32(1.0)
        for row in range(used):
            for column in range(slope.shape[1]):
                moved = slope[row, column] * tangent_z[row, column]
                tangent[row, column] = moved * scale
                # slope' = beta slope (1 - slope), with one slope in delta already
                bend[row, column] = (tangent_z[row, column] - moved) * delta[row, column] * np.float32(SOFTPLUS_BETA)
        if has_skip(layer + 1, count):
            join(tangent_encoded, tangent)
    # The ordinary backward pass, from the last layer down.
    grad_z = part(kept.grad_zs, 2 * rows, sizes, OUT, count - 1)[:used]
    write(grad_output, grad_z)
    grad_encoded = np.zeros((used, columns), np.float32)
    for layer in range(count - 1, -1, -1):
        back = np.dot(grad_z, affine(net.packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            add_encoded(back, scale, grad_encoded)
        if layer > 0:
            slope = part(kept.slopes, rows, sizes, OUT, layer - 1)
            grad_z = part(kept.grad_zs, 2 * rows, sizes, OUT, layer - 1)[:used]
            for row in range(used):
                for column in range(slope.shape[1]):
                    grad_z[row, column] += back[row, column] * scale * slope[row, column]
    return grad_encoded


@compiled
def grad_position(encoded: np.ndarray, derivative: np.ndarray, normal_encoded: np.ndarray, grad_encoded: np.ndarray,
                  grad_normal: np.ndarray) -> np.ndarray:
    """Return the first M rows' gradient with respect to x (M, 3), from those with respect to gamma (M, columns) and
    normal."""
    out = np.empty((len(grad_encoded), 3), np.float32)
    for row in range(len(out)):
        for c in range(3):      # columns c, c + 3, ... encode coordinate c; gamma'' = -frequency^2 gamma
            total, square = grad_encoded[row, c], np.float32(1.0)
            for first in range(3 + c, derivative.shape[1], 6):
                for column in (first, first + 3):
                    total += (grad_encoded[row, column] * derivative[row, column]
                              - square * encoded[row, column] * normal_encoded[row, column] * grad_normal[row, c])
                square *= np.float32(4.0)
            out[row, c] = total
    return out


@compiled
def sum_rows(array: np.ndarray, out: np.ndarray) -> None:
    """Write the sum of the rows of an array (N, C) to out (C,)."""
    out[:] = 0.0
    for row in range(len(array)):
        for column in range(len(out)):
            out[column] += array[row, column]


# --- the rendering network --------------------------------------------------------------------------------------------

def rendering_forward(h: np.ndarray, net: Weights, rgb: np.ndarray) -> None:
    """Write rgb (N, 3) in [-1, 1] of the renderer's input h (N, in) to rgb."""
    on_all_cores(rendering_forward_block, split_rows(len(h), net.sizes[-1, IN]), h, net, rgb)


@compiled
def rendering_forward_block(number: int, split: Split, h: np.ndarray, net: Weights, rgb: np.ndarray) -> None:
    """Do one block of rendering_forward."""
    block = block_of(split, number)
    rows = slice(block.first, block.first + block.rows)
    inputs = np.empty(block.rows * net.sizes[:, IN].sum(), np.float32)
    write(h[rows], part(inputs, block.rows, net.sizes, IN, 0))
    render_block(inputs, net, rgb[rows])


@compiled
def render_block(inputs: np.ndarray, net: Weights, rgb: np.ndarray) -> None:
    """Write a block's colours to rgb (N, 3). inputs: flat, of each layer (N, in), the first one given, the others
    written."""
    sizes, rows = net.sizes, len(rgb)
    for layer in range(len(sizes)):
        w, b = affine(net.packed, sizes, layer)
        z = np.dot(part(inputs, rows, sizes, IN, layer), w)
        if layer == len(sizes) - 1:
            for row in range(rows):
                for column in range(len(b)):
                    rgb[row, column] = np.tanh(z[row, column] + b[column])
        else:
            after = part(inputs, rows, sizes, IN, layer + 1)
            for row in range(rows):
                for column in range(len(b)):
                    value = z[row, column] + b[column]
                    after[row, column] = np.float32(0.0) if value < 0.0 else value      # NaN stays NaN


@compiled
def carry_colors_back(inputs: np.ndarray, net: Weights, rgb: np.ndarray, grad_rgb: np.ndarray,
                      grad_packed: np.ndarray) -> np.ndarray:
    """Return a loss's gradient with respect to the input (N, in) of render_block, from that with respect to rgb (N, 3);
    write that with respect to the packed weights to grad_packed (P,)."""
    sizes, rows = net.sizes, len(rgb)
    grad_z = np.empty((rows, 3), np.float32)
    for row in range(rows):
        for c in range(3):
            grad_z[row, c] = grad_rgb[row, c] * (np.float32(1.0) - rgb[row, c] ** 2)
    for layer in range(len(sizes) - 1, -1, -1):
        h = part(inputs, rows, sizes, IN, layer)
        grad_w, grad_b = affine(grad_packed, sizes, layer)
        np.dot(h.T, grad_z, grad_w)
        sum_rows(grad_z, grad_b)
        grad_z = np.dot(grad_z, affine(net.packed, sizes, layer)[0].T)
        if layer > 0:
            for row in range(rows):
                for column in range(grad_z.shape[1]):
                    if not h[row, column] > 0.0:
                        grad_z[row, column] = 0.0
    return grad_z


# --- a training step --------------------------------------------------------------------------------------------------

class StepRows(NamedTuple):
    """A block's N points of a step: first S hits in the mask, then those of its other rays, R in all, then others."""
    points: np.ndarray          # (N, 3)
    directions: np.ndarray      # (S, 3), unit, of the rays
    rgb: np.ndarray             # (S, 3), of the photographs
    color_weights: np.ndarray   # (S,)
    object_mask: np.ndarray     # (R,), 1 on the object
    mask_weights: np.ndarray    # (R,), 0 for a hit


class LossTerms(NamedTuple):
    """What the losses are multiplied by, and what else they depend on."""
    mask: float
    eikonal: float
    missed: float               # in the mask loss, of a ray in the object mask that misses
    least_slope: float          # of architecture.inverse_slope
    alpha: float
    num_rays: int               # of the step, with all its blocks
    num_points: int


class Networks(NamedTuple):
    """The weights of both networks, and the columns of the renderer's OPTIONAL_INPUTS, as architecture.used_columns."""
    implicit: Weights
    rendering: Weights
    inputs: Tuple[int, int, int]


class StepValues(NamedTuple):
    """What a block's forward pass finds, and keeps for the backward pass. Arrays over rows are in the order of
    StepRows."""
    kept: Kept
    inputs: np.ndarray          # flat, inputs of the renderer's layers, as in render_block
    output: np.ndarray          # (N, 1 + F): sdf and feature
    normals: np.ndarray         # (N, 3)
    rgb: np.ndarray             # (S, 3)
    grad_rgb: np.ndarray        # (S, 3)
    grads: Gradients            # of the losses with respect to their inputs; the backward pass adds to them


@inlined
def step_forward(rows: StepRows, nets: Networks, terms: LossTerms, sums: np.ndarray) -> StepValues:
    """Compute both networks at a block's points, and the losses' gradients with respect to what enters them; write its
    shares of the colour, mask and eikonal loss to sums (3,) float64."""
    f, (x, v), sizes = np.float32, rows[:2], nets.rendering.sizes
    (count, hits), kept = (len(x), len(v)), new_kept(len(x), nets.implicit.sizes)
    output, normals = forward_block(x, nets.implicit, kept)
    grads = Gradients(np.zeros((count, 1), f), np.empty((count, 3), f), np.empty((hits, 3), f),
                      np.empty((hits, 3), f), np.empty((hits, output.shape[1] - 1), f), np.empty((hits, 3), f))
    inputs, rgb = np.empty(hits * sizes[:, IN].sum(), f), np.empty((hits, 3), f)
    if hits:
        join_inputs(x[:hits], v, normals, output, nets.inputs, part(inputs, hits, sizes, IN, 0))
        render_block(inputs, nets.rendering, rgb)
    for row in range(hits):
        slope = v[row, 0] * normals[row, 0] + v[row, 1] * normals[row, 1] + v[row, 2] * normals[row, 2]
        inverse = inverse_slope(slope, f(terms.least_slope), max)
        for c in range(3):
            grads.moves[row, c] = -v[row, c] * inverse
    values = StepValues(kept, inputs, output, normals, rgb, np.empty((hits, 3), f), grads)
    find_losses(rows, terms, values, sums)
    return values


@compiled
def join_inputs(x: np.ndarray, directions: np.ndarray, normals: np.ndarray, output: np.ndarray,
                used: Tuple[int, int, int], h: np.ndarray) -> None:
    """Write the renderer's inputs to h (M, in): point, encoded direction to the camera, normal and feature, as used.

    used: of Networks.
    """
    (view, normal, feature), count = used, len(x)
    write(x, h[:, :3])
    if view:
        write(encode(-directions, encoded_bands(view)), h[:, 3:3 + view])
    if normal:
        write(normals[:count], h[:, 3 + view:3 + view + normal])
    if feature:
        write(output[:count, 1:], h[:, 3 + view + normal:])


@compiled
def find_losses(rows: StepRows, terms: LossTerms, values: StepValues, sums: np.ndarray) -> None:
    """Write a block's share of the losses to sums (3,), and their gradients to values.grads and grad_rgb.

    They are the losses of training/step.py.
    """
    f, grads, num_rays = np.float32, values.grads, np.float32(terms.num_rays)
    alpha, per_point, color, mask, eikonal = f(terms.alpha), f(1.0 / terms.num_points), 0.0, 0.0, 0.0
    for row in range(len(rows.points)):
        n = values.normals[row]
        length = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2] + f(1e-12))     # a root has no derivative at 0
        error = length - f(1.0)
        eikonal += error * error * per_point
        for c in range(3):
            grads.normals[row, c] = f(2.0 * terms.eikonal) * per_point * error / length * n[c]
    for row in range(len(rows.mask_weights)):
        weight, wanted, v = rows.mask_weights[row] / num_rays, rows.object_mask[row], -alpha * values.output[row, 0]
        e = f(0.0) if abs(v) > f(80.0) else np.exp(-abs(v))     # numbers that small are slow, and count for nothing
        sigmoid = (f(1.0) if v > 0 else e) / (f(1.0) + e)
        mask += weight * ((v if v > 0 else f(0.0)) - v * wanted + np.log1p(e)) / alpha
        grads.sdf[row, 0] = f(terms.mask) * weight * (wanted - sigmoid)
    for row in range(len(rows.rgb)):
        weight = rows.color_weights[row] / num_rays
        for c in range(3):
            error = values.rgb[row, c] - rows.rgb[row, c]
            color += weight * abs(error)
            values.grad_rgb[row, c] = weight * np.sign(error)
    sums[0], sums[1], sums[2] = color, mask, eikonal        # once, as the cores' sums lie side by side


@inlined
def step_backward(nets: Networks, values: StepValues, grad_directions: np.ndarray,
                  grad_packed: Tuple[np.ndarray, np.ndarray]) -> None:
    """Write the gradients of a block's losses' sum with respect to the packed weights of both networks to grad_packed.

    grad_directions: (S, 3), receives that with respect to the directions that enter the renderer; or empty.
    """
    grads, sizes = values.grads, nets.rendering.sizes
    hits = len(grads.hits)
    if hits:
        grad_h = carry_colors_back(values.inputs, nets.rendering, values.rgb, values.grad_rgb, grad_packed[1])
        split_inputs(part(values.inputs, hits, sizes, IN, 0), grad_h, nets.inputs,
                     (grads.hits, grads.hit_normals, grads.hit_features), grad_directions)
    else:
        grad_packed[1][:] = 0.0
    carry_block_back(values.kept, nets.implicit, grads)
    find_weight_gradients(len(values.output), values.kept, nets.implicit.sizes, grad_packed[0])


@inlined
def grad_points(values: StepValues) -> np.ndarray:
    """Return the losses' gradient with respect to a block's points (N, 3), after step_backward.

    A ray's point takes its hit along, and its sdf changes by normal . movement. The part that comes through the
    normal's loss is left out.
    """
    grad = values.grads.sdf * values.normals
    hits = grad[:len(values.grads.hits)]
    hits += values.grads.hits
    return grad


@compiled
def split_inputs(h: np.ndarray, grad_h: np.ndarray, used: Tuple[int, int, int],
                 out: Tuple[np.ndarray, np.ndarray, np.ndarray], grad_directions: np.ndarray) -> None:
    """Write the gradient with respect to the parts of the renderer's inputs, as join_inputs joins them.

    out: of point, normal and feature. grad_directions: of the rays' directions, unless it is empty.
    """
    (grad_x, grad_normals, grad_features), (view, normal, feature) = out, used
    write(grad_h[:, :3], grad_x)
    grad_normals[:], grad_features[:], grad_directions[:] = 0.0, 0.0, 0.0
    if view and len(grad_directions):
        encoded = h[:, 3:3 + view].copy()
        derivative = np.empty_like(encoded)
        encode_derivative(encoded, derivative)
        for row in range(len(h)):
            for column in range(view):
                grad_directions[row, column % 3] -= grad_h[row, 3 + column] * derivative[row, column]
    if normal:
        write(grad_h[:, 3 + view:3 + view + normal], grad_normals)
    if feature:
        write(grad_h[:, 3 + view + normal:], grad_features)


# --- weight normalisation ---------------------------------------------------------------------------------------------

@compiled
def parameters_of(flat: np.ndarray, sizes: np.ndarray, layer: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return v (in, out), g (out,) and b (out,) of a layer, as views of a vector that has those of all layers in order.
    """
    start = 0
    for k in range(layer):
        start += (sizes[k, IN] + 2) * sizes[k, OUT]
    rows, columns = sizes[layer]
    middle = start + rows * columns
    return (flat[start:middle].reshape((rows, columns)), flat[middle:middle + columns],
            flat[middle + columns:middle + 2 * columns])


@compiled
def fold(flat: np.ndarray, net: Weights) -> np.ndarray:
    """Write the normalised weight g v / |v|, per column of v, and the bias of each layer to the Weights.

    flat: the parameters of all layers, as parameters_of reads them. Returns |v| of all layers, flat.
    """
    norms, first = np.zeros(net.sizes[:, OUT].sum(), np.float32), 0
    for layer in range(len(net.sizes)):
        (v, g, b), (w_out, b_out) = parameters_of(flat, net.sizes, layer), affine(net.packed, net.sizes, layer)
        norm, scale = norms[first:first + len(g)], np.empty(len(g), np.float32)
        first += len(g)
        for row in range(len(v)):
            for column in range(len(g)):
                norm[column] += v[row, column] * v[row, column]
        for column in range(len(g)):
            norm[column] = np.sqrt(norm[column])
            scale[column] = g[column] / norm[column]
            b_out[column] = b[column]
        for row in range(len(v)):
            for column in range(len(g)):
                w_out[row, column] = v[row, column] * scale[column]
    return norms


@compiled
def fold_backward(flat: np.ndarray, norms: np.ndarray, grad: Weights) -> np.ndarray:
    """Return a loss's gradients with respect to the parameters, in the order of `flat`.

    flat, norms: what fold has taken and returned; grad: the gradients of the packed weights in parts (parts, P), which
    are summed in place.
    """
    total, out, first = grad.packed[0], np.empty_like(flat), 0
    for k in range(1, len(grad.packed)):
        for i in range(len(total)):
            total[i] += grad.packed[k, i]
    for layer in range(len(grad.sizes)):
        (v, g, _), (grad_v, grad_g, grad_b) = (parameters_of(flat, grad.sizes, layer),
                                               parameters_of(out, grad.sizes, layer))
        grad_w, grad_bias = affine(total, grad.sizes, layer)
        norm, along, scale = norms[first:first + len(g)], np.zeros(len(g), np.float32), np.empty(len(g), np.float32)
        first += len(g)
        for row in range(len(v)):
            for column in range(len(g)):
                along[column] += grad_w[row, column] * v[row, column]
        for column in range(len(g)):
            along[column] /= norm[column]
            scale[column] = g[column] / norm[column]
            grad_g[column], grad_b[column] = along[column], grad_bias[column]
            along[column] /= norm[column]
        for row in range(len(v)):
            for column in range(len(g)):
                grad_v[row, column] = (grad_w[row, column] - v[row, column] * along[column]) * scale[column]
    return out
