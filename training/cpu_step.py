"""A training step on a CPU, compiled as one: each core takes its rays from the search to the weights' gradients.

The rays are cut into blocks, each with its share of the eikonal loss's uniform points. So the cores are handed work
once per step. A block's arrays stay in its core's cache.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

import network
import ray_tracer
from backends import cpu, cpu_kernels
from backends.architecture import used_columns
from backends.cpu_kernels import Block, LossTerms, Networks, Split, StepRows, Weights
from config.settings import Tracer
from datasets import Batch
from ray_tracer import Chords, Refinement
from tracing.compiling import compiled, inlined, plain
from tracing.sdf_grid import SdfGrid
from training.search import Found, Known, search, take_in


class StepRays(NamedTuple):
    """The rays of a step, and the uniform points."""
    chords: Chords          # of R rays, in the batch's order; length 0 where they miss the sphere
    rgb: np.ndarray         # (R, 3) float32
    weights: np.ndarray     # (R,) float32
    uniform: np.ndarray     # (R / 2, 3) float32


class StepResults(NamedTuple):
    """What a step finds, in the batch's order. Each block writes its own part."""
    points: np.ndarray          # (R, 3) float32, that carry the losses; given if they are not searched
    hit: np.ndarray             # (R,) bool, whether they are hits in the mask; the same
    uniform_sdf: np.ndarray     # (R / 2,) float32
    sums: np.ndarray            # (blocks, 3) float64, shares of the colour, mask and eikonal loss
    grad_rays: Tuple[np.ndarray, np.ndarray]    # (R, 3) each, the losses' gradients with respect to the points and the
                                                # directions; empty if they are not wanted
    grad_packed: Tuple[np.ndarray, np.ndarray]  # (blocks, P) each, shares of the gradients of both networks


class CompiledStep:
    """The steps of a training, on the parameters of both networks.

    without: which of OPTIONAL_INPUTS the renderer was built without. want_grad_rays: for trained cameras.
    """

    def __init__(self, without: Sequence[str], want_grad_rays: bool):
        self.weights = [cpu.PackedWeights(network.layer_parameters(name)) for name in network.NETWORKS]
        self.inputs = used_columns(without, *(weights.sizes for weights in self.weights))
        self.want_grad_rays = want_grad_rays

    def take(self, rays: StepRays, terms: LossTerms, placed: Optional[Tuple[np.ndarray, np.ndarray]] = None,
             grid_search: Optional[Tuple[SdfGrid, Known]] = None) -> StepResults:
        """Add the gradients of the losses' weighted sum to those of the parameters.

        placed: points and hit of StepResults; or grid_search: how to search them, and the grid that hears what is
        evaluated.
        """
        nets, width = Networks(*(weights.fold() for weights in self.weights), self.inputs), self.weights[0].sizes[-1, 0]
        split = cpu_kernels.split_rows(len(rays.rgb), width, len(rays.uniform))
        results = self.new_results(rays, split.blocks, placed)
        grid, known = grid_search or (None, NOTHING_KNOWN)
        found = [None] * split.blocks

        arguments = plain((split, rays.chords[:3], (*rays.chords[3:], rays.rgb, rays.weights), rays.uniform,
                           known[:3], known.how, *nets, terms, results[:4], results[4:]))

        def step_part(number, split):
            found[number] = take_block(number, *arguments)

        cpu_kernels.on_all_cores(step_part, split)
        if grid:
            take_in(grid, found, known.how.tolerance)
        num_networks = 2 if results.hit.any() else 1        # without a hit, the renderer has no gradient
        for weights, gradient in list(zip(self.weights, results.grad_packed))[:num_networks]:
            weights.backward(gradient)
        return results

    def new_results(self, rays: StepRays, blocks: int, placed: Optional[Tuple[np.ndarray, np.ndarray]]) -> StepResults:
        """Return results to write to."""
        (count, f), wanted = (len(rays.rgb), np.float32), len(rays.rgb) if self.want_grad_rays else 0
        points, hit = placed or (np.empty((count, 3), f), np.empty(count, bool))
        # One type and memory order. With another signature of take_block in the process, Numba gave wrong results.
        points, hit = np.ascontiguousarray(points, f), np.ascontiguousarray(hit, bool)
        grad_rays = np.zeros((wanted, 3), f), np.zeros((wanted, 3), f)
        grad_packed = tuple(np.empty((blocks, len(weights.packed)), f) for weights in self.weights)
        return StepResults(points, hit, np.empty(len(rays.uniform), f), np.empty((blocks, 3)), grad_rays, grad_packed)


NOTHING_KNOWN = Known(np.empty((0, 0, 0), np.float32), np.zeros((1, 1), np.float32), np.empty(0, np.float32),
                      Refinement(True, 0, 0.0))


def step_rays(batch: Batch, uniform: np.ndarray, searched: bool) -> StepRays:
    """Return the StepRays of a batch; searched: whether their points are to be searched, which needs their chords."""
    directions, mask, rgb, weights = (np.ascontiguousarray(array, kind) for array, kind in (
        (batch.directions, np.float32), (batch.mask, bool), (batch.rgb, np.float32), (batch.weights, np.float32)))
    if searched:
        origins = np.ascontiguousarray(np.broadcast_to(batch.origins, directions.shape), np.float32)
        near, far, _ = ray_tracer.intersect_unit_sphere(origins, directions)
    else:
        origins, near, far = directions, *np.zeros((2, len(directions)), np.float32)
    return StepRays(Chords(origins, directions, mask, near, far - near), rgb, weights, uniform)


def known_of(grid: SdfGrid, tracer: Tracer, rng: np.random.Generator) -> Known:
    """Return what the search of a step goes by; the samples lie as those of ray_tracer.hit_or_least_sdf."""
    return Known(grid.values, grid.margins, ray_tracer.sample_fractions(tracer.samples, rng),
                 Refinement(tracer.refinement == "secant", tracer.refinement_steps, tracer.tolerance))


# --- a block ----------------------------------------------------------------------------------------------------------

@compiled
def take_block(number, split, lines, rays, uniform, known, how, implicit, rendering, inputs, terms, found,
               gradients) -> Found:
    """Do step_block. The arguments are its own, as `plain` makes them, and cut where they have many arrays."""
    return step_block(number, Split(*split), StepRays(Chords(*lines, *rays[:2]), *rays[2:], uniform),
                      Known(*known, Refinement(*how)),
                      Networks(Weights(*implicit), Weights(*rendering), inputs), LossTerms(*terms),
                      StepResults(*found, *gradients))


@inlined
def step_block(number: int, split: Split, rays: StepRays, known: Known, nets: Networks, terms: LossTerms,
               results: StepResults) -> Found:
    """Take one block of a step, and write to results. Returns the Found of the search."""
    block = cpu_kernels.block_of(split, number)
    found = search_block(block, rays.chords, known, nets.implicit, results)
    order, num_hits = hits_first(block, results.hit)
    rows = rows_of(block, rays, (order, num_hits), results.points, np.float32(terms.missed))
    values = cpu_kernels.step_forward(rows, nets, terms, results.sums[number])
    grad_points, grad_directions = results.grad_rays
    own_directions = np.empty((num_hits if len(grad_directions) else 0, 3), np.float32)
    cpu_kernels.step_backward(nets, values, own_directions,
                              (results.grad_packed[0][number], results.grad_packed[1][number]))
    results.uniform_sdf[block.first_other:block.first_other + block.others] = values.output[block.rows:, 0]
    if len(grad_points):
        own_points = cpu_kernels.grad_points(values)
        for row in range(block.rows):
            grad_points[order[row]] = own_points[row]
        for row in range(num_hits):
            grad_directions[order[row]] = own_directions[row]
    return found


@inlined
def search_block(block: Block, chords: Chords, known: Known, net: Weights, results: StepResults) -> Found:
    """Search a block's rays, if the samples have places, and write their points. Returns the Found."""
    own = slice(block.first, block.first + block.rows)
    met = block.first + np.flatnonzero(chords.length[own] > np.float32(0))
    t, hit, found = search(Chords(chords.origins[met], chords.directions[met], chords.want_hit[met], chords.near[met],
                                  chords.length[met]), known, net)
    if len(known.fractions):
        distances = chords.near[own].copy()     # of a ray that misses the sphere, its nearest point already
        distances[met - block.first], results.hit[own] = t, False
        results.hit[met] = hit
        for i in range(block.rows):
            for c in range(3):
                ray = block.first + i
                results.points[ray, c] = chords.origins[ray, c] + distances[i] * chords.directions[ray, c]
    return found


@inlined
def hits_first(block: Block, hit: np.ndarray) -> Tuple[np.ndarray, int]:
    """Return the numbers of a block's rays, those with a hit first, and how many these are."""
    order, count = np.empty(block.rows, np.int64), 0
    for wanted in (True, False):
        for ray in range(block.first, block.first + block.rows):
            if hit[ray] == wanted:
                order[count] = ray
                count += 1
    return order, np.sum(hit[block.first:block.first + block.rows])


@inlined
def rows_of(block: Block, rays: StepRays, order: Tuple[np.ndarray, int], points: np.ndarray,
            missed: np.float32) -> StepRows:
    """Return a block's StepRows; order: what hits_first gives; missed: of LossTerms."""
    order, hits = order
    first, mask = order[:hits], rays.chords.want_hit[order]
    x = np.empty((block.rows + block.others, 3), np.float32)
    x[:block.rows], x[block.rows:] = points[order], rays.uniform[block.first_other:block.first_other + block.others]
    mask_weights = rays.weights[order]
    for row in range(block.rows):
        if row < hits:
            mask_weights[row] = 0.0
        elif mask[row]:
            mask_weights[row] *= missed
    return StepRows(x, rays.chords.directions[first], rays.rgb[first], rays.weights[first], mask.astype(np.float32),
                    mask_weights)
