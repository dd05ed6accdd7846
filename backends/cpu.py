"""The networks on the CPU as nnabla sees them: functions of its graphs with cpu_kernels inside, and the sdf.

gpu.py offers the same for a GPU (folded_weights, implicit, rendering, evaluate, Sdf); network.py chooses.
"""
import sys
import types
from collections import namedtuple

import nnabla as nn
import nnabla_ext
import nnabla_ext.cpu
import numpy as np
from nnabla.function import PythonFunction

from backends import cpu_kernels


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

# A network's weights as one Variable, and (in, out) of each of its layers, an array (L, 2).
PackedWeights = namedtuple("PackedWeights", "packed sizes")


class CpuFunction(PythonFunction):
    """A nnabla function whose forward and backward passes take and give NumPy arrays, in the current context."""

    def __init__(self, sizes):
        super().__init__(nn.get_current_context())
        self.sizes = sizes      # (in, out) of each of the network's layers, an array (L, 2)

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


class FoldFunction(CpuFunction):
    """Inputs v, g, b, v, g, b, ...; output the packed weights."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((int(((self.sizes[:, 0] + 1) * self.sizes[:, 1]).sum()),), True)

    def forward_impl(self, inputs, outputs):
        self.arrays = [i.data.data for i in inputs]         # backward_impl takes these: to get them takes time
        outputs[0].data.data[...], self.norms = packed_arrays(*(self.arrays[part::3] for part in range(3)))

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        v, g, _ = (self.arrays[part::3] for part in range(3))
        by_weights = cpu_kernels.unpack(outputs[0].grad.data, self.sizes)
        gradients = []
        for layer, (by_w, by_b) in zip(zip(v, g, self.norms), by_weights):
            gradients += [*cpu_kernels.fold_backward(*layer, by_w), by_b]
        self.arrays = self.norms = None
        self.hand_back(inputs, gradients, propagate_down, accum)


class ImplicitFunction(CpuFunction):
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
        output, self.gradient, self.saved = cpu_kernels.implicit_forward(x, inputs[-1].data.data, self.sizes, hits)
        results = output[:, :1], self.gradient, x[:hits], self.gradient[:hits], output[:hits, 1:]
        for output, result in zip(outputs, results):
            output.data.data[...] = result

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        by_sdf, by_gradient, *by_hits = (o.grad.data for o in outputs)
        hits = None
        if by_hits:
            directions = inputs[1].data.data
            slopes = cpu_kernels.slope_along(directions, self.gradient[:self.hits])
            hits = cpu_kernels.Hits(directions, slopes, *by_hits)
        by_packed, self.by_sdf, self.by_hits = cpu_kernels.implicit_backward(
            self.saved, inputs[-1].data.data, self.sizes, by_sdf, by_gradient, hits)
        self.saved = None
        self.hand_back(inputs, [np.float32(0.0)] * (len(inputs) - 1) + [by_packed], propagate_down, accum)

    def by_points(self):
        by = self.by_sdf * self.gradient
        if self.hits:
            by[:self.hits] += self.by_hits
        return by


class RenderingFunction(CpuFunction):
    """Inputs the renderer's input and the packed weights; output rgb."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def grad_depends_output_data(self, i, o):
        return True

    def forward_impl(self, inputs, outputs):
        h, packed = (i.data.data for i in inputs)
        outputs[0].data.data[...], self.saved = cpu_kernels.rendering_forward(h, packed, self.sizes)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        by_h, by_packed = cpu_kernels.rendering_backward(
            self.saved, inputs[1].data.data, self.sizes, outputs[0].data.data, outputs[0].grad.data)
        self.saved = None
        self.hand_back(inputs, (by_h, by_packed), propagate_down, accum)


# --- what network.py takes --------------------------------------------------------------------------------------------

def folded_weights(layers):
    """The PackedWeights of layers, a list of Variables (v, g, b), for a graph: W = g v / |v|, per output."""
    sizes = layer_sizes(layers)
    return PackedWeights(FoldFunction(sizes)(*(p for layer in layers for p in layer)), sizes)


def layer_sizes(layers):
    """(in, out) of each of the layers, Variables (v, g, b), as an array (L, 2)."""
    return np.array([v.shape for v, _, _ in layers])


def packed_arrays(v, g, b):
    """The packed weights of the layers whose arrays these lists hold, and |v| (out,) of each layer."""
    norms = [np.linalg.norm(array, axis=0) for array in v]
    return cpu_kernels.pack(zip(map(cpu_kernels.fold, v, g, norms), b)), norms


def implicit(x, weights):
    """As network.implicit; weights: a PackedWeights."""
    sdf, gradient, _, _, feature = ImplicitFunction(weights.sizes, x.shape[0])(x, x, weights.packed)
    return sdf, feature, gradient


def rendering(h, weights):
    """The renderer's rgb (N, 3) of its joined inputs h (N, in); weights: a PackedWeights."""
    return RenderingFunction(weights.sizes)(h, weights.packed)


def evaluate(layers, points, directions, by_rays=False):
    """The implicit network at points (N, 3), and at the differentiable hits of the first rays, of directions (S, 3).

    layers: its parameters, Variables (v, g, b). Returns sdf (N, 1), gradient (N, 3), (hits, normal, feature) of the S
    rays, and two functions that have nothing to do: nnabla carries the derivatives back. A third one gives, with
    `by_rays`, the derivatives by the points (N, 3), as ImplicitFunction has them.

    A hit has the value of its point, so one evaluation serves both.
    """
    weights = folded_weights(layers)
    function = ImplicitFunction(weights.sizes, directions.shape[0])
    rays = [directions] if directions.shape[0] else []
    sdf, gradient, *at_hits = function(points, *rays, weights.packed)
    return sdf, gradient, at_hits, lambda: None, lambda: None, function.by_points


class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator says."""

    def __init__(self, layers):
        self.layers, self.sizes = layers, layer_sizes(layers)
        self.refresh()

    def refresh(self):
        self.packed, _ = packed_arrays(*zip(*([p.d for p in layer] for layer in self.layers)))

    def __call__(self, points):
        return cpu_kernels.implicit_sdf(points, self.packed, self.sizes)

    roughly = None
