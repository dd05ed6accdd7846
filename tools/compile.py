"""Compile what Numba compiles when it is first called (some 15 s), so that the first training need not.

What is compiled is kept in __pycache__ until its source changes, and compiled anew then.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nnabla.solvers as S  # noqa: E402

import network  # noqa: E402
import ray_tracer  # noqa: E402
from backends import context
from training import step

context.set_context("cpu", "0")
rng, rays = np.random.default_rng(0), 16
network.initialize(64, 4, 6, 0.6, rng)
sdf, step, solver = network.sdf_evaluator(), step.TrainingStep(rays, 100.0, 0.1), S.Adam()
tracer = SimpleNamespace(tolerance=5e-5, samples=16, refinement="secant", refinement_steps=4)
origin, mask = np.array([0.0, 0.0, -2.5], np.float32), np.arange(rays) % 2 == 0
directions = np.float32([0, 0, 1]) + 0.3 * rng.uniform(-1, 1, (rays, 3)).astype(np.float32)
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
ray_tracer.trace(sdf, origin, directions)
points, hits = step.place_points(sdf, origin, directions, mask, tracer, rng)
step(solver, points, hits, directions, directions, mask, np.ones(rays), 50.0, rng)
