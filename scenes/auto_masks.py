"""Photographs with cameras -> a mask of the object in each, from nothing else: `prepare.py --masks auto`.

After Campbell et al., "Automatic 3D object segmentation in multiple views using volumetric graph-cuts" (2010):

1. Sparse points say where the object is: the connected points above the table that stand in the middle of the pictures.
   A COLMAP model has such points; for other cameras they are found.
2. Colour models of object and background, of each picture and of all together, and the edges in the picture give a
   mask. On a table, a second model helps: a pixel of the table looks like the table's place in other views.
3. The visual hull of all masks, projected back, says for the next round where the object is. Steps 2 and 3 repeat until
   the masks stay as they are.
4. A larger picture gives the mask its final outline, within a band about it.

A view says nothing of what lies outside its picture, so pictures may cut the object off.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import List, NamedTuple, Optional

import cv2
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from tqdm import tqdm

import datasets
import helper
from helper import UserError
from scenes import mask_files, segmentation, sparse_points
from scenes.views import read_view
from scenes.visual_hull import SMALL, Hull, Look, agreements, make_look, project, silhouette
from tracing.compiling import compiled

ROUNDS = 8              # at most
SETTLED = 0.003         # share of the masks that a last round changes at most
CELLS = 80              # of the grid of the hull, along each side
REACH = 1.6             # the grid's half side, in radii of the object's points
LINK = 0.25             # points as far apart as this share of the pictures' half height at the object are connected
ALIKE = 0.35            # of two groups of points, if one is so much less in the middle both may be the object's
TOLERATED = 0.12        # share of the masks that a point of the hull may miss
LEAST_SEEN = 0.15       # share of the views that must have a point of the hull in their pictures
ENOUGH_POINTS = 300     # of a camera file; fewer are found anew
FEWEST_POINTS = 30      # below, the object is looked for where the cameras' axes meet
LEAST_CONTRAST = 1.5    # between the object's pixels and others, on the scale of segmentation.SURE
REFINED = 800           # pixels of the longer side of the pictures in which the outline is found at last
BAND = 0.06             # half width of the band of step 4, in radii of the object
DEEP = 2.5              # what the hull can say at most, on the scale of segmentation.SURE
UNKNOWN = 31            # the bin of pixels that no other view shows on the table


class Subject(NamedTuple):
    """A box around the object in one view, as the user draws it: --subject."""
    view: int
    box: np.ndarray     # (4,) x0, y0, x1, y1, pixels of the whole photograph


class Region(NamedTuple):
    """Where the object is about."""
    centre: np.ndarray      # (3,)
    radius: float           # of a ball that holds nearly all of the object's points
    points: np.ndarray      # (N, 3): the object's sparse points, or some of a ball where there are none
    table: Optional[sparse_points.Plane]


class Sight(NamedTuple):
    """What stays the same of a view from round to round."""
    bins: np.ndarray        # (h, w) int32, of the pixels' colours
    costs: np.ndarray       # (2, h, w), segmentation.edge_costs
    limit: np.ndarray       # (h, w) bool, where the object may be
    size: float             # the object's radius in pixels


class Labels(NamedTuple):
    """The state between two rounds, a list entry for each view, all arrays (h, w)."""
    masks: List[np.ndarray]     # bool
    inside: List[np.ndarray]    # float32: pixels to the outline of what is known of the object, negative outside
    object: List[np.ndarray]    # weights of the pixels in the object's colour model
    background: List[np.ndarray]    # and in the background's


class Found(NamedTuple):
    """The masks of all views."""
    looks: List[Look]           # shrunk, with the masks
    tables: List[np.ndarray]    # of each view, what each bin of colours says: segmentation.colour_evidence
    extra: List[np.ndarray]     # (h, w): what the table says
    sizes: List[float]          # the object's radius in pixels of the shrunk views
    agreed: np.ndarray          # (V,) intersection over union of the masks and the hull


# --- the command ------------------------------------------------------------------------------------------------------

def mask_makers(views, subject=None, points=()):
    """Return for each camera_files.View a function that makes the mask (H, W) bool from its photograph (H, W, 3) uint8.

    The photographs are those of views.read_view, without distortion. subject: a Subject, None to find the object.
    points: sparse points (N, 3) of what they show; if these are few, points are found by matching the photographs.
    Raises UserError if no object is found on which the views agree.
    """
    looks, features, known = [], [], len(points) >= ENOUGH_POINTS
    for view in tqdm(views, desc="reading" if known else "features", unit="view", dynamic_ncols=True):
        pinhole = read_view(view, whole, None)
        if subject is not None and subject.view == len(looks):
            subject = checked(subject, pinhole.image.shape, view.image.name)
        looks.append(make_look(view.image.name, pinhole.image, pinhole.mask, pinhole.intrinsics, view.pose))
        if not known:
            features.append(sparse_points.find_features(pinhole.image, pinhole.intrinsics))
    if known:
        points = sparse_points.without_strays(np.asarray(points, np.float64))
    else:
        points = sparse_points.triangulated(features, np.stack([look.pose for look in looks]))
    found = find_masks(looks, points, subject)
    return [partial(refined, found, index) for index in range(len(looks))]


def whole(image):
    """Return a mask (H, W) bool of a whole image."""
    return np.ones(image.shape[:2], bool)


def checked(subject, shape, name):
    """Return a Subject with the box in pixels of the shrunk view. Raise UserError if it is not in the photograph."""
    x0, y0, x1, y1 = subject.box
    if not (0 <= x0 < x1 <= shape[1] and 0 <= y0 < y1 <= shape[0]):
        raise UserError(f"--subject: the box {x0:g},{y0:g},{x1:g},{y1:g} does not lie in {name}, which has "
                        f"{shape[1]}x{shape[0]} pixels; give left, top, right and bottom")
    factor = -(-max(shape[:2]) // SMALL)
    return subject._replace(box=(np.array(subject.box) - (factor - 1) / 2) / factor)


def read_subject(text, views):
    """Return the Subject of the option --subject view:x0,y0,x1,y1. Raise UserError for anything else.

    The view is its photograph's name, or its index among the camera_files.Views from 0.
    """
    name, _, numbers = text.rpartition(":")
    try:
        box = np.array([float(number) for number in numbers.split(",")])
    except ValueError:
        box = np.zeros(0)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise UserError(f"--subject {text[:200]}: give a photograph and a box in pixels, view:left,top,right,bottom")
    for index, view in enumerate(views):
        if name in (view.image.name, view.image.stem):
            return Subject(index, box)
    if name.isdecimal() and int(name[:9]) < len(views):
        return Subject(int(name), box)
    raise UserError(f"--subject {text[:200]}: no photograph {name[:100]}; name one, or its number from 0 to "
                    f"{len(views) - 1}")


def find_masks(looks, points, subject=None):
    """Return what is Found in Looks (their masks do not matter) and sparse points (N, 3). subject: a Subject, with the
    box in the look's pixels."""
    region = find_region(looks, points, np.stack([look.pose for look in looks]), subject)
    grid = region_grid(region)
    sights = [make_sight(look, region, grid) for look in looks]
    if subject is not None:
        limit = sights[subject.view].limit
        limit &= box_mask(subject.box, limit.shape)
    residuals = table_residuals(looks, region) if region.table else None
    labels, hull = first_labels(looks, region, sights), grid
    projections = np.stack([look.intrinsics @ np.linalg.inv(look.pose)[:3] for look in looks])
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=ROUNDS, desc="masks", unit="round",
                                                          dynamic_ncols=True) as bar:
        for number in range(ROUNDS):
            tables, extra = models(labels, sights, residuals)
            evidence = [table[sight.bins] + more for table, sight, more in zip(tables, sights, extra)]
            masks = list(pool.map(partial(one_mask, number), sights, evidence, labels.masks, labels.inside))
            before, hull = labels.masks, carved(grid, projections, masks)
            labels = next_labels(looks, masks, hull, region.table is None)
            bar.update()
            if np.mean([overlap(*pair) for pair in zip(before, masks)]) > 1 - SETTLED:
                bar.total = bar.n
                break
    looks = [look._replace(mask=mask) for look, mask in zip(looks, labels.masks)]
    check_contrast(looks, evidence)
    return Found(looks, tables, extra, [sight.size for sight in sights], agreements(hull, looks))


def make_sight(look, region, grid):
    """Return the Sight of a Look. grid: region_grid's."""
    size = look.intrinsics[0, 0] * region.radius / np.linalg.norm(look.pose[:3, 3] - region.centre)
    return Sight(segmentation.colour_bins(look.image), segmentation.edge_costs(look.image), silhouette(grid, look),
                 max(1.0, size))


def check_contrast(looks, evidence):
    """Raise UserError unless the masks of most Looks show something that differs from what is around it.

    evidence: arrays (h, w), of what colours and table say.
    """
    differ = [says[look.mask].mean() - says[~look.mask].mean() for look, says in zip(looks, evidence)
              if look.mask.any() and not look.mask.all()]
    if len(differ) < max(2, len(looks) / 2) or np.median(differ) < LEAST_CONTRAST:
        raise UserError("--masks auto: no object was found that stands out from its surroundings in most photographs; "
                        "draw a box around it in one, --subject VIEW:X0,Y0,X1,Y1, or give masks")


def overlap(one, other):
    """Return the intersection over union of two masks; 1 for two empty ones."""
    union = (one | other).sum()
    return (one & other).sum() / union if union else 1.0


# --- where the object is ----------------------------------------------------------------------------------------------

def find_region(looks, points, poses, subject):
    """Return the Region of the object that the cameras look at, or that the Subject's box shows."""
    centre = sparse_points.axes_centre(poses)
    scale = np.median([half_height(look, centre) for look in looks])
    table = sparse_points.find_table(points, poses, scale)
    if table:
        points = points[table.heights(points) > 0.03 * scale]
    if subject is not None:
        pixels, depth = project(points, looks[subject.view])
        x0, y0, x1, y1 = subject.box
        points = points[(depth > 0) & (pixels >= (x0, y0)).all(axis=1) & (pixels <= (x1, y1)).all(axis=1)]
    points = points[middle_group(points, looks, LINK * scale)]
    if len(points) < FEWEST_POINTS:
        points = ball_points(centre, 0.6 * scale) if subject is None else box_points(looks[subject.view], subject.box,
                                                                                     centre)
    low, high = np.percentile(points, (2, 98), axis=0)
    centre = (low + high) / 2
    return Region(centre, float(np.percentile(np.linalg.norm(points - centre, axis=1), 97)), points, table)


def half_height(look, centre):
    """Return half the length, in world units, that a Look's picture covers along its shorter side at a point (3,)."""
    return np.linalg.norm(look.pose[:3, 3] - centre) * min(look.mask.shape) / 2 / look.intrinsics[0, 0]


def middle_group(points, looks, link):
    """Return which points (N,) bool are the object's.

    Points that are connected by steps of `link` are a group. The object's are the group with the most points in the
    middle of the pictures, and those that are nearly as much in the middle.
    """
    if not len(points):
        return np.zeros(0, bool)
    aside = np.zeros(len(points))
    for look in looks:
        pixels, depth = project(points, look)
        middle = (np.array(look.mask.shape[::-1]) - 1) / 2
        from_middle = np.abs((pixels - middle) / (middle + 0.5)).max(axis=1)
        aside += np.where(depth > 0, np.minimum(from_middle, 1), 1) / len(looks)
    pairs = cKDTree(points).query_pairs(link, output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs), bool), pairs.T), (len(points),) * 2)
    group = connected_components(graph, directed=False)[1]
    sizes, central = np.bincount(group), np.bincount(group, np.exp(-(aside / 0.35) ** 2))
    best = central.argmax()
    return ((central / sizes > ALIKE * central[best] / sizes[best]) & (central > 0.02 * central[best]))[group]


def ball_points(centre, radius):
    """Return points (N, 3) spread over a ball."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (4000, 3))
    return centre + radius * points[np.linalg.norm(points, axis=1) < 1]


def box_points(look, box, centre):
    """Return points (N, 3) of the ball that a box in a Look shows, at the distance of a point (3,)."""
    x0, y0, x1, y1 = box
    origin, direction = helper.pixel_rays([((x0 + x1) / 2, (y0 + y1) / 2)], look.intrinsics, look.pose)
    away = np.linalg.norm(centre - origin)
    return ball_points(origin + away * direction[0], away * max(x1 - x0, y1 - y0) / 2 / look.intrinsics[0, 0])


def region_grid(region):
    """Return the Hull of all that may be the object: a ball of REACH radii, above the table."""
    reach = REACH * region.radius
    axis, spacing = np.linspace(-reach, reach, CELLS, retstep=True)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    points = region.centre + points[np.linalg.norm(points, axis=1) <= reach]
    if region.table:
        points = points[region.table.heights(points) > -0.5 * spacing]
    return Hull(points, spacing)


def box_mask(box, shape):
    """Return the mask (h, w) bool of a box (x0, y0, x1, y1)."""
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    return (columns >= box[0] - 0.5) & (columns <= box[2] + 0.5) & (rows >= box[1] - 0.5) & (rows <= box[3] + 0.5)


# --- a round ----------------------------------------------------------------------------------------------------------

def first_labels(looks, region, sights):
    """Return the first Labels: the convex outline of the object's points in each view, with weights that fall off."""
    masks = []
    for look, sight in zip(looks, sights):
        pixels, depth = project(region.points, look)
        mask = np.zeros(look.mask.shape, np.uint8)
        if (depth > 0).sum() > 2:
            far = 4 * max(mask.shape)
            corners = cv2.convexHull(np.clip(pixels[depth > 0], -far, far).astype(np.float32))
            cv2.fillConvexPoly(mask, np.rint(corners[:, 0]).astype(np.int32), 1)
        masks.append((mask > 0) & sight.limit)
    inside = [signed_distance(mask) for mask in masks]
    depths = [distance / sight.size for distance, sight in zip(inside, sights)]
    return Labels(masks, inside, [np.clip(0.5 + depth / 0.3, 0, 1) for depth in depths],
                  [np.where(sight.limit, np.clip(-depth / 0.5, 0, 1), 1) for depth, sight in zip(depths, sights)])


def next_labels(looks, masks, hull, cautious):
    """Return the Labels after a round, from its masks and their Hull.

    cautious: the object's colours are learnt in its middle rather. Where the table is not known, its shadow would creep
    into them from round to round.
    """
    shapes = [silhouette(hull, look) for look in looks]
    inside = [signed_distance(shape) for shape in shapes]
    weights = [(mask & shape).astype(np.float64) for mask, shape in zip(masks, shapes)]
    if cautious:
        for weight, mask, distance in zip(weights, masks, inside):
            deep = np.minimum(signed_distance(mask), distance) / (0.2 * np.sqrt(mask.sum() / np.pi) + 0.2)
            weight *= np.clip(deep, 0.1, 1)
    return Labels(masks, inside, weights, [(~mask).astype(np.float64) for mask in masks])


def signed_distance(mask):
    """Return the distances (h, w) float32, in pixels, to a mask's outline: positive inside. The image's border is no
    outline, since the object may go on there."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, 1e3 if mask.all() else -1e3, np.float32)
    mask = mask.astype(np.uint8)
    return cv2.distanceTransform(mask, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)


def models(labels, sights, residuals):
    """Return for each view what each bin of colours says, and an array (h, w) of what the table says.

    residuals: table_residuals', None without a table.
    """
    inner = [segmentation.histogram(sight.bins, weights) for sight, weights in zip(sights, labels.object)]
    outer = [segmentation.histogram(sight.bins, weights) for sight, weights in zip(sights, labels.background)]
    common = sum(inner), sum(outer)
    tables = [segmentation.colour_evidence(own, common) for own in zip(inner, outer)]
    if residuals is None:
        return tables, [np.zeros(mask.shape) for mask in labels.masks]
    counts = []
    for weights in (labels.object, labels.background):
        total = sum(np.bincount(r.ravel(), w.ravel(), UNKNOWN + 1) for r, w in zip(residuals, weights))
        total = ndimage.gaussian_filter1d(1 + total[:UNKNOWN], 1.0)
        counts.append(total / total.sum())
    says = np.append(np.clip(np.log(counts[0] / counts[1]), -3, 3), 0)
    return tables, [says[residual] for residual in residuals]


def one_mask(number, sight, evidence, before, inside):
    """Return the mask (h, w) bool of a view in round `number`, from its evidence, its edges and the last hull.

    evidence: (h, w), what colours and table say; before, inside: of its Labels. The hull's word counts more in its
    depth, and from round to round.
    """
    depth = inside / sight.size
    evidence = evidence + 1.5 * np.tanh(depth / (0.15 if number else 0.5))
    evidence += DEEP * min(1, number / 3) * np.clip((np.abs(depth) - 0.08) / 0.1, 0, 1) * np.sign(depth)
    evidence[~sight.limit] = -8
    return segmentation.cut(evidence, sight.costs, before)


def carved(grid, projections, masks):
    """Return the Hull of the grid's points that lie in enough of the masks that could show them."""
    seen, met = votes(grid.points, projections, np.stack(masks))
    least = max(2, LEAST_SEEN * len(masks))
    return Hull(grid.points[(seen >= least) & (met >= (1 - TOLERATED) * seen)], grid.spacing)


@compiled
def votes(points, projections, masks):
    """Return for each point (N, 3) the number of views that have it in their pictures, and of masks that it lies in.

    projections: (V, 3, 4). masks: (V, h, w) bool.
    """
    count, height, width = masks.shape
    seen, met = np.zeros(len(points), np.int32), np.zeros(len(points), np.int32)
    for n in range(len(points)):
        x, y, z = points[n]
        for v in range(count):
            p = projections[v]
            depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
            if depth > 0:
                column = np.rint((p[0, 0] * x + p[0, 1] * y + p[0, 2] * z + p[0, 3]) / depth)
                row = np.rint((p[1, 0] * x + p[1, 1] * y + p[1, 2] * z + p[1, 3]) / depth)
                if 0 <= column < width and 0 <= row < height:
                    seen[n] += 1
                    met[n] += masks[v, int(row), int(column)]
    return seen, met


# --- the table --------------------------------------------------------------------------------------------------------

def table_residuals(looks, region, others=4):
    """Return for each Look the bins (h, w) int32 of how little a pixel looks like the table's place behind it.

    The place's colour is what other views show there. Of their differences the second smallest counts, since the object
    hides the place from some. UNKNOWN: fewer than two views show it.
    """
    soft = [cv2.GaussianBlur(look.image, (0, 0), 1.0).astype(np.float32) for look in looks]
    towards = np.stack([look.pose[:3, 3] for look in looks]) - region.centre
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(towards @ towards.T, -1, 1)))
    residuals = []
    for view, look in enumerate(looks):
        places = table_places(look, region)
        nearest = [other for other in np.argsort(np.abs(angles[view] - 25)) if 4 < angles[view, other] < 70][:others]
        away = [table_difference(soft[view], soft[other], looks[other], places) for other in nearest]
        if len(away) < 2:
            residuals.append(np.full(look.mask.shape, UNKNOWN, np.int32))
            continue
        second = np.sort(np.stack(away), axis=0)[1]
        known = np.isfinite(second)
        scaled = np.clip(4 * np.log2(1 + np.where(known, second, 0)), 0, UNKNOWN - 1)
        residuals.append(np.where(known, scaled, UNKNOWN).astype(np.int32))
    return residuals


def table_places(look, region):
    """Return the points (h, w, 3) of the table behind a Look's pixels, NaN where there are none nearby."""
    origin, directions = helper.pixel_rays(helper.pixel_grid(*look.mask.shape), look.intrinsics, look.pose)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (region.table.offset - origin @ region.table.normal) / (directions @ region.table.normal)
        places = origin + t[:, None] * directions
        far = np.linalg.norm(places - region.centre, axis=1) > 8 * region.radius
    places[far | ~(t > 0)] = np.nan
    return places.reshape(*look.mask.shape, 3)


def table_difference(image, other_image, other, places):
    """Return the differences (h, w), in grey levels, between an image and what the Look `other` shows at places (h, w,
    3); inf where it shows nothing."""
    height, width = image.shape[:2]
    pixels, depth = project(places.reshape(-1, 3), other)
    limits = np.array(other_image.shape[1::-1]) - 1
    with np.errstate(invalid="ignore"):
        shown = ((depth > 0) & (pixels >= 0).all(axis=1) & (pixels <= limits).all(axis=1)).reshape(height, width)
    uv = np.where(shown[..., None], pixels.reshape(height, width, 2), 0).astype(np.float32)
    there = cv2.remap(other_image, uv[..., 0], uv[..., 1], cv2.INTER_LINEAR)
    apart = cv2.blur(np.abs(there - image).max(axis=2), (3, 3))
    return np.where(shown, apart, np.inf)


# --- the final outline ------------------------------------------------------------------------------------------------

def refined(found, index, image):
    """Return the mask (H, W) bool of a view's photograph (H, W, 3) uint8, from what was Found in its shrunk view."""
    look, size = found.looks[index], found.sizes[index]
    if not look.mask.any():
        return np.zeros(image.shape[:2], bool)
    factor = -(-max(image.shape) // REFINED)
    small, enlarge = datasets.shrink_image(image, factor), -(-max(image.shape) // SMALL) / factor
    inside = resampled(signed_distance(look.mask), enlarge, small.shape) * enlarge
    band = BAND * size * enlarge
    evidence = found.tables[index][segmentation.colour_bins(small)] + 1.5 * np.tanh(inside / band)
    evidence += resampled(found.extra[index], enlarge, small.shape)
    evidence[np.abs(inside) > band] = 0
    evidence += 4 * DEEP * np.clip(np.abs(inside) / band - 1, 0, 1) * np.sign(inside)
    outline, near = inside > 0, np.abs(inside) <= 2 * band
    if not near.any():
        return whole(image) & outline.any()
    rows, columns = (slice(*(np.flatnonzero(near.any(axis=axis))[[0, -1]] + (0, 1))) for axis in (1, 0))
    outline[rows, columns] = segmentation.cut(evidence[rows, columns], segmentation.edge_costs(small)[:, rows, columns],
                                              outline[rows, columns])
    return resampled(mask_files.without_specks(outline), factor, image.shape) > 0.5


def resampled(picture, scale, shape):
    """Return a picture (h, w) of a shrunk image, `scale` times as large, for a shape (H, W, ...): float32."""
    place = np.array([[1, 0, (1 - scale) / 2], [0, 1, (1 - scale) / 2]]) / scale      # pixel centres at integers
    return cv2.warpAffine(picture.astype(np.float32), place, shape[1::-1],
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
