"""The overview picture of a scene: its cameras around the unit sphere, and outlines over its photographs.

The outlines of hull and mask coincide only if cameras, masks and their order are right.
"""
import warnings

import cv2
import numpy as np

import helper
from files import writing
from scenes.checks import NOTICE
from scenes.visual_hull import agreements, ray_distances, silhouette

MOST_TILES = 400    # photographs shown
COLUMNS, SHEET = 5, 1250    # of the photographs: at most so many in a row, and the row's pixels
SIDE = 680          # pixels of the cameras' drawings, on the left
ORANGE, WHITE, BLUE, RED = (255, 140, 20), (255, 255, 255), (70, 150, 255), (230, 40, 40)


def draw(path, title, looks, hull, findings):
    """Write the picture of normalised Looks and their Hull to `path`.

    The views come in the order of their agreement with the hull, the worst first; those with findings, notices apart,
    are red.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed where nothing is drawn
    wrong = {finding.view for finding in findings if finding.level != NOTICE}
    shares = agreements(hull, looks) if len(hull.points) else np.zeros(len(looks))
    shown = sorted(range(len(looks)), key=lambda index: (shares[index], index not in wrong))[:MOST_TILES]
    sheet = contact_sheet(looks, shown, shares, hull, wrong)
    top, width, height = 60, SIDE + sheet.shape[1], max(sheet.shape[0], 2 * SIDE)
    figure = Figure(figsize=(width / 100, (top + height) / 100), dpi=100)
    figure.suptitle(printable(title), fontsize=13, x=0.01, y=1 - 20 / (top + height), ha="left", va="top",
                    parse_math=False)
    for place, (name, elevation, azimuth) in enumerate((("from the side", 18, -60), ("from above", 89.9, -90))):
        low = height - (place + 1) * SIDE
        axes = figure.add_axes((0, low / (top + height), SIDE / width, SIDE / (top + height)), projection="3d")
        draw_cameras(axes, looks, hull.points, wrong)
        axes.view_init(elevation, azimuth)
        figure.text(0.01, (low + SIDE - 10) / (top + height), name, fontsize=10, va="top")
    axes = figure.add_axes((SIDE / width, (height - sheet.shape[0]) / (top + height), sheet.shape[1] / width,
                            sheet.shape[0] / (top + height)))
    axes.imshow(sheet, interpolation="nearest")     # pixel by pixel
    axes.set_axis_off()
    with writing.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some letters of a name; it draws boxes
        figure.savefig(temporary)


# --- the photographs --------------------------------------------------------------------------------------------------

def contact_sheet(looks, shown, shares, hull, wrong):
    """Return an image (H, W, 3) uint8 of the Looks with the indices `shown`, in rows.

    shares: of all Looks, the agreement of mask and hull, from 0 to 1. wrong: the indices in red.
    """
    tiles, ratio = [], max(looks[i].mask.shape[0] / looks[i].mask.shape[1] for i in shown)
    fits = [n for n in range(1, COLUMNS) if -(-len(shown) // n) * (SHEET / n * ratio + 20) <= 2 * SIDE]
    columns = fits[0] if fits else COLUMNS
    width = SHEET // columns - 2
    for index in shown:
        look = looks[index]
        tile = np.full((int(np.ceil(width * ratio)) + 20, width, 3), 255, np.uint8)
        picture = outlined(look, hull, width)
        ink = RED if index in wrong else (0, 0, 0)
        if index in wrong:
            cv2.rectangle(picture, (0, 0), (picture.shape[1] - 1, picture.shape[0] - 1), RED, 5)
        tile[20:20 + picture.shape[0], :picture.shape[1]] = picture[:tile.shape[0] - 20]
        name = printable(f"{index}: {100 * shares[index]:.0f} %  {look.name}")[:width // 8]
        cv2.putText(tile, name, (2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, ink, 1, cv2.LINE_AA)
        tiles.append(cv2.copyMakeBorder(tile, 0, 2, 2, 2, cv2.BORDER_CONSTANT, value=WHITE))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])


def outlined(look, hull, width):
    """Return a Look's image, `width` pixels wide, with the outlines of mask, hull and unit sphere."""
    scale = width / look.mask.shape[1]
    picture = cv2.resize(look.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    outlines = [(look.mask, WHITE, 2)]
    if len(hull.points):
        outlines.append((silhouette(hull, look), ORANGE, 2))
    outlines.append((sphere_pixels(look), BLUE, 1))
    for mask, colour, thickness in outlines:
        large = cv2.resize(mask.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC) > 0.5
        lines = cv2.findContours(large.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(picture, lines, -1, colour, thickness, cv2.LINE_AA)
    return picture


def sphere_pixels(look):
    """Return the mask (h, w) bool of the unit sphere in a normalised Look."""
    height, width = look.mask.shape
    return (ray_distances(look, helper.pixel_grid(height, width)) <= 1).reshape(height, width)


def printable(text):
    """Return a string with ? for what no font can draw, such as bytes of a name in another encoding."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- the cameras ------------------------------------------------------------------------------------------------------

def draw_cameras(axes, looks, points, wrong):
    """Draw the cameras, the unit sphere and the hull's points (N, 3) into 3D axes. wrong: the indices in red.

    A camera is a pyramid with a tip on the upper side of its image and a dotted line along its axis.
    """
    from matplotlib import colormaps
    from mpl_toolkits.mplot3d.art3d import Line3DCollection
    upright = upright_rotation(looks)
    poses = np.stack([look.pose[:3] for look in looks])
    poses[:, :, 3] /= np.maximum(1, np.linalg.norm(poses[:, :, 3], axis=1) / 6)[:, None]  # drawn at distance 6 at most
    poses, points = upright @ poses, points @ upright.T
    angle, distance = np.linspace(0, 2 * np.pi, 60), np.median(np.linalg.norm(poses[:, :, 3], axis=1))
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle])
        axes.plot(*circle[list(order)], color=np.divide(BLUE, 255), linewidth=0.9)
    if len(points):
        some = points[::max(1, len(points) // 2500)]
        axes.scatter(*some.T, s=2, color=np.divide(ORANGE, 255), alpha=0.3, linewidths=0)
    for index, (look, pose) in enumerate(zip(looks, poses)):
        bad = index in wrong
        colour = np.divide(RED, 255) if bad else colormaps["viridis"](0.9 * index / max(1, len(looks) - 1))[:3]
        lines_ahead = [(pose[:, 3], pose[:, 3] + pose[:, 2] * np.linalg.norm(pose[:, 3]))]
        axes.add_collection3d(Line3DCollection(camera_lines(look, pose, 0.08 * distance), colors=[colour],
                                               linewidths=1.6 if bad else 0.9))
        axes.add_collection3d(Line3DCollection(lines_ahead, colors=[colour], linewidths=0.6, linestyles="dotted"))
        if bad or index % -(-len(looks) // 12) == 0:
            axes.text(*(1.1 * pose[:, 3]), str(index), fontsize=8, color=colour)
    box = np.concatenate([1.1 * poses[:, :, 3], np.eye(3), -np.eye(3)])
    low, high = box.min(axis=0), box.max(axis=0)
    reach = (high - low).max() / 2
    axes.set(**{f"{name}lim": (middle - reach, middle + reach) for name, middle in zip("xyz", (low + high) / 2)})
    axes.set_box_aspect((1, 1, 1), zoom=1.4)
    axes.set_axis_off()


def camera_lines(look, pose, size):
    """Return the lines, pairs of points (3,), of a camera's pyramid. pose: (3, 4), camera to the drawing's coordinates;
    size: half of the frame's longest side, about."""
    height, width = look.mask.shape
    frame = np.array([(0, 0), (width, 0), (width, height), (0, height), (width / 2, -0.4 * height)])
    local = np.column_stack([frame, np.ones(5)]) @ np.linalg.inv(look.intrinsics).T
    corners = size / np.abs(local[:4, :2]).max() * local @ pose[:, :3].T + pose[:, 3]
    lines = [(pose[:, 3], corner) for corner in corners[:4]]
    return lines + [corners[[a, b]] for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 4), (4, 1))]


def upright_rotation(looks):
    """Return the rotation (3, 3) to coordinates in which z is up and the cameras look, on average, along y."""
    poses = np.stack([look.pose for look in looks])
    up = helper.upright(poses)
    side = helper.rightwards(up, poses[:, :3, 3].mean(axis=0))
    return np.stack([side, np.cross(up, side), up])
