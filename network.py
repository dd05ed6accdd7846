"""IDR's networks, the differentiable hit and the losses, as nnabla graphs (Yariv et al., NeurIPS 2020).

The sdf reaches the tracer and the extraction as a plain callable: SdfOnCpu or SdfOnGpu, by sdf_evaluator().
As a script: the zero contour of the initial sdf as a picture, `python network.py -Ds 512 -R 0.75`.
"""
import sys
import threading
import types
from collections import namedtuple

import nnabla as nn
import nnabla.functions as F
import nnabla_ext
import nnabla_ext.cpu
import numpy as np
from nnabla.ext_utils import get_extension_context
from nnabla.function import PythonFunction

import cpu_network
from cpu_network import GRAZING, SKIP_LAYER, SOFTPLUS_BETA, frequencies, has_skip


def answer_at_once(module):
    """Put a stand-in for `module` in sys.modules where nnabla's compiled modules look for it first.

    They import nnabla and nnabla_ext.cpu at every access to an array, and first as parts of their own package, where
    they are not. To find that out takes Python longer than the access (7 of 10 us, 130 times in a step: a tenth of a
    small one). The stand-in is no package, so nothing that is looked for in it is loaded a second time.
    """
    def attribute(name):
        if name.startswith("__"):       # __path__ makes a package
            raise AttributeError(name)
        return getattr(module, name)

    stand_in = types.ModuleType(f"nnabla.{module.__name__}")
    stand_in.__getattr__ = attribute
    sys.modules.setdefault(stand_in.__name__, stand_in)


answer_at_once(nn)
answer_at_once(nnabla_ext)
sys.modules.setdefault("nnabla.nnabla_ext.cpu", nnabla_ext.cpu)

POSITION_BANDS = 6      # of the implicit network's encoding: 39 values
VIEW_BANDS = 4          # of the view direction's: 27 values
RENDERING_LAYERS = 5
OPTIONAL_INPUTS = ("view", "normal", "feature")     # of the renderer: what network.without may name, in their order


# --- parameters -------------------------------------------------------------------------------------------------------

def layer_sizes(width, feature, layers, without=()):
    """Return {parameter scope: (in, out)} of every affine layer: implicit/0, ..., rendering/4 (section 5.1).

    without: of the OPTIONAL_INPUTS, those that the renderer is not given.
    """
    encoded, sizes = 3 + 6 * POSITION_BANDS, {}
    for layer in range(layers):
        inputs = encoded if layer == 0 else width
        outputs = 1 + feature if layer == layers - 1 else width
        sizes[f"implicit/{layer}"] = (inputs, outputs - encoded if has_skip(layer + 1, layers) else outputs)
    given = dict(zip(OPTIONAL_INPUTS, (3 + 6 * VIEW_BANDS, 3, feature)))
    for layer in range(RENDERING_LAYERS):
        inputs = 3 + sum(given[name] for name in given if name not in without) if layer == 0 else width
        sizes[f"rendering/{layer}"] = (inputs, 3 if layer == RENDERING_LAYERS - 1 else width)
    return sizes


def parameter_shapes(width, feature, layers, without=()):
    """Return {name: shape} of all parameters; a layer has v (in, out), its scale g (out,) and bias b (out,)."""
    shapes = {}
    for scope, (inputs, outputs) in layer_sizes(width, feature, layers, without).items():
        shapes.update({f"{scope}/v": (inputs, outputs), f"{scope}/g": (outputs,), f"{scope}/b": (outputs,)})
    return shapes


def initialize(width, feature, layers, radius, rng, without=()):
    """Set nnabla's parameters to fresh networks, the implicit one by the geometric initialisation (SAL, theorem 1).

    The sdf starts close to that of the sphere of `radius`; rng is a numpy Generator; without as in layer_sizes. Earlier
    parameters are dropped.
    """
    nn.clear_parameters()
    encoded = 3 + 6 * POSITION_BANDS
    for scope, (inputs, outputs) in layer_sizes(width, feature, layers, without).items():
        network, layer = scope.split("/")
        if network == "rendering":
            bound = inputs ** -0.5
            v, b = rng.uniform(-bound, bound, (inputs, outputs)), rng.uniform(-bound, bound, outputs)
        elif int(layer) == layers - 1:
            v, b = rng.normal(np.sqrt(np.pi / inputs), 1e-4, (inputs, outputs)), np.full(outputs, -radius)
        else:
            v, b = rng.normal(0.0, np.sqrt(2.0 / outputs), (inputs, outputs)), np.zeros(outputs)
            if int(layer) == 0:
                v[3:] = 0.0                     # only the raw coordinates count at first
            elif has_skip(int(layer), layers):
                v[3 - encoded:] = 0.0           # likewise for the encoding that joins here
        for name, value in (("v", v), ("g", np.linalg.norm(v, axis=0)), ("b", b)):
            variable = nn.Variable.from_numpy_array(value.astype(np.float32), need_grad=True)
            nn.parameter.set_parameter(f"{scope}/{name}", variable)


def layer_parameters(network):
    """Return [(v, g, b)] of "implicit" or "rendering", nnabla's parameters as they are."""
    parameters, layers = nn.get_parameters(grad_only=False), []
    while f"{network}/{len(layers)}/v" in parameters:
        layers.append(tuple(parameters[f"{network}/{len(layers)}/{name}"] for name in "vgb"))
    return layers


def folded_weights(network):
    """Return the weights of "implicit" or "rendering" for a graph, normalised: W = g v / |v|, per output.

    On the CPU as a PackedWeights, else as [(W, b, transposed W)] of Variables.
    """
    layers = layer_parameters(network)
    if on_cpu():
        return PackedWeights(FoldOnCpu()(*(p for layer in layers for p in layer)),
                             np.array([v.shape for v, _, _ in layers]))
    folded = [(F.weight_normalization(v, g, dim=1), b) for v, g, b in layers]
    return [(w, b, F.transpose(w, (1, 0))) for w, b in folded]


def packed_arrays(network):
    """The same as NumPy arrays, of the parameters as they are now: the packed weights, and (in, out) of each layer."""
    layers = layer_parameters(network)
    arrays = [(v.d, g.d, b.d) for v, g, b in layers]
    return (cpu_network.pack([(cpu_network.fold(v, g, np.linalg.norm(v, axis=0)), b) for v, g, b in arrays]),
            np.array([v.shape for v, _, _ in layers]))


# --- the networks -----------------------------------------------------------------------------------------------------

def on_cpu():
    """Whether nnabla computes on the CPU, where NumPy takes over the heavy functions."""
    return nn.get_current_context().backend[0].startswith("cpu")


def constant(array):
    """A graph input that holds `array` and takes no gradient."""
    return nn.Variable.from_numpy_array(np.asarray(array, np.float32))


def row_sums(x):
    """Sum each row of x (N, C): (N, 1)."""
    return F.affine(x, constant(np.ones((x.shape[1], 1))))


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


def implicit(x, weights):
    """The implicit network with the gradient of its sdf; training_graph carries a loss's derivatives back.

    x: (N, 3) Variable; weights: folded_weights("implicit").
    Returns sdf (N, 1), positive outside, feature (N, F) and gradient (N, 3).
    """
    if on_cpu():
        sdf, gradient, _, _, feature = ImplicitOnCpu(weights.sizes, x.shape[0])(x, x, weights.packed)
        return sdf, feature, gradient
    output, gradient, _ = implicit_graph(x, weights)
    return output[:, :1], output[:, 1:], gradient


# What implicit_graph keeps for implicit_backward_graph: gamma(x), its derivative and the sdf's derivative by it, (N, 39);
# as lists over the layers their inputs (N, in), the slopes of their softplus, and the deltas, d sdf / d z (N, out).
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


def implicit_backward_graph(kept, weights, by_output, by_gradient, rows):
    """Carry a loss's derivatives, by_output (N, 1 + F) and by_gradient (N, 3), back through implicit_graph, by the
    formulas of cpu_network.backward_block.

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


def rendering(x, normal, view, feature, weights, without=()):
    """The renderer: rgb (N, 3) in [-1, 1] of surface points.

    x, normal, view: (N, 3) Variables; view is the unit vector from the surface to the camera, the normal is the
    gradient of the sdf as it is; feature (N, F); weights: folded_weights("rendering"); without: of the OPTIONAL_INPUTS,
    those that it was not built for.
    """
    encoded_view = None if "view" in without else positional_encoding(view, VIEW_BANDS)[0]
    given = [part for name, part in zip(OPTIONAL_INPUTS, (encoded_view, normal, feature)) if name not in without]
    h = F.concatenate(x, *given, axis=1) if given else x
    if on_cpu():
        return RenderingOnCpu(weights.sizes)(h, weights.packed)
    for layer, (w, b, _) in enumerate(weights):
        h = F.affine(h, w, b)
        h = F.relu(h) if layer < len(weights) - 1 else F.tanh(h)
    return h


# --- the networks on the CPU, as nnabla functions with cpu_network inside -------------------------------------------

# A network's weights as one Variable, and (in, out) of each of its layers, an array (L, 2).
PackedWeights = namedtuple("PackedWeights", "packed sizes")


class NumpyFunction(PythonFunction):
    """A nnabla function whose forward and backward passes run in NumPy, in the current context."""

    def __init__(self, sizes=None):
        super().__init__(nn.get_current_context())
        self.sizes = sizes

    @property
    def name(self):
        return type(self).__name__

    def grad_depends_output_data(self, i, o):
        return False

    def grad_depends_input_data(self, i, j):
        return True

    @staticmethod
    def hand_back(inputs, gradients, propagate_down, accum):
        """Write or add each gradient where nnabla wants it."""
        for variable, gradient, wanted, add in zip(inputs, gradients, propagate_down, accum):
            if wanted:
                target = variable.grad.data
                target[...] = target + gradient if add else gradient


class FoldOnCpu(NumpyFunction):
    """Inputs v, g, b, v, g, b, ...; output the packed weights."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((sum(v.shape[0] * v.shape[1] + v.shape[1] for v in inputs[::3]),), True)

    def forward_impl(self, inputs, outputs):
        self.arrays = [i.data.data for i in inputs]         # backward_impl takes these: to get them takes time
        v, g, b = (self.arrays[part::3] for part in range(3))
        self.norms = [np.linalg.norm(array, axis=0) for array in v]
        outputs[0].data.data[...] = cpu_network.pack(zip(map(cpu_network.fold, v, g, self.norms), b))

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        v, g, _ = (self.arrays[part::3] for part in range(3))
        by_weights = cpu_network.unpack(outputs[0].grad.data, [array.shape for array in v])
        gradients = []
        for layer, (by_w, by_b) in zip(zip(v, g, self.norms), by_weights):
            gradients += [*cpu_network.fold_backward(*layer, by_w), by_b]
        self.arrays = self.norms = None
        self.hand_back(inputs, gradients, propagate_down, accum)


class ImplicitOnCpu(NumpyFunction):
    """The implicit network, and its first points as those that move with the surface along their rays (equation 3).

    Inputs: points (N, 3), the directions of the first S points' rays (S, 3; only where S > 0), and the packed weights.
    Outputs: sdf (N, 1) and gradient (N, 3); and where S > 0, of the first S, the points again, their gradient and their
    feature (S, F). After a backward pass by_points() gives its loss's derivative by the points (N, 3), but for the part
    that the gradient's loss has in it: to move a ray's point is to move its hit along, and to change the point's sdf by
    gradient . movement.
    """

    def __init__(self, sizes, hits):
        super().__init__(sizes)
        self.hits = hits        # S

    def min_outputs(self):
        return 5 if self.hits else 2

    def setup_impl(self, inputs, outputs):
        rows = [inputs[0].shape[0]] * 2 + [self.hits] * 3
        for output, rows, columns in zip(outputs, rows, (1, 3, 3, 3, self.sizes[-1, 1] - 1)):
            output.reset_shape((rows, columns), True)

    def forward_impl(self, inputs, outputs):
        x, hits = inputs[0].data.data, self.hits
        output, self.gradient, self.saved = cpu_network.implicit_forward(x, inputs[-1].data.data, self.sizes, hits)
        results = output[:, :1], self.gradient, x[:hits], self.gradient[:hits], output[:hits, 1:]
        for output, result in zip(outputs, results):
            output.data.data[...] = result

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        by_sdf, by_gradient, *by_hits = (o.grad.data for o in outputs)
        hits = None
        if by_hits:
            directions = inputs[1].data.data
            slopes = cpu_network.slope_along(directions, self.gradient[:self.hits])
            hits = cpu_network.Hits(directions, slopes, *by_hits)
        by_packed, self.by_sdf, self.by_hits = cpu_network.implicit_backward(
            self.saved, inputs[-1].data.data, self.sizes, by_sdf, by_gradient, hits)
        self.saved = None
        self.hand_back(inputs, [np.float32(0.0)] * (len(inputs) - 1) + [by_packed], propagate_down, accum)

    def by_points(self):
        by = self.by_sdf * self.gradient
        if self.hits:
            by[:self.hits] += self.by_hits
        return by


class RenderingOnCpu(NumpyFunction):
    """Inputs the renderer's input and the packed weights; output rgb."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def grad_depends_output_data(self, i, o):
        return True

    def forward_impl(self, inputs, outputs):
        h, packed = (i.data.data for i in inputs)
        outputs[0].data.data[...], self.saved = cpu_network.rendering_forward(h, packed, self.sizes)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        by_h, by_packed = cpu_network.rendering_backward(
            self.saved, inputs[1].data.data, self.sizes, outputs[0].data.data, outputs[0].grad.data)
        self.saved = None
        self.hand_back(inputs, (by_h, by_packed), propagate_down, accum)


# --- the differentiable hit and the losses ----------------------------------------------------------------------------

def slope_along(directions, gradient):
    """gradient . direction (N, 1), but no nearer to 0 than GRAZING, as the hit's derivative is without bound there."""
    slope = row_sums(gradient * directions)
    return F.where(F.less_scalar(F.abs(slope), GRAZING), constant(np.full(slope.shape, -GRAZING)), slope)


def total(x):
    """The sum of all of x (N, C), as a scalar."""
    return F.reshape(F.affine(F.reshape(x, (1, -1)), constant(np.ones((x.size, 1)))), ())


def color_loss(rgb, rgb_true, weights, rays):
    """(1 / rays) sum of |rgb - rgb_true|_1 over the rows, weighted by weights (N, 1) (equation 6)."""
    return total(F.absolute_error(rgb, rgb_true) * weights) * (1.0 / rays)


def mask_loss(sdf, object_mask, weights, alpha, rays):
    """(1 / (alpha rays)) sum of CE(object_mask, sigmoid(-alpha sdf)) over the rows, weighted (equation 7).

    sdf, object_mask, weights: (N, 1); alpha: (1, 1) Variable.
    """
    return total(F.sigmoid_cross_entropy(sdf * alpha * -1.0, object_mask) * weights / alpha) * (1.0 / rays)


def eikonal_loss(gradient):
    """Mean of (|gradient| - 1)^2 over the rows of gradient (N, 3) (equation 8)."""
    norm = (row_sums(gradient * gradient) + 1e-12) ** 0.5       # the derivative of a root ends where its value is 0
    return total((norm - 1.0) ** 2.0) * (1.0 / gradient.shape[0])


def training_graph(rays, surface, mask_weight, eikonal_weight, without=(), by_rays=False):
    """The losses of one step over `rays` rays, of which the first `surface` may show the surface.

    without: as rendering. Returns a dict of Variables and two functions. To be set: points (rays + rays // 2, 3), the
    rays' points followed by the uniform ones; directions and rgb (surface, 3); colored (surface, 1), the weight of a
    ray that hits in the object mask, else 0; object_mask and masked (rays, 1), the latter the weight of the other rays,
    else 0; alpha (1, 1).
    forward() computes the losses, to be read: loss, color, mask, eikonal; backward() then adds the loss's derivatives
    to the parameters' gradients.

    With `by_rays` a third function, by_rays(), then gives those by the rays' points (rays, 3) and by the directions
    (surface, 3) as the renderer is given them, NumPy arrays; the eikonal loss has no part in them, and the distance
    along a ray is held constant.
    """
    g = {"points": nn.Variable((rays + rays // 2, 3)), "directions": nn.Variable((surface, 3)),
         "rgb": nn.Variable((surface, 3)), "colored": nn.Variable((surface, 1)),
         "object_mask": nn.Variable((rays, 1)), "masked": nn.Variable((rays, 1)), "alpha": nn.Variable((1, 1))}
    evaluate = evaluate_on_cpu if on_cpu() else evaluate_on_gpu
    g["directions"].need_grad = by_rays
    sdf, gradient, at_hits, evaluation, carry_back, by_points = evaluate(g["points"], g["directions"], by_rays)
    g["mask"] = mask_loss(sdf[:rays], g["object_mask"], g["masked"], g["alpha"], rays)
    g["eikonal"] = eikonal_loss(gradient)
    g["color"] = constant(0.0)
    if surface:
        hits, normal, feature = at_hits
        rgb = rendering(hits, normal, g["directions"] * -1.0, feature, folded_weights("rendering"),
                        without)
        g["color"] = color_loss(rgb, g["rgb"], g["colored"], rays)
    g["loss"] = g["color"] + g["mask"] * mask_weight + g["eikonal"] * eikonal_weight
    for name in ("color", "mask", "eikonal"):
        g[name].persistent = True

    def forward():
        evaluation()
        g["loss"].forward(clear_no_need_grad=True)

    def backward():
        if by_rays:
            g["directions"].grad.zero()     # an input's is added to
        g["loss"].backward(clear_buffer=True)
        carry_back()

    g["forward"], g["backward"] = forward, backward
    if by_rays:
        g["by_rays"] = lambda: (by_points()[:rays], g["directions"].g.copy())
    return g


def evaluate_on_cpu(points, directions, by_rays=False):
    """The implicit network at points (N, 3), and at the differentiable hits of the first rays, of directions (S, 3).

    Returns sdf (N, 1), gradient (N, 3), (hits, normal, feature) of the S rays, and two functions that have nothing to
    do: nnabla carries the derivatives back. A third one gives, with `by_rays`, the derivatives by the points (N, 3), as
    ImplicitOnCpu has them.

    A hit has the value of its point, so one evaluation serves both (DESIGN).
    """
    weights = folded_weights("implicit")
    function = ImplicitOnCpu(weights.sizes, directions.shape[0])
    rays = [directions] if directions.shape[0] else []
    sdf, gradient, *at_hits = function(points, *rays, weights.packed)
    return sdf, gradient, at_hits, lambda: None, lambda: None, function.by_points


def evaluate_on_gpu(points, directions, by_rays=False):
    """What evaluate_on_cpu gives, with the derivatives written out in nnabla's functions. A GPU waits for nnabla to
    start each of them (7 to 20 us on an H200, where a product takes 40 and all else less); this way there are fewer.

    The one evaluation has the surface's rows twice in it: once as hits, once as points. What a loss's derivative by the
    hit adds to that by the point's sdf, shift, reaches the weights through the deltas that are there already. Of the two
    functions, the first computes the values, which are leaves of the graph of the losses; the second carries their
    derivatives back to the parameters.
    """
    surface, layers = directions.shape[0], layer_parameters("implicit")
    folded = [F.weight_normalization(v, g, dim=1) for v, g, _ in layers]
    folding = F.sink(*folded, one_input_grad=False)
    weights = [(w, b, F.transpose(w, (1, 0))) for w, (_, _, b) in zip(leaves(folded), layers)]
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


# --- evaluation without gradient --------------------------------------------------------------------------------------

def sdf_evaluator():
    """Return the sdf of the current parameters as a callable, points (N, 3) float32 -> (N,) float32.

    Its refresh() takes over parameters that have changed since. Its `roughly` is None or a faster callable that is less
    exact, for a choice among samples.
    """
    return SdfOnCpu() if on_cpu() else SdfOnGpu()


class SdfOnCpu:
    """The sdf through NumPy."""

    def __init__(self):
        self.refresh()

    def refresh(self):
        self.weights = packed_arrays("implicit")

    def __call__(self, points):
        return cpu_network.implicit_sdf(points, *self.weights)

    roughly = None


class SdfOnGpu:
    """The sdf through static graphs of a few sizes, so that a call costs launches and no graph building."""

    SIZES = tuple(size for k in range(8, 16) for size in (2 ** k, 3 * 2 ** (k - 1))) + (2 ** 16,)
    KEPT = 8192     # up to this size a graph keeps its buffers: taking and freeing them would take longer than the work

    def __init__(self):
        folded = [(w, b) for w, b, _ in folded_weights("implicit")]
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


def shade(points, directions=None, without=(), chunk=4096):
    """Colour and normal of surface points with the current parameters.

    points, directions: (N, 3) float32, the latter the unit ray directions; without them each point is seen along its
    normal; without: as rendering. Returns rgb (N, 3) in [0, 1] and the gradient of the sdf (N, 3), float32.
    """
    rows = min(chunk, len(points))
    rgb, normals = np.empty((len(points), 3), np.float32), np.empty((len(points), 3), np.float32)
    if rows == 0:
        return rgb, normals
    x, view = nn.Variable((rows, 3)), nn.Variable((rows, 3))
    with nn.no_grad():
        _, feature, normal = implicit(x, folded_weights("implicit"))
        if directions is None:
            view = normal / (row_sums(normal * normal) + 1e-12) ** 0.5
        color = rendering(x, normal, view, feature, folded_weights("rendering"), without)
    both = F.sink(color, normal)
    for start in range(0, len(points), rows):
        part = slice(start, min(start + rows, len(points)))
        count = part.stop - start
        x.d[:count] = points[part]
        if directions is not None:
            view.d[:count] = -directions[part]
        both.forward(clear_no_need_grad=False)
        rgb[part], normals[part] = color.d[:count] * 0.5 + 0.5, normal.d[:count]
    return rgb, normals


# --- the initial sdf as a picture -------------------------------------------------------------------------------------

def check_sizes(width, layers, radius):
    """Raise UserError for sizes on the command line that make no network."""
    import helper
    if width < 64 or layers < 2 or not 0 < radius < 1:
        raise helper.UserError(f"the width must be 64 or more (not {width}), -L 2 or more (not {layers}) and -R between "
                               f"0 and 1 (not {radius})")


def main():
    import helper
    parser = helper.argument_parser("Draw the zero contour of the initial sdf and measure it against the exact sphere; "
                                    "with several widths, plot the error over the width.", config=False)
    parser.add_argument("-Ds", type=int, nargs="+", default=[512], metavar="D", help="layer widths")
    parser.add_argument("-L", type=int, default=9, help="affine layers")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    for width in args.Ds:
        check_sizes(width, args.L, args.R)
    helper.set_context(args.context, args.device_id)
    errors = []
    for width in args.Ds:
        initialize(width, 256, args.L, args.R, np.random.default_rng(0))
        sdf = sdf_evaluator()
        points = np.random.default_rng(1).uniform(-1, 1, (100000, 3)).astype(np.float32)
        errors.append(np.abs(sdf(points) - (np.linalg.norm(points, axis=1) - args.R)).mean())
        path = f"sdf_contour_D{width:03d}_L{args.L:03d}.png"
        draw_contour(sdf, args.R, f"initial sdf, width {width}, {args.L} layers", path)
        print(f"width {width}: mean absolute error {errors[-1]:.4f} against the sphere of radius {args.R} in [-1, 1]^3, "
              f"{path}")
    if len(args.Ds) > 1:
        path = f"sdf_error_L{args.L:03d}.png"
        draw_errors(args.Ds, errors, path)
        print(f"error over width: {path}")


def draw_contour(sdf, radius, title, path):
    """Draw the sdf on the plane z = 0 with its zero contour, and the exact circle of `radius`, to `path`."""
    import helper
    from matplotlib.figure import Figure
    line = np.linspace(-1, 1, 201, dtype=np.float32)
    grid = np.stack(np.broadcast_arrays(line[None], line[:, None], np.float32(0)), axis=-1)
    values = sdf(grid.reshape(-1, 3)).reshape(201, 201)
    figure = Figure(figsize=(5.4, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(aspect="equal", title=title, xlabel="x", ylabel="y")
    levels = np.linspace(-1, 1, 21)
    filled = axes.contourf(line, line, values, levels, cmap="RdBu", extend="both")
    axes.contour(line, line, values, [0.0], colors="black", linewidths=2)
    angle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(radius * np.cos(angle), radius * np.sin(angle), "--", color="orange", label=f"circle of radius {radius}")
    axes.plot([], [], color="black", linewidth=2, label="sdf = 0")
    figure.legend(loc="outside lower center", ncols=2)
    figure.colorbar(filled, label="sdf")
    with helper.replacing(path) as temporary:
        figure.savefig(temporary)


def draw_errors(widths, errors, path):
    """Plot the mean absolute error over the layer width to `path`."""
    import helper
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="initial sdf against the exact sphere", xlabel="layer width",
                              ylabel="mean absolute error", xscale="log")
    axes.plot(widths, errors, "o-")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    with helper.replacing(path) as temporary:
        figure.savefig(temporary)


if __name__ == "__main__":
    import helper
    helper.run(main)
