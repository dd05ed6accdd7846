"""One step of the optimisation: a point for each ray, the losses at these points, and their gradients (section 3)."""
from functools import partial
from typing import NamedTuple, Optional, Tuple

import nnabla as nn
import nnabla.functions as F
import nnabla.solvers as S
import numpy as np

import datasets
import network
import ray_tracer
from backends import context, cpu
from backends.architecture import LEAST_SLOPE
from backends.cpu_kernels import LossTerms, StepRows
from backends.gpu import constant, row_sums
from config.settings import Network, Tracer, Train
from tracing.sdf_grid import SdfGrid
from training.search import CompiledSearch

LOSSES = ("loss", "color", "mask", "eikonal")       # the total first


class Placed(NamedTuple):
    """Where each ray of a batch carries its loss."""
    points: np.ndarray          # (R, 3) float32: the hit in the object mask, else the sample of least sdf
    hit_in_mask: np.ndarray     # (R,) bool: whether it is a hit; only these rays have a colour


class LossSettings(NamedTuple):
    """What a configuration says of the losses."""
    mask: float             # weights of the losses
    eikonal: float
    missed: float = 1.0     # in the mask loss, of a ray in the object mask that misses; one outside the mask has 1
    least_slope: float = LEAST_SLOPE    # of architecture.inverse_slope, in the differentiable hit

    @classmethod
    def of(cls, train: Train) -> "LossSettings":
        """Return the settings of a configuration's section."""
        return cls(train.mask_weight, train.eikonal_weight, train.missed_weight, train.least_slope)


def place_points(sdf, batch: datasets.Batch, tracer: Tracer, rng, grid: Optional[SdfGrid] = None) -> Placed:
    """Find the point of each ray that carries its loss.

    sdf: what network.sdf_evaluator gives; tracer: the configuration's section, whose sphere tracing is for renders
    alone; rng: of the samples' places; grid: what is known of the sdf. It hears all values, and learns nothing yet.
    """
    settings = {name: value for name, value in vars(tracer).items() if name != "sphere_tracing_steps"}
    search, heard = None, sdf
    if grid and isinstance(sdf, cpu.Sdf):
        search = CompiledSearch(grid, sdf.folded)
    elif grid and sdf.search:
        search = partial(sdf.search, grid=grid)
    elif grid:
        heard = grid.listening(sdf)
    t, hit_in_mask = ray_tracer.hit_or_least_sdf(heard, batch.origins, batch.directions, batch.mask, grid=grid,
                                                 half_precision_sdf=sdf.half_precision, search=search, rng=rng,
                                                 **settings)
    return Placed(batch.origins + t[:, None] * batch.directions, hit_in_mask)


# --- the losses -------------------------------------------------------------------------------------------------------

def weighted_sum(weights, x):
    """Return the weighted sum of the rows of x (N, C), (1, C); weights: (1, N), a Variable.

    It is a matrix product: nnabla's reductions fail on Hopper GPUs.
    """
    return F.affine(weights, x)


def color_loss(rgb, rgb_true, weights, num_rays):
    """Return (1 / num_rays) sum of |rgb - rgb_true|_1 over the rows, weighted by weights (1, N) (equation 6)."""
    return row_sums(weighted_sum(weights, F.absolute_error(rgb, rgb_true))) * (1.0 / num_rays)


def mask_loss(sdf, object_mask, weights, alpha, num_rays):
    """Return (1 / (alpha num_rays)) sum of CE(object_mask, sigmoid(-alpha sdf)) over the rows, weighted (equation 7).

    sdf, object_mask: (N, 1); weights: (1, N); alpha: (1, 1) Variable.
    """
    return weighted_sum(weights, F.sigmoid_cross_entropy(sdf * alpha * -1.0, object_mask)) / alpha * (1.0 / num_rays)


def eikonal_loss(normal):
    """Return the mean of (|normal| - 1)^2 over the rows of the sdf's gradient, normal (N, 3) (equation 8)."""
    error = (row_sums(normal * normal) + 1e-12) ** 0.5 - 1.0        # a root has no derivative at 0
    return weighted_sum(constant(np.full((1, normal.shape[0]), 1.0 / normal.shape[0])), error * error)


class TrainingGraph:
    """The losses of one step over num_rays rays, of which the first num_surface may hit the surface in their mask.

    Inputs: points (num_rays + num_rays // 2, 3), the rays' points and then the uniform ones; directions and rgb
    (num_surface, 3); color_weights (1, num_surface), 0 for a ray without a hit in its mask; object_mask (num_rays, 1)
    and mask_weights (1, num_rays), 0 for a ray with a hit; alpha (1, 1). forward() computes `losses`, a Variable for
    each name of LOSSES; backward() adds the total's gradient to those of the parameters.

    On a GPU it is a graph of nnabla's functions. On the CPU, compiled functions do the same, losses included: nnabla
    takes longer to call its functions than they take.
    """

    def __init__(self, without, settings: LossSettings, num_rays, num_surface, want_grad_rays=False):
        self.num_rays, self.settings = num_rays, settings
        self.points = nn.Variable((num_rays + num_rays // 2, 3))
        self.directions, self.rgb = nn.Variable((num_surface, 3)), nn.Variable((num_surface, 3))
        self.color_weights, self.alpha = nn.Variable((1, num_surface)), nn.Variable((1, 1))
        self.object_mask, self.mask_weights = nn.Variable((num_rays, 1)), nn.Variable((1, num_rays))
        self.directions.need_grad = want_grad_rays
        if network.on_cpu():
            self.compiled = cpu.StepEvaluation([network.layer_parameters(name) for name in network.NETWORKS], without)
            self.losses = {name: nn.Variable(()) for name in LOSSES}
        else:
            self.compiled = None
            self.build(without, want_grad_rays)

    def build(self, without, want_grad_rays):
        """Build nnabla's graph."""
        settings, num_rays, num_surface = self.settings, self.num_rays, self.directions.shape[0]
        self.surface = surface = network.surface_evaluation(self.points, self.directions, want_grad_rays,
                                                            settings.least_slope)
        mask = mask_loss(surface.sdf[:num_rays], self.object_mask, self.mask_weights, self.alpha, num_rays)
        eikonal, color = eikonal_loss(surface.normal), constant([[0.0]])
        if num_surface:
            rgb = network.rendering(surface.hit, surface.hit_normal, self.directions * -1.0, surface.hit_feature,
                                    network.folded_weights("rendering"), without)
            color = color_loss(rgb, self.rgb, self.color_weights, num_rays)
        self.total = color + mask * settings.mask + eikonal * settings.eikonal
        parts = self.total, color, mask, eikonal
        for part in parts:
            part.persistent = True
        self.losses = {name: part.reshape((), unlink=True) for name, part in zip(LOSSES, parts)}

    def forward(self):
        if self.compiled:
            self.forward_compiled()
        else:
            self.surface.forward()
            self.total.forward(clear_no_need_grad=True)

    def forward_compiled(self):
        settings, rows = self.settings, StepRows(
            self.points.d, self.directions.d, self.rgb.d, self.color_weights.d[0], self.object_mask.d[:, 0],
            self.mask_weights.d[0])
        terms = LossTerms(settings.mask, settings.eikonal, float(self.alpha.d[0, 0]), settings.least_slope)
        color, mask, eikonal = self.compiled.forward(rows, terms)
        total = color + mask * settings.mask + eikonal * settings.eikonal
        for name, value in zip(LOSSES, (total, color, mask, eikonal)):
            self.losses[name].d = value

    def backward(self):
        if self.compiled:
            self.compiled.backward(self.directions.need_grad)
            return
        if self.directions.need_grad:
            self.directions.grad.zero()     # nnabla adds to an input's gradient
        self.total.backward(clear_buffer=True)
        self.surface.backward()

    def sdf(self) -> np.ndarray:
        """Return the sdf (num_rays + num_rays // 2,) at the points, after forward()."""
        return self.compiled.sdf if self.compiled else self.surface.sdf.d[:, 0]

    def grad_rays(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the loss's gradients with respect to the rays' points (R, 3) and the directions (num_surface, 3).

        Only with want_grad_rays, after backward(). The eikonal loss has no part in them, and the distance along a ray
        is held constant.
        """
        if self.compiled:
            return self.compiled.grad_points()[:self.num_rays], self.compiled.grad_directions
        return self.surface.grad_points()[:self.num_rays], self.directions.g.copy()


# --- a step -----------------------------------------------------------------------------------------------------------

class TrainingStep:
    """The gradients of one step, on graphs that are kept: one for each of a few numbers of surface rays."""

    SIZES = 8

    def __init__(self, without, settings: LossSettings, num_rays, want_grad_rays=False):
        self.graph_settings = without, settings, num_rays
        self.num_rays, self.want_grad_rays, self.missed_weight = num_rays, want_grad_rays, settings.missed
        self.graphs, self.latest = {}, None

    def graph(self, num_hits) -> TrainingGraph:
        """Return the graph for at least that many surface rays; few sizes, so that few graphs are built."""
        grain = -(-self.num_rays // self.SIZES)
        num_surface = min(-(-num_hits // grain) * grain, self.num_rays)
        if num_surface not in self.graphs:
            self.graphs[num_surface] = TrainingGraph(*self.graph_settings, num_surface, self.want_grad_rays)
        return self.graphs[num_surface]

    def fill(self, batch, placed: Placed, alpha, rng) -> TrainingGraph:
        """Return the graph of a step with its inputs set; rng: of the eikonal loss's uniform points."""
        graph = self.graph(placed.hit_in_mask.sum())
        num_surface = graph.directions.shape[0]
        order = np.argsort(~placed.hit_in_mask, kind="stable")       # the rays with a colour first
        color_weights = np.where(placed.hit_in_mask, batch.weights, 0.0)[order].astype(np.float32)
        mask_weights = batch.weights[order].astype(np.float32) - color_weights
        mask_weights[batch.mask[order]] *= self.missed_weight
        uniform = rng.uniform(-1.0, 1.0, (self.num_rays // 2, 3)).astype(np.float32)
        graph.points.d = np.concatenate([placed.points[order], uniform])
        if num_surface:
            graph.directions.d, graph.rgb.d = batch.directions[order[:num_surface]], batch.rgb[order[:num_surface]]
            graph.color_weights.d = color_weights[None, :num_surface]
        graph.object_mask.d = batch.mask[order, None].astype(np.float32)        # nnabla's GPU has no bool
        graph.mask_weights.d = mask_weights[None]
        graph.alpha.d = alpha
        self.latest = graph, order
        return graph

    def compute_gradients(self, solver, batch, placed: Placed, alpha, rng) -> dict:
        """Compute the gradients that solver.update() takes; returns {name of a loss: Variable}.

        On a GPU this only hands over the work; reading a loss waits for it.
        """
        graph = self.fill(batch, placed, alpha, rng)
        solver.zero_grad()
        graph.forward()
        graph.backward()
        return graph.losses

    def uniform_points(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the eikonal loss's uniform points (R / 2, 3) and the sdf there (R / 2,), after compute_gradients."""
        graph, _ = self.latest
        return graph.points.d[self.num_rays:], graph.sdf()[self.num_rays:]

    def grad_rays(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the loss's gradients with respect to the batch's points and directions, (R, 3) float32 each.

        They are those of TrainingGraph.grad_rays, in the batch's order, after compute_gradients.
        """
        graph, order = self.latest
        grad_points, grad_directions = np.zeros((2, self.num_rays, 3), np.float32)
        found_points, found_directions = graph.grad_rays()
        grad_points[order], grad_directions[order[:len(found_directions)]] = found_points, found_directions
        return grad_points, grad_directions


def compile_functions():
    """Take one tiny step on the CPU, so that Numba compiles and caches all that a training calls (some 30 s)."""
    context.set_context("cpu", "0")
    rng, num_rays, net = np.random.default_rng(0), 16, Network(width=64, feature=4, layers=6)
    network.initialize(net, rng)
    sdf = network.sdf_evaluator()
    origin = np.tile(np.float32([0, 0, -2.5]), (num_rays, 1))
    directions = 0.3 * rng.random((num_rays, 3), np.float32) + np.float32([0, 0, 1])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mask, weights = np.arange(num_rays) % 2 == 0, np.ones(num_rays, np.float32)
    batch = datasets.Batch(np.zeros(1, np.int64), origin, directions, directions, mask, weights)
    datasets.Strata.of(datasets.mask_regions(mask.reshape(4, 4)), 0.5).draw(num_rays, rng)
    ray_tracer.trace(sdf, origin, directions)
    grid = SdfGrid.of(sdf, 8)
    placed = place_points(sdf, batch, Tracer(samples=16), rng, grid)
    grid.learn_heard()
    place_points(sdf, batch, Tracer(samples=16), rng)
    TrainingStep(net.without, LossSettings(100.0, 0.1), num_rays).compute_gradients(S.Adam(), batch, placed, 50.0, rng)
