"""The surface of a trained scene: the zero set of its sdf in the unit sphere, which closes it where it leaves it."""
from typing import Callable, NamedTuple, Optional, Tuple

import numpy as np

STEEPEST = 1e-2     # least squared slope that Newton's method divides by


def in_sphere(sdf: Callable) -> Callable:
    """Return the sdf of a shape's intersection with the unit sphere."""
    return lambda points: np.maximum(sdf(points), np.sqrt(np.einsum("nc,nc->n", points, points)) - 1)


def cut_by_sphere(vertices: np.ndarray, sdf: Callable) -> np.ndarray:
    """Return which vertices (V, 3) of a mesh lie on the unit sphere inside the shape that it cuts, (V,) bool."""
    height = np.sqrt(np.einsum("nc,nc->n", vertices, vertices)) - 1
    cut = height > -0.01        # a generous bound that saves most evaluations
    if cut.any():
        cut[cut] = sdf(vertices[cut].astype(np.float32)) < height[cut] - 1e-4
    return cut


class Surface(NamedTuple):
    """The surface and its colours, as callables on points (N, 3) float32."""
    sdf: Callable       # -> (N,) float32, of the network, positive outside
    shade: Callable     # -> rgb (N, 3) in [0, 1] and the sdf's gradient (N, 3), float32, as network.shader's

    def closed_sdf(self, points: np.ndarray) -> np.ndarray:
        """Return the sdf (N,) float32 of the shape that the unit sphere closes."""
        return in_sphere(self.sdf)(points).astype(np.float32)

    def colors_and_gradient(self, points: np.ndarray,
                            towards: Optional[np.ndarray] = None) -> Tuple[np.ndarray, np.ndarray]:
        """Return the colours (N, 3) in [0, 1] and closed_sdf's gradient (N, 3), float32.

        towards: (N, 3), unit directions to the eyes; without them the points are seen along their normals.
        """
        rgb, gradient = self.shade(points) if towards is None else self.shade(points, -towards)
        cut = cut_by_sphere(points, self.sdf)
        gradient[cut] = points[cut] / np.linalg.norm(points[cut], axis=1, keepdims=True)
        return np.clip(rgb, 0, 1), gradient

    def gradient(self, points: np.ndarray) -> np.ndarray:
        """Return closed_sdf's gradient (N, 3) float32."""
        return self.colors_and_gradient(points)[1]


def newton_step(values: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return the steps (N, 3) along the gradient (N, 3) to where an sdf of these values (N,) is 0, if it is linear."""
    square = np.maximum(np.einsum("nc,nc->n", gradient, gradient), np.float32(STEEPEST))
    return -gradient * (values / square)[:, None]
