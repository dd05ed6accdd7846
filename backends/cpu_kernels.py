"""The two networks on the CPU, where nnabla's own kernels run on one core without vector instructions.

The formulas are gpu.py's; tests/test_network.py holds the two against each other. The weights of a network
come as one vector (pack), with the weight normalisation folded in, and `sizes`, (in, out) of each affine layer. All
arrays are float32. The implicit network runs in functions compiled by Numba: in NumPy each of its many passes over a
layer costs time of its own, and the cores would wait for one another between them. Imports nothing of the other
scripts.
"""
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  compiled products take its library, which threadpool_limits must know
from threadpoolctl import threadpool_limits

SOFTPLUS_BETA = 100.0
ROOT_HALF = np.float32(0.5 ** 0.5)
LEAST_SLOPE = 1e-6    # of n . v in the differentiable hit: below, it is float32's rounding and divides by nothing
SKIP_LAYER = 4        # its input is [h, gamma(x)] / sqrt(2)
BLOCK = 1 << 17       # values of a layer worked on together (512 rows at least): they stay in the cache
LEAST = 3 << 12       # values that a core must get: below, two threads lose more by waiting for the interpreter's lock
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# Blocks of rows go to the cores as a whole. The matrix library's own threads are off: they would help with the products
# alone, and between products they spin on the cores that the blocks need.
pool = ThreadPoolExecutor(max(CORES - 1, 1))      # the caller's thread works too
threadpool_limits(1, user_api="blas")


def blocks(rows, width):
    """Cut rows of that width into slices, for as many cores as they are enough for and as many for each."""
    cores = min(max(rows * width // LEAST, 1), CORES)
    rounds = -(-rows // (cores * max(BLOCK // width, 512)))
    block = max(-(-rows // (cores * rounds)), 1) if rows else 1
    return [slice(start, min(start + block, rows)) for start in range(0, rows, block)]


def on_all_cores(function, items):
    """[function(item) for item in items], each item on one core."""
    results, numbers = [None] * len(items), iter(range(len(items)))

    def work():
        for number in numbers:      # each thread takes the next one
            results[number] = function(items[number])

    others = [pool.submit(work) for _ in range(min(CORES, len(items)) - 1)]
    work()
    for other in others:
        other.result()
    return results


# Compiled when first called, and kept beside this file. While one runs, Python is free on other cores. Of the liberties
# that fastmath offers, not the order of sums, nor NaN and infinity, which train.py looks for.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})


@numba.extending.register_jitable
def has_skip(layer, layers):
    """Whether `layer` of an implicit network of that many affine layers takes the encoded position in (section 5.1)."""
    return layer == SKIP_LAYER and layer < layers - 1


@compiled
def encode(x, bands):
    """gamma(x) (N, 3 + 6 bands) of x (N, 3): x, then sin and cos of 2^k x for k < bands, as in NeRF.

    Both from their series about the nearest multiple of pi / 2, to float32's last digits while |2^k x| < 1000.
    """
    f = np.float32
    columns = np.empty((3 + 6 * bands, len(x)), f)      # many of a kind in a row, for the vector instructions
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
def encode_derivative(encoded):
    """The derivative (N, columns) of each column of gamma(x) by the one coordinate that it depends on."""
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
def affine(packed, sizes, layer):
    """W (in, out) and b (out,) of a layer, as views of what pack gave."""
    start = 0
    for k in range(layer):
        start += (sizes[k, 0] + 1) * sizes[k, 1]
    middle = start + sizes[layer, 0] * sizes[layer, 1]
    return packed[start:middle].reshape((sizes[layer, 0], sizes[layer, 1])), packed[middle:middle + sizes[layer, 1]]


IN, OUT = 0, 1


@compiled
def part(flat, rows, sizes, side, layer):
    """A layer's array (rows, sizes[layer, side]), a view of `flat`, which holds those of all layers in their order."""
    start = 0
    for k in range(layer):
        start += rows * sizes[k, side]
    return flat[start:start + rows * sizes[layer, side]].reshape((rows, sizes[layer, side]))


@compiled
def softplus(z, b, scale, h, slope):
    """scale * softplus(z + b), with beta = 100, to the first columns of h; its derivative (without scale) to slope,
    unless that is None.

    softplus(v) = max(v, 0) + log(1 + e), e = exp(-|v|): exp(a) as exp(a / 16)^16, both by their series, to float32's
    last digits. (Where e is below 2e-9 it is 2e-9.)
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
def join(encoded, h):
    """Fill the last columns of a skip layer's input, [h, gamma(x)] / sqrt(2)."""
    first = h.shape[1] - encoded.shape[1]
    for row in range(len(h)):
        for column in range(encoded.shape[1]):
            h[row, first + column] = encoded[row, column] * ROOT_HALF


@compiled
def split(back, scale, to_encoded):
    """Add a derivative by a layer's input [h, gamma(x)] * scale, its last columns, to the derivative by gamma(x)."""
    first = back.shape[1] - to_encoded.shape[1]
    for row in range(len(back)):
        for column in range(to_encoded.shape[1]):
            to_encoded[row, column] += back[row, first + column] * scale


@compiled
def last_hidden(x, packed, sizes, inputs, slopes):
    """The input of the implicit network's last layer at x (N, 3). Unless they are empty, inputs and slopes, flat, are
    filled with the inputs of all layers and the derivatives of the softplus after all but the last."""
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


def implicit_sdf(x, packed, sizes):
    """The sdf (N,) at x (N, 3), without what only a feature or a gradient would need."""
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    last_w, last_b = affine(packed, sizes, len(sizes) - 1)

    def evaluate(rows):
        h = last_hidden(x[rows], packed, sizes, NOTHING, NOTHING)
        np.matmul(h, last_w[:, 0], out=out[rows])
        out[rows] += last_b[0]

    on_all_cores(evaluate, blocks(len(x), sizes[-1, IN]))
    return out


def implicit_forward(x, packed, sizes, hits=0):
    """Value and gradient of the implicit network at x (N, 3).

    Returns sdf and feature (N, 1 + F), gradient of the sdf (N, 3), and what implicit_backward wants to be given. hits:
    how many of x are surface points for it.
    """
    x = np.ascontiguousarray(x, np.float32)
    output, gradient = np.empty((len(x), sizes[-1, OUT]), np.float32), np.empty((len(x), 3), np.float32)

    def evaluate(block):
        hits, rows = block
        inputs, slopes = (np.empty(len(rows) * total, np.float32)
                          for total in (sizes[:, IN].sum(), sizes[:-1, OUT].sum()))
        h = last_hidden(x[rows], packed, sizes, inputs, slopes)
        output[rows], gradient[rows], *rest = forward_block(h, inputs, slopes, packed, sizes)
        return hits, rows, (inputs, slopes, *rest)

    return output, gradient, on_all_cores(evaluate, mixed_blocks(hits, len(x), sizes[-1, IN]))


def mixed_blocks(hits, rows, width):
    """As blocks, with as many of the first rows, `hits`, in each: so many are the first of a block's, and the numbers
    of its rows."""
    count = len(blocks(rows, width))
    ends = [np.linspace(first, last, count + 1).astype(int) for first, last in ((0, hits), (hits, rows))]
    return [(b - a, np.r_[a:b, c:d]) for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:])]


@compiled
def forward_block(h, inputs, slopes, packed, sizes):
    """The last layer's z (N, 1 + F) and the gradient of the sdf (N, 3); h, inputs and slopes as last_hidden gives them.

    Returns after these the layers' deltas (d sdf / d z; of all but the last), flat, gamma's derivative and
    d sdf / d gamma (N, columns).
    """
    rows, count = len(h), len(sizes)
    deltas = np.empty_like(slopes)
    w, b = affine(packed, sizes, count - 1)
    z, gradient = np.dot(h, w), np.empty((rows, 3), np.float32)
    back, scale = np.empty((rows, sizes[count - 1, IN]), np.float32), np.float32(1.0)
    for row in range(rows):
        for column in range(len(b)):
            z[row, column] += b[column]
        for column in range(len(w)):
            back[row, column] = w[column, 0]
    # d sdf / d z of each layer but the last, from the last down.
    encoded = part(inputs, rows, sizes, IN, 0)
    to_encoded = np.zeros_like(encoded)
    for layer in range(count - 2, -1, -1):
        slope, delta = part(slopes, rows, sizes, OUT, layer), part(deltas, rows, sizes, OUT, layer)
        for row in range(rows):
            for column in range(delta.shape[1]):
                delta[row, column] = slope[row, column] * (back[row, column] * scale)
        back = np.dot(delta, affine(packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            split(back, scale, to_encoded)
    derivative = encode_derivative(encoded)
    for row in range(rows):
        for c in range(3):
            total = np.float32(0.0)
            for column in range(c, encoded.shape[1], 3):
                total += to_encoded[row, column] * derivative[row, column]
            gradient[row, c] = total
    return z, gradient, deltas, derivative, to_encoded


def rendering_forward(h, packed, sizes):
    """The renderer on its input h (N, in): rgb (N, 3) in [-1, 1], and what rendering_backward wants to be given."""
    rgb, (*hidden, last) = np.empty((len(h), 3), np.float32), unpack(packed, sizes)

    def evaluate(rows):
        inputs = [h[rows]]
        for w, b in hidden:
            z = inputs[-1] @ w
            z += b
            inputs.append(np.maximum(z, 0.0, out=z))
        rgb[rows] = np.tanh(inputs[-1] @ last[0] + last[1])
        return rows, inputs

    return rgb, on_all_cores(evaluate, blocks(len(h), sizes[-1, 0]))


def rendering_backward(saved, packed, sizes, rgb, by_rgb):
    """Carry a loss's derivative by rgb back: the derivatives by h and by the packed weights."""
    by_h, weights = np.empty((len(rgb), sizes[0, 0]), np.float32), unpack(packed, sizes)

    def evaluate(saved_block):
        rows, inputs = saved_block
        by_weights = []
        by_z = by_rgb[rows] * (1.0 - rgb[rows] ** 2)
        for (w, _), h in zip(weights[::-1], inputs[::-1]):
            by_weights.insert(0, (h.T @ by_z, by_z.sum(axis=0)))
            by_z = by_z @ w.T
            if h is not inputs[0]:
                by_z *= h > 0.0
        by_h[rows] = by_z
        return pack(by_weights)

    return by_h, sum(on_all_cores(evaluate, saved))


def pack(weights):
    """One vector of all [(W, b)]: nnabla's functions in Python cost time for each of their inputs."""
    return np.concatenate([array.ravel() for layer in weights for array in layer]).astype(np.float32, copy=False)


def unpack(packed, sizes):
    """[(W, b)] as views of what pack gave; sizes: (in, out) of each layer, an array (L, 2)."""
    return [affine(packed, sizes, layer) for layer in range(len(sizes))]


def fold(v, g, norm):
    """The weight normalisation of a layer: g v / |v|, per column of v (in, out); norm: |v| (out,)."""
    return v * (g / norm)


def fold_backward(v, g, norm, by_w):
    """The derivatives by v and g of a loss whose derivative by fold's result is by_w."""
    by_g = np.einsum("io,io->o", by_w, v) / norm
    return (by_w - v * (by_g / norm)) * (g / norm), by_g


# Of the first rows of implicit_forward, which are surface points: their rays' directions (S, 3), gradient . direction
# (S,) as slope_along gives it, and a loss's derivatives by the points as such, by their gradient and their feature.
Hits = namedtuple("Hits", "directions slopes by_points by_gradient by_feature")


def slope_along(directions, gradient):
    """gradient . direction (S,), but no nearer to 0 than LEAST_SLOPE: the hit's derivative divides by it. The sign stays;
    0 counts as negative, as of a ray that enters."""
    slope = (directions * gradient).sum(axis=1)
    return np.where(slope > 0, np.float32(1), np.float32(-1)) * np.maximum(np.abs(slope), np.float32(LEAST_SLOPE))


def implicit_backward(saved, packed, sizes, by_sdf, by_gradient, hits=None):
    """Carry a loss's derivatives back through implicit_forward.

    by_sdf (N, 1), by_gradient (N, 3). hits: None, or the Hits, for which a movement of the surface moves the point
    along its ray: x0 - (sdf - sdf0) / (gradient0 . direction) direction (the paper's equation 3).
    Returns the derivative by the packed weights; then that by the sdf (N, 1), in which such movements are counted, and
    that by the points of the hits (S, 3), or None.
    """
    by_sdf, features = by_sdf.copy(), sizes[-1, OUT] - 1
    by_hits = hits and hits.by_points.copy()

    def evaluate(saved_block):
        count, rows, (inputs, slopes, deltas, derivative, to_encoded) = saved_block
        kept = slopes, deltas, derivative, packed, sizes
        by_output, by_gradients = np.zeros((len(rows), 1 + features), np.float32), by_gradient[rows]
        if count:
            own = rows[:count]
            by_output[:count, 1:] = hits.by_feature[own]
            _, _, by_encoded = carry_back(*kept, by_output[:count], hits.by_gradient[own])
            by_hits[own] += by_position(inputs, derivative, to_encoded, by_encoded, hits.by_gradient[own])
            by_sdf[own, 0] -= (by_hits[own] * hits.directions[own]).sum(axis=1) / hits.slopes[own]
            by_gradients[:count] += hits.by_gradient[own]
        by_output[:, 0] = by_sdf[rows, 0]
        by_zs, tangents, _ = carry_back(*kept, by_output, by_gradients)
        return by_weights(inputs, deltas, by_zs, tangents, packed, sizes)

    by_packed = sum(on_all_cores(evaluate, saved))
    return by_packed, by_sdf, by_hits


@compiled
def carry_back(slopes, deltas, derivative, packed, sizes, by_output, by_gradient):
    """Carry derivatives by the first rows' z of the last layer and by their gradient, (M, 1 + F) and (M, 3), back.

    sum(by_gradient * gradient) is the derivative of the sdf along by_gradient, so its own derivative is the backward
    pass of a forward (tangent) pass, in which d sdf / d z, known already, is the derivative by every tangent of z.

    Returns, flat, the derivatives by the z of all layers and the tangents of their inputs, and the derivative by gamma
    (M, columns).
    """
    rows, used, count, columns = len(derivative), len(by_output), len(sizes), derivative.shape[1]
    # Tangents of each layer's input along by_gradient, and what they add to the derivative by z.
    tangents = np.empty(used * sizes[:, IN].sum(), np.float32)
    by_zs = np.empty(used * sizes[:, OUT].sum(), np.float32)
    tangent_encoded = part(tangents, used, sizes, IN, 0)
    for row in range(used):
        for column in range(columns):
            tangent_encoded[row, column] = derivative[row, column] * by_gradient[row, column % 3]
    for layer in range(count - 1):
        tangent_z = np.dot(part(tangents, used, sizes, IN, layer), affine(packed, sizes, layer)[0])
        slope, delta = part(slopes, rows, sizes, OUT, layer), part(deltas, rows, sizes, OUT, layer)
        bend, tangent = part(by_zs, used, sizes, OUT, layer), part(tangents, used, sizes, IN, layer + 1)
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
    by_z, by_encoded = part(by_zs, used, sizes, OUT, count - 1), np.zeros((used, columns), np.float32)
    by_z[:] = by_output
    for layer in range(count - 1, -1, -1):
        back = np.dot(by_z, affine(packed, sizes, layer)[0].T)
        scale = ROOT_HALF if has_skip(layer, count) else np.float32(1.0)
        if has_skip(layer, count) or layer == 0:
            split(back, scale, by_encoded)
        if layer > 0:
            slope, by_z = part(slopes, rows, sizes, OUT, layer - 1), part(by_zs, used, sizes, OUT, layer - 1)
            for row in range(used):
                for column in range(slope.shape[1]):
                    by_z[row, column] += back[row, column] * scale * slope[row, column]
    return by_zs, tangents, by_encoded


@compiled
def by_position(inputs, derivative, to_encoded, by_encoded, by_gradient):
    """The derivative by x (M, 3) of the first rows, from that by their gamma (M, columns) and by their gradient."""
    out, columns = np.empty((len(by_encoded), 3), np.float32), derivative.shape[1]
    encoded = inputs[:derivative.size].reshape(derivative.shape)
    for row in range(len(out)):
        for c in range(3):      # columns c, c + 3, ... depend on coordinate c; gamma'' = -frequency^2 gamma
            total, square = by_encoded[row, c], np.float32(1.0)
            for first in range(3 + c, columns, 6):
                for column in (first, first + 3):
                    total += (by_encoded[row, column] * derivative[row, column]
                              - square * encoded[row, column] * to_encoded[row, column] * by_gradient[row, c])
                square *= np.float32(4.0)
            out[row, c] = total
    return out


@compiled
def by_weights(inputs, deltas, by_zs, tangents, packed, sizes):
    """The derivative by the packed weights, from what carry_back gives of all rows."""
    by_packed, count = np.zeros_like(packed), len(sizes)
    rows = len(inputs) // sizes[:, IN].sum()
    for layer in range(count):
        tangent, by_z = part(tangents, rows, sizes, IN, layer), part(by_zs, rows, sizes, OUT, layer)
        by_w, by_b = affine(by_packed, sizes, layer)
        along_h = np.dot(part(inputs, rows, sizes, IN, layer).T, by_z)
        if layer < count - 1:
            along_tangent = np.dot(tangent.T, part(deltas, rows, sizes, OUT, layer))
            for row in range(len(by_w)):
                for column in range(len(by_b)):
                    by_w[row, column] = along_h[row, column] + along_tangent[row, column]
        else:
            by_w[:] = along_h
            for row in range(rows):
                for column in range(len(by_w)):
                    by_w[column, 0] += tangent[row, column]
        for row in range(rows):
            for column in range(len(by_b)):
                by_b[column] += by_z[row, column]
    return by_packed
