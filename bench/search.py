"""Train, and compare the search that remembers the sdf with one that evaluates every sample, at every 100th step.

    python bench/search.py --config config/demo.yaml
    python bench/search.py --config config/default.yaml --model-load-path model.h5 --steps 1000

Writes nothing but a table: of all compared steps since the last line, the share of rays whose hits differ, of common
hits that lie apart, and of least samples that differ; by how much the mask losses differ, of their sum; evaluations of
both.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import nnabla as nn
import nnabla.solvers as S
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets  # noqa: E402
import helper  # noqa: E402
import network  # noqa: E402
import ray_tracer  # noqa: E402
from backends import architecture, context  # noqa: E402
from config import settings  # noqa: E402
from train import remembered  # noqa: E402
from training import checkpoints, schedule  # noqa: E402
from training.step import LossSettings, Placed, TrainingStep, place_points  # noqa: E402

EVERY, LINES = 100, 10      # steps between comparisons; lines of the table


class Compared(NamedTuple):
    """How the answers of two searches for the same rays differ."""
    hits: float             # share of the rays of which one has a hit and the other has none
    distances: float        # share of the common hits that lie apart by more than 4 times the tolerance
    least: float            # share of the other rays whose points differ
    away: float             # absolute difference of the mask losses
    mask_loss: float        # that of the full search


def main():
    parser = helper.argument_parser("Compare the search that remembers the sdf with one that evaluates every sample, "
                                    "during a training.")
    parser.add_argument("--model-load-path", help="a trained model to go on from, instead of the initial sphere")
    parser.add_argument("--steps", type=int, help="instead of those of the configuration")
    args = parser.parse_args()
    conf = settings.load_config(args.config, args.changes)
    context.set_context(args.context, args.device_id)
    ray_tracer.STRIDES = (1,)       # the full search skips no sample
    network.initialize(conf.network, np.random.default_rng(conf.train.seed))
    if args.model_load_path:
        checkpoints.load_model(args.model_load_path, architecture.parameter_shapes(conf.network))
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    views = datasets.training_views(conf.data.held_out_views, len(scene.images), args.config)
    num_steps = args.steps or conf.train.steps
    print(f"{'step':>7}{'hits':>9}{'apart':>9}{'least':>9}{'mask loss':>11}{'evaluations':>13}{'of':>8}")
    found = []
    for step, compared in enumerate(compare(conf, scene, views, num_steps)):
        found += [compared] if compared else []
        if (step + 1) % max(num_steps // LINES, EVERY) == 0 and found:
            answers, evaluations, full = (np.mean(column, axis=0) for column in zip(*found))
            tqdm.write(f"{step + 1:7d}" + "".join(f"{value:9.3%}" for value in answers[:3])
                       + f"{answers[3] / max(answers[4], 1e-12):11.1e}{evaluations:13.0f}{full:8.0f}")
            found = []


def compare(conf, scene, views, num_steps):
    """Take training steps. Yield (Compared, evaluations, evaluations of the full search) at every 100th, else None."""
    train, counted, rng = conf.train, [], np.random.default_rng(0)
    solver = S.Adam(train.learning_rate, beta2=train.adam_beta2)
    solver.set_parameters(nn.get_parameters())
    sdf = network.sdf_evaluator()
    plain, grid = counting(sdf, counted), remembered(sdf, train.rays)
    if not grid:
        raise helper.UserError("on a GPU, a training remembers the sdf with CuPy alone; pip install -r "
                               "requirements-gpu.txt, or add --context cpu")
    taken = TrainingStep(conf.network.without, LossSettings.of(train), train.rays)
    draw = datasets.Draw(train.rays, train.seed, train.outline_fraction, train.views_per_step)
    batches = datasets.training_batches(scene, views, draw)
    for step in tqdm(range(num_steps), unit="step", dynamic_ncols=True, smoothing=0.05):
        batch, alpha = next(batches), schedule.alpha(train, step)
        solver.set_learning_rate(train.learning_rate * schedule.learning_rate_factor(train, step))
        sdf.refresh()
        counted.clear()
        compared, seed = None, (0, helper.SAMPLES, step)
        before = sum(sdf.search.evaluations.values()) if sdf.search else 0
        placed = place_points(sdf, batch, conf.tracer, helper.random_numbers(*seed), grid)
        if (step + 1) % EVERY == 0:
            evaluations = (sum(sdf.search.evaluations.values()) - before if sdf.search else
                           sum(len(points) for points, _ in grid.heard))
            full = place_points(plain, batch, conf.tracer, helper.random_numbers(*seed))
            compared = (difference(sdf, batch, alpha, placed, full, conf.tracer.tolerance), evaluations,
                        sum(counted))
        taken.compute_gradients(solver, batch, placed, alpha, rng)
        taken.teach(grid)
        solver.update()
        yield compared


def counting(sdf, counted):
    """Return an sdf as network.sdf_evaluator gives it, which appends the number of points of each call to `counted`."""
    def count(function):
        return function and (lambda points: (counted.append(len(points)), function(points))[1])

    counts = count(sdf)
    counts.half_precision, counts.search = count(sdf.half_precision), sdf.search
    return counts


def difference(sdf, batch, alpha, ours: Placed, full: Placed, tolerance) -> Compared:
    """Compare two answers of place_points."""
    both, neither = ours.hit_in_mask & full.hit_in_mask, ~ours.hit_in_mask & ~full.hit_in_mask
    apart = np.linalg.norm(ours.points - full.points, axis=1)
    losses = [mask_loss(sdf(placed.points), batch, placed.hit_in_mask, alpha) for placed in (ours, full)]
    return Compared(np.mean(ours.hit_in_mask != full.hit_in_mask), np.mean(apart[both] > 4 * tolerance),
                    np.mean(apart[neither] > 0), abs(losses[0] - losses[1]), losses[1])


def mask_loss(values, batch, hit_in_mask, alpha):
    """Return the mask loss without its constant factor, in double precision."""
    logits = -alpha * values.astype(np.float64)
    entropy = np.maximum(logits, 0) - logits * batch.mask + np.log1p(np.exp(-np.abs(logits)))
    return (entropy * batch.weights * ~hit_in_mask).sum()


if __name__ == "__main__":
    helper.run(main)
