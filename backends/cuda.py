"""The networks on a GPU as nnabla sees them, with gpu_kernels.py inside: faster than gpu.py, and in need of CuPy.

With gpu.py, nnabla's host side starts a thousand kernels in a step, and the GPU waits for it. Here the networks cost a
few dozen calls. Losses, solver and all parameters stay nnabla's. cpu.py and gpu.py offer the same names.
"""
import threading
from functools import partial
from typing import List, Tuple, Union

import cupy
import nnabla as nn
import numpy as np
from nnabla.ext_utils import get_extension_context
from nnabla.function import PythonFunction

from backends import gpu_kernels, gpu_search
from backends.architecture import array_sizes
from backends.gpu import Layers
from backends.gpu_kernels import page_locked


class Gpu:
    """The GPU that set_up has chosen: nnabla's context, and the kernels."""
    context: nn.Context = None
    device: gpu_kernels.Device = None
    spare: dict = {}        # {(class, sizes, rows): passes of gpu_kernels that nothing holds}


def set_up(device_id: str) -> None:
    """Prepare this process for the kernels on a GPU. Raises what CuPy raises where it cannot be used."""
    Gpu.context = get_extension_context("cudnn", device_id=str(device_id))
    Gpu.device, Gpu.spare = gpu_kernels.Device(int(device_id)), {}


def pointer(array: nn.NdArray, write: bool = False) -> int:
    """Return where a float32 array of nnabla's lies on the GPU; with `write`, what it held is lost."""
    return array.data_ptr(np.float32, Gpu.context, write)


def pointers(layers: Layers) -> List[Tuple[int, ...]]:
    """Return where each layer's v, g and b lie."""
    return [tuple(pointer(parameter.data) for parameter in layer) for layer in layers]


def sizes_of(layers: Layers) -> Tuple[Tuple[int, int], ...]:
    """Return (in, out) of each layer."""
    return tuple(map(tuple, array_sizes(layers).tolist()))


Passes = Union[gpu_kernels.Evaluation, gpu_kernels.Rendering]


def take(kind: type, layers: Layers, rows: int) -> Passes:
    """Return passes of a class of gpu_kernels for `rows` rows, with the layers' weights; spare ones where there are."""
    key = kind, sizes_of(layers), rows
    spare = Gpu.spare.setdefault(key, [])
    passes = spare.pop() if spare else kind(Gpu.device, *key[1:])
    passes.weights.fold(pointers(layers))
    return passes


def give_back(passes: Passes) -> None:
    """Let others use the passes' buffers."""
    Gpu.spare[type(passes), passes.weights.sizes, passes.rows].append(passes)


# --- the evaluation of a training step --------------------------------------------------------------------------------

class SurfaceEvaluation:
    """As gpu.SurfaceEvaluation.

    The buffers, some 400 MB at full size, are held from forward() to backward() and then serve the next evaluation.
    """

    def __init__(self, layers: Layers, points: nn.Variable, directions: nn.Variable, want_grad_points: bool,
                 least_slope: float):
        self.layers, self.points, self.directions, self.want_grad_points = layers, points, directions, want_grad_points
        self.least_slope = least_slope
        self.sizes, (rows, self.num_hits) = sizes_of(layers), (points.shape[0], directions.shape[0])
        self.held = None
        self.sdf, self.normal = (nn.Variable((rows, columns), need_grad=True) for columns in (1, 3))
        self.leaves, self.hit, self.hit_normal, self.hit_feature = [self.sdf, self.normal], None, None, None
        if self.num_hits:
            self.hit, self.hit_normal, self.hit_feature = hits = [
                nn.Variable((self.num_hits, columns), need_grad=True) for columns in (3, 3, self.sizes[-1][1] - 1)]
            self.leaves += hits

    def forward(self) -> None:
        with Gpu.device.current():
            if self.held:
                self.held.weights.fold(pointers(self.layers))
            else:
                self.held = take(gpu_kernels.Evaluation, self.layers, self.points.shape[0])
            results = [pointer(leaf.data, write=True) for leaf in self.leaves]
            self.held.implicit_forward(pointer(self.points.data), results + [0] * (5 - len(results)), self.num_hits)
        for leaf in self.leaves:
            leaf.grad.zero()

    def backward(self) -> None:
        held, inputs = self.held, [pointer(leaf.grad) for leaf in self.leaves]
        if self.num_hits:
            inputs.append(pointer(self.directions.data))
        with Gpu.device.current():
            held.implicit_backward(gpu_kernels.Gradients(*inputs), self.num_hits, self.want_grad_points,
                                   self.least_slope)
            held.weights.fold_backward(gradients_of(self.layers))
            if self.want_grad_points:
                self.gradient = held.grad_points.get()
        give_back(held)
        self.held = None

    def grad_points(self) -> np.ndarray:
        return self.gradient


def gradients_of(layers: Layers) -> List[Tuple[int, ...]]:
    """Return where the gradients of each layer's v, g and b lie, and 0 if they are zero, 1 if they must be added to."""
    found = []
    for layer in layers:
        zero = all(parameter.grad.zeroing for parameter in layer)
        found.append((*(pointer(parameter.grad, write=zero) for parameter in layer), int(not zero)))
    return found


# --- functions of nnabla's graphs -------------------------------------------------------------------------------------

def folded_weights(layers: Layers) -> Layers:
    """Return the layers as they are: what takes them normalises their weights."""
    return layers


def implicit(x: nn.Variable, weights: Layers) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """As network.implicit, without a gradient, as only renders take it; weights: the layers."""
    return ImplicitFunction(weights)(x)


def rendering(h: nn.Variable, weights: Layers) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: the layers.

    In training h takes a gradient. Then the backward pass also adds to the gradients of the parameters.
    """
    return RenderingFunction(weights, training=h.need_grad)(h)


class Function(PythonFunction):
    """A function of nnabla's whose passes are those of gpu_kernels, for any number of rows.

    The parameters are no inputs: at every step nnabla would ask Python about each of them, which takes longer than the
    kernels. forward_impl reads them.
    """

    def __init__(self, layers: Layers):
        super().__init__(nn.get_current_context())
        self.layers = layers

    @property
    def name(self):
        return type(self).__name__

    def grad_depends_output_data(self, i, o):
        return False

    def grad_depends_input_data(self, i, j):
        return False


class ImplicitFunction(Function):
    """Input: points. Outputs: sdf, feature and normal. It has no backward pass."""

    def min_outputs(self):
        return 3

    def setup_impl(self, inputs, outputs):
        for output, columns in zip(outputs, (1, sizes_of(self.layers)[-1][1] - 1, 3)):
            output.reset_shape((inputs[0].shape[0], columns), True)

    def forward_impl(self, inputs, outputs):
        with Gpu.device.current():
            passes = take(gpu_kernels.Evaluation, self.layers, inputs[0].shape[0])
            sdf, feature, normal = (pointer(output.data, write=True) for output in outputs)
            # All points are hits; what is asked of a hit beside the feature is there already.
            passes.implicit_forward(pointer(inputs[0].data), [sdf, normal, passes.x.data.ptr, normal, feature],
                                    passes.rows)
            give_back(passes)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        raise NotImplementedError("a render has no gradient")


class RenderingFunction(Function):
    """Input: the renderer's input. Output: rgb. In training, backward_impl adds to the gradients of the parameters."""

    def __init__(self, layers: Layers, training: bool):
        super().__init__(layers)
        self.training = training

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)
        self.held = None

    def forward_impl(self, inputs, outputs):
        with Gpu.device.current():
            if self.held:
                self.held.weights.fold(pointers(self.layers))
            else:
                self.held = take(gpu_kernels.Rendering, self.layers, inputs[0].shape[0])
            self.held.rendering_forward(pointer(inputs[0].data), pointer(outputs[0].data, write=True))
            if not self.training:
                give_back(self.held)
                self.held = None

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        passes, add = self.held, accum[0]
        with Gpu.device.current():
            passes.rendering_backward(pointer(outputs[0].grad), pointer(inputs[0].grad, write=not add), add)
            passes.weights.fold_backward(gradients_of(self.layers))


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator describes it. Threads may share it."""

    SIZES = tuple(size for k in range(8, 14) for size in (2 ** k, 3 * 2 ** (k - 1))) + (2 ** 14,)
    half_precision = None       # only `search` chooses by it

    def __init__(self, layers: Layers):
        self.layers, self.launching = layers, threading.Lock()
        with Gpu.device.current():
            self.network = gpu_kernels.ImplicitSdf(Gpu.device, sizes_of(layers), self.SIZES)
            self.search = gpu_search.Search(Gpu.device, partial(self.network.implicit_sdf, half=False))
        self.refresh()

    def refresh(self) -> None:
        with self.launching, Gpu.device.current():
            self.network.fold(pointers(self.layers))
            self.search.still = None        # what is remembered was of other parameters

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return self.in_precision(points, half=False)

    def in_precision(self, points: np.ndarray, half: bool) -> np.ndarray:
        x, out = page_locked((len(points), 3)), page_locked((len(points),))
        x[:] = points
        with self.launching, Gpu.device.current():
            self.network.implicit_sdf(x.ctypes.data, out.ctypes.data, len(points), half)
            cupy.cuda.Stream.null.synchronize()
        return out.copy()
