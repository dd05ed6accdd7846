"""The two networks on a GPU: cuBLAS for the products, and for each loop of cpu_kernels.py a kernel of gpu_kernels.cu.

The formulas, their order and most names are those of cpu_kernels.py; tests/test_gpu_kernels.py compares the results
with gpu.py's. All arrays are float32. A pass is recorded once as a CUDA graph, on buffers that stay where they are, and
later started as a whole: one call instead of a hundred. All work is started on CUDA's legacy default stream, as that of
nnabla is. So each sees what the other has written, without waiting.

Importing this file needs CuPy. Arrays that belong to nnabla come as pointers (int).
"""
import ctypes
import threading
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple, Union

import cupy
import numpy as np

from backends.architecture import SKIP_LAYER, SOFTPLUS_BETA, has_skip

Pointer = int
IN, OUT = 0, 1
THREADS = 128           # of a block: columns of one row
WORKSPACE = 32 << 20    # bytes for cuBLAS, which may not allocate them while a graph is recorded

SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = ("encode softplus last_product delta find_normal hand_out take_in tangent add_back move_hits add_hits "
           "find_grad_points copy_rows relu relu_backward find_rgb rgb_backward join_inputs find_losses split_inputs "
           "sum_losses sum_rows fold fold_backward").split()


class Device:
    """A GPU with the kernels of gpu_kernels.cu, cuBLAS, and a stream on which passes are recorded.

    Raises OSError, RuntimeError or an exception of CuPy's where CuPy, its compiler, cuBLAS and the driver do not fit.
    """

    def __init__(self, number: int):
        self.number = number
        with self.current():
            self.kernels = compiled(SOURCE, KERNELS, BETA=SOFTPLUS_BETA, THREADS=THREADS)
            self.stream, self.recording = cupy.cuda.Stream(non_blocking=True), threading.Lock()
            self.workspace = cupy.empty(WORKSPACE, np.uint8)
            # CuPy refuses its own cuBLAS calls while a stream records.
            self.cublas = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
            self.handle = ctypes.c_void_p()
            self.check(self.cublas.cublasCreate_v2(ctypes.byref(self.handle)))
            self.check(self.cublas.cublasSetStream_v2(self.handle, ctypes.c_void_p(self.stream.ptr)))
            self.check(self.cublas.cublasSetWorkspace_v2(self.handle, ctypes.c_void_p(self.workspace.data.ptr),
                                                         ctypes.c_size_t(WORKSPACE)))

    def current(self) -> "cupy.cuda.Device":
        """Return a context in which the calling thread works on this GPU."""
        return cupy.cuda.Device(self.number)

    @staticmethod
    def check(status: int) -> None:
        """Raise RuntimeError unless `status`, of a call of cuBLAS, is 0."""
        if status:
            raise RuntimeError(f"cuBLAS fails with status {status}")

    def start(self, kernel: str, rows: int, columns: int, *arguments) -> None:
        """Start a kernel with one thread per row and column. arguments: arrays, pointers and integers."""
        self.kernels[kernel]((rows, -(-columns // THREADS)), (THREADS,), arguments)

    def start_columns(self, kernel: str, columns: int, layers: int, *arguments) -> None:
        """Start a kernel whose blocks share 32 columns, in that many layers."""
        self.kernels[kernel]((-(-columns // 32), layers), (32, 32), arguments)

    def product(self, a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray, add: bool = False) -> None:
        """Write the product of a and b to out, or add it; a and b may be transposed views. Only while recording.

        cuBLAS's matrices are stored by columns, so it is asked for the transposed product.
        """
        (m, k), n = a.shape, b.shape[1]
        one, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
        (b_transposed, b_pitch), (a_transposed, a_pitch) = stored(b), stored(a)
        pointers = [ctypes.c_void_p(x.data.ptr) for x in (b, a, out)]
        self.check(self.cublas.cublasSgemm_v2(
            self.handle, b_transposed, a_transposed, n, m, k, ctypes.byref(one), pointers[0], b_pitch,
            pointers[1], a_pitch, ctypes.byref(beta), pointers[2], out.strides[0] // 4))

    def recorded(self, function: Callable[[], None]) -> "cupy.cuda.Graph":
        """Return what `function` starts as a graph. It runs once before: cuBLAS loads its kernels at first use."""
        cupy.cuda.Stream.null.synchronize()
        with self.recording, self.stream:
            function()
            self.stream.synchronize()
            self.stream.begin_capture()
            function()
            return self.stream.end_capture()


def compiled(source: Path, names: Sequence[str], *options: str, **constants: Union[float, Sequence[float]]) -> dict:
    """Return {name: kernel} of a CUDA source, in which the constants are defined; options: the compiler's."""
    def written(value):
        return f"{value}f" if isinstance(value, float) else str(value)

    options += tuple(f"-D{name}={','.join(map(written, value)) if isinstance(value, tuple) else written(value)}"
                     for name, value in constants.items())
    module = cupy.RawModule(code=source.read_text(), options=options)
    return {name: module.get_function(name) for name in names}


def copy(target: Pointer, source: Pointer, num_bytes: int) -> None:
    """Start a copy on the default stream, between any two places; of the host's memory, only page-locked places."""
    cupy.cuda.runtime.memcpyAsync(target, source, num_bytes, cupy.cuda.runtime.memcpyDefault, 0)


def page_locked(shape: Tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Return an array that the GPU copies to and from while the host goes on."""
    count = int(np.prod(shape))
    memory = cupy.cuda.alloc_pinned_memory(max(count * np.dtype(dtype).itemsize, 4))
    return np.frombuffer(memory, dtype, count).reshape(shape)


def stored(x: cupy.ndarray) -> Tuple[int, int]:
    """Return whether a matrix is a transposed view (0 or 1), and the distance of its rows, or else of its columns."""
    return (0, x.strides[0] // 4) if x.strides[1] == 4 else (1, x.strides[1] // 4)


class Weights:
    """The folded weights of a network, their gradients, and the shapes of its buffers. sizes: (in, out) of each layer.

    The rows of all matrices are `pitch` apart, a multiple of 32: cuBLAS is fast on aligned rows.
    """

    def __init__(self, device: Device, sizes: Sequence[Tuple[int, int]]):
        self.device, self.sizes, self.count = device, sizes, len(sizes)
        self.tables = {}        # of_all_layers' latest arguments
        self.pitch = -(-max(map(max, sizes)) // 32) * 32
        self.columns, self.outputs = sizes[0][IN], sizes[-1][OUT]
        self.skip = SKIP_LAYER if has_skip(SKIP_LAYER, self.count) else 0
        self.w, self.grad_w = self.weight_buffers(), self.weight_buffers()
        self.b, self.grad_b, self.norms = cupy.empty((3, self.count, self.pitch), np.float32)

    def buffers(self, rows: int, side: int) -> List[cupy.ndarray]:
        """Return a matrix of that many rows for each layer, with as many columns as the layer has inputs or outputs."""
        whole = cupy.empty((self.count, rows, self.pitch), np.float32)
        return [whole[layer, :, :size[side]] for layer, size in enumerate(self.sizes)]

    def per_layer(self, scratch: cupy.ndarray, side: int) -> List[cupy.ndarray]:
        """Return the same scratch buffer for each layer, with as many columns as the layer has inputs or outputs."""
        return [scratch[:, :size[side]] for size in self.sizes]

    def weight_buffers(self) -> List[cupy.ndarray]:
        """Return a matrix (in, out) for each layer."""
        return [matrix[:inputs] for matrix, (inputs, _) in zip(self.buffers(self.pitch, OUT), self.sizes)]

    def around(self, layer: int) -> Tuple[int, int]:
        """Return the outputs of a layer, and the inputs of the next, which are more where that is the skip layer."""
        return self.sizes[layer][OUT], self.sizes[layer + 1][IN]

    def fold(self, layers: List[Tuple[Pointer, Pointer, Pointer]]) -> None:
        """Take the weights W = g v / |v| of layers, (v, g, b) each."""
        self.layers = layers
        self.of_all_layers("fold", [(*layer, w.data.ptr, b.data.ptr, norms.data.ptr)
                                    for layer, w, b, norms in zip(layers, self.w, self.b, self.norms)])

    def fold_backward(self, gradients: List[Tuple[Pointer, ...]]) -> None:
        """Carry grad_w and grad_b back to the layers that fold has taken.

        gradients: for each layer, arrays for the gradients of v, g and b, and whether to add to them (1) or not (0).
        """
        self.of_all_layers("fold_backward", [
            (*layer[:2], norms.data.ptr, grad_w.data.ptr, grad_b.data.ptr, *gradient) for layer, norms, grad_w, grad_b,
            gradient in zip(self.layers, self.norms, self.grad_w, self.grad_b, gradients)])

    def of_all_layers(self, kernel: str, arguments: List[Tuple[int, ...]]) -> None:
        """Start a kernel for all layers. arguments: for each layer, pointers and integers; its size is added."""
        table = np.array([(*size, *row) for size, row in zip(self.sizes, arguments)], np.int64)
        if not np.array_equal(table, self.tables.get(kernel)):
            self.tables[kernel], self.tables[kernel, "on the GPU"] = table, cupy.asarray(table)
        self.device.start_columns(kernel, self.pitch, self.count, self.tables[kernel, "on the GPU"], table.shape[1],
                                  self.pitch)

    def sum_rows(self, grad_z: cupy.ndarray, rows_apart: int) -> None:
        """Write the sums of each layer's rows to grad_b. grad_z: the first layer's; each next one lies so many rows
        behind."""
        self.device.start_columns("sum_rows", self.pitch, self.count, grad_z, self.grad_b, len(grad_z), self.pitch,
                                  rows_apart * self.pitch)

    def last_hidden(self, x, inputs, slopes, z, derivative) -> None:
        """Write the inputs of all layers at x; and slopes and gamma's derivative, unless these are 0. z is scratch."""
        rows, (start, pitch) = len(inputs[0]), (self.device.start, self.pitch)
        start("encode", rows, self.columns, x, inputs[0], derivative, self.columns, pitch)
        for layer in range(self.count - 1):
            self.device.product(inputs[layer], self.w[layer], z[layer])
            outputs, following = self.around(layer)
            start("softplus", rows, -(-following // 4), z[layer], self.b[layer], inputs[0], inputs[layer + 1],
                  slopes and slopes[layer], outputs, following, pitch)


# --- the sdf alone ----------------------------------------------------------------------------------------------------

class ImplicitSdf:
    """The implicit network's sdf, without features and normals, at as many points as one of `calls` says."""

    def __init__(self, device: Device, sizes: Sequence[Tuple[int, int]], calls: Sequence[int]):
        self.weights, self.graphs, self.calls, most = Weights(device, sizes), {}, calls, calls[-1]
        self.x, self.sdf = cupy.empty((most, 3), np.float32), cupy.empty(most, np.float32)
        self.encoded, self.h, self.z = cupy.empty((3, most, self.weights.pitch), np.float32)

    def fold(self, layers: List[Tuple[Pointer, Pointer, Pointer]]) -> None:
        """Take the weights, as Weights.fold."""
        self.weights.fold(layers)

    def implicit_sdf(self, x: Pointer, out: Pointer, count: int) -> None:
        """Start the computation of out (count,), the sdf at x (count, 3), on the GPU or in page-locked memory."""
        for start in range(0, count, self.calls[-1]):
            part = min(count - start, self.calls[-1])
            rows = next(size for size in self.calls if size >= part)     # the rows behind x's are of earlier calls
            if rows not in self.graphs:
                self.graphs[rows] = self.weights.device.recorded(partial(self.block, rows))
            copy(self.x.data.ptr, x + 12 * start, 12 * part)
            self.graphs[rows].launch(cupy.cuda.Stream.null)
            copy(out + 4 * start, self.sdf.data.ptr, 4 * part)

    def block(self, rows: int) -> None:
        """Start the pass of the first `rows` points."""
        net = self.weights
        first, *others = net.sizes
        inputs = [self.encoded[:rows, :first[IN]]] + [self.h[:rows, :size[IN]] for size in others]
        net.last_hidden(self.x, inputs, 0, [self.z[:rows, :size[OUT]] for size in net.sizes], 0)
        net.device.start("last_product", -(-rows // (THREADS // 32)), 1, inputs[-1], net.w[-1], net.b[-1], self.sdf,
                         rows, net.sizes[-1][IN], net.pitch)


# --- the evaluation of a training step --------------------------------------------------------------------------------

class Gradients(NamedTuple):
    """What the backward pass reads: the losses' gradients with respect to the sdf (N,), the normal (N, 3) and the S
    hits (S, 3), their normals (S, 3) and features (S, F); and the directions of the hits' rays (S, 3)."""
    sdf: cupy.ndarray
    normals: cupy.ndarray
    hits: cupy.ndarray
    hit_normals: cupy.ndarray
    hit_features: cupy.ndarray
    directions: cupy.ndarray


class Evaluation:
    """The implicit network at N points, of which the first S are hits, and the backward pass; S may change.

    The forward pass computes the hits once, as points. In the backward pass they have rows of their own, before the
    points': what reaches a hit also moves it along its ray.
    """

    def __init__(self, device: Device, sizes: Sequence[Tuple[int, int]], rows: int):
        self.device, self.rows, self.graph = device, rows, None
        self.weights = net = Weights(device, sizes)
        self.x, self.normals, self.grad_points = cupy.empty((3, rows, 3), np.float32)
        self.derivative, self.normal_encoded, self.last_delta, z = cupy.empty((4, rows, net.pitch), np.float32)
        self.z = net.per_layer(z, OUT)
        self.inputs, self.slopes, self.deltas = (net.buffers(rows, side) for side in (IN, OUT, OUT))
        unit = np.zeros((rows, net.pitch), np.float32)
        unit[:, 0] = 1.0
        self.last_delta.set(unit)       # the sdf is the first column of the last layer's z
        self.deltas[-1] = self.last_delta[:, :1]
        back, from_skip = cupy.empty((2, 2 * rows, net.pitch), np.float32)
        self.back = net.per_layer(back, IN)
        self.tangent_z, self.from_skip = net.per_layer(back, OUT), 0
        if net.skip:        # what the skip layer gives back to gamma(x) is needed at the end
            self.back[net.skip] = from_skip[:, :sizes[net.skip][IN]]
            self.from_skip = self.back[net.skip][:, -net.columns:]
        self.tangents = None

    def reserve_backward(self) -> None:
        """Make room for the backward pass, of the hits and the points; renders have none."""
        net, rows = self.weights, self.rows
        self.tangents, self.grad_zs = net.buffers(2 * rows, IN), net.buffers(2 * rows, OUT)
        self.grad_hits, self.grad_hit_normals, self.directions = cupy.empty((3, rows, 3), np.float32)
        self.shifts = cupy.empty(rows, np.float32)

    def implicit_forward(self, x: Pointer, sdf: Pointer, feature: Pointer, normal: Pointer) -> None:
        """Compute the network and its sdf's gradient, the normal, at x (N, 3), for nnabla's arrays: sdf (N, 1), feature
        (N, F) and normal (N, 3)."""
        net, self.graph = self.weights, self.graph or self.device.recorded(self.forward_block)
        copy(self.x.data.ptr, x, self.x.nbytes)
        self.graph.launch(cupy.cuda.Stream.null)
        self.device.start("hand_out", self.rows, net.outputs, self.z[-1], net.b[-1], sdf, feature, net.outputs,
                          net.pitch)
        copy(normal, self.normals.data.ptr, self.normals.nbytes)

    def forward_block(self) -> None:
        net, (start, product) = self.weights, (self.device.start, self.device.product)
        net.last_hidden(self.x, self.inputs, self.slopes, self.z, self.derivative)
        product(self.inputs[-1], net.w[-1], self.z[-1])
        back, row_step, column_step = net.w[-1], 0, net.pitch       # for every row the sdf's column of the last weights
        for layer in range(net.count - 2, -1, -1):
            outputs, inputs = net.around(layer)
            start("delta", self.rows, outputs, self.slopes[layer], back, row_step, column_step, self.deltas[layer],
                  outputs, inputs, net.pitch)
            back, row_step, column_step = self.back[layer][:self.rows], net.pitch, 1
            product(self.deltas[layer], net.w[layer].T, back)
        start("find_normal", self.rows, 3, self.back[0], self.from_skip, self.derivative, self.normal_encoded,
              self.normals, net.columns, net.pitch)

    def carry_gradients_back(self, gradients: Gradients, num_hits: int, least_slope: float) -> None:
        """Carry gradients back to those of the folded weights and of the points; to be recorded.

        least_slope: of architecture.inverse_slope.
        """
        net = self.weights
        self.device.start("take_in", num_hits + self.rows, max(net.outputs, net.columns), *gradients, self.derivative,
                          self.tangents[0], self.grad_zs[-1], self.grad_hits, self.grad_hit_normals, self.directions,
                          num_hits, net.columns, net.outputs, net.pitch)
        self.backward_block(num_hits, least_slope)
        self.device.start("find_grad_points", self.rows, 3, self.grad_zs[-1], self.normals, self.grad_hits,
                          self.grad_points, num_hits, net.pitch)

    def backward_block(self, num_hits: int, least_slope: float) -> None:
        net, start = self.weights, self.device.start
        self.carry_back(num_hits)
        if num_hits:
            start("move_hits", num_hits, 1, self.back[0], self.from_skip, self.inputs[0], self.derivative,
                  self.normal_encoded, self.normals, self.grad_hit_normals, self.directions, self.grad_hits,
                  self.shifts, np.float32(least_slope), net.columns, net.pitch)
            for layer, (inputs, outputs) in enumerate(net.sizes):
                delta = self.deltas[layer] if layer < net.count - 1 else self.last_delta
                start("add_hits", num_hits, max(inputs, outputs), self.shifts, delta, self.tangents[layer],
                      self.grad_zs[layer], num_hits, inputs, outputs, net.pitch)
        self.grad_weights(slice(num_hits, num_hits + self.rows))

    def carry_back(self, num_hits: int) -> None:
        """As cpu_kernels.carry_back, for the hits' and the points' rows together; then back[0] and from_skip hold the
        gradient with respect to gamma."""
        net, rows, (start, product) = self.weights, num_hits + self.rows, (self.device.start, self.device.product)
        for layer in range(net.count - 1):
            outputs, inputs = net.around(layer)
            product(self.tangents[layer][:rows], net.w[layer], self.tangent_z[layer])
            start("tangent", rows, inputs, self.tangent_z[layer], self.slopes[layer], self.deltas[layer],
                  self.tangents[0], self.tangents[layer + 1], self.grad_zs[layer], num_hits, outputs, inputs, net.pitch)
        for layer in range(net.count - 1, 0, -1):
            outputs, inputs = net.around(layer - 1)
            product(self.grad_zs[layer][:rows], net.w[layer].T, self.back[layer])
            start("add_back", rows, outputs, self.back[layer], self.slopes[layer - 1], self.grad_zs[layer - 1],
                  num_hits, outputs, inputs, net.pitch)
        if num_hits:
            product(self.grad_zs[0][:num_hits], net.w[0].T, self.back[0])

    def grad_weights(self, points: slice) -> None:
        """Compute the gradients of the folded weights and biases, from the points' rows of what carry_back gives."""
        net = self.weights
        for layer, delta in enumerate(self.deltas):
            grad_w, tangent = net.grad_w[layer], self.tangents[layer][points]
            self.device.product(self.inputs[layer].T, self.grad_zs[layer][points], grad_w)
            self.device.product(tangent.T, delta, grad_w[:, :delta.shape[1]], add=True)
        net.sum_rows(self.grad_zs[0][points], 2 * self.rows)


# --- the renderer -----------------------------------------------------------------------------------------------------

class Rendering:
    """The renderer for N rows of its joined inputs, and the backward pass."""

    def __init__(self, device: Device, sizes: Sequence[Tuple[int, int]], rows: int):
        self.device, self.rows, self.weights = device, rows, Weights(device, sizes)
        net = self.weights
        self.inputs, self.grad_zs = net.buffers(rows, IN), net.buffers(rows, OUT)
        z, back = cupy.empty((2, rows, net.pitch), np.float32)
        self.z, self.back = net.per_layer(z, OUT), net.per_layer(back, IN)
        self.rgb = cupy.empty((rows, net.outputs), np.float32)
        self.graph = None

    def rendering_forward(self, h: Pointer, rgb: Pointer) -> None:
        """Compute rgb (N, 3) of h (N, in)."""
        net, columns = self.weights, self.weights.columns
        self.graph = self.graph or self.device.recorded(self.forward_block)
        self.device.start("copy_rows", self.rows, columns, h, columns, self.inputs[0], net.pitch, 0, columns)
        self.graph.launch(cupy.cuda.Stream.null)
        copy(rgb, self.rgb.data.ptr, self.rgb.nbytes)

    def forward_block(self) -> None:
        net, (start, product) = self.weights, (self.device.start, self.device.product)
        for layer, (_, outputs) in enumerate(net.sizes):
            product(self.inputs[layer], net.w[layer], self.z[layer])
            if layer < net.count - 1:
                start("relu", self.rows, outputs, self.z[layer], net.b[layer], self.inputs[layer + 1], outputs,
                      net.pitch)
        start("find_rgb", self.rows, net.outputs, self.z[-1], net.b[-1], self.rgb, net.outputs, net.pitch)

    def carry_colors_back(self, grad_rgb: cupy.ndarray) -> None:
        """Carry the gradient with respect to rgb back to that of the inputs, back[0], and of the folded weights."""
        net = self.weights
        self.device.start("rgb_backward", self.rows, net.outputs, self.rgb, grad_rgb, self.grad_zs[-1], net.outputs,
                          net.pitch)
        for layer in range(net.count - 1, -1, -1):
            h, grad_z, back = self.inputs[layer], self.grad_zs[layer], self.back[layer]
            self.device.product(h.T, grad_z, net.grad_w[layer])
            self.device.product(grad_z, net.w[layer].T, back)
            if layer:
                columns = h.shape[1]
                self.device.start("relu_backward", self.rows, columns, back, h, self.grad_zs[layer - 1], columns,
                                  net.pitch)
        net.sum_rows(self.grad_zs[0], self.rows)


# --- a training step --------------------------------------------------------------------------------------------------

class Inputs(NamedTuple):
    """What a step needs: cpu_kernels.StepRows, with S = R, and the numbers of LossTerms that change or scale."""
    terms: np.ndarray           # (3,), the weights of the mask and the eikonal loss, and alpha
    points: np.ndarray          # (N, 3)
    object_mask: np.ndarray     # (R,)
    mask_weights: np.ndarray    # (R,)
    directions: np.ndarray      # (R, 3)
    rgb: np.ndarray             # (R, 3)
    color_weights: np.ndarray   # (R,)

    @classmethod
    def of(cls, flat, rows: int, rays: int) -> "Inputs":
        """Return the parts of a flat array of `size` floats, as views."""
        shapes = (3,), (rows, 3), (rays,), (rays,), (rays, 3), (rays, 3), (rays,)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        return cls(*(flat[end - int(np.prod(shape)):end].reshape(shape) for shape, end in zip(shapes, ends)))

    @staticmethod
    def size(rows: int, rays: int) -> int:
        return 3 + 3 * rows + 9 * rays


class Step:
    """Both networks at N points, the losses over R rays and all gradients, as cpu_kernels' step: one graph for each
    number of hits.

    sizes: of both networks; used: the columns of the renderer's OPTIONAL_INPUTS, as architecture.used_columns. host:
    the Inputs to fill before start().
    """

    def __init__(self, device: Device, sizes: Sequence[Sequence[Tuple[int, int]]], rows: int, rays: int,
                 used: Tuple[int, int, int]):
        self.device, self.rays, self.rendering_sizes, self.used = device, rays, sizes[1], used
        self.evaluation = Evaluation(device, sizes[0], rows)
        self.evaluation.reserve_backward()
        size = Inputs.size(rows, rays)
        self.locked, self.given = page_locked((size,)), cupy.empty(size, np.float32)
        self.host, self.inputs = Inputs.of(self.locked, rows, rays), Inputs.of(self.given, rows, rays)
        self.evaluation.x = self.inputs.points
        self.renderings: Dict[int, Rendering] = {}
        self.graphs = {}
        self.parts, self.sdf = cupy.zeros((rows, 3), np.float32), cupy.empty(rows, np.float32)
        self.grad_rgb, self.grad_directions = cupy.empty((2, rays, 3), np.float32)
        self.sums, self.host_sums = cupy.empty(3, np.float64), page_locked((3,), np.float64)
        hits, hit_normals = cupy.empty((2, rays, 3), np.float32)
        self.gradients = Gradients(cupy.empty(rows, np.float32), cupy.empty((rows, 3), np.float32), hits, hit_normals,
                                   cupy.empty((rays, sizes[0][-1][OUT] - 1), np.float32), self.inputs.directions)

    def rendering(self, num_hits: int) -> Rendering:
        """Return the renderer's passes for so many hits. All have the same weights."""
        if num_hits not in self.renderings:
            passes = Rendering(self.device, self.rendering_sizes, num_hits)
            passes.weights = next(iter(self.renderings.values()), passes).weights
            self.renderings[num_hits] = passes
        return self.renderings[num_hits]

    def start(self, num_hits: int, least_slope: float) -> None:
        """Start a step with the weights that have been folded; least_slope: of architecture.inverse_slope."""
        key = num_hits, least_slope
        if key not in self.graphs:
            self.graphs[key] = self.device.recorded(lambda: self.block(num_hits, least_slope))
        copy(self.given.data.ptr, self.locked.ctypes.data, self.locked.nbytes)
        self.graphs[key].launch(cupy.cuda.Stream.null)
        copy(self.host_sums.ctypes.data, self.sums.data.ptr, self.sums.nbytes)

    def block(self, num_hits: int, least_slope: float) -> None:
        """Start all passes of a step of which the first `num_hits` points may be hits."""
        net, start, given, rgb = self.evaluation, self.device.start, self.inputs, self.parts
        output, pitch, used = (net.z[-1], net.weights.b[-1]), net.weights.pitch, self.used
        net.forward_block()
        if num_hits:
            passes = self.rendering(num_hits)
            columns, rgb = passes.weights.columns, passes.rgb
            start("join_inputs", num_hits, columns, given.points, given.directions, net.normals, *output, *used,
                  passes.inputs[0], columns, pitch, passes.weights.pitch)
            passes.forward_block()
        start("find_losses", net.rows, 1, *given, net.normals, *output, rgb, self.sdf, *self.gradients[:2],
              self.grad_rgb, self.parts, self.rays, num_hits, net.rows, pitch)
        start("sum_losses", 1, 1, self.parts, self.sums, net.rows)
        if num_hits:
            passes.carry_colors_back(self.grad_rgb)
            start("split_inputs", num_hits, max(net.weights.outputs - 1, 3), passes.back[0], given.directions, *used,
                  *self.gradients[2:5], self.grad_directions, net.weights.outputs - 1, passes.weights.pitch)
        net.carry_gradients_back(self.gradients, num_hits, least_slope)
