"""The networks in nnabla's own functions, as a GPU runs them: the implicit one's derivatives written out, and the sdf.

cpu.py offers the same for the CPU (folded_weights, implicit, rendering, evaluate, Sdf); network.py chooses.
"""
import threading
from collections import namedtuple

import nnabla as nn
import nnabla.functions as F
import numpy as np
from nnabla.ext_utils import get_extension_context

from backends.cpu_kernels import LEAST_SLOPE, SKIP_LAYER, SOFTPLUS_BETA, has_skip

POSITION_BANDS = 6      # of the encoding: 39 values


# --- the graph --------------------------------------------------------------------------------------------------------

def constant(array):
    """A graph input that holds `array` and takes no gradient."""
    return nn.Variable.from_numpy_array(np.asarray(array, np.float32))


def row_sums(x):
    """Sum each row of x (N, C): (N, 1)."""
    return F.affine(x, constant(np.ones((x.shape[1], 1))))


def frequencies(columns):
    """Return the frequency of each column of an encoding: 0 for the 3 raw ones, then 2^k for sin and cos of 3 each."""
    bands = (columns - 3) // 6
    return np.concatenate([np.zeros(3), np.repeat(2.0 ** np.arange(bands), 6)]).astype(np.float32)


def positional_encoding(x, bands):
    """gamma(x) (N, 3 + 6 bands) and the derivative of each of its columns by the coordinate it depends on.

    In one sine: cos a = sin(a + pi/2), and the derivative of sin a is sin(a + pi/2).
    """
    freq = frequencies(3 + 6 * bands)[3:]
    quarter = np.tile(np.repeat([0.0, np.pi / 2], 3), bands)
    spread = constant(np.tile(np.eye(3), (1, 2 * bands)) * freq)
    encoded = F.concatenate(x, F.sin(F.affine(x, spread, constant(quarter))), axis=1)
    slopes = F.sin(F.affine(x, spread, constant(quarter + np.pi / 2))) * constant(freq[None])
    return encoded, F.concatenate(constant(np.ones(x.shape)), slopes, axis=1)


def normalized(layers):
    """The weights W = g v / |v|, per output, of layers, a list of Variables (v, g, b)."""
    return [F.weight_normalization(v, g, dim=1) for v, g, _ in layers]


def with_transposed(weights, layers):
    """[(W, b, transposed W)] of layers, Variables (v, g, b), whose normalised weights are given."""
    return [(w, b, F.transpose(w, (1, 0))) for w, (_, _, b) in zip(weights, layers)]


def folded_weights(layers):
    """[(W, b, transposed W)] of layers, a list of Variables (v, g, b), with the weights normalised."""
    return with_transposed(normalized(layers), layers)


# What implicit_graph keeps for implicit_backward_graph: gamma(x), its derivative and the sdf's derivative by it,
# (N, 39); as lists over the layers their inputs (N, in), the slopes of their softplus, and the deltas, d sdf / d z
# (N, out).
Kept = namedtuple("Kept", "encoded derivative to_encoded inputs slopes deltas")


def implicit_graph(x, weights):
    """The implicit network in nnabla's functions: sdf and feature (N, 1 + F), gradient (N, 3), and a Kept."""
    encoded, derivative = positional_encoding(x, POSITION_BANDS)
    columns, count = encoded.shape[1], len(weights)
    h, inputs, slopes = encoded, [], []
    for layer, (w, b, _) in enumerate(weights):
        inputs.append(layer_input(layer, count, h, encoded))
        z = F.affine(inputs[-1], w, b)
        if layer < count - 1:
            slopes.append(F.sigmoid(z * SOFTPLUS_BETA))
            h = F.softplus(z, beta=SOFTPLUS_BETA)
    # The sdf is the first column of the last layer's z.
    deltas = [constant(np.tile(np.eye(1, z.shape[1]), (z.shape[0], 1)))]
    back, from_skip = weights[-1][2][:1], None
    for layer in range(count - 2, -1, -1):
        deltas.insert(0, slopes[layer] * back)
        back = F.affine(deltas[0], weights[layer][2])
        if has_skip(layer, count):
            back, from_skip = split_skip(back, columns)
    to_encoded = back if from_skip is None else back + from_skip
    kept = Kept(encoded, derivative, to_encoded, inputs, slopes, deltas)
    return z, F.affine(to_encoded * derivative, per_coordinate(columns)), kept


def implicit(x, weights):
    """As network.implicit; weights: [(W, b, transposed W)]."""
    output, gradient, _ = implicit_graph(x, weights)
    return output[:, :1], output[:, 1:], gradient


def rendering(h, weights):
    """The renderer's rgb (N, 3) of its joined inputs h (N, in); weights: [(W, b, transposed W)]."""
    for layer, (w, b, _) in enumerate(weights):
        h = F.affine(h, w, b)
        h = F.relu(h) if layer < len(weights) - 1 else F.tanh(h)
    return h


def implicit_backward_graph(kept, weights, by_output, by_gradient, rows):
    """Carry a loss's derivatives, by_output (N, 1 + F) and by_gradient (N, 3), back through implicit_graph, by the
    formulas of cpu_kernels.carry_back.

    Returns, as lists over the layers, the derivatives by z (N, out) and the tangents of the inputs (N, in) that the
    deltas multiply, and the derivative by x of the first `rows` rows.
    """
    count, columns = len(weights), kept.encoded.shape[1]
    direction = F.affine(by_gradient, F.transpose(per_coordinate(columns), (1, 0)))
    tangent = tangent_encoded = kept.derivative * direction
    tangents, bends = [], []
    for layer, (w, _, _) in enumerate(weights):
        tangents.append(layer_input(layer, count, tangent, tangent_encoded))
        if layer < count - 1:
            tangent_z = F.affine(tangents[-1], w)
            tangent = kept.slopes[layer] * tangent_z
            bends.append((tangent_z - tangent) * kept.deltas[layer] * SOFTPLUS_BETA)
    by_z, from_skip = [by_output], None
    for layer in range(count - 1, 0, -1):
        back = F.affine(by_z[0], weights[layer][2])
        if has_skip(layer, count):
            back, from_skip = split_skip(back, columns)
        by_z.insert(0, back * kept.slopes[layer - 1] + bends[layer - 1])
    if not rows:
        return by_z, tangents, None
    by_encoded = F.affine(by_z[0][:rows], weights[0][2])
    if from_skip is not None:
        by_encoded = by_encoded + from_skip[:rows]
    curvature = constant(frequencies(columns)[None] ** 2)       # gamma'' = -frequency^2 gamma
    by_x = F.affine(by_encoded * kept.derivative[:rows]
                    - kept.encoded[:rows] * curvature * kept.to_encoded[:rows] * direction[:rows],
                    per_coordinate(columns))
    return by_z, tangents, by_x


def layer_input(layer, count, h, encoded):
    """The input of an affine layer: h, or at the skip layer [h, encoded] / sqrt(2)."""
    return F.concatenate(h, encoded, axis=1) * 0.5 ** 0.5 if has_skip(layer, count) else h


def split_skip(back, columns):
    """Split a derivative by the skip layer's input into those by h and by gamma(x), with its 1 / sqrt(2)."""
    back = back * 0.5 ** 0.5
    return back[:, :-columns], back[:, -columns:]


def per_coordinate(columns):
    """The matrix (columns, 3) that sums an encoding's columns for the coordinate that each depends on."""
    return constant(np.tile(np.eye(3), (columns // 3, 1)))


# --- the evaluation of a training step --------------------------------------------------------------------------------

def slope_along(directions, gradient):
    """gradient . direction (N, 1), as cpu_kernels.slope_along has it."""
    slope = row_sums(gradient * directions)
    return F.sign(slope, alpha=-1.0) * F.maximum_scalar(F.abs(slope), LEAST_SLOPE)


def evaluate(layers, points, directions, by_rays=False):
    """What cpu.evaluate gives, with the derivatives written out in nnabla's functions.

    A GPU waits for nnabla to start each function (7 to 20 us on an H200, where a product takes 40 and all else less);
    this way there are fewer. The one evaluation has the surface's rows twice in it: once as hits, once as points. What
    a loss's derivative by the hit adds to that by the point's sdf, shift, reaches the weights through the deltas that
    are there already. Of the two functions, the first computes the values, which are leaves of the graph of the losses;
    the second carries their derivatives back to the parameters.
    """
    surface = directions.shape[0]
    folded = normalized(layers)
    folding = F.sink(*folded, one_input_grad=False)
    weights = with_transposed(leaves(folded), layers)
    x = F.concatenate(points[:surface], points, axis=0) if surface else F.identity(points)
    output, gradient, kept = implicit_graph(x, weights)
    values = F.sink(output, gradient)
    kept_lists = kept.inputs, kept.slopes, kept.deltas
    for variable in (x, output, gradient, *kept[:3], *sum(kept_lists, []), *sum(map(list, weights), [])):
        variable.persistent = True      # what else the evaluation needs is freed as it goes

    results = leaves((x, output, gradient), need_grad=True)
    by_x, by_output, by_gradient = by_results = [nn.Variable(result.shape) for result in results]
    for by_result, result in zip(by_results, results):
        by_result.data = result.grad
    weights = [leaves(layer) for layer in weights]
    kept = Kept(*leaves(kept[:3]), *map(leaves, kept_lists))
    by_z, tangents, through_network = implicit_backward_graph(kept, weights, by_output, by_gradient, surface)
    by_points = by_output[surface:, :1] * results[2][surface:] if by_rays else None
    if surface:
        by_hits = by_x[:surface] + through_network
        shift = row_sums(by_hits * directions) / slope_along(directions, results[2][:surface]) * -1.0
        if by_rays:
            others = constant(np.zeros((points.shape[0] - surface, 3)))
            by_points = by_points + F.concatenate(by_hits + shift * results[2][:surface], others, axis=0)
        shift = F.concatenate(shift, constant(np.zeros((points.shape[0], 1))), axis=0)
        by_z = [by + shift * delta for by, delta in zip(by_z, kept.deltas)]
    by_weights = [transposed_product(h, by) + transposed_product(tangent, delta)
                  for h, by, tangent, delta in zip(kept.inputs, by_z, tangents, kept.deltas)]
    ones = constant(np.ones((1, x.shape[0])))
    by_biases = [F.reshape(F.affine(ones, by), by.shape[1:]) for by in by_z]
    wanted = by_weights + by_biases + ([by_points] if by_rays else [])
    for variable in wanted:
        variable.persistent = True
    derivatives = F.sink(*wanted)

    def evaluation():
        folding.forward()
        values.forward(clear_buffer=True)
        for result in results:
            result.grad.zero()

    def carry_back():
        derivatives.forward(clear_buffer=True)
        for w, by_w, (_, _, b), by_b in zip(folded, by_weights, layers, by_biases):
            w.grad, b.grad = by_w.data, by_b.data
        folding.backward()
        for array in (kept.derivative, *kept.inputs, *kept.slopes, *kept.deltas[:-1]):
            array.data.clear()          # each graph of a few sizes would hold on to them

    x, output, gradient = results
    at_hits = (x[:surface], gradient[:surface], output[:surface, 1:]) if surface else None
    return output[surface:, :1], gradient[surface:], at_hits, evaluation, carry_back, lambda: by_points.d


def leaves(variables, need_grad=False):
    """The same arrays as variables at which a graph begins."""
    return [variable.get_unlinked_variable(need_grad=need_grad) for variable in variables]


def transposed_product(a, b):
    """The transposed a (N, I) times b (N, O): (I, O)."""
    product = F.batch_matmul(*(F.reshape(v, (1, *v.shape)) for v in (a, b)), transpose_a=True)
    return F.reshape(product, product.shape[1:])


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator says: through static graphs of a few
    sizes, so that a call costs launches and no graph building."""

    SIZES = tuple(size for k in range(8, 16) for size in (2 ** k, 3 * 2 ** (k - 1))) + (2 ** 16,)
    KEPT = 8192     # up to this size a graph keeps its buffers: taking and freeing them would take longer than the work

    def __init__(self, layers):
        folded = [(w, b) for w, (_, _, b) in zip(normalized(layers), layers)]
        w, b = folded[-1]
        folded[-1] = w[:, :1], b[:1]
        if has_skip(SKIP_LAYER, len(folded)):
            w, b = folded[SKIP_LAYER]
            folded[SKIP_LAYER] = w * 0.5 ** 0.5, b
        self.folding = F.sink(*(w for w, _ in folded), folded[-1][1])
        self.weights = [(w.get_unlinked_variable(need_grad=False), b.get_unlinked_variable(need_grad=False))
                        for w, b in folded]
        self.graphs = {}
        self.launching = threading.Lock()       # two threads may call; nnabla's context and cuBLAS's mode are global
        self.refresh()

    def refresh(self):
        self.folding.forward()

    def __call__(self, points):
        return self.evaluate(points, "float")

    def roughly(self, points):
        """The same in half precision, to about 1e-3: large calls take half the time."""
        return self.evaluate(points, "half")

    def evaluate(self, points, precision):
        out = np.empty(len(points), np.float32)
        for start in range(0, len(points), self.SIZES[-1]):
            part = points[start:start + self.SIZES[-1]]
            size = next(size for size in self.SIZES if size >= len(part))
            with self.launching:
                x, sdf = self.graph(size, precision)
                x.d[:len(part)] = part          # the rows behind are left over and not read
                sdf.forward(clear_buffer=size > self.KEPT)
            out[start:start + len(part)] = sdf.d[:len(part), 0]
        return out

    def graph(self, size, precision):
        if (size, precision) not in self.graphs:
            x = constant(np.zeros((size, 3)))
            h = encoded = positional_encoding(x, POSITION_BANDS)[0]     # in float: half has no digits for 32 x
            context = nn.get_current_context()
            with nn.context_scope(get_extension_context("cudnn", device_id=context.device_id, type_config=precision)):
                for layer, (w, b) in enumerate(self.weights):
                    if has_skip(layer, len(self.weights)):
                        h = F.concatenate(h, encoded, axis=1)       # its 1 / sqrt(2) is in the weights
                    h = F.affine(h, w, b)
                    if layer < len(self.weights) - 1:
                        h = F.softplus(h, beta=SOFTPLUS_BETA)
            self.graphs[size, precision] = x, h
        return self.graphs[size, precision]
