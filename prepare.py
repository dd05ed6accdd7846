"""Make a scene for train.py from photographs with cameras and masks, or judge a scene that is there.

    python prepare.py FOLDER --output data/mine     from a COLMAP model, transforms.json, ...; see --help
    python prepare.py data/mine --check             says what is wrong, in which view, and what to do

Both find the object's region from cameras and masks, the visual hull, and draw prepare_{scene}.png in the current
folder: the cameras around the unit sphere, and the hull's outline over the photographs. The outlines fit the
masks only where cameras, masks and their order are right.
"""
import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage.measure
import skimage.morphology
from PIL import Image
from tqdm import tqdm

import cameras_in
import datasets
import helper
from helper import UserError

SMALL = 256         # pixels: hull and picture are made from views shrunk until their longer side is no longer
COARSE, FINE = 40, 80  # cells along the sides of the two grids in which the hull is carved
AGREE = 0.6         # of the union of a mask and the hull's outline, what both must share for the view to be right


class Look(NamedTuple):
    """What is kept of a view: shrunk, its camera with it."""
    name: str
    image: np.ndarray       # (h, w, 3) uint8
    mask: np.ndarray        # (h, w) bool
    intrinsics: np.ndarray  # (3, 3)
    pose: np.ndarray        # (4, 4) camera to world; after normalising, to the unit sphere's coordinates
    corners: np.ndarray     # (M, 2) pixels, of the whole mask's convex hull: its rays enclose all masked ones


class Finding(NamedTuple):
    text: str
    view: int = -1          # -1: of the whole scene
    wrong: bool = True      # or only worth knowing


# --- photographs and masks --------------------------------------------------------------------------------------------

def mask_sources(views, choice, root):
    """Return for each view where its mask comes from: a Path, "alpha" or "background".

    choice: --masks. Without it: the masks that the cameras' file names, a folder masks/ or mask/ beside the
    photographs or in the folder `root`, or the alpha channel. Raises UserError where there is none of these.
    """
    if choice in ("alpha", "background"):
        return [choice] * len(views)
    if choice is not None:
        return masks_in(Path(choice), views)
    if all(view.mask for view in views):
        return [view.mask for view in views]
    for parent in (root, views[0].image.parent, views[0].image.parent.parent):
        for folder in (parent / "masks", parent / "mask"):
            if folder.is_dir():
                return masks_in(folder, views)
    if has_alpha(views[0].image):
        return ["alpha"] * len(views)
    raise UserError(f"{root}: no masks found; put them into {root / 'masks'} under the names of the photographs, or say "
                    "--masks FOLDER, --masks alpha, or --masks background for an object before a plain background")


def masks_in(folder, views):
    """Return each view's mask in a folder: by the photograph's name, else, where the counts are equal, in order."""
    if not folder.is_dir():
        raise UserError(f"--masks {folder}: no such folder; name one, or alpha or background")
    found = [mask_named(folder, view.image) for view in views]
    if len(set(found) - {None}) < len(views):
        files = datasets.picture_files(folder)[0]
        if not any(found) and len(files) == len(views):
            print(f"notice: {folder}: no names of photographs; the masks are taken in the order of their names")
            order = sorted(range(len(views)), key=lambda index: views[index].image)
            return [files[order.index(index)] for index in range(len(views))]
        name = next(v.image.name for i, v in enumerate(views) if found[i] is None or found[i] in found[:i])
        raise UserError(f"{folder}: no mask for {name} ({len(views)} views, {len(files)} masks); name it like its "
                        f"photograph: {Path(name).stem}.png or {name}.png")
    return found


def mask_named(folder, image):
    """Return the mask of a photograph by its name, as people name them, with or without its folders; None if absent."""
    for parts in (3, 2, 1):
        tail = Path(*image.parts[-parts:])
        names = [tail.name + ".png"] + [tail.stem + end + suffix for end in ("", "_mask") for suffix in
                                        datasets.SUFFIXES + tuple(s.upper() for s in datasets.SUFFIXES)]
        for name in names:
            if (folder / tail.parent / name).is_file():
                return folder / tail.parent / name
    return None


def has_alpha(path):
    """Tell whether a picture has transparent colours."""
    datasets.picture_size(path)
    with Image.open(str(path)) as picture:
        return "A" in picture.mode or "transparency" in picture.info


def read_view(view, mask_source, threshold):
    """Return a view's image (H, W, 3) uint8, mask (H, W) bool and intrinsics (3, 3), with distortion undone."""
    image = datasets.read_image(view.image)
    if mask_source == "background":
        mask = background_mask(image, threshold)
    elif mask_source == "alpha":
        if not has_alpha(view.image):
            raise UserError(f"{view.image}: has no alpha channel; put masks into a folder and name it with --masks")
        mask = datasets.read_picture(view.image, "LA")[..., 1] > 127
    else:
        mask = datasets.read_mask(mask_source)
    if mask.shape != image.shape[:2]:
        raise UserError(f"{mask_source}: {datasets.says_size(mask.shape)}, but its photograph {view.image.name} is "
                        f"{datasets.says_size(image.shape)}; a mask has its photograph's size")
    intrinsics = view.intrinsics
    if view.size and view.size != image.shape[1::-1]:
        scale = np.divide(image.shape[1::-1], view.size)
        if abs(scale[0] / scale[1] - 1) > 0.02:
            raise UserError(f"{view.image}: {datasets.says_size(image.shape)}, but its camera is for "
                            f"{view.size[0]}x{view.size[1]}; give the photographs that the cameras were made from")
        shift = (scale - 1) / 2  # pixel centres are at integers, before and after
        intrinsics = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]], [0, 0, 1]]) @ intrinsics
    if view.distortion:
        image = undistorted(image, intrinsics, view)
        mask = undistorted(mask.astype(np.uint8) * 255, intrinsics, view) > 127
    return image, mask, intrinsics


def undistorted(picture, intrinsics, view):
    """Return a picture as a pinhole camera of the same intrinsics would have taken it; black where it saw nothing."""
    coefficients = np.array(view.distortion)
    if view.fisheye:
        return cv2.fisheye.undistortImage(picture, intrinsics, coefficients, Knew=intrinsics)
    return cv2.undistort(picture, intrinsics, coefficients)


def background_mask(image, threshold=None):
    """Return the mask (H, W) bool of an object before a dark or uniform background.

    The background's colour is the median along the image's border. The object is what differs from it by more than
    `threshold` grey levels in some channel (None: by the spread along the border); then specks and gaps of a few
    pixels and small holes are closed and pieces below a tenth of the largest dropped.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, max(image.shape[:2]) / 1500)).astype(np.float32)
    width = max(1, min(image.shape[:2]) // 40)
    border = np.concatenate([side.reshape(-1, 3) for side in (smooth[:width], smooth[-width:], smooth[:, :width],
                                                              smooth[:, -width:])])
    colour = np.median(border, axis=0)
    if threshold is None:  # of the border's pixels a quarter may be the object
        threshold = 8 + 2 * np.percentile(np.abs(border - colour).max(axis=1), 75)
    mask = (np.abs(smooth - colour).max(axis=2) > threshold).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 + 2 * (max(image.shape[:2]) // 800),) * 2)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc) > 0
    mask = skimage.morphology.remove_small_holes(mask, mask.size // 1000)
    labels = skimage.measure.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.1 * sizes.max()))[labels]


def look(name, image, mask, intrinsics, pose):
    """Return what is kept of a view, shrunk."""
    factor = -(-max(mask.shape) // SMALL)
    points = cv2.findNonZero(mask.astype(np.uint8))
    corners = np.zeros((0, 2)) if points is None else cv2.convexHull(points)[:, 0].astype(np.float64)
    return Look(name, datasets.shrink_image(image, factor), datasets.shrink_mask(mask, factor),
                datasets.shrink_intrinsics(intrinsics, factor), pose, (corners - (factor - 1) / 2) / factor)


# --- the visual hull and the unit sphere ------------------------------------------------------------------------------

def project(points, view):
    """Return the pixels (N, 2) at which a Look sees world points (N, 3), and their depths (N,)."""
    local = (points - view.pose[:3, 3]) @ view.pose[:3, :3]
    pixels = local @ view.intrinsics.T
    depth = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return pixels[:, :2] / pixels[:, 2:], depth


def carve(points, reach, views, most_misses):
    """Count for each point (N, 3) the views in whose frame it is and those whose mask it meets; both (N,).

    reach: a point meets a mask that is no farther than the image of this length. Points with more misses than
    most_misses are given up.
    """
    seen, met, alive = np.zeros(len(points), int), np.zeros(len(points), int), np.arange(len(points))
    for view in views:
        pixels, depth = project(points[alive], view)
        height, width = view.mask.shape
        framed = (depth > 0) & (pixels > -0.5).all(axis=1) & (pixels < (width - 0.5, height - 0.5)).all(axis=1)
        u, v = np.rint(pixels[framed]).astype(int).T
        away = cv2.distanceTransform((~view.mask).astype(np.uint8), cv2.DIST_L2, 5)
        near = away[v, u] * depth[framed] <= reach * view.intrinsics[0, 0]
        seen[alive[framed]] += 1
        met[alive[framed][near]] += 1
        alive = alive[seen[alive] - met[alive] <= most_misses]
    return seen, met


def grid(low, high, cells):
    """Return the points (N, 3) of a cubic grid over the box from low to high (3,), and its spacing."""
    spacing = (high - low).max() / cells
    axes = [np.arange(a + spacing / 2, b + spacing / 2, spacing) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3), spacing


def visual_hull(views, cells=FINE):
    """Return the points (N, 3) of the visual hull of some Looks, on a grid, and its spacing; no points: it is empty.

    It is what lies in every mask, but for one in 12 of the views (masks err; IDR's authors ask for 45 of 49), and in
    the frame of half the views at least.
    """
    usable = [view for view in views if view.mask.any()]
    misses, least = len(usable) // 12, max(2, (len(usable) + 1) // 2)
    centre, half = first_region(usable)

    def hull_in(low, high, cells, slack):
        points, spacing = grid(low, high, cells)
        seen, met = carve(points, slack * spacing, usable, misses)
        return points[(seen - met <= misses) & (seen >= least)], spacing

    for _ in range(5):  # larger, while the hull reaches the sides
        points, spacing = hull_in(centre - half, centre + half, COARSE, 0.9)
        if not len(points) or np.abs(points - centre).max() < half - spacing:
            break
        half *= 1.6
    if not len(points) or cells <= COARSE:
        return points, spacing
    return hull_in(points.min(axis=0) - spacing, points.max(axis=0) + spacing, cells, 0.5)


def first_region(views):
    """Return the point (3,) nearest to the rays through the masks' centres, and how far the masks reach from there."""
    origins, directions = np.stack([view.pose[:3, 3] for view in views]), []
    for view in views:
        v, u = np.nonzero(view.mask)
        directions.append(helper.pixel_rays([(u.mean(), v.mean())], view.intrinsics, view.pose)[1][0])
    across = np.eye(3) - np.einsum("ni,nj->nij", directions, directions).astype(np.float64)
    centre = np.linalg.lstsq(across.sum(axis=0), np.einsum("nij,nj->i", across, origins), rcond=None)[0]
    reaches = [np.ptp(view.corners, axis=0).max() / 2 / view.intrinsics[0, 0] for view in views]
    return centre, 1.2 * np.median(reaches * np.linalg.norm(origins - centre, axis=1)) + 1e-9


def enclosing_sphere(points, views):
    """Return the centre (3,) and radius of the sphere that becomes the unit sphere.

    As IDR's authors do: the hull's centroid, and 3 times its points' mean distance from there. Larger where the hull
    or, by up to a half, the masks reach beyond.
    """
    centre = points.mean(axis=0)
    away = np.linalg.norm(points - centre, axis=1)
    radius = max(3 * away.mean(), 1.1 * away.max())
    reached = max(ray_distances(view, view.corners, centre).max(initial=0) for view in views)
    return centre, max(radius, 1.01 * reached) if reached < 1.5 * radius else radius


def ray_distances(view, pixels, centre=(0, 0, 0)):
    """Return how far the rays (N,) of a Look's pixels (N, 2) pass from a point."""
    origin, directions = helper.pixel_rays(pixels, view.intrinsics, view.pose)
    offset = np.asarray(centre) - view.pose[:3, 3]
    along = np.maximum(directions @ offset, 0)
    return np.linalg.norm(offset - along[:, None] * directions, axis=1)


def normalised(views, centre, radius):
    """Return Looks with their poses in the coordinates in which that sphere is the unit sphere."""
    poses = [view.pose.copy() for view in views]
    for pose in poses:
        pose[:3, 3] = (pose[:3, 3] - centre) / radius
    return [view._replace(pose=pose) for view, pose in zip(views, poses)]


def silhouette(points, spacing, view):
    """Return the image (h, w) bool of grid points (N, 3) in a Look."""
    pixels, depth = project(points, view)
    height, width = view.mask.shape
    pixels = np.rint(pixels[depth > 0])
    u, v = pixels[(pixels >= 0).all(axis=1) & (pixels < (width, height)).all(axis=1)].astype(int).T
    shown = np.zeros((height, width), np.uint8)
    shown[v, u] = 1
    cell = int(np.ceil(spacing * view.intrinsics[0, 0] / np.median(depth))) + 1 if len(u) else 1
    return cv2.morphologyEx(shown, cv2.MORPH_CLOSE, np.ones((min(cell, 99),) * 2, np.uint8)) > 0


def agreements(points, spacing, views):
    """Return for each Look the share of the union of its mask and the hull's silhouette that both have (N,)."""
    shares = []
    for view in views:
        outline = silhouette(points, spacing, view)
        shares.append((outline & view.mask).sum() / max(1, (outline | view.mask).sum()))
    return np.array(shares)


# --- judging ----------------------------------------------------------------------------------------------------------

def judge_masks(views):
    """Return the Findings on each view's mask by itself."""
    findings = []
    for index, view in enumerate(views):
        edges = [name for name, edge in (("upper", view.mask[0]), ("lower", view.mask[-1]), ("left", view.mask[:, 0]),
                                         ("right", view.mask[:, -1])) if edge.any()]
        if not view.mask.any():
            findings.append(Finding("the mask is empty; the object must be white, more than half of 255, else leave "
                                    "the view out", index))
        elif len(edges) == 4 and view.mask.mean() > 0.5:
            findings.append(Finding("the mask covers the image's border all around; the object must be white and the "
                                    "background black", index))
        elif edges:
            findings.append(Finding(f"the mask touches the {' and '.join(edges)} border; the object is cut off there, "
                                    "better frame it whole", index, wrong=False))
    return findings


def judge_agreement(shares, views):
    """Return the Findings on cameras and masks that contradict one another; shares: agreements, None for no hull."""
    median = 0.0 if shares is None else np.median(shares)
    if median >= AGREE:
        return [Finding(f"mask and hull share only {shares[i]:.0%} of their union; this view's camera or mask "
                        "contradicts the others'", i) for i in range(len(views))
                if shares[i] < min(AGREE, median - 0.1) and views[i].mask.any()]
    text = ("no point of space lies in the masks of enough views" if shares is None else
            f"the visual hull and the masks share only {median:.0%} of their union in the median view")
    return [Finding(f"{text}; {explanation(views)}")]


def explanation(views):
    """Return a guess, tried out, at why cameras and masks contradict one another."""
    usable = [view for view in views if view.mask.any()]
    chosen = usable[::-(-len(usable) // 24)]
    guesses = [(f"without view {views.index(left)} ({left.name}) they agree: its camera or mask is wrong",
                [view for view in usable if view is not left]) for left in usable if len(usable) <= 12]
    for text, turn in (("with y and z of the cameras turned round they agree: the poses have OpenGL's axes (y up, z "
                        "backwards), wanted are y down, z into the scene", (1, -1, -1)),
                       ("with x and y of the cameras turned round they agree: the images or the axes are upside down",
                        (-1, -1, 1)),
                       ("with x and z of the cameras turned round they agree: z must point into the scene", (-1, 1, -1))):
        guesses.append((text, [view._replace(pose=view.pose @ np.diag(turn + (1.0,))) for view in chosen]))
    guesses.append(("with the poses inverted they agree: world to camera was taken for camera to world, or the reverse",
                    [view._replace(pose=np.linalg.inv(view.pose)) for view in chosen]))
    guesses.append(("with black and white of the masks exchanged they agree",
                    [view._replace(mask=~view.mask) for view in chosen if not view.mask.all()]))
    for text, changed in guesses:
        if len(changed) > 1:
            points, spacing = visual_hull(changed, COARSE)
            if len(points) and np.median(agreements(points, spacing, changed)) > 0.75:
                return text
    return "look for a wrong order of images, masks and cameras, other axes, or intrinsics of another image size"


def judge_sphere(points, views):
    """Return the Findings on normalised Looks and their hull: whether the unit sphere holds the object, not the cameras.

    points: of the hull (N, 3), none where there is no trustworthy one.
    """
    findings = []
    renew = "make the scene anew with prepare.py, which finds the sphere, or mend scale_mat"
    for index, view in enumerate(views):
        centre, axis = view.pose[:3, 3], view.pose[:3, 2]
        missing = ray_distances(view, np.argwhere(view.mask)[:, ::-1]) > 1 if view.mask.any() else np.zeros(1, bool)
        if axis @ centre > 1:
            findings.append(Finding("the unit sphere is behind the camera; z must point into the scene", index))
        elif np.linalg.norm(centre) < 1:
            findings.append(Finding("the camera is inside the unit sphere; tracing starts outside it: " + renew, index))
        elif missing.mean() > 0.01:
            findings.append(Finding(f"{missing.mean():.0%} of the masked pixels' rays miss the unit sphere; clean the "
                                    "mask of specks, or " + renew, index))
        elif len(view.corners) and ray_distances(view, view.corners).max() > 1:
            findings.append(Finding("some masked pixels' rays miss the unit sphere", index, wrong=False))
    if len(points):
        away = np.linalg.norm(points, axis=1)
        if away.max() > 1.05:
            findings.append(Finding(f"the visual hull reaches {away.max():.2f} from the centre of the unit sphere; "
                                    + renew))
        elif away.max() < 0.25:
            findings.append(Finding(f"the visual hull reaches only {away.max():.2f} from the centre of the unit sphere, "
                                    "so training starts far from it; " + renew))
    return findings


def say(findings, views):
    """Print the findings, one line each; what holds of several views is said once."""
    for text, wrong in dict.fromkeys((finding.text, finding.wrong) for finding in findings):
        which = [finding.view for finding in findings if finding.text == text]
        names = ", ".join(str(i) for i in which[:12]) + (f" and {len(which) - 12} more" if len(which) > 12 else "")
        where = "" if which[0] < 0 else (f"view {names} ({views[which[0]].name}): " if len(which) == 1 else
                                         f"views {names}: ")
        print(f"{'wrong' if wrong else 'notice'}: {where}{text}", file=sys.stderr)


# --- the picture ------------------------------------------------------------------------------------------------------

ORANGE, WHITE, BLUE, RED = (255, 140, 20), (255, 255, 255), (70, 150, 255), (230, 40, 40)


def draw(path, title, views, points, spacing, findings, most=30):
    """Draw normalised Looks: their cameras around the unit sphere, the hull (N, 3), and outlines over photographs."""
    from matplotlib.figure import Figure
    wrong = {finding.view for finding in findings if finding.wrong}
    shown = sorted(sorted(range(len(views)), key=lambda i: (i not in wrong, (i * 7919) % len(views)))[:most])
    sheet = contact_sheet(views, shown, points, spacing, wrong)
    figure = Figure(figsize=(15, 15 * 0.64 * sheet.shape[0] / sheet.shape[1] + 0.9), dpi=80)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    height = 1 - 0.6 / figure.get_figheight()
    for place, (elevation, azimuth) in enumerate(((20, -60), (88, -90))):
        axes = figure.add_axes((0.0, height * (0.5 - 0.5 * place), 0.35, 0.5 * height), projection="3d")
        draw_cameras(axes, views, points, wrong)
        axes.view_init(elevation, azimuth)
    axes = figure.add_axes((0.35, 0.005, 0.645, height - 0.01))
    axes.imshow(sheet, interpolation="lanczos")
    axes.set_axis_off()
    with helper.replacing(path) as temporary:
        figure.savefig(temporary)


def contact_sheet(views, shown, points, spacing, wrong):
    """Return the shown Looks in one image, with the outlines of mask, hull and unit sphere."""
    tiles, columns = [], int(np.ceil(np.sqrt(1.3 * len(shown))))
    width = 1200 // columns
    ratio = max(views[i].mask.shape[0] / views[i].mask.shape[1] for i in shown)
    for index in shown:
        view = views[index]
        scale = width / view.mask.shape[1]
        tile = np.full((int(np.ceil(width * ratio)) + 20, width, 3), 255, np.uint8)
        picture = cv2.resize(view.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        outlines = [(view.mask, WHITE, 2)]
        if len(points):
            outlines.append((silhouette(points, spacing, view), ORANGE, 2))
        outlines.append((sphere_pixels(view), BLUE, 1))
        for mask, colour, thickness in outlines:
            large = cv2.resize(mask.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC) > 0.5
            lines = cv2.findContours(large.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
            cv2.drawContours(picture, lines, -1, colour, thickness, cv2.LINE_AA)
        ink = RED if index in wrong else (0, 0, 0)
        if index in wrong:
            cv2.rectangle(picture, (0, 0), (picture.shape[1] - 1, picture.shape[0] - 1), RED, 5)
        tile[20:20 + picture.shape[0], :picture.shape[1]] = picture[:tile.shape[0] - 20]
        cv2.putText(tile, f"{index}: {view.name}"[:width // 8], (2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, ink, 1,
                    cv2.LINE_AA)
        tiles.append(cv2.copyMakeBorder(tile, 0, 2, 2, 2, cv2.BORDER_CONSTANT, value=WHITE))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])


def sphere_pixels(view):
    """Return the pixels (h, w) bool of a normalised Look whose rays meet the unit sphere."""
    height, width = view.mask.shape
    return (ray_distances(view, helper.pixel_grid(height, width)) <= 1).reshape(height, width)


def draw_cameras(axes, views, points, wrong):
    """Draw cameras, each with its image's frame, a tip on its upper side and its axis, around the unit sphere."""
    from matplotlib import colormaps
    from mpl_toolkits.mplot3d.art3d import Line3DCollection
    angle, centres = np.linspace(0, 2 * np.pi, 60), np.stack([view.pose[:3, 3] for view in views])
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle])
        axes.plot(*circle[list(order)], color=np.divide(BLUE, 255), linewidth=0.8)
    if len(points):
        some = points[::max(1, len(points) // 2500)]
        axes.scatter(*some.T, s=2, color=np.divide(ORANGE, 255), alpha=0.35, linewidths=0)
    distance = np.median(np.linalg.norm(centres, axis=1))
    for index, view in enumerate(views):
        height, width = view.mask.shape
        frame = np.array([(0, 0), (width, 0), (width, height), (0, height), (width / 2, -0.35 * height)])
        local = np.column_stack([frame, np.ones(5)]) @ np.linalg.inv(view.intrinsics).T
        depth = 0.16 * distance / np.abs(local[:4, :2]).max() / 2
        corners = depth * local @ view.pose[:3, :3].T + view.pose[:3, 3]
        centre, ahead = view.pose[:3, 3], view.pose[:3, 3] + view.pose[:3, 2] * np.linalg.norm(view.pose[:3, 3])
        lines = [(centre, corner) for corner in corners[:4]]
        lines += [corners[[a, b]] for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 4), (4, 1))]
        bad = index in wrong
        colour = np.divide(RED, 255) if bad else colormaps["viridis"](index / max(1, len(views) - 1))[:3]
        axes.add_collection3d(Line3DCollection(lines, colors=[colour], linewidths=1.6 if bad else 0.9))
        axes.add_collection3d(Line3DCollection([(centre, ahead)], colors=[colour], linewidths=0.4, linestyles="dotted"))
        if bad or index % -(-len(views) // 12) == 0:
            axes.text(*(1.08 * centre), str(index), fontsize=8, color=colour)
    reach = max(1.0, np.percentile(np.linalg.norm(centres, axis=1), 95)) * 0.85
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach), box_aspect=(1, 1, 1))
    axes.set_axis_off()


# --- the two commands -------------------------------------------------------------------------------------------------

def picture_path(scene):
    return Path(f"prepare_{Path(scene).absolute().name}.png")


def understand(views, picture, sphere=None):
    """Find hull and sphere of some Looks, judge them, say the findings and draw the picture.

    sphere: the centre (3,) and radius of the unit sphere, None to find it. Returns centre, radius and the findings;
    a finding that concerns the whole scene means that centre and radius are not to be trusted.
    """
    findings = judge_masks(views)
    usable = [view for view in views if view.mask.any()]
    if len(usable) < 2:
        say(findings, views)
        raise UserError("two views with masks are needed at least; see the lines above")
    points, spacing = visual_hull(views)
    findings += judge_agreement(agreements(points, spacing, views) if len(points) else None, views)
    if sphere is None and len(points):
        sphere = enclosing_sphere(points, usable)
    elif sphere is None:  # for the picture alone
        sphere = first_region(usable)
    centre, radius = sphere
    units, points, spacing = normalised(views, centre, radius), (points - centre) / radius, spacing / radius
    if not any(finding.view < 0 for finding in findings):
        findings += judge_sphere(points, units)
    say(findings, views)
    count = sum(finding.wrong for finding in findings)
    draw(picture, f"{picture.stem[8:]}: {len(views)} views, {count or 'nothing'} wrong.  White: mask.  Orange: visual "
         "hull of all masks.  Blue: unit sphere.", units, points, spacing, findings)
    return centre, radius, findings


def write_scene(folder, views, sources, threshold, downscale):
    """Write image/ and mask/ of the views to an empty folder; returns their Looks and their intrinsics (N, 3, 3)."""
    (folder / "image").mkdir()
    (folder / "mask").mkdir()
    looks, matrices, digits = [], [], max(3, len(str(len(views) - 1)))
    for index, (view, source) in enumerate(zip(tqdm(views, unit="view", dynamic_ncols=True), sources)):
        image, mask, intrinsics = read_view(view, source, threshold)
        name = f"{index:0{digits}d}_" + re.sub(r"[^A-Za-z0-9.-]", "_", view.image.stem)[:100]  # sorts as the views do
        datasets.check_downscale(image.shape, downscale, view.image)
        if looks and image.shape[:2] != shape:  # noqa: F821 (it is that of the first view)
            raise UserError(f"{view.image}: {datasets.says_size(image.shape)}, but {views[0].image.name} is "
                            f"{datasets.says_size(shape)}; all photographs must have one size")  # noqa: F821
        shape = image.shape[:2]
        image, mask = datasets.shrink_image(image, downscale), datasets.shrink_mask(mask, downscale)
        if downscale == 1 and not view.distortion:
            shutil.copyfile(str(view.image), str(folder / "image" / (name + view.image.suffix.lower())))
        else:
            helper.write_image(folder / "image" / (name + ".png"), image)
        helper.write_image(folder / "mask" / (name + ".png"), mask.astype(np.uint8) * 255)
        matrices.append(datasets.shrink_intrinsics(intrinsics, downscale))
        looks.append(look(view.image.name, image, mask, matrices[-1], view.pose))
    return looks, matrices


def prepare(args):
    """Make the scene args.output."""
    views, what = cameras_in.read_views(args.input, args.images)
    root = Path(args.input) if Path(args.input).is_dir() else Path(args.input).parent
    missing = [view.image for view in views if not view.image.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such photograph ({len(missing)} of {len(views)} are missing); say with --images "
                        "where they are")
    sources = mask_sources(views, args.masks, root)
    print(f"read {what}; masks: {sources[0] if isinstance(sources[0], str) else sources[0].parent}")
    with helper.new_folder(args.output) as folder:
        looks, intrinsics = write_scene(folder, views, sources, args.threshold, args.downscale)
        picture = picture_path(args.output)
        centre, radius, findings = understand(looks, picture)
        fatal = [finding for finding in findings if finding.wrong and (finding.view < 0 or "empty" in finding.text)]
        if fatal:
            raise UserError(f"{args.output}: not written, as {fatal[0].text}; see {picture}")
        cameras, scale_mat = {}, np.diag((radius, radius, radius, 1.0))
        scale_mat[:3, 3] = centre
        for index, view in enumerate(views):
            world_mat = np.linalg.inv(view.pose)
            world_mat[:3] = intrinsics[index] @ world_mat[:3]
            cameras[f"world_mat_{index}"], cameras[f"scale_mat_{index}"] = world_mat, scale_mat
        np.savez(str(folder / "cameras.npz"), **cameras)
        datasets.load_cameras(folder / "cameras.npz", len(views))
    print(f"{args.output}: {len(views)} views; the unit sphere lies at {np.array2string(centre, precision=4)}, radius "
          f"{radius:.4g}; look at {picture}")


def check(scene):
    """Judge the scene in a folder; raise UserError where something is wrong."""
    path = Path(scene)
    image_files, mask_files = datasets.scene_files(path)
    matrices = datasets.read_matrices(path / "cameras.npz", len(image_files))
    looks = []
    for index, (image_file, mask_file) in enumerate(zip(tqdm(image_files, unit="view", dynamic_ncols=True), mask_files)):
        try:
            k, pose = helper.decompose_projection(matrices[f"world_mat_{index}"] @ matrices[f"scale_mat_{index}"])
        except ValueError as error:
            raise UserError(f"{path / 'cameras.npz'}: the camera of view {index} cannot be used: {error}")
        image, mask = datasets.read_image(image_file), datasets.read_mask(mask_file)
        if mask.shape != image.shape[:2]:
            raise UserError(f"{mask_file}: {datasets.says_size(mask.shape)}, but its image {image_file.name} is "
                            f"{datasets.says_size(image.shape)}; a mask has its image's size")
        looks.append(look(image_file.name, image, mask, k, pose))
    findings = understand(looks, picture_path(scene), sphere=(np.zeros(3), 1.0))[2]
    count = len({finding.text for finding in findings if finding.wrong})
    if count:
        raise UserError(f"{scene}: {count} thing{'s' * (count > 1)} to mend, in the lines above; see "
                        f"{picture_path(scene)}")
    datasets.load_scene(path, max(1, min(looks[0].mask.shape) // 8))
    print(f"{scene}: {len(looks)} views, nothing wrong; look at {picture_path(scene)}")


def main():
    parser = argparse.ArgumentParser(description="Make a scene from photographs with cameras and masks, or judge one.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"Cameras are {cameras_in.FORMATS}.")
    parser.add_argument("input", help="the folder of the photographs and cameras, or a camera file; with --check a scene")
    parser.add_argument("--output", help="the scene's folder, new or empty")
    parser.add_argument("--check", action="store_true", help="write nothing but the picture; judge the scene in `input`")
    parser.add_argument("--images", metavar="FOLDER", help="the photographs, if not where the format has them")
    parser.add_argument("--masks", metavar="FOLDER|alpha|background", help="where the masks come from; by default the "
                        "folder masks/ or mask/, else the alpha channel; background: what differs from the border")
    parser.add_argument("--threshold", type=float, help="of --masks background, in grey levels; by default found")
    parser.add_argument("--downscale", type=int, default=1, help="shrink the images by this whole factor")
    args = parser.parse_args()
    if args.check:
        return check(args.input)
    if args.output is None:
        raise UserError("--output is missing: the folder for the scene, such as data/mine (or --check a scene)")
    if args.downscale < 1:
        raise UserError(f"--downscale must be 1 or more, not {args.downscale}")
    if args.threshold is not None and not 0 < args.threshold < 255:
        raise UserError(f"--threshold must be between 0 and 255, not {args.threshold}")
    prepare(args)


if __name__ == "__main__":
    helper.run(main)
