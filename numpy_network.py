"""The two networks in NumPy, for the CPU, where nnabla's own kernels run on one core without vector instructions.

The formulas are network.py's; tests/test_network.py holds the two against each other. Weights are lists of (W, b), one
per affine layer, W (in, out) with its weight normalisation folded in, b (out,). All arrays are float32.
Imports nothing of the other scripts.
"""
import numpy as np

SOFTPLUS_BETA = 100.0
SKIP_LAYER = 4        # its input is [h, gamma(x)] / sqrt(2)
BLOCK = 1024          # rows evaluated together: their activations stay in the cache


def has_skip(layer, layers):
    """Whether `layer` of an implicit network of that many affine layers takes the encoded position in (section 5.1)."""
    return layer == SKIP_LAYER and layer < layers - 1


def frequencies(columns):
    """Return the frequency of each column of an encoding: 0 for the 3 raw ones, then 2^k for sin and cos of 3 each."""
    bands = (columns - 3) // 6
    return np.concatenate([np.zeros(3), np.repeat(2.0 ** np.arange(bands), 6)]).astype(np.float32)


def encode(x, bands):
    """gamma(x) (N, 3 + 6 bands) of x (N, 3): x, then sin and cos of 2^k x for k < bands, as in NeRF."""
    out = np.empty((len(x), 3 + 6 * bands), np.float32)
    out[:, :3] = x
    for k in range(bands):
        phase = x * np.float32(2 ** k)
        np.sin(phase, out=out[:, 3 + 6 * k:6 + 6 * k])
        np.cos(phase, out=out[:, 6 + 6 * k:9 + 6 * k])
    return out


def encode_derivative(encoded):
    """The derivative (N, columns) of each column of gamma(x) by the one coordinate that it depends on."""
    out = np.ones_like(encoded)
    freq = frequencies(encoded.shape[1])
    for s in range(3, encoded.shape[1], 6):
        np.multiply(encoded[:, s + 3:s + 6], freq[s], out=out[:, s:s + 3])      # sin' = cos
        np.multiply(encoded[:, s:s + 3], -freq[s], out=out[:, s + 3:s + 6])     # cos' = -sin
    return out


def per_coordinate(columns):
    """Sum (N, columns) over the columns of each coordinate: (N, 3)."""
    return columns.reshape(len(columns), -1, 3).sum(axis=1)


def softplus(z):
    """Softplus with beta = 100 of z, which is overwritten; log and exp of few values, in few passes."""
    rest = np.abs(z)
    rest *= -SOFTPLUS_BETA
    np.exp(rest, out=rest)
    np.log1p(rest, out=rest)
    rest *= 1.0 / SOFTPLUS_BETA
    np.maximum(z, 0.0, out=z)
    z += rest
    return z


def sigmoid(z):
    """The derivative of softplus: sigmoid(beta z), as a new array."""
    slope = z * (0.5 * SOFTPLUS_BETA)
    np.tanh(slope, out=slope)
    slope += 1.0
    slope *= 0.5
    return slope


def implicit_sdf(x, weights):
    """The sdf (N,) at x (N, 3), in blocks, without what only a gradient would need."""
    last_w, last_b = weights[-1]
    last_w, last_b = np.ascontiguousarray(last_w[:, 0]), last_b[0]
    out = np.empty(len(x), np.float32)
    for start in range(0, len(x), BLOCK):
        encoded = encode(x[start:start + BLOCK], (len(weights[0][0]) - 3) // 6)
        h = encoded
        for layer, (w, b) in enumerate(weights[:-1]):
            if has_skip(layer, len(weights)):
                h = np.concatenate([h, encoded], axis=1) * np.float32(0.5 ** 0.5)
            h = h @ w
            h += b
            h = softplus(h)
        out[start:start + BLOCK] = h @ last_w + last_b
    return out


def implicit_forward(x, weights):
    """Value and gradient of the implicit network at x (N, 3).

    Returns sdf (N, 1), feature (N, F), gradient of the sdf (N, 3), and what implicit_backward wants to be given.
    """
    count = len(weights)
    encoded = encode(x, (len(weights[0][0]) - 3) // 6)
    inputs, slopes = [], []
    h = encoded
    for layer, (w, b) in enumerate(weights):
        if has_skip(layer, count):
            h = np.concatenate([h, encoded], axis=1) * np.float32(0.5 ** 0.5)
        inputs.append(h)
        z = h @ w
        z += b
        if layer < count - 1:
            slopes.append(sigmoid(z))
            h = softplus(z)
    # The chain of d sdf / d z, from the last layer down: deltas[l] (N, out of l).
    deltas = [None] * (count - 1)
    back, to_encoded = weights[-1][0][:, 0], np.float32(0.0)
    for layer in range(count - 2, -1, -1):
        deltas[layer] = slopes[layer] * back
        back = deltas[layer] @ weights[layer][0].T
        if has_skip(layer, count):
            back, to_encoded = split_skip(back, encoded.shape[1])
    to_encoded = to_encoded + back
    derivative = encode_derivative(encoded)
    gradient = per_coordinate(to_encoded * derivative)
    return z[:, :1], z[:, 1:], gradient, (inputs, slopes, deltas, derivative, to_encoded)


def split_skip(back, columns):
    """Split a derivative by the skip layer's input into those by h and by gamma(x), with its 1 / sqrt(2)."""
    back = back * np.float32(0.5 ** 0.5)
    return back[:, :-columns], back[:, -columns:]


def implicit_backward(saved, weights, by_output, by_gradient):
    """Carry a loss's derivatives back through implicit_forward.

    by_output: (N, 1 + F), by sdf and feature; by_gradient: (N, 3), by the gradient of the sdf.
    Returns the derivatives by x (N, 3) and, as lists over the layers, by each W and each b.

    sum(by_gradient * gradient) is the derivative of the sdf along by_gradient, so its own derivative is the backward
    pass of a forward (tangent) pass, in which d sdf / d z, known already, is the derivative by every tangent of z.
    """
    inputs, slopes, deltas, derivative, to_encoded = saved
    count, columns = len(weights), derivative.shape[1]
    # Tangents of each layer's input and of z along by_gradient.
    direction = np.tile(by_gradient, (1, columns // 3))
    tangent_encoded = derivative * direction
    tangents, bends = [], []
    tangent = tangent_encoded
    for layer, (w, _) in enumerate(weights):
        if has_skip(layer, count):
            tangent = np.concatenate([tangent, tangent_encoded], axis=1) * np.float32(0.5 ** 0.5)
        tangents.append(tangent)
        if layer < count - 1:
            tangent_z = tangent @ w
            tangent = slopes[layer] * tangent_z
            bend = (1.0 - slopes[layer])          # slope' = beta slope (1 - slope); delta holds one slope already
            bend *= SOFTPLUS_BETA
            bend *= tangent_z
            bend *= deltas[layer]
            bends.append(bend)
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
            by_z = back
            by_z *= slopes[layer - 1]
            by_z += bends[layer - 1]
    by_encoded = by_encoded + back
    curvature = frequencies(columns)
    encoded = inputs[0]
    by_x = per_coordinate(by_encoded * derivative - (curvature * curvature) * encoded * to_encoded * direction)
    return by_x, by_w, by_b
