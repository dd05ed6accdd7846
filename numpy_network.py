"""The two networks in NumPy, for the CPU, where nnabla's own kernels run on one core without vector instructions.

The formulas are network.py's; tests/test_network.py holds the two against each other. Weights are lists of (W, b), one
per affine layer, W (in, out) with its weight normalisation folded in, b (out,). All arrays are float32.
Imports nothing of the other scripts.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

SOFTPLUS_BETA = 100.0
SKIP_LAYER = 4        # its input is [h, gamma(x)] / sqrt(2)
BLOCK = 1 << 17       # values of a layer worked on together (512 rows at least): they stay in the cache
LEAST = 3 << 12       # values that a core must get: below, two threads lose more by waiting for the interpreter's lock
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# Blocks of rows go to the cores as a whole. The matrix library's own threads are off: they would help with the products
# alone, and between products they spin on the cores that the blocks need.
pool = ThreadPoolExecutor(max(CORES - 1, 1))      # the caller's thread works too
threadpool_limits(1, user_api="blas")


def blocks(rows, width):
    """Cut rows of that width into slices, for as many cores as they are enough for."""
    cores = min(max(rows * width // LEAST, 1), CORES)
    block = max(min(max(BLOCK // width, 512), -(-rows // cores)), 1)
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


def has_skip(layer, layers):
    """Whether `layer` of an implicit network of that many affine layers takes the encoded position in (section 5.1)."""
    return layer == SKIP_LAYER and layer < layers - 1


def frequencies(columns):
    """Return the frequency of each column of an encoding: 0 for the 3 raw ones, then 2^k for sin and cos of 3 each."""
    bands = (columns - 3) // 6
    return np.concatenate([np.zeros(3), np.repeat(2.0 ** np.arange(bands), 6)]).astype(np.float32)


def encode(x, bands):
    """gamma(x) (N, 3 + 6 bands) of x (N, 3): x, then sin and cos of 2^k x for k < bands, as in NeRF."""
    out = np.empty((3 + 6 * bands, len(x)), np.float32)     # by columns: sine and cosine want their values in a row
    out[:3] = x.T
    for k in range(bands):
        phase = out[:3] * np.float32(2 ** k)
        np.sin(phase, out=out[3 + 6 * k:6 + 6 * k])
        np.cos(phase, out=out[6 + 6 * k:9 + 6 * k])
    return out.T


def encode_derivative(encoded):
    """The derivative (N, columns) of each column of gamma(x) by the one coordinate that it depends on."""
    out = np.ones_like(encoded)
    for s, freq in zip(range(3, encoded.shape[1], 6), frequencies(encoded.shape[1])[3::6]):
        np.multiply(encoded[:, s + 3:s + 6], freq, out=out[:, s:s + 3])      # sin' = cos
        np.multiply(encoded[:, s:s + 3], -freq, out=out[:, s + 3:s + 6])     # cos' = -sin
    return out


def per_coordinate(columns):
    """Sum (N, columns) over the columns of each coordinate: (N, 3)."""
    return columns.reshape(len(columns), -1, 3).sum(axis=1)


def softplus(z, slope=None):
    """Softplus with beta = 100 of z, which is overwritten; with `slope`, an array like z, its derivative goes there."""
    z *= SOFTPLUS_BETA
    rest = np.minimum(z, 30.0, out=slope)       # beyond 30, softplus is z in float32
    np.exp(rest, out=rest)
    one_more = rest + 1.0
    if slope is not None:
        np.divide(rest, one_more, out=slope)
    np.log(one_more, out=one_more)
    np.maximum(z, one_more, out=z)
    z *= 1.0 / SOFTPLUS_BETA
    return z


def layer_input(layer, count, h, encoded):
    """The input of an affine layer: h, or at the skip layer [h, encoded] / sqrt(2)."""
    if not has_skip(layer, count):
        return h
    joined = np.concatenate([h, encoded], axis=1)
    joined *= 0.5 ** 0.5
    return joined


def implicit_sdf(x, weights):
    """The sdf (N,) at x (N, 3), without what only a feature or a gradient would need."""
    last_w, last_b = np.ascontiguousarray(weights[-1][0][:, 0]), weights[-1][1][0]
    out = np.empty(len(x), np.float32)

    def evaluate(rows):
        h = encoded = encode(x[rows], (len(weights[0][0]) - 3) // 6)
        for layer, (w, b) in enumerate(weights[:-1]):
            h = layer_input(layer, len(weights), h, encoded) @ w
            h += b
            softplus(h)
        np.matmul(h, last_w, out=out[rows])
        out[rows] += last_b

    on_all_cores(evaluate, blocks(len(x), len(weights[-1][0])))
    return out


def implicit_forward(x, weights):
    """Value and gradient of the implicit network at x (N, 3).

    Returns sdf (N, 1), feature (N, F), gradient of the sdf (N, 3), and what implicit_backward wants to be given.
    """
    output = np.empty((len(x), weights[-1][0].shape[1]), np.float32)
    gradient = np.empty((len(x), 3), np.float32)

    def evaluate(rows):
        output[rows], gradient[rows], saved = forward_block(x[rows], weights)
        return rows, saved

    return output[:, :1], output[:, 1:], gradient, on_all_cores(evaluate, blocks(len(x), len(weights[-1][0])))


def forward_block(x, weights):
    count = len(weights)
    encoded = encode(x, (len(weights[0][0]) - 3) // 6)
    inputs, slopes = [], []
    h = encoded
    for layer, (w, b) in enumerate(weights):
        inputs.append(layer_input(layer, count, h, encoded))
        h = inputs[-1] @ w
        h += b
        if layer < count - 1:
            slopes.append(np.empty_like(h))
            softplus(h, slopes[-1])
    # d sdf / d z of each layer but the last, from the last down.
    deltas = [None] * (count - 1)
    back, to_encoded = weights[-1][0][:, 0], np.float32(0.0)
    for layer in range(count - 2, -1, -1):
        deltas[layer] = slopes[layer] * back
        back = deltas[layer] @ weights[layer][0].T
        if has_skip(layer, count):
            back, to_encoded = split_skip(back, encoded.shape[1])
    to_encoded = to_encoded + back
    derivative = encode_derivative(encoded)
    return h, per_coordinate(to_encoded * derivative), (inputs, slopes, deltas, derivative, to_encoded)


def rendering_forward(h, weights):
    """The renderer on its input h (N, in): rgb (N, 3) in [-1, 1], and what rendering_backward wants to be given."""
    rgb = np.empty((len(h), 3), np.float32)

    def evaluate(rows):
        inputs = [h[rows]]
        for w, b in weights:
            z = inputs[-1] @ w
            z += b
            inputs.append(np.maximum(z, 0.0, out=z))
        rgb[rows] = np.tanh(inputs[-2] @ weights[-1][0] + weights[-1][1])
        return rows, inputs[:-1]

    return rgb, on_all_cores(evaluate, blocks(len(h), len(weights[-1][0])))


def rendering_backward(saved, weights, rgb, by_rgb):
    """Carry a loss's derivative by rgb back: the derivatives by h and, as lists over the layers, by each W and b."""
    by_h = np.empty((len(rgb), len(weights[0][0])), np.float32)

    def evaluate(saved_block):
        rows, inputs = saved_block
        by_w, by_b = [], []
        by_z = by_rgb[rows] * (1.0 - rgb[rows] ** 2)
        for (w, _), h in zip(weights[::-1], inputs[::-1]):
            by_w.insert(0, h.T @ by_z)
            by_b.insert(0, by_z.sum(axis=0))
            by_z = by_z @ w.T
            if h is not inputs[0]:
                by_z *= h > 0.0
        by_h[rows] = by_z
        return by_w, by_b

    by_w, by_b = zip(*on_all_cores(evaluate, saved))
    return by_h, [sum(layer) for layer in zip(*by_w)], [sum(layer) for layer in zip(*by_b)]


def pack(weights):
    """One vector of all [(W, b)]: nnabla's functions in Python cost time for each of their inputs."""
    return np.concatenate([array.ravel() for layer in weights for array in layer])


def unpack(packed, sizes):
    """[(W, b)] as views of what pack gave; sizes: (in, out) of each layer."""
    weights, start = [], 0
    for inputs, outputs in sizes:
        middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
        weights.append((packed[start:middle].reshape(inputs, outputs), packed[middle:end]))
        start = end
    return weights


def fold(v, g):
    """The weight normalisation of a layer: g v / |v|, per column of v (in, out)."""
    return v * (g / np.linalg.norm(v, axis=0))


def fold_backward(v, g, by_w):
    """The derivatives by v and g of a loss whose derivative by fold's result is by_w."""
    norm = np.linalg.norm(v, axis=0)
    by_g = np.einsum("io,io->o", by_w, v) / norm
    return (by_w - v * (by_g / norm)) * (g / norm), by_g


def split_skip(back, columns):
    """Split a derivative by the skip layer's input into those by h and by gamma(x), with its 1 / sqrt(2)."""
    back = back * np.float32(0.5 ** 0.5)
    return back[:, :-columns], back[:, -columns:]


def implicit_backward(saved, weights, by_output, by_gradient):
    """Carry a loss's derivatives back through implicit_forward.

    by_output: (N, 1 + F), by sdf and feature; by_gradient: (N, 3), by the gradient of the sdf.
    Returns the derivatives by x (N, 3) and, as lists over the layers, by each W and each b.
    """
    by_x = np.empty_like(by_gradient)

    def evaluate(saved_block):
        rows, block = saved_block
        by_x[rows], by_w, by_b = backward_block(block, weights, by_output[rows], by_gradient[rows])
        return by_w, by_b

    by_w, by_b = zip(*on_all_cores(evaluate, saved))
    return by_x, [sum(layer) for layer in zip(*by_w)], [sum(layer) for layer in zip(*by_b)]


def backward_block(saved, weights, by_output, by_gradient):
    """sum(by_gradient * gradient) is the derivative of the sdf along by_gradient, so its own derivative is the backward
    pass of a forward (tangent) pass, in which d sdf / d z, known already, is the derivative by every tangent of z."""
    inputs, slopes, deltas, derivative, to_encoded = saved
    count, columns = len(weights), derivative.shape[1]
    # Tangents of each layer's input along by_gradient, and what they add to the derivative by z.
    direction = np.tile(by_gradient, (1, columns // 3))
    tangent_encoded = derivative * direction
    tangents, bends = [], []
    tangent = tangent_encoded
    for layer, (w, _) in enumerate(weights):
        tangents.append(layer_input(layer, count, tangent, tangent_encoded))
        if layer < count - 1:
            tangent_z = tangents[-1] @ w
            tangent = slopes[layer] * tangent_z
            tangent_z -= tangent                    # slope' = beta slope (1 - slope), with one slope in delta already
            tangent_z *= deltas[layer]
            tangent_z *= SOFTPLUS_BETA
            bends.append(tangent_z)
    # The ordinary backward pass, from the last layer down.
    by_w, by_b = [None] * count, [None] * count
    by_z, by_encoded = by_output, np.float32(0.0)
    for layer in range(count - 1, -1, -1):
        by_w[layer] = inputs[layer].T @ by_z
        by_b[layer] = by_z.sum(axis=0)
        if layer < count - 1:
            by_w[layer] += tangents[layer].T @ deltas[layer]
        else:
            by_w[layer][:, 0] += tangents[layer].sum(axis=0)
        back = by_z @ weights[layer][0].T
        if has_skip(layer, count):
            back, by_encoded = split_skip(back, columns)
        if layer > 0:
            by_z = back * slopes[layer - 1]
            by_z += bends[layer - 1]
    by_encoded = by_encoded + back
    curvature = frequencies(columns) ** 2           # gamma'' = -frequency^2 gamma
    by_x = per_coordinate(by_encoded * derivative - curvature * inputs[0] * to_encoded * direction)
    return by_x, by_w, by_b
