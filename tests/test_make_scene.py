"""The embedded scene: its exact surface, its cameras, and the command, which writes all of it or nothing."""
import json
import subprocess
import sys

import imageio.v2 as imageio
import numpy as np
import pytest
import trimesh

import datasets
import helper
import make_scene
from commands import run
from conftest import ROOT
from scenes import surroundings

VIEWS, HELD_OUT, SIZE = 5, 2, 48
COMMAND = [str(ROOT / "make_scene.py"), "--output", "scenes/small", "--views", str(VIEWS),
           "--held-out", str(HELD_OUT), "--size", str(SIZE)]


def make(folder, *options, status=0):
    """Run the script in `folder` on a small scene. Return its stdout and stderr."""
    done = subprocess.run([sys.executable, *COMMAND, *options], cwd=str(folder), capture_output=True,
                          text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return a function that asserts that the script refuses `options`, changes nothing, and returns its one line.

    Options replace those of COMMAND. It runs in tmp_path in this process, since a new one takes a second to start.
    """
    def refused(*options):
        before = contents(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*COMMAND, *options])  # the last of equal flags counts
        with pytest.raises(SystemExit) as stopped:
            helper.run(make_scene.main)
        out, error = capsys.readouterr()
        assert stopped.value.code == 2 and out == "" and error.count("\n") == 1, error
        assert contents(tmp_path) == before
        return error

    return refused


def contents(folder):
    """Return {relative path: bytes, or None for a folder} of all that is in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Return a folder with the small scene, and the script's stdout."""
    folder = tmp_path_factory.mktemp("user")
    return folder, make(folder)[0]


@pytest.fixture(scope="module")
def scene(user):
    return user[0] / "scenes" / "small"


@pytest.fixture(scope="module")
def mesh():
    return make_scene.surface_mesh(96)


@pytest.fixture(scope="module")
def samples():
    return make_scene.surface_samples(20000, np.random.default_rng(1))


@pytest.fixture(scope="module")
def outside():
    """Return points (N, 3) float32 of [-1, 1]^3 outside the object, some close to it."""
    points = np.random.default_rng(2).uniform(-1, 1, (20000, 3)).astype(np.float32)
    return points[make_scene.exact_sdf(points) > 1e-3]


def test_distance_agrees_with_brute_force(samples, mesh):
    # The nearest sample is never nearer than the surface, and farther by a few sample spacings at most.
    points = np.random.default_rng(3).uniform(-1, 1, (400, 3)).astype(np.float32)
    sdf = make_scene.exact_sdf(points)
    brute = np.array([np.linalg.norm(samples - point, axis=1).min() for point in points])
    off = sdf > 0
    assert off.sum() > 200 and (~off).sum() > 20
    assert (brute[off] >= sdf[off] - 1e-5).all()
    spacing = np.sqrt(mesh.area / len(samples))
    assert (brute[off] <= sdf[off] + 3 * spacing).all()
    assert np.median(brute[off] - sdf[off]) < 0.1 * spacing
    assert (brute[~off] >= -sdf[~off] - 1e-5).all()  # inside it is a bound


@pytest.mark.parametrize("where", ["outside", "samples"])
def test_sdf_is_float32_and_its_gradient_is_the_unit_normal(request, where):
    places = request.getfixturevalue(where)
    sdf = make_scene.exact_sdf(places)
    assert sdf.dtype == np.float32 and sdf.shape == (len(places),)
    step, points = 1e-5, places.astype(np.float64)

    def distance(points):
        return make_scene.part_distances(points)[0].min(axis=0)  # float64, for the finite differences

    gradient = np.stack([(distance(points + step * axis) - distance(points - step * axis)) / (2 * step)
                         for axis in np.eye(3)], axis=1)
    # The gradient jumps where two parts are equally near; a handful of the points are that close.
    smooth = np.abs(np.linalg.norm(gradient, axis=1) - 1) < 1e-4
    assert smooth.mean() > 0.999
    assert np.abs(gradient[smooth] - make_scene.exact_normals(places)[smooth]).max() < 1e-3


def test_sdf_never_falls_faster_than_the_distance():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(-1, 1, (2, 50000, 3)).astype(np.float32)
    b = a + 0.1 * b
    change = np.abs(make_scene.exact_sdf(a) - make_scene.exact_sdf(b))
    assert (change <= np.linalg.norm(a - b, axis=1) + 1e-6).all()


def test_object_is_one_piece_with_one_hole_inside_the_unit_sphere(mesh):
    assert mesh.is_watertight and mesh.body_count == 1
    assert mesh.euler_number == 0  # 2 - 2 genus: one hole, the handle's
    assert np.linalg.norm(mesh.vertices, axis=1).max() < make_scene.OBJECT_RADIUS <= 0.8
    through = np.stack([np.full(201, -0.57), np.linspace(-1, 1, 201), np.full(201, 0.02)], axis=1)
    assert (make_scene.exact_sdf(through.astype(np.float32)) > 0.05).all()  # between pot and handle
    assert mesh.volume / mesh.convex_hull.volume < 0.9  # a convex body gives 1


def test_samples_lie_evenly_on_the_surface(samples, mesh):
    assert samples.shape == (20000, 3) and samples.dtype == np.float32
    assert np.abs(make_scene.exact_sdf(samples)).max() < 1e-4
    for axis in range(3):  # each slab's share of the samples is its share of the area
        edges = np.quantile(samples[:, axis], [0.2, 0.4, 0.6, 0.8])
        slab = np.searchsorted(edges, mesh.triangles_center[:, axis])
        share = np.bincount(slab, mesh.area_faces, 5) / mesh.area
        assert share == pytest.approx([0.2] * 5, abs=0.015)


def test_shading_is_a_colour_that_depends_on_the_view(samples):
    rng = np.random.default_rng(5)
    toward = rng.normal(size=(2, len(samples), 3))
    toward /= np.linalg.norm(toward, axis=2, keepdims=True)
    one, other = (make_scene.shade(samples, directions.astype(np.float32)) for directions in toward)
    for colours in (one, other):
        assert colours.shape == (len(samples), 3) and colours.dtype == np.float32
        assert colours.min() >= 0 and colours.max() <= 1
    changed = np.abs(one - other).max(axis=1)
    assert changed.max() > 0.2 and np.median(changed) < 0.05  # a highlight, on a body that is mostly diffuse
    hue = make_scene.paint(samples)
    for colour in (make_scene.TEAL, make_scene.CREAM, make_scene.GOLD, make_scene.RED):
        assert (np.abs(hue - colour).max(axis=1) < 0.05).mean() > 0.05


def test_look_at_makes_a_right_handed_camera_that_sees_its_target_upright():
    eye, target = np.array([1.0, 2.0, 0.5]), np.array([0.1, -0.2, 0.3])
    pose = make_scene.look_at(eye, target, (0, 0, 1))
    assert pose[:3, :3].T @ pose[:3, :3] == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    assert pose[:, 3] == pytest.approx([*eye, 1]) and pose[3] == pytest.approx([0, 0, 0, 1])
    seen = np.linalg.inv(pose) @ [*target, 1]
    assert seen[:3] == pytest.approx([0, 0, np.linalg.norm(target - eye)])
    above = np.linalg.inv(pose) @ [*target + (0, 0, 0.1), 1]
    assert above[0] == pytest.approx(0, abs=1e-12) and above[1] < -0.05  # y points down


def test_views_surround_the_object_and_held_out_ones_lie_between():
    directions = make_scene.view_directions(32, 6)
    assert directions.shape == (38, 3) and np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(38))
    assert (directions[:32] == make_scene.view_directions(32, 0)).all()  # the training views stay the same
    cosines = directions @ directions.T - 2 * np.eye(38)
    assert np.degrees(np.arccos(cosines[32:].max(axis=1))).min() > 20
    assert directions[:32, 2].min() < -0.9 and directions[:32, 2].max() > 0.9


def test_folder_holds_the_convention(scene, user):
    names = [f"{i:03d}.png" for i in range(VIEWS + HELD_OUT)]
    assert {p.name for p in scene.iterdir()} == {"cameras.npz", "image", "mask", "scene.json", "surface.ply"}
    covered = []
    for name in names:
        image, mask = imageio.imread(scene / "image" / name), imageio.imread(scene / "mask" / name)
        assert image.shape == (SIZE, SIZE, 3) and mask.shape == (SIZE, SIZE)
        assert image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        assert (image[mask == 0] == round(255 * make_scene.BACKGROUND)).all()
        assert image[mask == 255].std() > 30
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()  # the object is in the picture as a whole
        covered.append((mask > 0).mean())
    assert sorted(p.name for p in (scene / "image").iterdir()) == names
    assert sorted(p.name for p in (scene / "mask").iterdir()) == names
    assert 0.35 <= np.mean(covered) <= 0.45
    cameras = np.load(scene / "cameras.npz")
    assert set(cameras) == {f"{kind}_mat_{i}" for kind in ("world", "scale") for i in range(len(names))}
    assert all(cameras[key].shape == (4, 4) and cameras[key].dtype == np.float64 for key in cameras)
    surface = trimesh.load(str(scene / "surface.ply"))
    assert surface.vertices.shape == (100000, 3)
    assert np.abs(make_scene.exact_sdf(surface.vertices.astype(np.float32))).max() < 1e-4
    said = user[1].strip()
    assert len(said.splitlines()) == 1
    for part in ("scenes/small", f"{VIEWS} views", f"{HELD_OUT} held out", f"{np.mean(covered):.0%}"):
        assert part in said


def test_cameras_decompose_into_what_was_put_in(scene):
    cameras = np.load(scene / "cameras.npz")
    for view, direction in enumerate(make_scene.view_directions(VIEWS, HELD_OUT)):
        world_mat, scale_mat = cameras[f"world_mat_{view}"], cameras[f"scale_mat_{view}"]
        intrinsics, pose = helper.decompose_projection(world_mat @ scale_mat)
        up = (0, 0, 1) if abs(direction[2]) < 0.99 else (0, 1, 0)
        expected = make_scene.look_at(make_scene.DISTANCE * direction, np.zeros(3), up)
        assert pose == pytest.approx(expected, abs=1e-6)
        assert intrinsics == pytest.approx(make_scene.camera_intrinsics(SIZE), abs=1e-6)
        assert intrinsics[:2, 2] == pytest.approx([(SIZE - 1) / 2] * 2)
        # world_mat alone is in world units
        centre = helper.decompose_projection(world_mat)[1][:3, 3]
        assert centre == pytest.approx((scale_mat @ [*expected[:3, 3], 1])[:3], rel=1e-6)
        assert np.linalg.norm(centre - expected[:3, 3]) > 100


def test_surface_points_appear_where_the_cameras_project_them(scene, samples):
    cameras = np.load(scene / "cameras.npz")
    for view in range(VIEWS + HELD_OUT):
        projection = cameras[f"world_mat_{view}"] @ cameras[f"scale_mat_{view}"]
        eye = helper.decompose_projection(projection)[1][:3, 3]
        directions = (samples - eye) / np.linalg.norm(samples - eye, axis=1, keepdims=True)
        projected = np.c_[samples, np.ones(len(samples))] @ projection[:3].T
        assert (projected[:, 2] > 0).all()
        uv = projected[:, :2] / projected[:, 2:]
        nearest = np.rint(uv).astype(int)
        mask = imageio.imread(scene / "mask" / f"{view:03d}.png") > 0
        image = imageio.imread(scene / "image" / f"{view:03d}.png") / 255.0
        # The object's points lie in the mask, up to half a pixel, and cover it.
        grown = np.zeros((SIZE + 2, SIZE + 2), bool)
        for row in range(3):
            for column in range(3):
                grown[row:row + SIZE, column:column + SIZE] |= mask
        assert grown[nearest[:, 1] + 1, nearest[:, 0] + 1].all()
        reached = np.zeros_like(mask)
        reached[nearest[:, 1], nearest[:, 0]] = True
        assert reached[mask].mean() > 0.99
        # A sample that faces the camera unoccluded, near a pixel's centre, has the pixel's colour.
        facing = (make_scene.exact_normals(samples) * directions).sum(axis=1) < -0.5
        middle = np.abs(uv - nearest).max(axis=1) < 0.15
        seen = np.flatnonzero(facing & middle)
        before = samples[seen] - np.linspace(0.02, 1.5, 60)[:, None, None] * directions[seen]
        clear = make_scene.exact_sdf(before.reshape(-1, 3).astype(np.float32)).reshape(60, -1).min(axis=0)
        seen = seen[clear > 0.005]
        assert len(seen) > 100
        colours = make_scene.shade(samples[seen], directions[seen].astype(np.float32))
        error = np.abs(colours - image[nearest[seen, 1], nearest[seen, 0]]).max(axis=1)
        assert np.median(error) < 0.02 and np.quantile(error, 0.9) < 0.1


def test_scene_loads_as_it_was_made(scene, capsys):
    loaded = datasets.load_scene(scene)
    assert "notice" not in capsys.readouterr().err
    assert loaded.names == [f"{i:03d}" for i in range(VIEWS + HELD_OUT)]
    for view, name in enumerate(loaded.names):
        assert (loaded.images[view] == imageio.imread(scene / "image" / f"{name}.png")).all()
        assert (loaded.masks[view] == (imageio.imread(scene / "mask" / f"{name}.png") > 0)).all()
    eyes = make_scene.DISTANCE * make_scene.view_directions(VIEWS, HELD_OUT)
    assert loaded.poses[:, :3, 3] == pytest.approx(eyes, abs=1e-6)
    for intrinsics in loaded.intrinsics:
        assert intrinsics == pytest.approx(make_scene.camera_intrinsics(SIZE), abs=1e-6)
    assert loaded.scale_mat[:3, 3] == pytest.approx(make_scene.OFFSET)
    assert loaded.scale_mat[:3, :3] == pytest.approx(make_scene.SCALE * np.eye(3))


def test_same_settings_give_the_same_bytes(scene, tmp_path):
    run(*COMMAND, cwd=tmp_path)
    assert contents(tmp_path / "scenes" / "small") == contents(scene)
    assert [p.name for p in (tmp_path / "scenes").iterdir()] == ["small"]  # and no temporary folder is left


def test_making_it_again_changes_nothing(user, scene, monkeypatch, capsys):
    before = contents(scene)
    monkeypatch.chdir(user[0])
    monkeypatch.setattr(sys, "argv", COMMAND)
    make_scene.main()
    assert capsys.readouterr().out == f"{COMMAND[2]}: is there already, made with these settings\n"
    assert contents(scene) == before


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    (tmp_path / "scenes" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_scene, "surface_samples", lambda count, rng: np.zeros((count, 3)))
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--views", "1", "--held-out", "0", "--size", "8"])
    make_scene.main()
    names = sorted(p.name for p in (tmp_path / "scenes" / "small" / "image").iterdir())
    assert names == ["000.png"]


@pytest.mark.parametrize("option, value, says", [
    ("--views", "0", "--views must be 1"), ("--views", "-3", "--views must be 1"),
    ("--held-out", "-1", "--held-out must be 0"), ("--size", "4", "--size must be 8"),
    ("--size", "100000", "--size must be 8 to 1024"),
])
def test_bad_values_are_refused_in_one_line(refused, option, value, says):
    assert refused(option, value).startswith("error: " + says)


def test_a_refusal_ends_the_script_itself_with_status_2(tmp_path):
    out, error = make(tmp_path, "--views", "0", status=2)
    assert out == "" and error.startswith("error: --views") and error.count("\n") == 1
    assert not contents(tmp_path)


@pytest.mark.parametrize("kind", ["file", "full folder", "other settings", "foreign json", "file as parent"])
def test_a_users_files_are_never_overwritten(tmp_path, refused, kind):
    output = tmp_path / "scenes" / "small"
    if kind == "file as parent":
        (tmp_path / "scenes").write_text("mine")
    elif kind == "file":
        output.parent.mkdir()
        output.write_text("mine")
    else:
        output.mkdir(parents=True)
        (output / "notes.txt").write_text("mine")
    if kind == "other settings":
        made = {"made by": "make_scene.py", "views": VIEWS, "held_out": HELD_OUT, "size": SIZE + 1}
        (output / "scene.json").write_text(json.dumps(made))
    elif kind == "foreign json":
        (output / "scene.json").write_text("not JSON")
    assert refused().startswith("error: scenes/small: ")


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_scene, "surface_samples", interrupted)
    monkeypatch.setattr(sys, "argv", ["make_scene.py", "--output", "scene", "--views", "1", "--size", "8"])
    with pytest.raises(KeyboardInterrupt):
        make_scene.main()
    assert not contents(tmp_path)


# --- on a floor -------------------------------------------------------------------------------------------------------

FLOOR_VIEWS, FLOOR_SIZE = 3, 80


@pytest.fixture(scope="module")
def floor_scenes(tmp_path_factory):
    """Return the folders of small scenes on a floor, by kind."""
    folder = tmp_path_factory.mktemp("floors")
    for kind in surroundings.KINDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_scene, "surface_samples", lambda count, rng: np.zeros((count, 3), np.float32))
            patch.setattr(sys, "argv", ["make_scene.py", "--floor", kind, "--output", str(folder / kind), "--views",
                                        str(FLOOR_VIEWS), "--held-out", "1", "--size", str(FLOOR_SIZE)])
            make_scene.main()
    return {kind: folder / kind for kind in surroundings.KINDS}


@pytest.mark.parametrize("kind", surroundings.KINDS)
def test_masks_on_a_floor_show_where_the_cameras_see_the_object(kind, floor_scenes, samples):
    loaded = datasets.load_scene(floor_scenes[kind])
    height, width = loaded.images.shape[1:3]
    assert (height, width) == (3 * FLOOR_SIZE // 4, FLOOR_SIZE) and len(loaded.names) == FLOOR_VIEWS + 1
    for image, mask, k, pose in zip(loaded.images, loaded.masks, loaded.intrinsics, loaded.poses):
        local = (samples - pose[:3, 3]) @ pose[:3, :3] @ k.T
        u, v = np.rint(local[:, :2] / local[:, 2:]).astype(int).T
        shown = np.zeros((height, width), bool)
        shown[np.clip(v, 0, height - 1), np.clip(u, 0, width - 1)] = True
        assert (shown & mask).sum() / (shown | mask).sum() > 0.9
        assert 0.08 < mask.mean() < 0.25
        outside = image[~mask].astype(float)
        busy, bright = outside.std(axis=0).mean(), outside.mean()
        assert (bright > 200) if kind == "white" else (bright < 12) if kind == "black" else busy > 15


def test_every_place_has_its_own_surroundings(floor_scenes):
    first = [imageio.imread(folder / "image" / "000.png").astype(int) for folder in floor_scenes.values()]
    for one in range(4):
        for other in range(one):
            assert np.abs(first[one] - first[other]).mean() > 1


def test_the_floor_is_where_its_pixels_are(floor_scenes):
    # A texture on the floor must move as a plane does: the homography between two views carries one to the other.
    loaded = datasets.load_scene(floor_scenes["textured"])
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 61), np.linspace(-1.5, 1.5, 61))
    points = np.stack([x.ravel(), y.ravel(), np.full(x.size, surroundings.FLOOR)], axis=1)
    looks = []
    for view in (0, FLOOR_VIEWS):       # the held-out view is half a step from the first
        local = (points - loaded.poses[view][:3, 3]) @ loaded.poses[view][:3, :3] @ loaded.intrinsics[view].T
        uv = np.rint(local[:, :2] / local[:, 2:]).astype(int)
        inside = ((uv >= 0) & (uv < loaded.masks.shape[:0:-1])).all(axis=1)
        u, v = np.where(inside[:, None], uv, 0).T
        looks.append((loaded.images[view][v, u].mean(axis=1), inside & ~loaded.masks[view][v, u]))
    both = looks[0][1] & looks[1][1]
    assert both.sum() > 300
    assert np.corrcoef(looks[0][0][both], looks[1][0][both])[0, 1] > 0.5


def test_clutter_stands_on_the_floor_and_hides_what_is_behind_it():
    scene = surroundings.Scene(make_scene.exact_sdf, make_scene.shade, make_scene.SUN,
                               surroundings.make_surroundings("clutter"))
    thing = next(thing for thing in scene.around.things if not thing.ball)
    above = np.array([*thing.place, 2.0], np.float32)
    down = np.array([[0.0, 0.0, -1.0]], np.float32)
    t = surroundings.surroundings_colours(scene, above, down, 0.01)[1]
    assert 2 - t[0] == pytest.approx(surroundings.FLOOR + 2 * thing.half[2], abs=1e-5)
    beside = surroundings.surroundings_colours(scene, np.array([1.1, 0, 2.0], np.float32), down, 0.01)[1]
    assert 2 - beside[0] == pytest.approx(surroundings.FLOOR, abs=1e-5)


def test_on_a_turntable_the_room_stands_still():
    camera = make_scene.walk_camera(0.0, 64)
    first = surroundings.render(make_scene.floor_scene("textured"), camera)
    angle = 1.0
    turned = surroundings.render(make_scene.floor_scene("textured", angle), camera._replace(
        pose=make_scene.turned_pose(camera.pose, angle)))
    far = np.zeros(first[1].shape, bool)
    far[:5] = True      # the upper rows show no shadow
    same = np.abs(first[0].astype(int) - turned[0]).max(axis=2) <= 2
    assert same[far].mean() > 0.99 and (first[1] != turned[1]).mean() > 0.01


def test_a_video_of_the_walk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_scene.py", "--floor", "--video", "walk.mp4", "--frames", "6", "--size",
                                      "64"])
    make_scene.main()
    assert capsys.readouterr().out == "walk.mp4: 6 frames\n" and [p.name for p in tmp_path.iterdir()] == ["walk.mp4"]
    with imageio.get_reader("walk.mp4") as video:
        frames = [frame for frame in video]
    assert len(frames) == 6 and frames[0].shape == (48, 64, 3)
    assert np.abs(frames[0].astype(int) - frames[3]).mean() > 10


@pytest.mark.parametrize("options, says", [
    (("--video", "walk.mp4"), "--video needs --floor"), (("--floor", "--turntable"), "--turntable needs --video"),
    (("--floor", "--video", "walk.png"), "--video walk.png: the name must end in .mp4"),
    (("--floor", "--video", "walk.mp4", "--frames", "1"), "--frames must be 2"),
])
def test_bad_options_of_a_floor_are_refused_in_one_line(refused, options, says):
    assert says in refused(*options)
