"""The light whose highlights explain best how the networks' colours change with the view, as glTF's viewers add it."""
from typing import NamedTuple, Optional, Tuple

import numpy as np
import trimesh
from scipy.optimize import least_squares

import helper
from tracing.compiling import compiled, elementwise

REFLECTED = 0.04        # share of light that the surface reflects at any angle; that of most materials, seen frontally
SHARPEST = 0.05         # least alpha
STARTS = (0.1, 0.2, 0.4)        # alphas from which the search starts
MOST_EVALUATIONS = 40   # of the search, without those of its derivatives
LEAST_EXPLAINED = 0.1   # share of the squared changes with the view; a light that explains less is none


class Light(NamedTuple):
    """A light infinitely far away, and the gloss of the surface."""
    direction: np.ndarray   # (3,) float64, unit length, towards the light, in the mesh's coordinates
    color: np.ndarray       # (3,) float64, illuminance in lux, where colours of 1 shine with 1 candela per square metre
    alpha: float            # of the GGX distribution: glTF's roughness squared


class Views(NamedTuple):
    """Colours of N points in V views."""
    normals: np.ndarray     # (N, 3) float32, unit length
    towards: np.ndarray     # (V, N, 3) float32, unit length, from the point to the camera
    colors: np.ndarray      # (V, N, 3) float32 in [0, 1], sRGB
    weights: np.ndarray     # (V, N) float32; 0 where the point is not seen


# --- colours ----------------------------------------------------------------------------------------------------------

@elementwise
def decoded(color):
    """Return the linear value of an sRGB colour in [0, 1]."""
    return color / 12.92 if color <= 0.04045 else ((color + 0.055) / 1.055) ** 2.4


@elementwise
def encoded(linear):
    """Return the sRGB colour of a linear value, which counts as 0 below 0 and as 1 above 1."""
    linear = min(max(linear, 0.0), 1.0)
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


@elementwise
def slope(color):
    """Return the derivative of `encoded` where its value is `color`, in [0, 1]."""
    return 12.92 if color <= 0.04045 else 1.055 / 2.4 * ((color + 0.055) / 1.055) ** -1.4


# --- highlights -------------------------------------------------------------------------------------------------------

@compiled
def lobe(normal, towards, light, alpha):
    """Return what a point reflects of a light of 1 lux, without its colour; normal, towards, light: unit (3,).

    Source: the glTF 2.0 specification, appendix B: GGX, with Smith's height-correlated shadowing, times the cosine.
    """
    nl = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
    nv = normal[0] * towards[0] + normal[1] * towards[1] + normal[2] * towards[2]
    hx, hy, hz = light[0] + towards[0], light[1] + towards[1], light[2] + towards[2]
    length = np.sqrt(hx * hx + hy * hy + hz * hz)
    if nl <= 0 or nv <= 0 or length == 0:
        return 0.0
    nh = (normal[0] * hx + normal[1] * hy + normal[2] * hz) / length
    square = alpha * alpha
    spread = square / (np.pi * (nh * nh * (square - 1) + 1) ** 2)
    shadowing = 0.5 / (nl * np.sqrt(square + (1 - square) * nv * nv) + nv * np.sqrt(square + (1 - square) * nl * nl))
    return REFLECTED * spread * shadowing * nl


@compiled
def lobes(normals, towards, light, alpha):
    """Return `lobe` of N points in V views, (V, N) float32. normals: (N, 3); towards: (V, N, 3); light: (3,)."""
    out = np.empty(towards.shape[:2], np.float32)
    for v in range(out.shape[0]):
        for n in range(out.shape[1]):
            out[v, n] = lobe(normals[n], towards[v, n], light, alpha)
    return out


def highlights(light: Light, normals: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Return the linear light (V, N, 3) that N points reflect into V views. normals: (N, 3); towards: (V, N, 3)."""
    return lobes(normals, towards, light.direction, light.alpha)[..., None] * light.color


def mean_colors(views: Views) -> np.ndarray:
    """Return the sRGB colours (N, 3) nearest to the Views by weighted least squares: their means."""
    return np.einsum("vn,vnc->nc", views.weights, views.colors) / total(views.weights)[:, None]


def colors_below(light: Light, views: Views) -> np.ndarray:
    """Return the sRGB colours (N, 3) with which and with the light's highlights a viewer comes near to the Views.

    Each view gives the colour with which it would be met exactly. Their weighted mean is nearest by least squares, if a
    view counts by the square of what is left of a change of that colour where the highlight is added.
    """
    colors, shares = without(views.colors, highlights(light, views.normals, views.towards))
    weights = views.weights[..., None] * shares ** 2
    return (weights * colors).sum(axis=0) / total(weights)


def without(colors: np.ndarray, shine: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return sRGB colours in [0, 1] without linear highlights, at least 0, and the slope at which these are added."""
    below = encoded(decoded(colors) - shine)
    return below, slope(colors) / slope(below)


def total(weights: np.ndarray) -> np.ndarray:
    """Return the sums over the views, never 0."""
    return np.maximum(weights.sum(axis=0), 1e-12)


# --- the light --------------------------------------------------------------------------------------------------------

def fitted_light(views: Views) -> Tuple[Optional[Light], float]:
    """Return the Light that explains best how colours change with the view, and which share of the squares it explains.

    A share below LEAST_EXPLAINED returns None for the light. The points' colours below the highlights are free.
    """
    roots = np.sqrt(views.weights)[..., None]
    changes = ((roots * (views.colors - mean_colors(views))) ** 2).sum()

    def missing(parameters):
        light = light_of(parameters)
        shown = decoded(colors_below(light, views)) + highlights(light, views.normals, views.towards)
        return (roots * (encoded(shown) - views.colors)).ravel()

    bounds = [-2] * 3 + [0] * 3 + [SHARPEST], [2] * 3 + [np.inf] * 3 + [1]
    start = first_guess(views)
    if changes < 1e-9 or start is None:
        return None, 0.0
    found = least_squares(missing, np.concatenate([start.direction, start.color, [start.alpha]]), bounds=bounds,
                          x_scale=np.concatenate([np.ones(3), start.color, [start.alpha]]), max_nfev=MOST_EVALUATIONS)
    explained = 1 - 2 * found.cost / changes
    return (light_of(found.x) if explained >= LEAST_EXPLAINED else None), float(explained)


def light_of(parameters: np.ndarray) -> Light:
    """Return the Light of direction (of any length), colour and alpha, (7,)."""
    return Light(helper.unit(parameters[:3]), parameters[3:6], float(parameters[6]))


def first_guess(views: Views) -> Optional[Light]:
    """Return the best white Light of some directions and alphas for faint highlights; None if none explains any."""
    weights, values = views.weights, views.colors.mean(axis=-1)
    sums, steepness = total(weights), slope(mean_colors(views)).mean(axis=-1)

    def apart(values):
        return values - (weights * values).sum(axis=0) / sums

    changes, best, guess = apart(values), 0.0, None
    for direction in np.asarray(trimesh.creation.icosphere(2).vertices):
        for alpha in STARTS:
            shape = apart(lobes(views.normals, views.towards, direction, alpha) * steepness)
            together, square = (weights * shape * changes).sum(), (weights * shape * shape).sum()
            if together > 0 and together ** 2 / square > best:
                best, guess = together ** 2 / square, Light(direction, np.full(3, together / square), alpha)
    return guess
