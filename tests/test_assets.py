"""Test the asset on exact shapes: decimation, atlas, textures, files, orientation, photographs, its page."""
import errno
import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation
from test_extract import NOTHING_FROM_OUTSIDE, photographed

import extract
import helper
from assets import appearance, baking, decimation, formats, highlights, orientation, page, photographs, visibility
from assets import atlas as atlases
from assets.surface import Surface
from config.settings import Tracer
from datasets import Scene
from metrics import meshes, rasterizer
from rendering.pixels import render_view

SIZE = 256


def bumpy(points):
    """A ring with 24 ridges, steeper than 1 in places: much detail for few faces."""
    across = np.hypot(points[:, 0], points[:, 1]) - 0.5
    angle = np.arctan2(points[:, 1], points[:, 0])
    return (np.hypot(across, points[:, 2]) - 0.2 - 0.004 * np.sin(24 * angle)).astype(np.float32)


def off_centre(points):
    """A ball that the unit sphere cuts."""
    return (np.linalg.norm(points - [0.6, 0.1, 0.0], axis=1) - 0.6).astype(np.float32)


def paint(points):
    """Colours (N, 3) in [0, 1] that are smooth in space, so that every place has its own."""
    return (0.5 + 0.4 * np.sin(points @ np.array([[4.0, 1, 0], [1, 3, 2], [0, -2, 3]]))).astype(np.float32)


def gradient_of(sdf, points):
    step = 1e-3 * np.eye(3)
    return np.stack([(sdf((points + d).astype(np.float64)) - sdf((points - d).astype(np.float64))) / 2e-3
                     for d in step], axis=1).astype(np.float32)


def exact(sdf):
    return Surface(sdf, lambda points, directions=None: (paint(points), gradient_of(sdf, points)))


@pytest.fixture(scope="module")
def ring():
    """Return an exact Surface, its full mesh, and the Asset of 3,000 faces."""
    surface = exact(bumpy)
    full = extract.extract(bumpy, 40, 120)
    few = extract.with_colors(decimation.decimated(full, 3000, surface), surface.shade)
    return surface, full, baking.baked(few, SIZE, surface)


# --- decimation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sdf", [bumpy, off_centre])
def test_few_faces_lie_on_the_surface_and_stay_closed(sdf):
    surface, full = exact(sdf), extract.extract(sdf, 40, 80)
    few = decimation.decimated(full, 4000, surface)
    assert 3900 < len(few.faces) <= 4000 and few.is_watertight and few.euler_number == full.euler_number
    assert np.abs(surface.closed_sdf(few.vertices.astype(np.float32))).mean() < 2e-5
    assert np.linalg.norm(few.vertices, axis=1).max() < 1 + 1e-4
    assert few.volume == pytest.approx(full.volume, rel=0.02) and few.volume > 0
    assert 0 < meshes.mesh_distances(few, full).chamfer < 2e-3


def test_parts_that_touch_are_taken_apart():
    box = trimesh.creation.box()
    beside, atop = box.copy().apply_translation([1, 1, 0]), box.copy().apply_translation([-1, -1, 1])
    pinched = trimesh.util.concatenate([box, beside, atop])     # they share an edge, and a vertex
    pinched.merge_vertices()
    flap = np.array([[0, 1, 8], [8, 1, 0]])
    pinched = trimesh.Trimesh(pinched.vertices, np.concatenate([pinched.faces, flap]), process=False)
    assert not pinched.is_watertight
    apart = decimation.untouched(pinched)
    assert apart.is_watertight and apart.body_count == 3
    assert len(apart.faces) == 36 + 4       # the four faces at the shared edge are halved
    assert trimesh.Trimesh(apart.vertices, apart.faces).is_watertight       # also after equal vertices are merged
    assert apart.volume == pytest.approx(3, rel=0.01)


def test_a_part_that_touches_itself_in_one_edge_stays_closed():
    """The four faces at the edge are linked around it, too, so that its ends cannot be taken apart."""
    ball = trimesh.creation.icosphere(3)
    left, right = ball.vertices[:, 0].argmin(), ball.vertices[:, 0].argmax()
    edge, other = (next(edge for edge in ball.edges_unique if end in edge) for end in (left, right))
    number = np.arange(len(ball.vertices))
    number[other] = edge
    pinched = trimesh.Trimesh(ball.vertices, number[ball.faces], process=False)
    assert not decimation.is_closed(pinched)
    apart = decimation.untouched(pinched)
    assert decimation.is_closed(apart) and apart.is_winding_consistent and len(apart.faces) == len(ball.faces) + 4


def test_a_mesh_with_as_few_faces_already_stays_as_it_is():
    ball = trimesh.creation.icosphere(2)
    assert decimation.decimated(ball, 320, exact(bumpy)) is ball


@pytest.mark.parametrize("faces", [4, 20, 100])
def test_too_few_faces_are_refused_or_closed(faces):
    surface, full = exact(bumpy), extract.extract(bumpy, 24, 40)
    try:
        assert decimation.decimated(full, faces, surface).is_watertight
    except helper.UserError as error:
        assert f"--faces {faces}" in str(error)


def test_a_point_that_cannot_reach_the_surface_stays():
    points = np.array([[0.9, 0, 0], [0.705, 0, 0]], np.float32)
    moved = decimation.onto_zero_set(points, exact(bumpy), 0.05)
    assert np.array_equal(moved[0], points[0]) and abs(bumpy(moved[1:])[0]) < 1e-5


def test_mesh_distances_are_those_of_surfaces_not_of_samples():
    ball = trimesh.creation.icosphere(3)
    assert meshes.mesh_distances(ball, ball).chamfer < 1e-6
    larger = ball.copy().apply_scale(1.01)
    assert meshes.mesh_distances(ball, larger).chamfer == pytest.approx(0.01, rel=0.03)


# --- atlas ------------------------------------------------------------------------------------------------------------

def test_every_face_has_a_place_of_its_own(ring):
    mesh, atlas = ring[2].mesh, ring[2].atlas
    assert np.array_equal(atlas.vertices[atlas.faces], mesh.faces)
    assert 0 <= atlas.uv.min() and atlas.uv.max() <= 1
    corners = (atlas.uv[atlas.faces] * SIZE).astype(np.float32)
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / 2
    inside = (atlases.face_of_texels(corners - np.float32(0.5), SIZE, np.float32(0)) >= 0).sum()
    assert inside == pytest.approx(area, rel=0.02) and 0.4 * SIZE ** 2 < area   # faces that overlap would share texels


def test_a_texel_knows_its_place_on_its_face(ring):
    atlas = ring[2].atlas
    texels = atlases.texels_of(atlas, SIZE)
    uv = np.einsum("nk,nkc->nc", texels.barycentric, atlas.uv[atlas.faces[texels.faces]])
    centres = np.stack([texels.places % SIZE, texels.places // SIZE], axis=1) + 0.5
    assert np.abs(uv * SIZE - centres).max() < 0.01
    assert texels.barycentric.min() < -1e-3     # the rim is there, too


def test_what_shows_no_face_gets_the_nearest_value():
    images, places = np.zeros((2, 9, 9, 2), np.uint8), np.array([0, 80])
    images.reshape(2, -1, 2)[:, places] = [[[7, 1], [9, 2]], [[3, 3], [4, 4]]]
    atlases.fill(images, places)
    assert images[0, 1, 2].tolist() == [7, 1] and images[0, 7, 7].tolist() == [9, 2]
    assert [set(image[..., 0].ravel()) for image in images] == [{7, 9}, {3, 4}]


# --- textures, as a viewer shows them ---------------------------------------------------------------------------------

def shown(asset, points=4000):
    """Return random points of an Asset's faces, and their colours and normals as glTF's viewers compute them."""
    mesh, atlas = asset.mesh, asset.atlas
    rng = np.random.default_rng(0)
    faces = rng.choice(len(mesh.faces), points, p=mesh.area_faces / mesh.area)
    weights = rng.dirichlet([1, 1, 1], points)

    def at(values):
        return np.einsum("nk,nkc->nc", weights, values[atlas.faces[faces]])

    tangents, normals = atlases.tangents_of(mesh, atlas), mesh.vertex_normals[atlas.vertices]
    bitangents = np.cross(normals, tangents[:, :3]) * tangents[:, 3:]
    local = rasterizer.texture_at(asset.normal_map / 127.5 - 1, at(atlas.uv))
    axes = [trimesh.unitize(at(axis)) for axis in (tangents[:, :3], bitangents, normals)]
    mapped = trimesh.unitize(sum(local[:, [k]] * axes[k] for k in range(3)))
    places = np.einsum("nk,nkc->nc", weights, mesh.vertices[mesh.faces[faces]])
    return places, rasterizer.texture_at(asset.base_color / 255, at(atlas.uv)), mapped, axes[2]


def angles(ours, truth):
    return np.degrees(np.arccos(np.clip((ours * truth).sum(axis=1), -1, 1)))


def test_colours_and_normals_are_the_surfaces_at_full_detail(ring):
    places, rgb, mapped, smooth = shown(ring[2])
    truth = trimesh.unitize(gradient_of(bumpy, places))
    assert np.abs(rgb - paint(places)).mean() < 0.01 and np.abs(rgb - paint(places)).max() < 0.15
    assert angles(mapped, truth).mean() < 1.0 and np.percentile(angles(mapped, truth), 99) < 8
    assert angles(smooth, truth).mean() > 1.5 * angles(mapped, truth).mean()    # the map holds what vertices do not


@pytest.mark.parametrize("matrix", [
    np.diag([300.0, 300, 300, 1]),
    np.array([[0.0, 2, 0, 5], [2, 0, 0, -3], [0, 0, 2, 1], [0, 0, 0, 1]]),       # a reflection
])
def test_the_normal_map_holds_wherever_the_asset_is_moved(ring, matrix):
    places, _, mapped, _ = shown(formats.moved(ring[2], matrix))
    linear = matrix[:3, :3]
    truth = trimesh.unitize(gradient_of(bumpy, (places - matrix[:3, 3]) @ np.linalg.inv(linear).T) @ linear.T)
    assert angles(mapped, truth).mean() < 1.0


def test_tangents_follow_the_texture_also_where_it_is_mirrored():
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False,
                             vertex_normals=np.tile([0.0, 0, 1], (4, 1)))
    for u, sign, along in (([0, 1, 1, 0], 1, [1, 0, 0]), ([1, 0, 0, 1], -1, [-1, 0, 0])):
        uv = np.stack([u, [1, 1, 0, 0]], axis=1).astype(np.float32)     # v goes down
        tangents = atlases.tangents_of(square, atlases.Atlas(np.arange(4), square.faces, uv, 1))
        assert tangents == pytest.approx(np.tile([*along, sign], (4, 1)))
        # The bitangent points up in the texture: against growing v.
        assert np.cross([0, 0, 1], tangents[0, :3]) * tangents[0, 3] == pytest.approx([0, 1, 0])


def test_a_surface_that_the_sphere_cuts_is_textured_there_too():
    surface = exact(off_centre)
    few = decimation.decimated(extract.extract(off_centre, 40, 60), 1500, surface)
    asset = baking.baked(extract.with_colors(few, surface.shade), 128, surface)
    places, _, mapped, _ = shown(asset)
    on_sphere = (np.linalg.norm(places, axis=1) > 0.995) & (off_centre(places) < -0.02)
    assert on_sphere.sum() > 100 and angles(mapped[on_sphere], trimesh.unitize(places[on_sphere])).mean() < 2


# --- colours without a viewing direction ------------------------------------------------------------------------------

SUN = highlights.Light(trimesh.unitize([0.5, 0.4, 0.75]), np.array([2.5, 2.0, 1.5]), 0.2)


def ball(points):
    return (np.linalg.norm(points, axis=1) - 0.5).astype(np.float32)


def around(count, distance=3.0):
    """Centres (count, 3) of cameras that are spread over a sphere."""
    height, turn = (2 * np.arange(count) + 1) / count - 1, np.pi * (3 - 5 ** 0.5) * np.arange(count)
    flat = np.sqrt(1 - height ** 2)
    return distance * np.stack([flat * np.cos(turn), flat * np.sin(turn), height], axis=1)


def glossy(sdf, light=SUN):
    """A Surface painted below the highlights of a light, as a glTF viewer shows it."""
    def shade(points, directions=None):
        gradient = gradient_of(sdf, points)
        normals = trimesh.unitize(gradient).astype(np.float32)
        towards = normals if directions is None else -directions
        shine = highlights.highlights(light, normals, towards[None])[0]
        return highlights.encoded(highlights.decoded(paint(points)) + shine).astype(np.float32), gradient

    return Surface(sdf, shade)


@pytest.fixture(scope="module")
def glossy_ball():
    """Return a glossy Surface, its Asset, and what share of the changes with the view its light explains."""
    surface, mesh = glossy(ball), trimesh.creation.icosphere(4, radius=0.5)
    mesh = extract.with_colors(mesh, surface.shade)
    look, explained = appearance.look_of(mesh, surface, around(30), True)
    return surface, baking.baked(mesh, SIZE, surface, look), explained


def test_a_colour_is_the_mean_of_what_the_cameras_see():
    """Red is the view's cosine with z. What no camera sees keeps the colour along the normal."""
    def shade(points, directions=None):
        gradient = gradient_of(two_balls, points)
        along = (-trimesh.unitize(gradient) if directions is None else directions)[:, 2]
        return np.stack([0.5 - along / 2, *np.full((2, len(points)), 0.25)], axis=1).astype(np.float32), gradient

    surface = Surface(two_balls, shade)
    mesh = trimesh.util.concatenate([trimesh.creation.icosphere(4, radius=0.3),
                                     trimesh.creation.icosphere(4, radius=0.15).apply_translation([0, 0, -0.6])])
    mesh = extract.with_colors(mesh, shade)
    centres = np.array([[0.0, 0, -3], [3, 0, -3], [3, 0, -3]])
    look, _ = appearance.look_of(mesh, surface, centres, False)
    found = look.base[:, 0] + shade(mesh.vertices.astype(np.float32), -look.towards)[0][:, 0]
    assert look.light is None and look.below is None and np.abs(look.base[:, 1:]).max() < 1e-6

    def at(place):
        return np.linalg.norm(mesh.vertices - place, axis=1).argmin()

    unseen, hidden, both = at([0, 0, 0.3]), at([0, 0, -0.3]), at([0.1, 0, -0.72])
    assert look.base[unseen] == pytest.approx([0, 0, 0], abs=1e-6)
    assert look.towards[unseen] == pytest.approx(mesh.vertex_normals[unseen], abs=1e-6)
    to = trimesh.unitize(centres - mesh.vertices[hidden])       # the small ball hides it from the first camera
    assert found[hidden] == pytest.approx(0.5 + to[1, 2] / 2, abs=2e-3)
    to = trimesh.unitize(centres - mesh.vertices[both])
    weights = to @ mesh.vertex_normals[both]
    assert found[both] == pytest.approx(0.5 + np.average(to[:, 2], weights=weights) / 2, abs=2e-3)


def test_cameras_see_what_faces_them():
    mesh = extract.with_colors(trimesh.creation.icosphere(4, radius=0.5), exact(ball).shade)
    cosines = visibility.cosines_seen(mesh, np.array([2.0, 0, 0]))
    truth = np.einsum("nc,nc->n", mesh.vertex_normals, trimesh.unitize([2, 0, 0] - mesh.vertices))
    assert np.abs(cosines - truth)[truth > 0.15].max() < 1e-3 and not cosines[truth < 0].any()
    assert not visibility.cosines_seen(mesh, np.array([0.3, 0, 0])).any()       # from within


def test_of_many_cameras_those_count_that_stand_apart():
    centres = np.concatenate([around(20), np.repeat(around(20)[:1], 200, axis=0)])
    assert {*range(20)} <= {*appearance.spread(centres)} and len(appearance.spread(centres)) == appearance.MOST_VIEWS
    assert appearance.spread(centres[:20]).tolist() == list(range(20))


def test_the_light_of_highlights_is_found(glossy_ball):
    light, explained = glossy_ball[1].light, glossy_ball[2]
    assert explained > 0.98 and light.direction @ SUN.direction > np.cos(np.radians(1))
    assert light.color == pytest.approx(SUN.color, rel=0.05) and light.alpha == pytest.approx(SUN.alpha, rel=0.05)


def test_without_highlights_there_is_no_light(glossy_ball):
    mesh = glossy_ball[1].mesh
    seen = np.full((9, len(mesh.vertices)), 255, np.uint8)
    views = appearance.views_of(mesh, exact(ball), around(9), seen, np.arange(200))
    assert highlights.fitted_light(views) == (None, 0.0)
    rng = np.random.default_rng(0)
    noise = views._replace(colors=np.clip(views.colors + rng.normal(0, 0.1, views.colors.shape), 0, 1).astype("f4"))
    light, explained = highlights.fitted_light(noise)
    assert light is None and explained < highlights.LEAST_EXPLAINED


@pytest.mark.parametrize("turn", [0, 70])
def test_an_asset_with_highlights_looks_as_the_surface_from_new_sides(glossy_ball, turn):
    surface, shiny, _ = glossy_ball
    mesh, plain, matrix = shiny.mesh, shiny._replace(light=None), np.diag([2.0, 2, 2, 1])
    matrix[:3, :3] @= Rotation.from_euler("xz", [turn, turn], degrees=True).as_matrix()
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_euler("y", 215, degrees=True).as_matrix(), [1.7, 0, 2.4]
    camera = helper.Camera(np.array([[150.0, 0, 40], [0, 150, 40], [0, 0, 1]]), pose, (81, 81))
    fragments = visibility.drawn(mesh.vertices, mesh.faces, camera)
    places = rasterizer.interpolated(fragments, mesh.faces, mesh.vertices).astype(np.float32)
    truth = surface.shade(places, helper.unit(places - pose[:3, 3].astype(np.float32)))[0]
    moved = camera._replace(pose=matrix @ camera.pose @ np.diag([0.5, 0.5, 0.5, 1]))
    errors = [np.sqrt(((rasterizer.shown(formats.moved(asset, matrix), moved)[0][fragments.face >= 0] - truth) ** 2)
                      .mean()) for asset in (plain, shiny)]
    assert len(truth) > 1000 and errors[1] < 0.01 and errors[0] > 5 * errors[1]


def test_photographs_without_highlights_are_the_paint(glossy_ball):
    surface, size, poses = glossy_ball[0], 61, np.tile(np.eye(4), (6, 1, 1))
    for pose, centre in zip(poses, around(6)):
        forward = -trimesh.unitize(centre)
        right = helper.rightwards(forward, np.array([0.0, 0, 1]))
        pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], axis=1), centre
    intrinsics = np.tile(np.array([[150.0, 0, 30], [0, 150, 30], [0, 0, 1]]), (6, 1, 1))
    views = [render_view(ball, surface.shade, helper.Camera(intrinsics[0], pose, (size, size)), Tracer())
             for pose in poses]
    images = np.stack([np.rint(255 * view.rgb).astype(np.uint8) for view in views])
    scene = Scene(images, np.stack([view.hit for view in views]), intrinsics, poses, np.eye(4), list("abcdef"))
    seen = photographs.blended(photographs.photographs_of(scene, range(6), ball, Tracer()))
    normals = trimesh.unitize(np.random.default_rng(0).normal(size=(500, 3))).astype(np.float32)
    points = baking.Points(0.5 * normals, normals, paint(0.5 * normals))
    errors = [np.abs(seen(points, light) - points.rgb).mean() for light in (SUN, None)]
    assert errors[0] < 0.003 and errors[0] < 0.5 * errors[1]


# --- files ------------------------------------------------------------------------------------------------------------

def facts(shape):
    return formats.facts_of(shape, True, "mm", 2.0)


def tree_of(content):
    size, = struct.unpack("<I", content[12:16])
    return json.loads(content[20:20 + size])


def test_a_glb_as_another_program_reads_it(ring, tmp_path):
    asset = ring[2]
    assert formats.write(tmp_path / "ring.glb", asset, facts(asset)) == [tmp_path / "ring.glb"]
    loaded = list(trimesh.load(tmp_path / "ring.glb", process=False).geometry.values())[0]
    assert loaded.vertices == pytest.approx(asset.mesh.vertices[asset.atlas.vertices], abs=1e-6)
    assert loaded.visual.uv == pytest.approx(asset.atlas.uv * [1, -1] + [0, 1], abs=1e-6)   # trimesh's v goes up
    material = loaded.visual.material
    assert np.array_equal(np.asarray(material.baseColorTexture), asset.base_color)
    assert np.array_equal(np.asarray(material.normalTexture), asset.normal_map)
    tree = tree_of((tmp_path / "ring.glb").read_bytes())
    assert tree["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}
    assert tree["asset"]["extras"]["volume"] == pytest.approx(8 * asset.mesh.volume)
    assert "extensions" not in tree_of(formats.textured_glb(asset, facts(asset), lit=True))["materials"][0]
    assert len(formats.textured_glb(asset, facts(asset), True, 90)) < len((tmp_path / "ring.glb").read_bytes())


@pytest.fixture(scope="session")
def validator(tmp_path_factory):
    """Return a script for node that prints the messages of Khronos' validator; skip without npm or the package."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("no npm here to fetch Khronos' gltf-validator with")
    folder = tmp_path_factory.mktemp("validator")
    got = subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "gltf-validator@2.0.0-dev.3.10"],
                         cwd=folder, capture_output=True, timeout=60)
    if got.returncode:
        pytest.skip("npm cannot fetch Khronos' gltf-validator here")
    (folder / "check.js").write_text(
        "require('gltf-validator').validateBytes(new Uint8Array(require('fs').readFileSync(process.argv[2])))"
        ".then(report => console.log(JSON.stringify(report.issues)))")
    return folder / "check.js"


def test_a_glb_with_highlights(ring):
    asset = ring[2]._replace(below=ring[2].base_color // 2, light=SUN)
    content = formats.textured_glb(asset, facts(asset))
    tree = tree_of(content)
    material, light = tree["materials"][0], tree["extensions"]["KHR_lights_punctual"]["lights"][0]
    assert material["emissiveTexture"] == {"index": 0} and tree["images"][0]["name"] == "below_highlights"
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == pytest.approx(SUN.alpha ** 0.5)
    assert "KHR_materials_unlit" not in material["extensions"] and light["type"] == "directional"
    assert light["intensity"] * np.array(light["color"]) == pytest.approx(SUN.color)
    node = tree["nodes"][tree["scenes"][0]["nodes"][1]]
    assert Rotation.from_quat(node["rotation"]).apply([0, 0, -1]) == pytest.approx(-SUN.direction)
    assert "lights" not in str(tree_of(formats.textured_glb(asset, facts(asset), lit=True)))


@pytest.mark.parametrize("kind", ["unlit", "lit", "jpeg", "highlights", "colours"])
def test_khronos_validator_finds_nothing(ring, glossy_ball, validator, tmp_path, kind):
    asset = ring[2]
    content = {"unlit": lambda: formats.textured_glb(asset, facts(asset)),
               "lit": lambda: formats.textured_glb(asset, facts(asset), True),
               "jpeg": lambda: formats.textured_glb(asset, facts(asset), True, 90),
               "highlights": lambda: formats.textured_glb(glossy_ball[1], facts(glossy_ball[1])),
               "colours": lambda: formats.colored_glb(asset.mesh, facts(asset))}[kind]()

    def issues(content):
        (tmp_path / "a.glb").write_bytes(content)
        return json.loads(subprocess.run(["node", str(validator), str(tmp_path / "a.glb")], capture_output=True,
                                         check=True).stdout)

    assert issues(content)["messages"] == []
    assert issues(content.replace(b"VEC3", b"VEC2"))["numErrors"]      # it would find something


def test_an_obj_and_its_textures(ring, tmp_path):
    asset = ring[2]
    written = formats.write(tmp_path / "ring.obj", asset, facts(asset))
    assert sorted(path.name for path in written) == ["ring.mtl", "ring.obj", "ring.png", "ring_normal.png"]
    loaded = trimesh.load(tmp_path / "ring.obj", process=False, maintain_order=True)
    assert np.array_equal(np.asarray(loaded.visual.material.image.convert("RGB")), asset.base_color)
    text = (tmp_path / "ring.obj").read_text().splitlines()
    corners = np.array([[corner.split("/") for corner in line.split()[1:]] for line in text if line[:2] == "f "], int)
    assert np.array_equal(corners[..., 0] - 1, asset.mesh.faces)        # closed: corners at seams are not doubled
    assert np.array_equal(corners[..., 1] - 1, asset.atlas.faces)


def test_a_full_disk_loses_nothing(ring, tmp_path, monkeypatch):
    for name in ("ring.obj", "ring.mtl", "ring.png", "ring_normal.png"):
        (tmp_path / name).write_text("earlier")
    real = Path.write_bytes

    def full(path, content):
        if len(list(tmp_path.glob(".*"))) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(helper.UserError, match="ring_normal.png: cannot be written .*free some space"):
        formats.write(tmp_path / "ring.obj", ring[2], facts(ring[2]))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("ring.obj", "ring.mtl", "ring.png", "ring_normal.png"), "earlier")


@pytest.mark.parametrize("suffix", [".stl", ".ply"])
def test_files_without_textures_have_the_same_mesh(ring, tmp_path, suffix):
    formats.write(tmp_path / f"ring{suffix}", ring[2], facts(ring[2]))
    loaded = trimesh.load(tmp_path / f"ring{suffix}")       # merges an STL's corners
    assert len(loaded.faces) == len(ring[2].mesh.faces) and loaded.is_watertight
    assert loaded.volume == pytest.approx(ring[2].mesh.volume, rel=1e-5)


# --- orientation ------------------------------------------------------------------------------------------------------

def test_a_box_stands_on_its_bottom_and_a_ball_follows_the_cameras():
    turn = Rotation.from_euler("xyz", [7, -5, 40], degrees=True).as_matrix()
    box = trimesh.creation.box([1, 0.6, 0.4]).vertices @ turn.T
    assert orientation.standing_up(box, np.array([0.0, 0, 1])) == pytest.approx(turn[:, 2], abs=1e-6)
    for other in (trimesh.creation.icosphere(3).vertices, np.zeros((4, 3)), box[:2],
                  trimesh.creation.cone(0.3, 1.0).apply_transform(np.diag([1, -1, -1, 1])).vertices):
        assert orientation.standing_up(other, np.array([0.0, 0, 1])).tolist() == [0, 0, 1]
    tilted = trimesh.creation.box([1, 0.6, 0.4]).vertices @ Rotation.from_euler("x", 40, degrees=True).as_matrix().T
    assert orientation.standing_up(tilted, np.array([0.0, 0, 1])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("vertical, front", [("y", [0, 0, 1]), ("z", [0, -1, 0])])
def test_it_stands_on_the_ground_at_the_origin_and_shows_its_front(vertical, front):
    up, back = trimesh.unitize([0.2, 0.1, -1.0]), np.array([1.0, 0.3, 0.2])
    rotation = orientation.turned_up(up, back, vertical)
    assert np.linalg.det(rotation) == pytest.approx(1) and rotation[:3, :3] @ up == pytest.approx(
        [0, 1, 0] if vertical == "y" else [0, 0, 1])
    flat_back = back - (back @ up) * up
    assert rotation[:3, :3] @ trimesh.unitize(flat_back) == pytest.approx(front)
    points = np.random.default_rng(0).normal(size=(50, 3)) + 4
    placed = trimesh.transform_points(points, orientation.on_ground(points, rotation, vertical))
    axis = "xyz".index(vertical)
    middle = (placed.min(axis=0) + placed.max(axis=0)) / 2
    assert placed[:, axis].min() == pytest.approx(0) and np.delete(middle, axis) == pytest.approx([0, 0])


# --- photographs ------------------------------------------------------------------------------------------------------

def two_balls(points):
    near = np.linalg.norm(points - [0, 0, -0.6], axis=1) - 0.15
    return np.minimum(np.linalg.norm(points, axis=1) - 0.3, near).astype(np.float32)


def test_colours_come_from_the_photographs_that_see_the_point():
    size, poses = 101, np.tile(np.eye(4), (2, 1, 1))
    poses[0, 2, 3] = -3         # looks along z, where the small ball hides the large one
    poses[1, :3, :3], poses[1, :3, 3] = Rotation.from_euler("y", -90, degrees=True).as_matrix(), [3, 0, 0]
    intrinsics = np.tile(np.array([[250.0, 0, 50], [0, 250, 50], [0, 0, 1]]), (2, 1, 1))
    images = np.zeros((2, size, size, 3), np.uint8)
    images[0], images[1] = [255, 0, 0], [0, 0, 255]
    scene = Scene(images, np.ones((2, size, size), bool), intrinsics, poses, np.eye(4), ["a", "b"])
    seen = photographs.blended(photographs.photographs_of(scene, [0, 1], two_balls, Tracer()))
    sides = np.array([[0, 0, -1], [1, 0, 0], [0, 0, 1], [0.28, 0, -0.96]], np.float32)
    places = np.concatenate([0.3 * sides, [[0, 0, -0.75]]]).astype(np.float32)
    normals = np.concatenate([sides, [[0, 0, -1]]]).astype(np.float32)
    rgb = seen(baking.Points(places, normals, np.full((5, 3), 0.5, np.float32)))
    assert rgb[0] == pytest.approx([0.5] * 3)       # hidden from the first, turned away from the second: the networks'
    assert rgb[1] == pytest.approx([0, 0, 1]) and rgb[2] == pytest.approx([0.5] * 3)
    assert rgb[4] == pytest.approx([1, 0, 0])
    masked = scene._replace(masks=np.zeros((2, size, size), bool))
    masked.masks[0, :5] = True
    seen = photographs.blended(photographs.photographs_of(masked, [0, 1], two_balls, Tracer()))
    assert np.all(seen(baking.Points(places, normals, np.full((5, 3), 0.5, np.float32))) == 0.5)


# --- the page ---------------------------------------------------------------------------------------------------------

# Chromium's virtual time does not wait for pictures that are decoded beside it, so the script spends some real time.
MEASURE = """<script>const waiting = setInterval(() => {
    for (let i = 0, sum = 0; i < 3e6; i++) sum += Math.sqrt(i);
    if (document.body.dataset.drawn !== "yes") return;
    clearInterval(waiting);
    for (const id of ["wire", "ruler"]) {
        document.getElementById(id).checked = true;
        document.getElementById(id).dispatchEvent(new Event("input"));
    }
    const canvas = document.querySelector("canvas");
    canvas.setPointerCapture = () => {};
    const side = Math.min(canvas.clientWidth, canvas.clientHeight);     // the ring fills it
    for (const along of [-0.32, 0.32]) for (const name of ["pointerdown", "pointerup"])
        canvas.dispatchEvent(new PointerEvent(name, {pointerId: 1, clientX: canvas.clientWidth / 2 + along * side,
                                                     clientY: canvas.clientHeight / 2, bubbles: true}));
    console.log("measured " + document.getElementById("distance").textContent);
}, 10);</script></body>"""


def test_the_page_shows_the_texture_and_its_tools_work(ring, tmp_path):
    asset = ring[2]
    drawn = page.page(asset, "ring", facts(asset)).replace("<head>", NOTHING_FROM_OUTSIDE)
    tools, console = photographed(drawn.replace("</body>", MEASURE), tmp_path)
    assert len(console) == 1 and "measured" in console[0]       # no complaint
    length = float(console[0].split("measured ")[1].split(" mm")[0])
    assert 2 * 0.6 < length < 2 * 1.4   # across the hole, twice the file's length
    colors = {tuple(color) for color in tools[60:340:3, 40:360:3].reshape(-1, 3) // 32}
    assert len(colors) > 15     # of the paint, not of a single colour
    assert (tools[60:340, 40:360].max(axis=-1) < 90).mean() > 0.01     # wires


def test_the_page_shows_highlights_as_the_rasteriser_does(glossy_ball, tmp_path):
    """The page's camera is that of viewer.js: 2.9 radii away and 0.29 radians above the front, 40 degrees wide."""
    asset = glossy_ball[1]
    picture, console = photographed(page.page(asset, "ball", facts(asset)).replace("<head>", NOTHING_FROM_OUTSIDE),
                                    tmp_path)
    assert console == []
    height = np.flatnonzero((picture[:, 0] == [244, 244, 242]).all(axis=-1))[0]     # where the tools begin
    back, focal = np.array([0, np.sin(0.29), np.cos(0.29)]), height / 2 / np.tan(np.pi / 9)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = [1, 0, 0], np.cross(-back, [1, 0, 0]), -back, 2.9 * 0.5 * back
    intrinsics = np.array([[focal, 0, 199.5], [0, focal, (height - 1) / 2], [0, 0, 1]])
    camera = helper.Camera(intrinsics, pose, (height, 400))
    (shiny, _, where), matt = rasterizer.shown(asset, camera), rasterizer.shown(asset._replace(light=None), camera)[0]
    highlight = where & (np.abs(shiny - matt).max(axis=-1) > 0.1)
    assert highlight.sum() > 500
    errors = [np.abs(picture[:height] / 255 - rgb)[highlight].mean() for rgb in (shiny, matt)]
    assert errors[0] < 0.03 and errors[0] < 0.3 * errors[1]
