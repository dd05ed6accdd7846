"""Run the scripts as a user does: from scene to mesh on a tiny scene, the initial surface, and what is refused."""
import html
import re

import imageio.v2 as imageio
import nnabla as nn
import numpy as np
import pytest
import trimesh

import network
from backends import context
from commands import refused, run
from conftest import write_demo_config
from training import checkpoints


def write_config(folder, **changes):
    """Write a tiny variant of config/demo.yaml, with `changes` {section__key: value}; return its path."""
    return write_demo_config(
        folder / "tiny.yaml", changes, data=dict(path="scenes/tiny", held_out_views=[9]),
        network=dict(width=64, feature=16),
        train=dict(steps=12 * 9, rays=256, learning_rate=1e-3, learning_rate_halved_at=[0.667], models=2,
                   validations=1, validation_view=9, alpha_doubled_at=[0.5]),
        extract=dict(coarse_resolution=32, resolution=48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which the scripts have made a tiny scene and trained a model on it."""
    folder = tmp_path_factory.mktemp("user")
    run("make_scene.py", "--output", "scenes/tiny", "--views", "9", "--held-out", "1", "--size", "32", cwd=folder,
        anew=True)
    write_config(folder)
    run("train.py", "--context", "cpu", "--device-id", "0", "--monitor-path", "results", "--config", "tiny.yaml",
        cwd=folder, anew=True)
    return folder


def series(folder, name):
    return np.loadtxt(folder / f"{name}.series.txt", ndmin=2)[:, 1]


MODEL = ("--config", "results_tiny/tiny.yaml", "--model-load-path", "results_tiny/model_00011.h5", "--context", "cpu")


def test_training_lowers_the_loss_and_writes_what_it_says(folder):
    results = folder / "results_tiny"
    loss = series(results, "loss")
    assert len(loss) == 12 and loss[-1] < 0.5 * loss[0]
    assert [p.name for p in sorted(results.glob("model_*.h5"))] == ["model_00005.h5", "model_00011.h5"]
    assert (results / "tiny.yaml").read_text() == (folder / "tiny.yaml").read_text()
    assert series(results, "alpha")[[0, 5, 6, 11]].tolist() == [50, 50, 100, 100]
    assert series(results, "learning_rate")[[0, 7, 8]] == pytest.approx([1e-3, 1e-3, 5e-4])
    for name in ("color", "mask", "eikonal", "hits"):
        assert len(series(results, name)) == 12
    assert (results / "time.timer.txt").exists()
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "complete</span>" in page and "refresh" not in page and page.count("<svg") == 6
    assert (results / "validation" / "epoch_00011_shape.png").exists()
    assert imageio.imread(results / "validation" / "epoch_00011.png").shape == (32, 128, 3)
    assert not [p for p in results.rglob(".*")]


def test_training_again_keeps_the_earlier_run(folder):
    write_config(folder, train__steps=9)
    before = (folder / "results_tiny" / "model_00011.h5").read_bytes()
    said = run("train.py", "--config", "tiny.yaml", "--monitor-path", "results", cwd=folder)
    assert "results_tiny.1" in said
    assert (folder / "results_tiny.1" / "model_00011.h5").read_bytes() == before
    assert (folder / "results_tiny" / "model_00000.h5").exists()
    for name in ("results_tiny", "results_tiny.1"):     # restored for the other tests
        (folder / name).rename(folder / ("again" if name == "results_tiny" else "results_tiny"))


def test_extraction_gives_a_closed_mesh_near_the_object(folder):
    said = run("extract.py", *MODEL, cwd=folder)
    mesh = trimesh.load(folder / "results_tiny" / "mesh.ply")
    assert mesh.is_watertight and "watertight" in said
    measured = run("evaluate.py", *MODEL, "--mesh", "results_tiny/mesh.ply", "--ground-truth",
                   "scenes/tiny/surface.ply", "--views", "none", cwd=folder)
    assert "view " not in measured
    assert float(re.search(r"chamfer: ([\d.]+)", measured).group(1)) < 0.15
    assert series(folder / "results_tiny", "chamfer")[0] < 0.15
    assert 0.7 < series(folder / "results_tiny", "normal_consistency")[0] < 1
    (folder / "dtu").mkdir()
    assert "--dtu" in refused("evaluate.py", *MODEL, "--mesh", "results_tiny/mesh.ply", "--dtu", "dtu", cwd=folder)
    assert "--mesh" in refused("evaluate.py", *MODEL, "--dtu", "dtu", cwd=folder)


def test_extraction_of_a_surface_that_leaves_the_unit_sphere_is_closed_and_says_so(folder):
    arrays, _ = checkpoints.read_arrays(folder / "results_tiny" / "model_00011.h5")
    points = trimesh.creation.icosphere(subdivisions=3).vertices.astype(np.float32)
    last = max(name for name in arrays if name.startswith("implicit/") and name.endswith("/b"))
    context.set_context("cpu", "0")
    nn.clear_parameters()       # of other tests' networks
    checkpoints.set_parameters(arrays)
    arrays[last][0] -= np.percentile(network.sdf_evaluator()(points), 30)       # now 30 % of the sphere are inside
    nn.clear_parameters()
    checkpoints.set_parameters(arrays)
    checkpoints.save_model(folder / "large.h5")
    nn.clear_parameters()
    said = run("extract.py", "--config", "tiny.yaml", "--model-load-path", "large.h5", "--context", "cpu", "--output",
               "large.ply", cwd=folder)
    mesh = trimesh.load(folder / "large.ply")
    assert mesh.is_watertight and np.linalg.norm(mesh.vertices, axis=1).max() < 1.002
    notices = [line for line in said.splitlines() if line.startswith("notice: ")]
    assert len(notices) == 1 and "unit sphere" in notices[0] and "scenes/tiny --check" in notices[0]
    assert 10 < float(re.search(r"with ([\d.]+)% of its area", notices[0]).group(1)) < 50
    across = np.einsum("fi,fci->fc", mesh.face_normals, mesh.vertex_normals[mesh.faces])
    assert np.median(across) > 0.9


def test_extraction_of_an_asset(folder):
    said = run("extract.py", *MODEL, "--faces", "900", "--texture", "64", "--appearance", "photographs", "--upright",
               "--world", "cm", "--output", "asset/a.glb", "asset/a.obj", "asset/a.html", "asset/a.stl", cwd=folder,
               anew=True)
    assert float(re.search(r"Chamfer distance to the full mesh: ([\d.]+)", said).group(1)) < 0.005
    assert said.count("texture of 64x64") == 3 and said.count(" watertight") == 4
    assert {path.name for path in (folder / "asset").iterdir()} == {"a.glb", "a.obj", "a.mtl", "a.png", "a_normal.png",
                                                                    "a.html", "a.stl"}
    glb, stl = (trimesh.load(folder / "asset" / f"a.{kind}", force="mesh") for kind in ("glb", "stl"))
    assert glb.bounds[0, 1] == pytest.approx(0, abs=1e-6) and stl.bounds[0, 2] == pytest.approx(0, abs=1e-3)
    assert stl.extents[[0, 2, 1]] == pytest.approx(1000 * glb.extents, rel=1e-4)        # mm, z up; and m, y up
    scale = np.load(folder / "scenes/tiny/cameras.npz")["scale_mat_0"][0, 0]
    assert 0.3 < 100 * np.linalg.norm(glb.extents) / scale < 3
    said = run("extract.py", *MODEL, "--texture", "64", "--faces", "400", "--highlights", cwd=folder)
    assert "highlights" in said
    run("report.py", "results_tiny", cwd=folder)
    assert "asset.glb" in (folder / "results_tiny" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("options, named", [
    (("--faces", "0"), "--faces"), (("--faces", "-5"), "--faces"), (("--texture", "100000"), "--texture"),
    (("--texture", "0"), "--texture"), (("--texture", "64", "--output", "a.stl"), "--texture"),
    (("--appearance", "photographs"), "--texture"), (("--highlights",), "--texture"),
    (("--highlights", "--texture", "64", "--output", "a.obj"), ".glb"),
    (("--highlights", "--texture", "64", "--lit"), "--lit"), (("--unit", "mm"), "--world"),
    (("--world", "--unit", "mm"), "mm"),
    (("--output", "a.usdz"), "a.usdz"),
])
def test_options_of_an_asset_that_cannot_be_are_refused(folder, options, named):
    assert named in refused("extract.py", *MODEL, *options, cwd=folder)
    assert not list(folder.glob("a.*"))


def test_extraction_in_world_units_and_as_several_kinds_of_file(folder):
    said = run("extract.py", *MODEL, "--world", "--output", "out/a.obj", "out/a.glb", "out/a.html", cwd=folder)
    assert said.count("vertices") == 3
    scale = np.load(folder / "scenes/tiny/cameras.npz")["scale_mat_0"]
    mesh = trimesh.load(folder / "out" / "a.obj", process=False)
    inside = (mesh.vertices - scale[:3, 3]) / scale[0, 0]
    assert 0.3 < np.linalg.norm(inside, axis=1).max() < 1.0 and mesh.is_watertight
    assert len({tuple(color) for color in mesh.visual.vertex_colors}) > 50
    assert "<script>" in (folder / "out" / "a.html").read_text(encoding="utf-8")
    assert "mesh.fbx" in refused("extract.py", *MODEL, "--output", "out/a.ply", "mesh.fbx", cwd=folder)


@pytest.mark.parametrize("resolution", [15, 1025, 10 ** 9, -512])
def test_the_extractions_resolution_has_the_configurations_bounds(folder, resolution):
    said = refused("extract.py", *MODEL, "--resolution", resolution, cwd=folder)
    assert said == f"error: --resolution must be between 16 and 1024, not {resolution}"


def test_rendering_writes_pictures(folder):
    run("synthesize.py", *MODEL, "--views", "0", "9", "--normals", "--depth", cwd=folder, anew=True)
    renders = folder / "results_tiny" / "renders"
    assert len(list(renders.iterdir())) == 8
    rendered, truth = imageio.imread(renders / "view_009.png"), imageio.imread(folder / "scenes/tiny/image/009.png")
    assert rendered.shape == (32, 32, 3)
    mask = imageio.imread(folder / "scenes/tiny/mask/009.png") > 127
    shown = np.load(renders / "view_009_depth.npy") > 0
    assert (shown & mask).sum() > 0.6 * (shown | mask).sum()
    assert np.abs(rendered[mask].astype(float) - truth[mask]).mean() < np.abs(255.0 - truth[mask]).mean()


def test_backgrounds(folder):
    renders, shown = folder / "results_tiny" / "renders", {}
    for background in ("black", "transparent", "white"):
        run("synthesize.py", *MODEL, "--views", "9", "--normals", "--background", background, cwd=folder)
        shown[background] = [imageio.imread(renders / f"view_009{name}.png") / 255 for name in ("", "_normals")]
    for black, clear, white in zip(*shown.values()):
        assert clear.shape == (32, 32, 4) and white.shape == black.shape == (32, 32, 3)
        alpha = clear[..., 3:]
        assert np.any((alpha > 0) & (alpha < 1)) and np.all(clear[..., :3] * (alpha == 0) == 0)
        assert np.abs(clear[..., :3] * alpha + 1 - alpha - white).max() < 1 / 128
        assert np.abs(clear[..., :3] * alpha - black).max() < 1 / 128
    run("synthesize.py", *MODEL, "--path", "turntable", "--frames", "2", "--height", "24", "--background", "black",
        "--output", "videos/black.gif", cwd=folder)
    assert imageio.mimread(folder / "videos" / "black.gif")[0][0, 0, :3].max() < 10
    assert "--background transparent is for single views" in refused(
        "synthesize.py", *MODEL, "--path", "turntable", "--background", "transparent", cwd=folder)


def test_rendering_a_path_and_another_models_colours(folder):
    run("synthesize.py", *MODEL, "--path", "turntable", "--frames", "4", "--height", "24", "--normals",
        "--output", "videos/round.gif", cwd=folder)
    for name in ("round.gif", "round_normals.gif"):
        frames = imageio.mimread(folder / "videos" / name)
        assert len(frames) == 4 and frames[0].shape[:2] == (24, 24)
        assert np.abs(frames[0][..., :3].astype(int) - frames[2][..., :3]).max() > 20
    run("synthesize.py", *MODEL, "--path", "cameras", "--views", "0", "1", "--frames", "3", cwd=folder)
    assert (folder / "results_tiny" / "renders" / "cameras.mp4").stat().st_size > 500
    early = ("--appearance-model-path", "results_tiny/model_00005.h5")
    run("synthesize.py", *MODEL, *early, "--views", "9", "--depth", cwd=folder)
    run("synthesize.py", *MODEL, "--views", "9", "--depth", cwd=folder)
    renders = folder / "results_tiny" / "renders"
    assert np.array_equal(np.load(renders / "view_009_appearance_depth.npy"), np.load(renders / "view_009_depth.npy"))
    own, others = (imageio.imread(renders / f"view_009{name}.png").astype(int) for name in ("", "_appearance"))
    assert np.abs(own - others).max() > 3
    for words, named in ((("--path", "turntable", "--output", "a.avi"), "a.avi"), (("--output", "a.gif"), "--path"),
                         (("--path", "cameras", "--views", "3"), "two or more"), (("--height", "1"), "--height"),
                         (("--appearance-model-path", "none.h5"), "none.h5")):
        assert named in refused("synthesize.py", *MODEL, *words, cwd=folder)


def test_evaluation_prints_and_writes_both_measures_per_view_and_over_all(folder):
    said, results = run("evaluate.py", *MODEL, cwd=folder, anew=True), folder / "results_tiny"
    assert len(re.findall(r"^view ", said, re.M)) == 10 and "held out" in said
    assert re.search(r"^ +rays through pixel centres: +pixels as areas:$", said, re.M) and "the paper's measure" in said
    cell = r" +([\d.]+) dB +SSIM ([\d.]+) +missed +([\d.]+)%"
    printed = [float(number) for number in re.search(rf"^all views \(10\):{cell}{cell}$", said, re.M).groups()]
    for number, name in zip(printed, ("psnr", "ssim", "missed", "area_psnr", "area_ssim", "area_missed")):
        per_view, over_all = series(results, f"{name}_per_view"), series(results, f"{name}_all_views")[0]
        assert len(per_view) == 10 and per_view.min() <= over_all <= per_view.max()
        assert number == pytest.approx(over_all, abs=0.006) and 0 <= over_all < (1 if "ssim" in name else 100)
        assert len(series(results, f"{name}_held_out_views")) == 1
    assert printed[5] < printed[2] and printed[3] != printed[0]     # areas miss less
    run("report.py", "results_tiny", cwd=folder, anew=True)
    page = html.unescape((results / "report.html").read_text(encoding="utf-8"))
    for words in ("pixels as areas", "the paper's measure", "held-out views", f"{printed[0]:.2f} dB<",
                  f"{printed[3]:.2f} dB<", f"{printed[5]:.2f} %<"):
        assert words in page, words


def test_the_measured_colours_are_those_of_the_picture(folder):
    """The masked pixels of the picture that synthesize.py writes give evaluate.py's second measure."""
    run("evaluate.py", *MODEL, "--views", "9", cwd=folder)
    run("synthesize.py", *MODEL, "--views", "9", "--background", "transparent", cwd=folder)
    picture = imageio.imread(folder / "results_tiny" / "renders" / "view_009.png") / 255
    truth = imageio.imread(folder / "scenes/tiny/image/009.png") / 255
    mask = imageio.imread(folder / "scenes/tiny/mask/009.png") > 127
    colors = np.where(picture[..., 3:] > 0, picture[..., :3], 1.0)
    psnr = -10 * np.log10(((colors - truth)[mask] ** 2).mean())
    assert psnr == pytest.approx(series(folder / "results_tiny", "area_psnr_all_views")[0], abs=0.02)


def test_the_initial_sphere_as_pictures(tmp_path):
    said = run("network.py", "-Ds", "64", "128", "-R", "0.75", "--context", "cpu", cwd=tmp_path, anew=True)
    assert [float(e) for e in re.findall(r"mean absolute error ([\d.]+)", said)] == pytest.approx([0.3, 0.3], abs=0.3)
    said = run("ray_tracer.py", "-D", "64", "-L", "9", "--context", "cpu", cwd=tmp_path, anew=True)
    hits, rays = re.search(r"(\d+) of (\d+) rays hit", said).groups()
    assert 0.05 * int(rays) < int(hits) < 0.9 * int(rays)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "sdf_contour_D064_L009.png", "sdf_contour_D128_L009.png", "sdf_error_L009.png", "sphere_D064_L009.png"]


def test_what_train_refuses(folder):
    def train(**changes):
        path = write_config(folder, **changes)
        return refused("train.py", "--config", path.name, "--monitor-path", "refused", cwd=folder)

    assert "train.speed" in train(train__speed=3)
    assert "train.rays is missing" in train(train__rays=None)
    assert "network.width" in train(network__width="wide")
    assert "no view 12" in train(data__held_out_views=[12])
    assert "scenes/none" in train(data__path="scenes/none")
    assert "validation_downscale" in train(train__validation_downscale=64)
    assert "nowhere.yaml" in refused("train.py", "--config", "nowhere.yaml", cwd=folder)


LONG = "n" * 300


@pytest.mark.parametrize("command", [
    ("train.py", "--config", LONG), ("train.py", "--config", "tiny.yaml", "--monitor-path", LONG),
    ("train.py", "--config", "tiny.yaml", "--resume", LONG),
    ("train.py", "--config", "tiny.yaml", "--monitor-path", LONG, "--resume"),
    ("extract.py", "--config", LONG, "--model-load-path", "results_tiny"),
    ("extract.py", "--config", "tiny.yaml", "--model-load-path", LONG),
    ("extract.py", *MODEL, "--monitor-path", LONG),
    ("extract.py", *MODEL, "--output", LONG + ".ply"), ("extract.py", *MODEL, "--output", LONG + "/mesh.html"),
    ("synthesize.py", *MODEL, "--appearance-model-path", LONG), ("synthesize.py", *MODEL, "--monitor-path", LONG),
    ("synthesize.py", *MODEL, "--path", "turntable", "--frames", "2", "--output", LONG + ".gif"),
    ("evaluate.py", *MODEL, "--mesh", LONG, "--ground-truth", "scenes/tiny/surface.ply"),
    ("evaluate.py", *MODEL, "--monitor-path", LONG), ("report.py", LONG),
], ids=lambda command: " ".join(command).replace(LONG, "LONG")[-60:])
def test_a_name_that_is_too_long_is_refused_in_one_line(folder, command):
    write_config(folder)
    assert LONG in refused(*command, cwd=folder)


def test_a_strange_name_is_as_good_as_another(folder):
    write_config(folder, train__steps=9)
    name = "o$\\frac{$<b>&'\"".ljust(250, "n")
    said = run("train.py", "--config", "tiny.yaml", "--monitor-path", name, "--context", "cpu", cwd=folder)
    assert "not made" not in said and (folder / f"{name}_tiny" / "report.html").exists()
    run("extract.py", *MODEL, "--output", f"{name}.ply", f"{name}.html", cwd=folder)
    assert trimesh.load(folder / f"{name}.ply").is_watertight
    assert f"<title>{html.escape(name)}</title>" in (folder / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["synthesize.py", "extract.py", "evaluate.py"])
def test_what_the_other_scripts_refuse(folder, script):
    write_config(folder)
    (folder / "broken.h5").write_bytes((folder / "results_tiny" / "model_00011.h5").read_bytes()[:5000])
    config = ("--config", "tiny.yaml")
    assert "none.h5" in refused(script, *config, "--model-load-path", "none.h5", cwd=folder)
    assert "broken.h5" in refused(script, *config, "--model-load-path", "broken.h5", cwd=folder)
    write_config(folder, network__width=128)
    said = refused(script, *config, "--model-load-path", "results_tiny", cwd=folder)
    assert "model_00011.h5" in said and "(33, 64)" in said and "(33, 128)" in said


def test_the_gpu_where_there_is_none(folder):
    write_config(folder)
    pytest.importorskip("nnabla")
    if context.gpu_or_reason("0")[0] == "cudnn":
        pytest.skip("there is one here")
    assert "--context cudnn" in refused("train.py", "--config", "tiny.yaml", "--context", "cudnn", cwd=folder)
