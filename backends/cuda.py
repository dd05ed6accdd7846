"""The networks on a GPU as nnabla sees them, with gpu_kernels.py inside: faster than gpu.py, and in need of CuPy.

With gpu.py, nnabla's host side starts a thousand kernels in a step, and the GPU waits for it. Here a step costs a few
calls. Solver and all parameters stay nnabla's. cpu.py and gpu.py offer the same names, but for StepEvaluation.
"""
import threading
from typing import Iterator, List, NamedTuple, Sequence, Tuple, Union

import cupy
import nnabla as nn
import numpy as np
from nnabla.ext_utils import get_extension_context
from nnabla.function import PythonFunction

from backends import gpu_kernels, gpu_search
from backends.architecture import array_sizes, used_columns
from backends.cpu_kernels import StepRows
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


# --- a training step --------------------------------------------------------------------------------------------------

class Late(NamedTuple):
    """A number that the GPU is still at work on."""
    step: gpu_kernels.Step
    weights: Tuple[float, ...]      # of the three losses in it

    @property
    def d(self) -> float:
        """The number, once it is there."""
        with Gpu.device.current():
            cupy.cuda.Stream.null.synchronize()
        return float(self.weights @ self.step.host_sums)


class StepEvaluation:
    """Both networks, the losses and their gradients in a training step, for training/step.py as TrainingGraph is.

    layers: the parameters of the implicit network and of the renderer, Variables (v, g, b); without: which of
    OPTIONAL_INPUTS the renderer was built without; least_slope: of architecture.inverse_slope. A step may have any
    number of hits; the buffers, some 600 MB at full size, serve all.
    """

    def __init__(self, layers: Tuple[Layers, Layers], without: Sequence[str], num_rays: int, least_slope: float):
        self.layers, self.num_rays, self.least_slope = layers, num_rays, least_slope
        sizes = [sizes_of(network) for network in layers]
        with Gpu.device.current():
            self.step = gpu_kernels.Step(Gpu.device, sizes, num_rays + num_rays // 2, num_rays,
                                         used_columns(without, *sizes))

    def set(self, rows: StepRows, weights: Tuple[float, float], alpha: float) -> None:
        """Set the inputs of a step; weights: those of the mask and the eikonal loss."""
        host, self.num_hits, self.weights = self.step.host, len(rows.directions), weights
        host.terms[:] = *weights, alpha
        for name, values in rows._asdict().items():
            getattr(host, name)[:len(values)] = values

    def networks(self) -> Iterator[Tuple[gpu_kernels.Weights, Layers]]:
        """Return the weights and layers of each network that the step needs: without a hit, the first one."""
        passes = [self.step.evaluation] + ([self.step.rendering(self.num_hits)] if self.num_hits else [])
        return zip((network.weights for network in passes), self.layers)

    def forward(self) -> None:
        """Start the whole step, with the parameters' current values."""
        with Gpu.device.current():
            for weights, layers in self.networks():
                weights.fold(pointers(layers))
            self.step.start(self.num_hits, self.least_slope)

    def backward(self) -> None:
        """Add the gradients of the losses' weighted sum to those of the parameters."""
        with Gpu.device.current():
            for weights, layers in self.networks():
                weights.fold_backward(gradients_of(layers))

    def losses(self) -> Tuple[Late, Late, Late, Late]:
        """Return the weighted sum of the losses, then the colour, mask and eikonal loss."""
        return tuple(Late(self.step, np.array(weights)) for weights in ((1.0, *self.weights), *np.eye(3)))

    def uniform_points(self) -> Tuple[cupy.ndarray, cupy.ndarray]:
        """Return the points (R / 2, 3) behind the rays', and the sdf there (R / 2,), on the GPU, for now."""
        return self.step.inputs.points[self.num_rays:], self.step.sdf[self.num_rays:]

    def grad_rays(self) -> Tuple[np.ndarray, np.ndarray]:
        """As TrainingGraph.grad_rays."""
        return self.step.evaluation.grad_points[:self.num_rays].get(), self.step.grad_directions[:self.num_hits].get()


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
    """As network.implicit; weights: the layers."""
    return ImplicitFunction(weights)(x)


def rendering(h: nn.Variable, weights: Layers) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: the layers."""
    return RenderingFunction(weights)(h)


class Function(PythonFunction):
    """A function of nnabla's whose pass is one of gpu_kernels, for any number of rows. It has no backward pass: in
    training, StepEvaluation takes its place. The parameters are no inputs; forward_impl reads them.
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
    """Input: points. Outputs: sdf, feature and normal."""

    def min_outputs(self):
        return 3

    def setup_impl(self, inputs, outputs):
        for output, columns in zip(outputs, (1, sizes_of(self.layers)[-1][1] - 1, 3)):
            output.reset_shape((inputs[0].shape[0], columns), True)

    def forward_impl(self, inputs, outputs):
        with Gpu.device.current():
            passes = take(gpu_kernels.Evaluation, self.layers, inputs[0].shape[0])
            passes.implicit_forward(pointer(inputs[0].data), *(pointer(o.data, write=True) for o in outputs))
            give_back(passes)


class RenderingFunction(Function):
    """Input: the renderer's input. Output: rgb."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def forward_impl(self, inputs, outputs):
        with Gpu.device.current():
            passes = take(gpu_kernels.Rendering, self.layers, inputs[0].shape[0])
            passes.rendering_forward(pointer(inputs[0].data), pointer(outputs[0].data, write=True))
            give_back(passes)


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator describes it. Threads may share it."""

    SIZES = tuple(size for k in range(8, 14) for size in (2 ** k, 3 * 2 ** (k - 1))) + (2 ** 14,)
    half_precision = None       # `search` has no use for it

    def __init__(self, layers: Layers):
        self.layers, self.launching = layers, threading.Lock()
        with Gpu.device.current():
            self.network = gpu_kernels.ImplicitSdf(Gpu.device, sizes_of(layers), self.SIZES)
            self.search = gpu_search.Search(Gpu.device, self.network.implicit_sdf)
        self.refresh()

    def refresh(self) -> None:
        with self.launching, Gpu.device.current():
            self.network.fold(pointers(self.layers))
            self.search.still = None        # what is remembered was of other parameters

    def __call__(self, points: np.ndarray) -> np.ndarray:
        x, out = page_locked((len(points), 3)), page_locked((len(points),))
        x[:] = points
        with self.launching, Gpu.device.current():
            self.network.implicit_sdf(x.ctypes.data, out.ctypes.data, len(points))
            cupy.cuda.Stream.null.synchronize()
        return out.copy()
