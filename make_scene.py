"""Make the embedded scene, a teapot with an exactly known surface, in the data convention of IDR's authors.

    python make_scene.py --output data/demo --views 32 --held-out 6 --size 96

writes image/, mask/ and cameras.npz (training views first, then held-out ones), surface.ply (100,000 points of the
exact surface with normals, in the unit sphere's coordinates) and scene.json (the settings). The same settings give the
same bytes. `--camera-noise 3 3` adds cameras_linear_init.npz, the same cameras with noise.

    python make_scene.py --floor --output data/table
    python make_scene.py --floor --video walk.mp4

make pictures such as users take: a painted teapot on a floor before a busy background, photographed or filmed on a walk
around it. `--floor white`, `black` and `clutter` are other places.
"""
import argparse
import json
from functools import partial
from pathlib import Path

import cv2
import imageio.v2 as imageio
import numpy as np
import skimage.measure
import tqdm
import trimesh
from scipy.spatial.transform import Rotation

import helper
import ray_tracer
from files import folders, writing
from scenes import surroundings

# --- the object: balls swept along discs, a circle and lines; z is up -------------------------------------------------

def lengths(vectors):
    """Return the lengths (N,) of vectors (N, 2 or 3), five times as fast as np.linalg.norm."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def from_disc(points, centre, width, radius):
    """Return the vectors (N, 3) from the nearest points of a horizontal disc to `points` (N, 3), and the ball's radius.

    A part is the union of balls about the points of its skeleton, here a disc of radius `width`. So |vector| - radius
    is its exact signed distance.
    """
    offsets = points - np.array(centre, points.dtype)
    across = lengths(offsets[:, :2])[:, None]
    offsets[:, :2] *= 1 - np.minimum(1, width / np.maximum(across, 1e-12))
    return offsets, radius


def from_circle(points, centre, width, radius):
    """Return the same as from_disc for a circle of radius `width` in the x-z plane."""
    offsets = points - np.array(centre, points.dtype)
    across = lengths(offsets[:, ::2])[:, None]
    offsets[:, ::2] *= 1 - width / np.maximum(across, 1e-12)
    return offsets, radius


def from_line(points, start, end, start_radius, end_radius):
    """Return the same as from_disc, but with radii (N,), for a line along which the radius changes linearly.

    That is a cone with round ends.
    """
    axis = np.subtract(end, start)
    length = np.linalg.norm(axis)
    axis, slope = (axis / length).astype(points.dtype), (start_radius - end_radius) / length
    offsets = points - np.array(start, points.dtype)
    along = np.einsum("ij,j->i", offsets, axis)      # offsets @ axis, without BLAS's threads
    lateral = lengths(offsets - along[:, None] * axis)
    along -= lateral * slope / np.sqrt(1 - slope ** 2)  # of the ball whose surface is nearest
    along = np.clip(along, 0, length)
    return offsets - along[:, None] * axis, start_radius - along * slope


TEAL, CREAM, GOLD, RED = (0.07, 0.50, 0.55), (0.95, 0.87, 0.72), (0.96, 0.70, 0.16), (0.84, 0.20, 0.16)
AXIS = 0.05  # x of the pot's axis
PARTS = (  # shape, its arguments, colour
    (from_disc, ((AXIS, 0, -0.05), 0.13, 0.42), CREAM),  # body
    (from_disc, ((AXIS, 0, -0.45), 0.24, 0.06), GOLD),  # foot
    (from_disc, ((AXIS, 0, 0.34), 0.21, 0.07), GOLD),  # lid
    (from_disc, ((AXIS, 0, 0.48), 0.0, 0.105), RED),  # its knob
    (from_circle, ((-0.475, 0, 0.02), 0.24, 0.07), RED),  # handle
    (from_line, ((0.36, 0, -0.16), (0.60, 0, 0.02), 0.19, 0.105), TEAL),  # spout
    (from_line, ((0.60, 0, 0.02), (0.675, 0, 0.23), 0.105, 0.075), TEAL),
)
SUN = np.array((0.5, -0.4, 0.77)) / np.linalg.norm((0.5, -0.4, 0.77))  # unit vector towards it
SKY, GROUND = np.array((0.54, 0.58, 0.60)), np.array((0.66, 0.60, 0.52))  # ambient light from above and from below
BACKGROUND = 0.25
OBJECT_RADIUS = 0.79  # the object lies in this sphere, which fills the images
SURFACE_SAMPLES = 100000
DISTANCE = 2.75  # of the cameras from the origin
WALK = 3.0  # the same of the cameras on a floor
SCALE, OFFSET = 250.0, (40.0, -70.0, 620.0)  # radius and centre of the unit sphere in world units, such as millimetres


def part_distances(points):
    """Return the parts' signed distances (parts, N) and the vectors from their skeletons (parts, N, 3)."""
    offsets, radii = zip(*[shape(points, *measures) for shape, measures, _ in PARTS])
    return np.stack([lengths(o) - r for o, r in zip(offsets, radii)]), np.stack(offsets)


def exact_sdf(points):
    """Return the signed distances (N,) float32 of `points` (N, 3), exact on and outside the surface.

    Inside, where parts overlap, it is a bound: the surface may be farther, never nearer.
    """
    return part_distances(points)[0].min(axis=0).astype(np.float32)


def exact_normals(points):
    """Return the normals (N, 3) float32 at `points` (N, 3), the unit gradient of exact_sdf."""
    distances, offsets = part_distances(points)
    normals = offsets[distances.argmin(axis=0), np.arange(len(points))]
    return (normals / lengths(normals)[:, None]).astype(np.float32)


def paint(points):
    """Return the albedo (N, 3) in [0, 1] of the surface at `points` (N, 3). Parts and glaze blend softly."""
    distances = part_distances(points)[0]
    weights = np.exp(-(distances - distances.min(axis=0)) / 0.012)
    colours = np.repeat(np.array([colour for *_, colour in PARTS])[:, None], len(points), axis=1)
    edge = 0.02 + 0.09 * np.sin(5 * np.arctan2(points[:, 1], points[:, 0] - AXIS))  # height of the glaze's edge
    glazed = 1 / (1 + np.exp(-(points[:, 2] - edge) / 0.015))
    colours[0] += glazed[:, None] * (np.array(TEAL) - CREAM)
    return (weights[..., None] * colours).sum(axis=0) / weights.sum(axis=0)[:, None]


def painted(points):
    """Return the albedo (N, 3) of the teapot on a floor: that of `paint` with speckles, so that pictures match."""
    return paint(points) * surroundings.speckles(points)[:, None]


def shade(points, directions, albedo=paint):
    """Return the colour (N, 3) float32 in [0, 1] of surface `points` (N, 3) seen along `directions` (N, 3).

    albedo: a function of the points, `paint` or `painted`.
    Ambient light from sky and ground, less in creases; a sun without cast shadows; its highlight (Blinn, 1977).
    """
    normals = exact_normals(points)
    openness = np.clip(exact_sdf(points + 0.15 * normals) / 0.15, 0, 1)
    ambient = GROUND + (SKY - GROUND) * (0.5 + 0.5 * normals[:, 2:])
    sun = np.maximum(normals @ SUN, 0)
    halfway = SUN - directions
    halfway /= lengths(halfway)[:, None]
    highlight = 0.4 * np.maximum((normals * halfway).sum(axis=1), 0) ** 25 * np.minimum(4 * sun, 1)
    light = ambient * (0.4 + 0.6 * openness)[:, None] + 0.55 * sun[:, None]
    return np.clip(albedo(points) * light + highlight[:, None], 0, 1).astype(np.float32)


def surface_mesh(resolution=128):
    """Return the object as a trimesh.Trimesh, by marching cubes on resolution^3 samples of [-1, 1]^3."""
    axis = np.linspace(-1, 1, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    volume = np.concatenate([exact_sdf(block) for block in np.array_split(grid, 32)])
    volume = volume.reshape(resolution, resolution, resolution)
    vertices, faces, _, _ = skimage.measure.marching_cubes(volume, 0, spacing=3 * (axis[1] - axis[0],))
    return trimesh.Trimesh(vertices - 1, faces)


def surface_samples(count, rng):
    """Return points (count, 3) float32, nearly uniform on the surface, with |sdf| < 1e-4. rng: a numpy Generator."""
    mesh = surface_mesh()
    corners = mesh.triangles[rng.choice(len(mesh.faces), count, p=mesh.area_faces / mesh.area)]
    points = (rng.dirichlet((1, 1, 1), count)[:, None] @ corners)[:, 0].astype(np.float32)
    off = np.arange(count)
    while off.size:  # Newton steps; a point in a crease needs several, between two parts
        points[off] -= exact_sdf(points[off])[:, None] * exact_normals(points[off])
        off = off[np.abs(exact_sdf(points[off])) > 2e-6]
    return points


# --- the cameras: x right, y down, z into the scene; pixel centres at integers ----------------------------------------

def look_at(eye, target, up):
    """Return the pose (4, 4), camera to world, of a camera at `eye` that looks at `target`, all (3,).

    up: a vector that is upwards in the image, not along the view.
    """
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose


def fibonacci_sphere(count):
    """Return unit vectors (count, 3) spread evenly over all directions: the Fibonacci lattice."""
    i = np.arange(count)
    z, angle = 1 - (2 * i + 1) / count, i * np.pi * (3 - np.sqrt(5))
    return np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], axis=1)


def view_directions(views, held_out):
    """Return unit vectors (views + held_out, 3) to the cameras, the held-out ones last, each in the widest gap."""
    directions, candidates = fibonacci_sphere(views), fibonacci_sphere(2000)
    for _ in range(held_out):
        farthest = (candidates @ directions.T).max(axis=1).argmin()
        directions = np.concatenate([directions, candidates[farthest:farthest + 1]])
    return directions


def camera_intrinsics(size):
    """Return K (3, 3) with which the sphere of OBJECT_RADIUS at DISTANCE fills size x size pixels."""
    focal = size / 2 * np.sqrt((DISTANCE / OBJECT_RADIUS) ** 2 - 1)
    return np.array([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]])


def sphere_cameras(views, held_out, size):
    """Return the helper.Cameras of the scene without a floor: all around, the held-out ones last."""
    poses = [look_at(DISTANCE * direction, np.zeros(3), (0, 0, 1) if abs(direction[2]) < 0.99 else (0, 1, 0))
             for direction in view_directions(views, held_out)]
    return [helper.Camera(camera_intrinsics(size), pose, (size, size)) for pose in poses]


def walk_camera(angle, size):
    """Return the helper.Camera of a walk around the object at an angle in radians, once around in 2 pi.

    It is held by hand: height, distance and aim vary smoothly. Images have size x 0.75 size pixels.
    """
    height, away = np.radians(36 + 9 * np.sin(2 * angle + 0.5)), WALK * (1 + 0.06 * np.sin(3 * angle))
    eye = away * np.array((np.cos(height) * np.cos(angle), np.cos(height) * np.sin(angle), np.sin(height)))
    target = np.array((0.05 * np.sin(5 * angle), 0.05 * np.cos(4 * angle), -0.05 + 0.05 * np.sin(7 * angle)))
    shape, focal = (3 * size // 4, size), 1.0 * size
    intrinsics = np.array([[focal, 0, (shape[1] - 1) / 2], [0, focal, (shape[0] - 1) / 2], [0, 0, 1]])
    return helper.Camera(intrinsics, look_at(eye, target, (0.03 * np.sin(2 * angle), 0, 1)), shape)


def walk_cameras(views, held_out, size):
    """Return the helper.Cameras of a walk: `views` in even steps around the object, then others between them."""
    steps = [*np.arange(views), *(np.floor(np.arange(held_out) * views / max(1, held_out)) + 0.5)]
    return [walk_camera(2 * np.pi * step / views, size) for step in steps]


def world_matrices(intrinsics, pose):
    """Return world_mat and scale_mat, both (4, 4): K [R | t] in world units, and the unit sphere to world units.

    intrinsics: (3, 3). pose: (4, 4), camera to the unit sphere's coordinates.
    """
    scale_mat = np.diag((SCALE, SCALE, SCALE, 1.0))
    scale_mat[:3, 3] = OFFSET
    pose = pose.copy()
    pose[:3, 3] = SCALE * pose[:3, 3] + OFFSET
    world_mat = np.linalg.inv(pose)
    world_mat[:3] = intrinsics @ world_mat[:3]
    return world_mat, scale_mat


def disturbed(pose, degrees, percent, rng):
    """Return a pose (4, 4) with random rotation and translation added.

    degrees: root mean square of the angle. percent: that of the translation, of the distance from the origin. rng: a
    numpy Generator.
    """
    noisy = pose.copy()
    turn = Rotation.from_rotvec(rng.normal(0.0, np.radians(degrees) / 3 ** 0.5, 3))
    noisy[:3, :3] = turn.as_matrix() @ pose[:3, :3]
    noisy[:3, 3] += rng.normal(0.0, percent / 100 * np.linalg.norm(pose[:3, 3]) / 3 ** 0.5, 3)
    return noisy


def render(intrinsics, pose, size):
    """Return the image (size, size, 3) and its mask (size, size) of 0 and 255, both uint8, from one ray per pixel."""
    origin, directions = helper.pixel_rays(helper.pixel_grid(size, size), intrinsics, pose)
    t, hit = ray_tracer.trace(exact_sdf, origin, directions, sphere_tracing_steps=200)
    image = np.full((size * size, 3), BACKGROUND, np.float32)
    image[hit] = shade(origin + t[hit, None] * directions[hit], directions[hit])
    image = np.round(255 * image).astype(np.uint8).reshape(size, size, 3)
    return image, np.where(hit, 255, 0).astype(np.uint8).reshape(size, size)


def floor_scene(kind, turned=0.0):
    """Return the teapot in surroundings of a kind, as a surroundings.Scene. turned: see surroundings.Surroundings."""
    around = surroundings.make_surroundings(kind)._replace(turned=turned)
    scene = surroundings.Scene(exact_sdf, partial(shade, albedo=painted), SUN, around)
    return scene._replace(light=surroundings.floor_light(scene))


# --- the scene on disk ------------------------------------------------------------------------------------------------

def write_scene(folder, cameras, render_view, camera_noise):
    """Write the scene to an empty folder. Return the fraction of pixels that show the object.

    cameras: helper.Cameras. render_view: the index and the Camera of a view to its image and mask, as from `render`.
    camera_noise: the degrees and percent of `disturbed`, None for no noisy cameras.
    """
    (folder / "image").mkdir()
    (folder / "mask").mkdir()
    matrices, noisy, covered, rng = {}, {}, [], np.random.default_rng(0)
    digits = max(3, len(str(len(cameras) - 1)))  # names that sort as the views do
    for view, camera in enumerate(tqdm.tqdm(cameras, unit="view", dynamic_ncols=True)):
        image, mask = render_view(view, camera)
        imageio.imwrite(folder / "image" / f"{view:0{digits}d}.png", image)
        imageio.imwrite(folder / "mask" / f"{view:0{digits}d}.png", mask)
        k, pose = camera.intrinsics, camera.pose
        matrices[f"world_mat_{view}"], matrices[f"scale_mat_{view}"] = world_matrices(k, pose)
        if camera_noise:
            pose = disturbed(pose, *camera_noise, rng)
            noisy[f"world_mat_{view}"], noisy[f"scale_mat_{view}"] = world_matrices(k, pose)
        covered.append((mask > 0).mean())
    np.savez(folder / "cameras.npz", **matrices)
    if camera_noise:
        np.savez(folder / "cameras_linear_init.npz", **noisy)
    surface = surface_samples(SURFACE_SAMPLES, np.random.default_rng(0))
    trimesh.Trimesh(surface, vertex_normals=exact_normals(surface), process=False).export(folder / "surface.ply")
    return np.mean(covered)


def write_video(path, kind, size, frames, turntable):
    """Write a video of a walk once around the teapot on a floor, which stands in surroundings of a kind.

    turntable: the camera stands still, and the object turns with a disc under it. Its light turns with it. Some frames
    are blurred, as where a hand moves.
    """
    scene = floor_scene(kind)
    with writing.video_writer(path) as append:
        for frame in tqdm.trange(frames, unit="frame", dynamic_ncols=True):
            angle = 2 * np.pi * frame / frames
            camera = walk_camera(angle, size)
            if turntable:
                camera = camera._replace(pose=turned_pose(walk_camera(0, size).pose, angle))
                scene = scene._replace(around=scene.around._replace(turned=angle))
            image = surroundings.render(scene, camera, np.random.default_rng(frame))[0]
            blur = int(round(size / 40 * max(0, np.sin(2 * np.pi * frame / 17)) ** 4))
            append(image if turntable or not blur else cv2.blur(image, (2 * blur + 1, 1)))


def turned_pose(pose, angle):
    """Return a pose (4, 4) turned about the z axis of the world by an angle in radians."""
    turn = np.eye(4)
    turn[:3, :3] = surroundings.vertical_turn(angle)
    return turn @ pose


def made_already(output, settings):
    """Tell whether `output` holds the scene of these settings. Raise UserError if it holds anything else."""
    if not output.exists():
        return False
    try:
        if not any(output.iterdir()):
            return False
        earlier = json.loads((output / "scene.json").read_text())
    except (OSError, ValueError) as error:
        raise helper.UserError(f"{output}: exists, but this script did not make it; choose another --output") \
            from error
    if earlier != settings:
        raise helper.UserError(f"{output}: made with other settings; choose another --output or remove it")
    return True


def parse_arguments():
    """Return the command line's arguments. Raise UserError for values that are out of range or do not go together."""
    parser = argparse.ArgumentParser(description="Make the embedded scene.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default="data/demo", help="the scene's folder")
    parser.add_argument("--views", type=int, default=32, help="training views, all around")
    parser.add_argument("--held-out", type=int, default=6, help="further views, to evaluate on")
    parser.add_argument("--size", type=int, help="pixels along the longer sides of an image; 96, with --floor 400")
    parser.add_argument("--camera-noise", type=float, nargs=2, metavar=("DEGREES", "PERCENT"),
                        help="also write cameras_linear_init.npz, to train cameras from: the cameras turned by about "
                             "so many degrees and moved by about so many percent of their distance")
    parser.add_argument("--floor", nargs="?", const="textured", choices=surroundings.KINDS,
                        help="put the object, painted, on a floor in a room, and the cameras on a walk around it; "
                             "textured if no place is named")
    parser.add_argument("--video", metavar="FILE", help="with --floor: write only a video (.mp4) of the walk")
    parser.add_argument("--frames", type=int, default=250, help="of the video, 25 per second")
    parser.add_argument("--turntable", action="store_true", help="with --video: the object turns, the camera stands")
    args = parser.parse_args()
    args.size = (400 if args.floor else 96) if args.size is None else args.size
    for flag, value, least, most in (("--views", args.views, 1, 1000), ("--held-out", args.held_out, 0, 1000),
                                     ("--size", args.size, 8, 1024), ("--frames", args.frames, 2, 10000)):
        if not least <= value <= most:
            raise helper.UserError(f"{flag} must be {least} to {most}, not {value}")
    if args.camera_noise and not all(0 <= value <= 30 for value in args.camera_noise):
        raise helper.UserError(f"--camera-noise must be two numbers from 0 to 30, not {args.camera_noise}")
    if args.video and not args.floor or args.turntable and not args.video:
        raise helper.UserError("--video needs --floor, and --turntable needs --video; add what is missing")
    if args.video and Path(args.video).suffix.lower() != ".mp4":
        raise helper.UserError(f"--video {args.video}: the name must end in .mp4")
    return args


def main():
    args = parse_arguments()
    if args.video:
        write_video(args.video, args.floor, args.size, args.frames, args.turntable)
        print(f"{args.video}: {args.frames} frames")
        return
    output = Path(args.output)
    settings = {"made by": "make_scene.py", "views": args.views, "held_out": args.held_out, "size": args.size}
    if args.camera_noise:
        settings["camera_noise"] = args.camera_noise
    if args.floor:
        settings["floor"] = args.floor
    if made_already(output, settings):
        print(f"{output}: is there already, made with these settings")
        return
    cameras = (walk_cameras if args.floor else sphere_cameras)(args.views, args.held_out, args.size)
    scene = floor_scene(args.floor) if args.floor else None

    def render_view(view, camera):
        if scene is None:
            return render(camera.intrinsics, camera.pose, args.size)
        return surroundings.render(scene, camera, np.random.default_rng(view))

    with folders.new_folder(output) as folder:
        covered = write_scene(folder, cameras, render_view, args.camera_noise)
        (folder / "scene.json").write_text(json.dumps(settings) + "\n")
    height, width = cameras[0].shape
    print(f"{output}: {args.views} views to train on and {args.held_out} held out, {width}x{height} "
          f"pixels, {covered:.0%} of them on the object; surface.ply holds its exact surface")


if __name__ == "__main__":
    helper.run(main)
