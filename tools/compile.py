"""Compile all Numba functions, by a tiny training step. It takes about 15 s, which the first training then saves.

Numba keeps the compiled code in __pycache__ until the source changes.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nnabla.solvers as S  # noqa: E402

import datasets  # noqa: E402
import network  # noqa: E402
import ray_tracer  # noqa: E402
from backends import context  # noqa: E402
from config.settings import Network, Tracer  # noqa: E402
from training.step import LossWeights, TrainingStep, place_points  # noqa: E402

context.set_context("cpu", "0")
rng, num_rays, net = np.random.default_rng(0), 16, Network(width=64, feature=4, layers=6)
network.initialize(net, rng)
sdf, step, solver = network.sdf_evaluator(), TrainingStep(net.without, LossWeights(100.0, 0.1), num_rays), S.Adam()
origin, mask = np.array([0.0, 0.0, -2.5], np.float32), np.arange(num_rays) % 2 == 0
directions = np.float32([0, 0, 1]) + 0.3 * rng.uniform(-1, 1, (num_rays, 3)).astype(np.float32)
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
batch = datasets.Batch(0, origin, directions, directions, mask, np.ones(num_rays, np.float32))
ray_tracer.trace(sdf, origin, directions)
step.compute_gradients(solver, batch, place_points(sdf, batch, Tracer(samples=16), rng), 50.0, rng)
