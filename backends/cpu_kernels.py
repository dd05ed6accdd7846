"""The two networks on the CPU, in NumPy and Numba. nnabla's own CPU kernels use one core and no vector instructions.

The formulas are those of gpu.py; tests/test_network.py compares the two. A network's weights come as one vector (pack)
with the weight normalisation folded in, and `sizes`, (in, out) of each affine layer. All arrays are float32. The
implicit network runs in functions compiled by Numba: NumPy would need many passes over each layer, and the cores would
wait for one another between them.
"""
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Callable, List, Optional, Tuple

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  compiled products use its BLAS, which limit_blas_threads must find
from threadpoolctl import threadpool_limits

from backends import architecture
from backends.architecture import SOFTPLUS_BETA

Pair = Tuple[np.ndarray, np.ndarray]
Layers = List[Pair]     # W (in, out) and b (out,) of each layer

ROOT_HALF = np.float32(0.5 ** 0.5)
BLOCK = 1 << 17         # values of a layer computed together (512 rows at least), so that they stay in the cache
MIN_PER_CORE = 3 << 12  # values; with fewer, two threads lose more time to the interpreter's lock than they save
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def limit_blas_threads() -> None:
    """Make BLAS use one thread, for the whole process: here, each core computes its own block of rows.

    BLAS's threads would speed up the products alone, and spin between them on the cores that the blocks need.
    """
    threadpool_limits(1, user_api="blas")


@lru_cache(maxsize=None)
def pool() -> ThreadPoolExecutor:
    """Return the threads that work beside the caller's."""
    return ThreadPoolExecutor(max(CORES - 1, 1))


def blocks(num_rows: int, width: int) -> List[slice]:
    """Cut rows of that width into slices: as many for each core, on as many cores as have enough to do."""
    cores = min(max(num_rows * width // MIN_PER_CORE, 1), CORES)
    rounds = -(-num_rows // (cores * max(BLOCK // width, 512)))
    block = max(-(-num_rows // (cores * rounds)), 1) if num_rows else 1
    return [slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block)]


def on_all_cores(function: Callable, items: list) -> list:
    """Return [function(item) for item in items], with each item computed on one core."""
    results, numbers = [None] * len(items), iter(range(len(items)))

    def work():
        for number in numbers:      # each thread takes the next one
            results[number] = function(items[number])

    others = [pool().submit(work) for _ in range(min(CORES, len(items)) - 1)]
    work()
    for other in others:
        other.result()
    return results


# Compiled at the first call and cached beside this file. Compiled code releases the interpreter's lock. fastmath may
# neither reorder sums nor assume that there is no NaN or infinity, which train.py checks for.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})


has_skip = numba.extending.register_jitable(architecture.has_skip)


@compiled
def encode(x: np.ndarray, bands: int) -> np.ndarray:
    """Return gamma(x) (N, 3 + 6 bands) of x (N, 3): x, then sin and cos of 2^k x for k < bands, as in NeRF.

    Both come from their series about the nearest multiple of pi / 2, exact to float32's last digits while |2^k x| <
    1000.
    """
    f = np.float32
    columns = np.empty((3 + 6 * bands, len(x)), f)      # transposed, so that the inner loop uses vector instructions
    columns[:3] = x.T
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
    return columns.T.copy()


@compiled
def encode_derivative(encoded: np.ndarray) -> np.ndarray:
    """Return the derivative (N, columns) of each column of gamma(x) with respect to the coordinate that it encodes."""
    out = np.ones_like(encoded)
    for row in range(len(encoded)):
        freq = np.float32(1.0)
        for s in range(3, encoded.shape[1], 6):
            for c in range(s, s + 3):
                out[row, c] = freq * encoded[row, c + 3]        # sin' = cos
                out[row, c + 3] = -freq * encoded[row, c]       # cos' = -sin
            freq *= np.float32(2.0)
    return out


@compiled
def affine(packed: np.ndarray, sizes: np.ndarray, layer: int) -> Pair:
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
def split(back: np.ndarray, scale: np.float32, grad_encoded: np.ndarray) -> None:
    """Add the part of gamma(x), the last columns of a derivative with respect to [h, gamma(x)] * scale, to
    grad_encoded."""
    first = back.shape[1] - grad_encoded.shape[1]
    for row in range(len(back)):
        for column in range(grad_encoded.shape[1]):
            grad_encoded[row, column] += back[row, first + column] * scale


@compiled
def last_hidden(x: np.ndarray, packed: np.ndarray, sizes: np.ndarray, inputs: np.ndarray,
                slopes: np.ndarray) -> np.ndarray:
    """Return the input of the implicit network's last layer at x (N, 3).

    inputs and slopes, flat, receive the inputs of all layers and the derivatives of the softplus after all but the
    last, unless they are empty.
    """
    rows, count, keep = len(x), len(sizes), len(inputs) > 0
    h = encoded = encode(x, (sizes[0, IN] - 3) // 6)
    if keep:
        inputs[:encoded.size] = encoded.ravel()
    for layer in range(count - 1):
        w, b = affine(packed, sizes, layer)
        z = np.dot(h, w)
        scale = ROOT_HALF if has_skip(layer + 1, count) else np.float32(1.0)
        if keep:
            h = part(inputs, rows, sizes, IN, layer + 1)
            softplus(z, b, scale, h, part(slopes, rows, sizes, OUT, layer))
        else:
            h = np.empty((rows, sizes[layer + 1, IN]), np.float32)
            softplus(z, b, scale, h, None)
        if has_skip(layer + 1, count):
            join(encoded, h)
    return h


NOTHING = np.empty(0, np.float32)


def implicit_sdf(x: np.ndarray, packed: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the sdf (N,) at x (N, 3), without computing features or normals."""
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    last_w, last_b = affine(packed, sizes, len(sizes) - 1)

    def fill(rows):
        h = last_hidden(x[rows], packed, sizes, NOTHING, NOTHING)
        np.matmul(h, last_w[:, 0], out=out[rows])
        out[rows] += last_b[0]

    on_all_cores(fill, blocks(len(x), sizes[-1, IN]))
    return out


def implicit_forward(x: np.ndarray, packed: np.ndarray, sizes: np.ndarray,
                     num_hits: int = 0) -> Tuple[np.ndarray, np.ndarray, list]:
    """Compute the implicit network and its sdf's gradient, the normal, at x (N, 3), of which the first num_hits are
    hits.

    Returns sdf and feature (N, 1 + F), the normals (N, 3), not normalised, and what implicit_backward takes as `saved`.
    """
    x = np.ascontiguousarray(x, np.float32)
    output, normals = np.empty((len(x), sizes[-1, OUT]), np.float32), np.empty((len(x), 3), np.float32)

    def fill(block):
        block_hits, rows = block
        inputs, slopes = (np.empty(len(rows) * total, np.float32)
                          for total in (sizes[:, IN].sum(), sizes[:-1, OUT].sum()))
        h = last_hidden(x[rows], packed, sizes, inputs, slopes)
        output[rows], normals[rows], *rest = forward_block(h, inputs, slopes, packed, sizes)
        return block_hits, rows, (inputs, slopes, *rest)

    return output, normals, on_all_cores(fill, mixed_blocks(num_hits, len(x), sizes[-1, IN]))


def mixed_blocks(num_hits: int, num_rows: int, width: int) -> List[Tuple[int, np.ndarray]]:
    """Cut rows into as many blocks as `blocks` does, each with its share of the hits, which are the first rows.

    Returns [(number of hits, the block's rows with its hits first)].
    """
    count = len(blocks(num_rows, width))
    ends = [np.linspace(first, last, count + 1).astype(int) for first, last in ((0, num_hits), (num_hits, num_rows))]
    return [(b - a, np.r_[a:b, c:d]) for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:])]


@compiled
def forward_block(h: np.ndarray, inputs: np.ndarray, slopes: np.ndarray, packed: np.ndarray,
                  sizes: np.ndarray) -> Tuple[np.ndarray, ...]:
    """Return the last layer's z (N, 1 + F) and the normal (N, 3), from what last_hidden computed.

    Also returns, for the backward pass, d sdf / d z of all layers but the last (deltas, flat), gamma's derivative and
    d sdf / d gamma (N, columns).
    """
    rows, count = len(h), len(sizes)
    deltas = np.empty_like(slopes)
    w, b = affine(packed, sizes, count - 1)
    z, normal = np.dot(h, w), np.empty((rows, 3), np.float32)
    back, scale = np.empty((rows, sizes[count - 1, IN]), np.float32), np.float32(1.0)
    for row in range(rows):
        for column in range(len(b)):
            z[row, column] += b[column]
        for column in range(len(w)):
            back[row, column] = w[column, 0]
    # d sdf / d z, from the last layer but one down.
    encoded = part(inputs, rows, sizes, IN, 0)
    normal_encoded = np.zeros_like(encoded)
    for layer in range(count - 2, -1, -1):
        slope, delta = part(slopes, rows, sizes, OUT, layer), part(deltas, rows, sizes, OUT, layer)
        for row in range(rows):
            for column in range(delta.shape[1]):
                delta[row, column] = slope[row, column] * (back[row, column] * scale)
        back = np.dot(delta, affine(packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            split(back, scale, normal_encoded)
    derivative = encode_derivative(encoded)
    for row in range(rows):
        for c in range(3):
            total = np.float32(0.0)
            for column in range(c, encoded.shape[1], 3):
                total += normal_encoded[row, column] * derivative[row, column]
            normal[row, c] = total
    return z, normal, deltas, derivative, normal_encoded


def rendering_forward(h: np.ndarray, packed: np.ndarray, sizes: np.ndarray) -> Tuple[np.ndarray, list]:
    """Return rgb (N, 3) in [-1, 1] of the renderer's input h (N, in), and what rendering_backward takes as `saved`."""
    rgb, (*hidden, last) = np.empty((len(h), 3), np.float32), unpack(packed, sizes)

    def fill(rows):
        inputs = [h[rows]]
        for w, b in hidden:
            z = inputs[-1] @ w
            z += b
            inputs.append(np.maximum(z, 0.0, out=z))
        rgb[rows] = np.tanh(inputs[-1] @ last[0] + last[1])
        return rows, inputs

    return rgb, on_all_cores(fill, blocks(len(h), sizes[-1, 0]))


def rendering_backward(saved: list, packed: np.ndarray, sizes: np.ndarray, rgb: np.ndarray,
                       grad_rgb: np.ndarray) -> Pair:
    """Return a loss's gradients with respect to h (N, in) and to the packed weights, from that with respect to rgb (N,
    3)."""
    grad_input, weights = np.empty((len(rgb), sizes[0, 0]), np.float32), unpack(packed, sizes)

    def fill(saved_block):
        rows, inputs = saved_block
        grad_layers = []
        grad_z = grad_rgb[rows] * (1.0 - rgb[rows] ** 2)
        for (w, _), h in zip(weights[::-1], inputs[::-1]):
            grad_layers.insert(0, (h.T @ grad_z, grad_z.sum(axis=0)))
            grad_z = grad_z @ w.T
            if h is not inputs[0]:
                grad_z *= h > 0.0
        grad_input[rows] = grad_z
        return pack(grad_layers)

    return grad_input, sum(on_all_cores(fill, saved))


def pack(layers: Layers) -> np.ndarray:
    """Return one float32 vector of all [(W, b)]: nnabla's functions in Python take time for each of their inputs."""
    return np.concatenate([array.ravel() for layer in layers for array in layer]).astype(np.float32, copy=False)


def unpack(packed: np.ndarray, sizes: np.ndarray) -> Layers:
    """Return [(W, b)] as views of the packed weights; sizes: (in, out) of each layer, an array (L, 2)."""
    return [affine(packed, sizes, layer) for layer in range(len(sizes))]


def fold(v: np.ndarray, g: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Return a layer's normalised weight g v / |v|, per column of v (in, out); norm: |v| (out,)."""
    return v * (g / norm)


def fold_backward(v: np.ndarray, g: np.ndarray, norm: np.ndarray, grad_w: np.ndarray) -> Pair:
    """Return a loss's gradients with respect to v and g, from that with respect to the result of fold."""
    grad_g = np.einsum("io,io->o", grad_w, v) / norm
    return (grad_w - v * (grad_g / norm)) * (g / norm), grad_g


# What the backward pass takes of the hits, the first S rows of implicit_forward: the directions of their rays (S, 3), 1
# / (n . v) (S,), and a loss's gradients with respect to the hit points (S, 3), their normals (S, 3) and their features
# (S, F).
Hits = namedtuple("Hits", "directions inverse_slopes grad_points grad_normals grad_features")


def implicit_backward(saved: list, packed: np.ndarray, sizes: np.ndarray, grad_sdf: np.ndarray,
                      grad_normals: np.ndarray,
                      hits: Optional["Hits"] = None) -> Tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]:
    """Carry a loss's gradients back through implicit_forward.

    grad_sdf (N, 1), grad_normals (N, 3). hits: None, or the Hits. Where the surface moves, a hit moves along its ray:
    x0 - (sdf - sdf0) / (n0 . v) v (the paper's equation 3).
    Returns the gradients with respect to the packed weights; to the sdf (N, 1), the hits' movements included; and to
    the hits (S, 3), or None.
    """
    grad_sdf, num_features = grad_sdf.copy(), sizes[-1, OUT] - 1
    grad_hits = hits and hits.grad_points.copy()

    def carry(saved_block):
        count, rows, (inputs, slopes, deltas, derivative, normal_encoded) = saved_block
        kept = slopes, deltas, derivative, packed, sizes
        grad_output, grad_block_normals = np.zeros((len(rows), 1 + num_features), np.float32), grad_normals[rows]
        if count:
            own = rows[:count]
            grad_output[:count, 1:] = hits.grad_features[own]
            _, _, grad_encoded = carry_back(*kept, grad_output[:count], hits.grad_normals[own])
            grad_hits[own] += grad_position(inputs, derivative, normal_encoded, grad_encoded, hits.grad_normals[own])
            grad_sdf[own, 0] -= (grad_hits[own] * hits.directions[own]).sum(axis=1) * hits.inverse_slopes[own]
            grad_block_normals[:count] += hits.grad_normals[own]
        grad_output[:, 0] = grad_sdf[rows, 0]
        grad_zs, tangents, _ = carry_back(*kept, grad_output, grad_block_normals)
        return grad_weights(inputs, deltas, grad_zs, tangents, packed, sizes)

    grad_packed = sum(on_all_cores(carry, saved))
    return grad_packed, grad_sdf, grad_hits


@compiled
def carry_back(slopes: np.ndarray, deltas: np.ndarray, derivative: np.ndarray, packed: np.ndarray, sizes: np.ndarray,
               grad_output: np.ndarray, grad_normal: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Carry gradients with respect to the first M rows' output (M, 1 + F) and normal (M, 3) back through the layers.

    sum(grad_normal * normal) is the sdf's derivative along grad_normal. So its own gradient is the backward pass of a
    forward (tangent) pass, in which d sdf / d z, known already, is the derivative with respect to every tangent of z.

    Returns, flat, the gradients with respect to the z of all layers and the tangents of their inputs; and the gradient
    with respect to gamma (M, columns).
    """
    rows, used, count, columns = len(derivative), len(grad_output), len(sizes), derivative.shape[1]
    # The tangents of each layer's input along grad_normal, and what they add to the gradient with respect to z.
    tangents = np.empty(used * sizes[:, IN].sum(), np.float32)
    grad_zs = np.empty(used * sizes[:, OUT].sum(), np.float32)
    tangent_encoded = part(tangents, used, sizes, IN, 0)
    for row in range(used):
        for column in range(columns):
            tangent_encoded[row, column] = derivative[row, column] * grad_normal[row, column % 3]
    for layer in range(count - 1):
        tangent_z = np.dot(part(tangents, used, sizes, IN, layer), affine(packed, sizes, layer)[0])
        slope, delta = part(slopes, rows, sizes, OUT, layer), part(deltas, rows, sizes, OUT, layer)
        bend, tangent = part(grad_zs, used, sizes, OUT, layer), part(tangents, used, sizes, IN, layer + 1)
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
    grad_z, grad_encoded = part(grad_zs, used, sizes, OUT, count - 1), np.zeros((used, columns), np.float32)
    grad_z[:] = grad_output
    for layer in range(count - 1, -1, -1):
        back = np.dot(grad_z, affine(packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            split(back, scale, grad_encoded)
        if layer > 0:
            slope, grad_z = part(slopes, rows, sizes, OUT, layer - 1), part(grad_zs, used, sizes, OUT, layer - 1)
            for row in range(used):
                for column in range(slope.shape[1]):
                    grad_z[row, column] += back[row, column] * scale * slope[row, column]
    return grad_zs, tangents, grad_encoded


@compiled
def grad_position(inputs: np.ndarray, derivative: np.ndarray, normal_encoded: np.ndarray, grad_encoded: np.ndarray,
                  grad_normal: np.ndarray) -> np.ndarray:
    """Return the first M rows' gradient with respect to x (M, 3), from those with respect to gamma (M, columns) and
    normal."""
    out, columns = np.empty((len(grad_encoded), 3), np.float32), derivative.shape[1]
    encoded = inputs[:derivative.size].reshape(derivative.shape)
    for row in range(len(out)):
        for c in range(3):      # columns c, c + 3, ... encode coordinate c; gamma'' = -frequency^2 gamma
            total, square = grad_encoded[row, c], np.float32(1.0)
            for first in range(3 + c, columns, 6):
                for column in (first, first + 3):
                    total += (grad_encoded[row, column] * derivative[row, column]
                              - square * encoded[row, column] * normal_encoded[row, column] * grad_normal[row, c])
                square *= np.float32(4.0)
            out[row, c] = total
    return out


@compiled
def grad_weights(inputs: np.ndarray, deltas: np.ndarray, grad_zs: np.ndarray, tangents: np.ndarray,
                 packed: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the gradient with respect to the packed weights, from what carry_back gives for all rows."""
    grad_packed, count = np.zeros_like(packed), len(sizes)
    rows = len(inputs) // sizes[:, IN].sum()
    for layer in range(count):
        tangent, grad_z = part(tangents, rows, sizes, IN, layer), part(grad_zs, rows, sizes, OUT, layer)
        grad_w, grad_b = affine(grad_packed, sizes, layer)
        along_h = np.dot(part(inputs, rows, sizes, IN, layer).T, grad_z)
        if layer < count - 1:
            along_tangent = np.dot(tangent.T, part(deltas, rows, sizes, OUT, layer))
            for row in range(len(grad_w)):
                for column in range(len(grad_b)):
                    grad_w[row, column] = along_h[row, column] + along_tangent[row, column]
        else:
            grad_w[:] = along_h
            for row in range(rows):
                for column in range(len(grad_w)):
                    grad_w[column, 0] += tangent[row, column]
        for row in range(rows):
            for column in range(len(grad_b)):
                grad_b[column] += grad_z[row, column]
    return grad_packed
