"""One step of the optimisation: a point for each ray, the losses at these points, and their gradients (section 3)."""
from concurrent.futures import Future
from functools import partial
from typing import Callable, NamedTuple, Optional, Tuple, Union

import nnabla as nn
import nnabla.functions as F
import nnabla.solvers as S
import numpy as np

import datasets
import network
import ray_tracer
from backends import context, cpu, gpu
from backends.architecture import LEAST_SLOPE
from backends.cpu_kernels import LossTerms, StepRows
from backends.gpu import constant, row_sums
from config.settings import Network, Tracer, Train
from tracing.sdf_grid import SdfGrid
from training import cpu_step
from training.search import CompiledSearch

LOSSES = ("loss", "color", "mask", "eikonal")       # the total first


class Placed(NamedTuple):
    """Where each ray of a batch carries its loss."""
    points: np.ndarray          # (R, 3) float32: the hit in the object mask, else the sample of least sdf
    hit_in_mask: np.ndarray     # (R,) bool: whether it is a hit; only these rays have a colour


class PointSearch(NamedTuple):
    """How the points of a step are searched: the arguments of place_points."""
    sdf: Union[cpu.Sdf, gpu.Sdf]    # what network.sdf_evaluator gives
    tracer: Tracer                  # the configuration's section
    grid: Optional[SdfGrid] = None  # what is known of the sdf


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


def beside_the_update() -> Callable[[Callable], Future]:
    """Return what starts a function of no arguments, while the networks are updated.

    On a CPU the function runs in a second thread. With a GPU it runs at once, as the GPU is still at work.
    """
    return ray_tracer.second_thread().submit if network.on_cpu() else at_once


def at_once(function: Callable) -> Future:
    """Call a function of no arguments. Return its result as that of a thread."""
    done = Future()
    done.set_result(function())
    return done


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

    set() takes the inputs, forward() computes the losses, backward() adds the gradient of their weighted sum to those
    of the parameters.

    It is a graph of nnabla's functions, for a GPU without CuPy: nnabla takes longer to call its functions than they
    take. Elsewhere kernels do the same: cpu_step.py's, or cuda.StepEvaluation's.
    """

    def __init__(self, without, settings: LossSettings, num_rays, num_surface, want_grad_rays=False):
        self.num_rays = num_rays
        self.points = nn.Variable((num_rays + num_rays // 2, 3))
        self.directions, self.rgb = nn.Variable((num_surface, 3)), nn.Variable((num_surface, 3))
        self.color_weights, self.alpha = nn.Variable((1, num_surface)), nn.Variable((1, 1))
        self.object_mask, self.mask_weights = nn.Variable((num_rays, 1)), nn.Variable((1, num_rays))
        self.directions.need_grad = want_grad_rays
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
        self.parts = [part.reshape((), unlink=True) for part in parts]

    def set(self, rows: StepRows, weights: Tuple[float, float], alpha: float):
        """Set the inputs; weights, of the losses, are those of the graph already."""
        self.points.d, self.object_mask.d = rows.points, rows.object_mask[:, None]
        self.mask_weights.d, self.alpha.d = rows.mask_weights[None], alpha
        if len(rows.directions):
            self.directions.d, self.rgb.d, self.color_weights.d = rows.directions, rows.rgb, rows.color_weights[None]

    def losses(self):
        """Return the weighted sum of the losses and each of them, Variables."""
        return self.parts

    def forward(self):
        self.surface.forward()
        self.total.forward(clear_no_need_grad=True)

    def backward(self):
        if self.directions.need_grad:
            self.directions.grad.zero()     # nnabla adds to an input's gradient
        self.total.backward(clear_buffer=True)
        self.surface.backward()

    def grad_rays(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the loss's gradients with respect to the rays' points (R, 3) and the directions (num_surface, 3).

        Only with want_grad_rays, after backward(). The eikonal loss has no part in them, and the distance along a ray
        is held constant.
        """
        return self.surface.grad_points()[:self.num_rays], self.directions.g.copy()


# --- a step -----------------------------------------------------------------------------------------------------------

class TrainingStep:
    """The gradients of one step, by the kernels of the CPU or a GPU, or on graphs of nnabla's functions that are kept,
    one for each of a few numbers of surface rays."""

    SIZES = 8

    def __init__(self, without, settings: LossSettings, num_rays, want_grad_rays=False):
        self.without, self.settings, self.num_rays, self.want_grad_rays = without, settings, num_rays, want_grad_rays
        self.graphs, self.latest, self.compiled = {}, None, None
        if network.on_cpu():
            self.compiled = cpu_step.CompiledStep(without, want_grad_rays)
            self.losses = {name: nn.Variable(()) for name in LOSSES}

    def take(self, solver, search: PointSearch, batch, alpha, rng) -> Tuple[Placed, dict]:
        """Find the points of a batch with the current parameters, and compute the gradients that solver.update() takes.

        rng: of the samples' places and the uniform points. Returns Placed, and losses as compute_gradients does. What
        is known of the sdf hears all values; it has learned nothing yet.
        """
        if self.compiled and search.grid:
            known = cpu_step.known_of(search.grid, search.tracer, rng)
            return self.take_compiled(solver, batch, alpha, rng, grid_search=(search.grid, known))
        search.sdf.refresh()
        placed = place_points(search.sdf, batch, search.tracer, rng, search.grid)
        return placed, self.compute_gradients(solver, batch, placed, alpha, rng)

    def compute_gradients(self, solver, batch, placed: Placed, alpha, rng) -> dict:
        """Compute the gradients that solver.update() takes; returns {name of a loss: what has its value in d}.

        On a GPU this only hands over the work; reading a loss waits for it.
        """
        if self.compiled:
            return self.take_compiled(solver, batch, alpha, rng, placed=placed)[1]
        uniform, order = self.draw_uniform(rng), np.argsort(~placed.hit_in_mask, kind="stable")
        rows = self.rows(batch, placed, order, uniform)
        graph = self.graph(len(rows.directions))
        graph.set(rows, self.settings[:2], alpha)
        solver.zero_grad()
        graph.forward()
        graph.backward()
        self.latest = graph, order
        return dict(zip(LOSSES, graph.losses()))

    def take_compiled(self, solver, batch, alpha, rng, **points) -> Tuple[Placed, dict]:
        """Take a step on the CPU; points: those of cpu_step.CompiledStep.take, or how to search them."""
        settings, uniform = self.settings, self.draw_uniform(rng)
        terms = LossTerms(*map(float, settings), float(alpha), self.num_rays, self.num_rays + len(uniform))
        solver.zero_grad()
        results = self.compiled.take(cpu_step.step_rays(batch, uniform, "grid_search" in points), terms, **points)
        color, mask, eikonal = results.sums.sum(axis=0)
        total = color + mask * settings.mask + eikonal * settings.eikonal
        self.latest = uniform, results
        for name, value in zip(LOSSES, (total, color, mask, eikonal)):
            self.losses[name].d = value
        return Placed(results.points, results.hit), self.losses

    def draw_uniform(self, rng):
        """Return the eikonal loss's uniform points (R / 2, 3) float32."""
        return rng.uniform(-1.0, 1.0, (self.num_rays // 2, 3)).astype(np.float32)

    def rows(self, batch, placed: Placed, order, uniform) -> StepRows:
        """Return the rows of a step; order (R,): the rays with a colour first. More rays than these may be hits, so
        that there are few numbers of them."""
        grain = -(-self.num_rays // self.SIZES)
        num_surface = min(-(-int(placed.hit_in_mask.sum()) // grain) * grain, self.num_rays)
        surface, mask = order[:num_surface], batch.mask[order]
        color_weights = np.where(placed.hit_in_mask, batch.weights, 0.0)[order].astype(np.float32)
        mask_weights = batch.weights[order].astype(np.float32) - color_weights
        mask_weights[mask] *= self.settings.missed
        return StepRows(np.concatenate([placed.points[order], uniform]), batch.directions[surface], batch.rgb[surface],
                        color_weights[:num_surface], mask.astype(np.float32), mask_weights)

    def graph(self, num_surface):
        """Return what computes a step with so many surface rays."""
        size = None if context.cuda else num_surface        # the kernels do any number
        if size not in self.graphs:
            self.graphs[size] = context.cuda.StepEvaluation(
                [network.layer_parameters(name) for name in network.NETWORKS], self.without, self.num_rays,
                self.settings.least_slope) if context.cuda else TrainingGraph(
                    self.without, self.settings, self.num_rays, num_surface, self.want_grad_rays)
        return self.graphs[size]

    def uniform_points(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the eikonal loss's uniform points (R / 2, 3) and the sdf there (R / 2,), after a step by kernels.

        They are arrays where the kernels run: of NumPy's, or of CuPy's.
        """
        return (self.latest[0], self.latest[1].uniform_sdf) if self.compiled else self.latest[0].uniform_points()

    def teach(self, grid: SdfGrid) -> None:
        """Let a grid learn what it has heard in the step's search, and the sdf at the uniform points."""
        grid.learn_heard()
        grid.learn(*self.uniform_points())

    def grad_rays(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return the loss's gradients with respect to the batch's points and directions, (R, 3) float32 each.

        They are those of TrainingGraph.grad_rays, in the batch's order, after compute_gradients.
        """
        if self.compiled:
            return self.latest[1].grad_rays
        graph, order = self.latest
        grad_points, grad_directions = np.zeros((2, self.num_rays, 3), np.float32)
        found_points, found_directions = graph.grad_rays()
        grad_points[order], grad_directions[order[:len(found_directions)]] = found_points, found_directions
        return grad_points, grad_directions


def compile_functions():
    """Take one tiny step on the CPU, so that Numba compiles and caches all that a training calls (70 s)."""
    context.set_context("cpu", "0")
    rng, num_rays, net = np.random.default_rng(0), 16, Network(width=64, feature=4, layers=6)
    network.initialize(net, rng)
    sdf = network.sdf_evaluator()
    origin = np.tile(np.float32([0, 0, -2.5]), (num_rays, 1))
    directions = 0.3 * rng.random((num_rays, 3), np.float32) + np.float32([0, 0, 1])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mask, weights = np.arange(num_rays) % 2 == 0, np.ones(num_rays, np.float32)
    batch = datasets.Batch(np.zeros(1, np.int64), origin, directions, directions, mask, weights)
    datasets.draw_from(*datasets.Strata.of(datasets.mask_regions(mask.reshape(4, 4)), 0.5), rng.random(num_rays + 1),
                       np.empty(num_rays, np.int64), weights.copy())
    ray_tracer.trace(sdf, origin, directions)
    grid = SdfGrid.of(sdf, 8)
    step = TrainingStep(net.without, LossSettings(100.0, 0.1), num_rays)
    placed, _ = step.take(S.Adam(), PointSearch(sdf, Tracer(samples=16), grid), batch, 50.0, rng)
    step.teach(grid)
    place_points(sdf, batch, Tracer(samples=16), rng)
