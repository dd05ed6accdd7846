"""The networks in nnabla's own functions, as a GPU runs them, with the implicit network's derivatives written out.

cpu.py offers the same names for the CPU: folded_weights, implicit, rendering, Sdf. network.py
chooses.
"""
import threading
from collections import namedtuple
from typing import Iterable, List, Optional, Tuple

import nnabla as nn
import nnabla.functions as F
import numpy as np
from nnabla.ext_utils import get_extension_context

from backends.architecture import SKIP_LAYER, SOFTPLUS_BETA, encoded_bands, encoded_columns, has_skip, inverse_slope

Layers = List[Tuple[nn.Variable, nn.Variable, nn.Variable]]     # v (in, out), g (out,) and b (out,) of each layer
FoldedWeights = List[Tuple[nn.Variable, nn.Variable, nn.Variable]]      # W (in, out), b (out,) and the transposed W


# --- the graph --------------------------------------------------------------------------------------------------------

def constant(array: np.ndarray) -> nn.Variable:
    """Return a graph input that holds `array` and takes no gradient."""
    return nn.Variable.from_numpy_array(np.asarray(array, np.float32))


def row_sums(x: nn.Variable) -> nn.Variable:
    """Return the sum of each row of x (N, C), (N, 1), as a matrix product: nnabla's reductions fail on Hopper GPUs."""
    return F.affine(x, constant(np.ones((x.shape[1], 1))))


def frequencies(columns: int) -> np.ndarray:
    """Return each encoded column's frequency: 0 for the 3 raw ones, then 2^k for 3 sines and 3 cosines each."""
    powers = 2.0 ** np.arange(encoded_bands(columns))
    return np.concatenate([np.zeros(3), np.repeat(powers, 6)]).astype(np.float32)


def positional_encoding(x: nn.Variable, bands: int) -> Tuple[nn.Variable, nn.Variable]:
    """Return gamma(x) (N, 3 + 6 bands), and each column's derivative with respect to the coordinate that it encodes.

    One sine does both: cos a = sin(a + pi/2), and the derivative of sin a is sin(a + pi/2).
    """
    freq = frequencies(encoded_columns(bands))[3:]
    quarter = np.tile(np.repeat([0.0, np.pi / 2], 3), bands)
    spread = constant(np.tile(np.eye(3), (1, 2 * bands)) * freq)
    encoded = F.concatenate(x, F.sin(F.affine(x, spread, constant(quarter))), axis=1)
    slopes = F.sin(F.affine(x, spread, constant(quarter + np.pi / 2))) * constant(freq[None])
    return encoded, F.concatenate(constant(np.ones(x.shape)), slopes, axis=1)


def normalized(layers: Layers) -> List[nn.Variable]:
    """Return the weights W = g v / |v|, per output, of layers, a list of Variables (v, g, b)."""
    return [F.weight_normalization(v, g, dim=1) for v, g, _ in layers]


def with_transposed(weights: List[nn.Variable], layers: Layers) -> FoldedWeights:
    """Return [(W, b, transposed W)] of layers, Variables (v, g, b), with these normalised weights."""
    return [(w, b, F.transpose(w, (1, 0))) for w, (_, _, b) in zip(weights, layers)]


def folded_weights(layers: Layers) -> FoldedWeights:
    """Return [(W, b, transposed W)] of layers, a list of Variables (v, g, b), with normalised weights."""
    return with_transposed(normalized(layers), layers)


# What implicit_graph keeps for implicit_backward_graph: gamma(x), its derivative, d sdf / d gamma, (N, columns) each;
# and as lists over the layers their inputs (N, in), the slopes of their softplus and d sdf / d z, the deltas (N, out).
Kept = namedtuple("Kept", "encoded derivative normal_encoded inputs slopes deltas")


def implicit_graph(x: nn.Variable, weights: FoldedWeights) -> Tuple[nn.Variable, nn.Variable, "Kept"]:
    """Return the implicit network's sdf and feature (N, 1 + F), its normal (N, 3), and a Kept, in nnabla's
    functions."""
    columns, count = weights[0][0].shape[0], len(weights)
    encoded, derivative = positional_encoding(x, encoded_bands(columns))
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
    normal_encoded = back if from_skip is None else back + from_skip
    kept = Kept(encoded, derivative, normal_encoded, inputs, slopes, deltas)
    return z, F.affine(normal_encoded * derivative, per_coordinate(columns)), kept


def implicit(x: nn.Variable, weights: FoldedWeights) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """As network.implicit; weights: [(W, b, transposed W)]."""
    output, normal, _ = implicit_graph(x, weights)
    return output[:, :1], output[:, 1:], normal


def rendering(h: nn.Variable, weights: FoldedWeights) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: [(W, b, transposed W)]."""
    for layer, (w, b, _) in enumerate(weights):
        h = F.affine(h, w, b)
        h = F.relu(h) if layer < len(weights) - 1 else F.tanh(h)
    return h


def implicit_backward_graph(kept: Kept, weights: FoldedWeights, grad_output: nn.Variable, grad_normal: nn.Variable,
                            rows: int) -> Tuple[List[nn.Variable], List[nn.Variable], Optional[nn.Variable]]:
    """Carry gradients with respect to output (N, 1 + F) and normal (N, 3) back, by cpu_kernels.carry_back's formulas.

    Returns, as lists over the layers, the gradients with respect to z (N, out) and the tangents of the inputs (N, in);
    and the gradient with respect to x of the first `rows` rows, None where there are none.
    """
    count, columns = len(weights), kept.encoded.shape[1]
    direction = F.affine(grad_normal, F.transpose(per_coordinate(columns), (1, 0)))
    tangent = tangent_encoded = kept.derivative * direction
    tangents, bends = [], []
    for layer, (w, _, _) in enumerate(weights):
        tangents.append(layer_input(layer, count, tangent, tangent_encoded))
        if layer < count - 1:
            tangent_z = F.affine(tangents[-1], w)
            tangent = kept.slopes[layer] * tangent_z
            bends.append((tangent_z - tangent) * kept.deltas[layer] * SOFTPLUS_BETA)
    grad_z, from_skip = [grad_output], None
    for layer in range(count - 1, 0, -1):
        back = F.affine(grad_z[0], weights[layer][2])
        if has_skip(layer, count):
            back, from_skip = split_skip(back, columns)
        grad_z.insert(0, back * kept.slopes[layer - 1] + bends[layer - 1])
    if not rows:
        return grad_z, tangents, None
    grad_encoded = F.affine(grad_z[0][:rows], weights[0][2])
    if from_skip is not None:
        grad_encoded = grad_encoded + from_skip[:rows]
    curvature = constant(frequencies(columns)[None] ** 2)       # gamma'' = -frequency^2 gamma
    grad_x = F.affine(grad_encoded * kept.derivative[:rows]
                    - kept.encoded[:rows] * curvature * kept.normal_encoded[:rows] * direction[:rows],
                    per_coordinate(columns))
    return grad_z, tangents, grad_x


def layer_input(layer: int, count: int, h: nn.Variable, encoded: nn.Variable) -> nn.Variable:
    """Return the input of an affine layer: h, or at the skip layer [h, encoded] / sqrt(2)."""
    return F.concatenate(h, encoded, axis=1) * 0.5 ** 0.5 if has_skip(layer, count) else h


def split_skip(back: nn.Variable, columns: int) -> Tuple[nn.Variable, nn.Variable]:
    """Split a gradient with respect to the skip layer's input into those with respect to h and to gamma(x)."""
    back = back * 0.5 ** 0.5
    return back[:, :-columns], back[:, -columns:]


def per_coordinate(columns: int) -> nn.Variable:
    """Return the matrix (columns, 3) that sums the encoded columns of each coordinate."""
    return constant(np.tile(np.eye(3), (columns // 3, 1)))


# --- the evaluation of a training step --------------------------------------------------------------------------------

class SurfaceEvaluation:
    """The implicit network at a step's points, and at the differentiable hits of its first rays (equation 3).

    layers: the network's parameters, Variables (v, g, b). points: (N, 3) Variable. directions: (S, 3) Variable, of the
    first S points' rays.
    Leaves for the graph of the losses, filled by forward(): sdf (N, 1), normal (N, 3); and of the S rays hit (S, 3),
    hit_normal (S, 3) and hit_feature (S, F), each None where S is 0. backward() carries the leaves' gradients back and
    adds to those of the parameters. least_slope: of architecture.inverse_slope.

    The derivatives are written out in nnabla's functions.
    A GPU waits for nnabla to start each function: 7 to 20 us on an H200, where a product takes 40 us and everything
    else less. So there are few functions. The one evaluation has the surface's rows twice: once as hits, once as
    points. The gradient with respect to a hit also moves the hit along its ray; `shift` is what that adds to the
    gradient with respect to the point's sdf. It reaches the weights through the deltas that are there already.
    """

    def __init__(self, layers: Layers, points: nn.Variable, directions: nn.Variable, want_grad_points: bool,
                 least_slope: float):
        self.layers, self.directions, self.num_points = layers, directions, points.shape[0]
        self.least_slope = least_slope
        self.folded = normalized(layers)
        self.folding = F.sink(*self.folded, one_input_grad=False)
        weights = with_transposed(leaves(self.folded), layers)
        kept = self.build_values(points, weights)
        self.build_gradients(kept, [leaves(layer) for layer in weights], want_grad_points)

    def build_values(self, points: nn.Variable, weights: FoldedWeights) -> Kept:
        """Build the graph of the values and set the leaves; returns a Kept."""
        num_hits = self.directions.shape[0]
        x = F.concatenate(points[:num_hits], points, axis=0) if num_hits else F.identity(points)
        output, normal, kept = implicit_graph(x, weights)
        self.values = F.sink(output, normal)
        for variable in (x, output, normal, *kept[:3], *sum(kept[3:], []), *sum(map(list, weights), [])):
            variable.persistent = True      # the rest is freed on the way
        self.results = x, output, normal = leaves((x, output, normal), need_grad=True)
        self.sdf, self.normal = output[num_hits:, :1], normal[num_hits:]
        self.hit = self.hit_normal = self.hit_feature = None
        if num_hits:
            self.hit, self.hit_normal, self.hit_feature = x[:num_hits], normal[:num_hits], output[:num_hits, 1:]
        return kept

    def build_gradients(self, kept: Kept, weights: FoldedWeights, want_grad_points: bool) -> None:
        """Build the graph of the gradients with respect to weights, biases and, if wanted, points."""
        num_hits, normal = self.directions.shape[0], self.results[2]
        grad_x, grad_output, grad_normal = (nn.Variable(result.shape) for result in self.results)
        for grad, result in zip((grad_x, grad_output, grad_normal), self.results):
            grad.data = result.grad
        self.kept = kept = Kept(*leaves(kept[:3]), *map(leaves, kept[3:]))
        grad_z, tangents, through_network = implicit_backward_graph(kept, weights, grad_output, grad_normal, num_hits)
        grad_points = grad_output[num_hits:, :1] * normal[num_hits:] if want_grad_points else None
        if num_hits:
            grad_hit = grad_x[:num_hits] + through_network
            slope = row_sums(normal[:num_hits] * self.directions)
            inverse = inverse_slope(slope, self.least_slope, F.maximum_scalar)
            shift = row_sums(grad_hit * self.directions) * inverse * -1.0
            if want_grad_points:
                others = constant(np.zeros((self.num_points - num_hits, 3)))
                grad_points = grad_points + F.concatenate(grad_hit + shift * normal[:num_hits], others, axis=0)
            shift = F.concatenate(shift, constant(np.zeros((self.num_points, 1))), axis=0)
            grad_z = [grad + shift * delta for grad, delta in zip(grad_z, kept.deltas)]
        self.grad_weights = [transposed_product(h, grad) + transposed_product(tangent, delta)
                             for h, grad, tangent, delta in zip(kept.inputs, grad_z, tangents, kept.deltas)]
        ones = constant(np.ones((1, self.results[0].shape[0])))
        self.grad_biases = [F.reshape(F.affine(ones, grad), grad.shape[1:]) for grad in grad_z]
        wanted = self.grad_weights + self.grad_biases + ([grad_points] if want_grad_points else [])
        for variable in wanted:
            variable.persistent = True
        self.gradients, self.point_gradients = F.sink(*wanted), grad_points

    def forward(self) -> None:
        self.folding.forward()
        self.values.forward(clear_buffer=True)
        for result in self.results:
            result.grad.zero()

    def backward(self) -> None:
        self.gradients.forward(clear_buffer=True)
        for w, grad_w, (_, _, b), grad_b in zip(self.folded, self.grad_weights, self.layers, self.grad_biases):
            w.grad, b.grad = grad_w.data, grad_b.data
        self.folding.backward()
        kept = self.kept
        for array in (kept.derivative, *kept.inputs, *kept.slopes, *kept.deltas[:-1]):
            array.data.clear()          # else each of the few graphs would hold on to its own

    def grad_points(self) -> np.ndarray:
        return self.point_gradients.d


def leaves(variables: Iterable[nn.Variable], need_grad: bool = False) -> List[nn.Variable]:
    """Return variables that hold the same arrays and begin a new graph."""
    return [variable.get_unlinked_variable(need_grad=need_grad) for variable in variables]


def transposed_product(a: nn.Variable, b: nn.Variable) -> nn.Variable:
    """Return the product (I, O) of the transposed a (N, I) and b (N, O)."""
    product = F.batch_matmul(*(F.reshape(v, (1, *v.shape)) for v in (a, b)), transpose_a=True)
    return F.reshape(product, product.shape[1:])


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator describes it.

    Static graphs of a few sizes compute it, so that a call builds no graph.
    """

    SIZES = tuple(size for k in range(8, 16) for size in (2 ** k, 3 * 2 ** (k - 1))) + (2 ** 16,)
    search = None
    KEPT = 8192     # up to this size a graph keeps its buffers: allocating them would take longer than the work

    def __init__(self, layers: Layers):
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
        self.launching = threading.Lock()       # two threads may call, and nnabla's context is global
        self.refresh()

    def refresh(self) -> None:
        self.folding.forward()

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return self.in_precision(points, "float")

    def half_precision(self, points: np.ndarray) -> np.ndarray:
        """The same in half precision, exact to about 1e-3: large calls take half the time."""
        return self.in_precision(points, "half")

    def in_precision(self, points: np.ndarray, precision: str) -> np.ndarray:
        out = np.empty(len(points), np.float32)
        for start in range(0, len(points), self.SIZES[-1]):
            part = points[start:start + self.SIZES[-1]]
            size = next(size for size in self.SIZES if size >= len(part))
            with self.launching:
                x, sdf = self.graph(size, precision)
                x.d[:len(part)] = part          # the rows behind these are not read
                sdf.forward(clear_buffer=size > self.KEPT)
            out[start:start + len(part)] = sdf.d[:len(part), 0]
        return out

    def graph(self, size: int, precision: str) -> Tuple[nn.Variable, nn.Variable]:
        if (size, precision) not in self.graphs:
            x = constant(np.zeros((size, 3)))
            bands = encoded_bands(self.weights[0][0].shape[0])
            h = encoded = positional_encoding(x, bands)[0]      # in float32: half has too few digits
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
