"""Images of a trained scene: one ray through each pixel's centre, and more where a pixel shows more than one thing.

Photographs average over a pixel's area. render_areas does so where it shows: where an outline passes through a pixel,
the depth jumps, or a part thinner than a pixel passes the ray. Everything else keeps its one ray.
"""
from itertools import product
from threading import Lock
from typing import Callable, NamedTuple, Optional, Tuple

import numpy as np

import helper
import ray_tracer
from tracing.compiling import compiled
from tracing.cones import Cones

CHUNK = 1 << 15     # rays traced together; bounds the memory of a render, whatever the image's size
CHUNK_ON_GPU = 1 << 17      # by a search on a GPU, where a call for few rays takes as long as one for many
TRACING = Lock()    # a GPU's search and shading reuse their buffers, so that only one thread at a time may use them

# A pixel's rays beside the one through its centre: columns and rows from there, in pixels. The five are a square
# lattice, turned so that they have five different columns and rows. The lattice goes on in the next pixels.
SUBPIXELS = np.array([(0.2, 0.4), (0.4, -0.2), (-0.4, 0.2), (-0.2, -0.4)], np.float32)
PER_PIXEL = len(SUBPIXELS) + 1
JUMP = 1.5          # pixels; neighbours farther than this from each other's tangent planes are on different surfaces
PROBES = np.array([2, 4, 8, 16], np.float32)        # pixels behind the central hit: where to look for the inside

BACKGROUNDS = {"white": 1.0, "black": 0.0, "transparent": None}


class View(NamedTuple):
    """What is seen, and from where."""
    sdf: ray_tracer.Sdf         # such as network.sdf_evaluator's, whose `search` serves, too
    shade: Callable             # points and directions (N, 3) to rgb and normals (N, 3), as network.shader's
    camera: helper.Camera
    tracer: object              # the configuration's section, of which every key is an option of ray_tracer.trace


class Render(NamedTuple):
    """An image of the trained scene."""
    rgb: np.ndarray         # (H, W, 3) float32 in [0, 1], of the object alone, whatever alpha; white without a hit
    normals: np.ndarray     # (H, W, 3) float32, the sdf's gradient, not normalised; 0 without a hit
    depth: np.ndarray       # (H, W) float32, along the camera's axis, in radii of the unit sphere; 0 without a hit
    hit: np.ndarray         # (H, W) bool: the ray through the pixel's centre hits; depth is this ray's
    alpha: np.ndarray       # (H, W) float32 in [0, 1], the share of the pixel that the object covers


class _Samples(NamedTuple):
    """What n rays have found; t, rgb and normals are 0 without a hit."""
    t: np.ndarray           # (n,) float32
    hit: np.ndarray         # (n,) bool
    near: np.ndarray        # (n,) bool: passes the surface within the reach of SUBPIXELS
    rgb: np.ndarray         # (n, 3) float32
    normals: np.ndarray     # (n, 3) float32


def render_view(sdf: ray_tracer.Sdf, shade: Callable, camera: helper.Camera, tracer,
                wanted: Optional[np.ndarray] = None) -> Render:
    """Render what a camera sees, with one ray through the centre of each pixel.

    sdf, shade, camera and tracer: see View. wanted: (H, W) bool, the pixels to render; None for all.
    """
    wanted = np.ones(camera.shape, bool) if wanted is None else wanted
    return _image(_sample(View(sdf, shade, camera, tracer), _pixels(wanted)), wanted, camera)


def render_areas(sdf: ray_tracer.Sdf, shade: Callable, camera: helper.Camera, tracer,
                 wanted: Optional[np.ndarray] = None) -> Tuple[Render, Render]:
    """Render what a camera sees with pixels as areas, and return that and what the rays through the centres saw.

    The parameters are those of render_view, whose result is the second one at the wanted pixels. In the first one,
    alpha is the share of a pixel's rays that hit, and rgb and normals are the means over the rays that hit. A ray that
    is not traced is taken to see what the centre's ray sees.
    """
    wanted, view = np.ones(camera.shape, bool) if wanted is None else wanted, View(sdf, shade, camera, tracer)
    rendered = _with_neighbours(wanted)
    found = _sample(view, _pixels(rendered), find_near=True)
    centres = _image(found, rendered, camera)
    near = np.zeros(camera.shape, bool)
    near[rendered] = found.near
    to_trace, to_probe = (rays & wanted for rays in _open_rays(centres, near, camera))
    to_trace[to_probe] = ~_ends_inside(view, centres, to_probe)
    which, row, column = np.nonzero(to_trace)
    uv = np.stack([column, row], axis=1) + SUBPIXELS[which]
    return _averaged(centres, _sample(view, uv), row * camera.shape[1] + column), centres


def on_background(colors: np.ndarray, alpha: np.ndarray, background: str) -> np.ndarray:
    """Return colours (H, W, 3) with alpha (H, W) in front of a background of BACKGROUNDS.

    White and black give (H, W, 3). Transparent gives (H, W, 4), the colours as they are, not multiplied by alpha, as
    PNG has it; where alpha is 0 they are 0.
    """
    level, alpha = BACKGROUNDS[background], alpha[..., None]
    if level is None:
        return np.concatenate([np.where(alpha > 0, colors, 0), alpha], axis=-1)
    return colors * alpha + level * (1 - alpha)


# --- rays -------------------------------------------------------------------------------------------------------------

def _pixels(wanted: np.ndarray) -> np.ndarray:
    """Return the pixel coordinates (n, 2), column and row, of the pixels in wanted (H, W) bool, row by row."""
    return np.argwhere(wanted)[:, ::-1].astype(np.float32)


def _sample(view: View, uv: np.ndarray, find_near: bool = False) -> _Samples:
    """Trace and shade the rays through pixel coordinates uv (n, 2); near is all False without find_near."""
    origin, directions = helper.pixel_rays(uv, view.camera.intrinsics, view.camera.pose)
    count, search = len(uv), getattr(view.sdf, "search", None)
    found = _Samples(np.zeros(count, np.float32), np.zeros(count, bool), np.zeros(count, bool),
                     np.zeros((count, 3), np.float32), np.zeros((count, 3), np.float32))
    chunk = CHUNK_ON_GPU if search else CHUNK
    for start in range(0, count, chunk):
        rays, part = directions[start:start + chunk], slice(start, start + chunk)
        cones = Cones(_angle(view.camera.intrinsics, SUBPIXELS)) if find_near else None
        with TRACING:
            t, hit = ray_tracer.trace(view.sdf, origin, rays, cones=cones, search=search, **vars(view.tracer))
            shaded = view.shade(origin + t[hit, None] * rays[hit], rays[hit])
        found.t[part], found.hit[part] = t, hit
        found.rgb[part][hit], found.normals[part][hit] = shaded
        if cones:
            found.near[part] = cones.near(t, hit)
    return found


def _angle(intrinsics: np.ndarray, offsets: np.ndarray) -> float:
    """Return the largest angle, in radians, between a pixel's central ray and those at offsets (n, 2) in pixels.

    It is that of a pixel at the principal point, where pixels are seen largest.
    """
    uv = intrinsics[:2, 2] + np.concatenate([np.zeros((1, 2)), offsets])
    directions = helper.pixel_rays(uv, intrinsics, np.eye(4))[1]
    return float(np.linalg.norm(directions[1:] - directions[0], axis=1).max())


def _image(found: _Samples, rendered: np.ndarray, camera: helper.Camera) -> Render:
    """Return the samples of the pixels in rendered (H, W) bool, row by row, as an image."""
    render = Render(np.ones((*camera.shape, 3), np.float32), np.zeros((*camera.shape, 3), np.float32),
                    np.zeros(camera.shape, np.float32), np.zeros(camera.shape, bool),
                    np.zeros(camera.shape, np.float32))
    render.hit[rendered] = found.hit
    directions = helper.pixel_rays(_pixels(render.hit), camera.intrinsics, camera.pose)[1]
    render.rgb[render.hit], render.normals[render.hit] = found.rgb[found.hit], found.normals[found.hit]
    render.depth[render.hit] = found.t[found.hit] * (directions @ camera.pose[:3, 2].astype(np.float32))
    render.alpha[render.hit] = 1
    return render


# --- pixels as areas --------------------------------------------------------------------------------------------------

def _with_neighbours(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) bool with the eight neighbours of its pixels."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y:y + height, x:x + width] for y, x in product(range(3), repeat=2)], axis=0)


def _open_rays(centres: Render, near: np.ndarray, camera: helper.Camera) -> Tuple[np.ndarray, np.ndarray]:
    """Return the rays of SUBPIXELS that may see something else than the ray through the pixel's centre, 2 x (4, H, W).

    The first ones are to be traced. The second ones pass an outline of the surface that the central ray hits. Most of
    them hit it too, which _ends_inside tells more cheaply.

    near: (H, W) bool, of _Samples. If the central ray neither hits nor is near, no ray of its pixel hits. If it is
    near, all four rays are open, as what it passes may be thin. If it hits, a ray is open if the four central rays
    around it do not all hit the same surface.
    """
    hit = centres.hit
    outlines, jumps = _around(hit[:, 1:] != hit[:, :-1], hit[1:] != hit[:-1]), _around(*_jumps(centres, camera))
    probe = hit & outlines & ~jumps & ~near
    return near | hit & jumps, probe


def _around(beside: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return (4, H, W) bool: whether two of the four pixel centres around each ray of SUBPIXELS differ.

    beside: (H, W - 1), below: (H - 1, W), whether a pixel differs from the next one in its row, in its column.
    """
    height, width = beside.shape[0], below.shape[1]
    squares = np.zeros((height + 1, width + 1), bool)       # between four centres; those of a pixel are at its corners
    for side in (squares[:-1, 1:-1], squares[1:, 1:-1]):
        side |= beside
    for side in (squares[1:-1, :-1], squares[1:-1, 1:]):
        side |= below
    return np.array([squares[int(v > 0):, int(u > 0):][:height, :width] for u, v in SUBPIXELS])


def _jumps(centres: Render, camera: helper.Camera) -> Tuple[np.ndarray, np.ndarray]:
    """Return whether two neighbours hit different surfaces, in a row (H, W - 1) and in a column (H - 1, W), bool.

    They do if either point is farther from the other's tangent plane than JUMP pixels are wide there. Next to the
    outline of a smooth shape its points are about one such width away.
    """
    rows, columns = np.nonzero(centres.hit)
    number = np.full(camera.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    points, normals = _points(centres, camera, rows, columns), helper.unit(centres.normals[rows, columns])
    widths = centres.depth[rows, columns] * np.float32(JUMP / camera.intrinsics[0, 0])
    return tuple(_apart(number[here], number[there], points, normals, widths)
                 for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])))


@compiled
def _apart(here, there, points, normals, widths):
    """Return where two hits, named by their numbers (H, W), or -1, are on different surfaces, (H, W) bool.

    points, normals (n, 3) and widths (n,): of each hit, the last one how far it may be from the other's tangent plane.
    """
    apart = np.zeros(here.shape, np.bool_)
    for y in range(here.shape[0]):
        for x in range(here.shape[1]):
            a, b = here[y, x], there[y, x]
            if a >= 0 and b >= 0:
                above = below = np.float32(0)
                for c in range(3):
                    way = points[b, c] - points[a, c]
                    above += way * normals[a, c]
                    below += way * normals[b, c]
                apart[y, x] = max(abs(above), abs(below)) > max(widths[a], widths[b])
    return apart


def _points(centres: Render, camera: helper.Camera, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the points (n, 3) that the rays through the centres of n pixels hit, up to the camera's position."""
    directions = helper.pixel_rays(np.stack([columns, rows], axis=1), camera.intrinsics, camera.pose)[1]
    return directions * (centres.depth[rows, columns] / (directions @ camera.pose[:3, 2].astype(np.float32)))[:, None]


def _ends_inside(view: View, centres: Render, rays: np.ndarray) -> np.ndarray:
    """Return which of n rays are inside the object at one of PROBES behind their pixel's central hit, (n,) bool.

    So they have entered it. rays: (4, H, W) bool, with n set.
    """
    which, row, column = np.nonzero(rays)
    inside = np.zeros(len(which), bool)
    for start in range(0, len(which), CHUNK):
        part = slice(start, start + CHUNK)
        uv = np.stack([column[part], row[part]], axis=1) + SUBPIXELS[which[part]]
        origin, directions = helper.pixel_rays(uv, view.camera.intrinsics, view.camera.pose)
        t = np.linalg.norm(_points(centres, view.camera, row[part], column[part]), axis=1)
        t = t[:, None] * (1 + PROBES / np.float32(view.camera.intrinsics[0, 0]))
        points = origin + t[..., None] * directions[:, None]
        values = view.sdf(points.reshape(-1, 3)).reshape(t.shape)
        inside[part] = (values < -view.tracer.tolerance).any(axis=1)
    return inside


def _averaged(centres: Render, found: _Samples, pixels: np.ndarray) -> Render:
    """Return the image in which more rays have been traced in some pixels; pixels: (n,), flat index of each sample."""
    changed, place, traced = np.unique(pixels, return_inverse=True, return_counts=True)
    place = place[found.hit]
    like_centre = (PER_PIXEL - traced) * centres.hit.ravel()[changed]
    count = like_centre + np.bincount(place, minlength=len(changed))

    def mean(image, values, without):
        sums = [np.bincount(place, values[found.hit, channel], len(changed)) for channel in range(3)]
        sums = np.stack(sums, axis=1) + image.reshape(-1, 3)[changed] * like_centre[:, None]
        result = image.reshape(-1, 3).copy()
        result[changed] = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], without)
        return result.reshape(image.shape)

    alpha = centres.alpha.ravel().copy()
    alpha[changed] = count / PER_PIXEL
    return centres._replace(rgb=mean(centres.rgb, found.rgb, 1), normals=mean(centres.normals, found.normals, 0),
                            alpha=alpha.reshape(centres.alpha.shape))


# --- colours ----------------------------------------------------------------------------------------------------------

def normal_colors(render: Render, background: str = "white") -> np.ndarray:
    """Return the unit normals as colours in [0, 1], (n + 1) / 2 in the scene's axes, on a background: on_background."""
    return on_background(helper.unit(render.normals) * 0.5 + 0.5, render.alpha, background)


def depth_grey(render: Render) -> np.ndarray:
    """Return the depth as grey values (H, W) in [0, 1]: white nearest, dark grey farthest, black without a hit."""
    if not render.hit.any():
        return np.zeros(render.depth.shape)
    near, far = render.depth[render.hit].min(), render.depth[render.hit].max()
    return np.where(render.hit, 1.0 - 0.8 * (render.depth - near) / max(far - near, 1e-6), 0.0)


def clay(normals: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return a shape as grey clay (H, W, 3) in [0, 1], lit from the camera's upper left and faintly from the right.

    normals: (H, W, 3) of any length, 0 without a hit, which becomes white. pose: (4, 4), the camera's.
    """
    inwards = helper.unit(normals) @ pose[:3, :3]
    key, fill = (inwards @ helper.unit(np.array(light)) for light in ((-0.5, -0.7, -0.75), (0.8, 0.1, -0.4)))
    grey = 0.16 + 0.66 * np.maximum(key, 0) + 0.16 * np.maximum(fill, 0)
    return np.where((normals != 0).any(axis=-1, keepdims=True), grey[..., None] * np.array([0.98, 0.96, 0.92]), 1.0)
