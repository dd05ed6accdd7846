"""The unit of a scene: --scale-by on exact cameras, and its page in a browser."""
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import datasets
import helper
import make_scene
import prepare
from commands import run as run_script
from scenes import scale, scale_page

POINTS = np.array([[0.42, -0.16, 0.3], [-0.2, 0.37, -0.25]])    # in the unit sphere's coordinates
FAR = "0:10,10 0:30,30 1:10,10 1:30,30 = 1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of the embedded scene with six small views."""
    folder = tmp_path_factory.mktemp("made")
    run_script("make_scene.py", "--output", "toy", "--views", 6, "--held-out", 0, "--size", 64, cwd=folder)
    return folder / "toy"


@pytest.fixture()
def scene(made, tmp_path, monkeypatch):
    """Return the folder of a copy of that scene; tests run in its parent."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(str(made), str(tmp_path / "toy")))


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
    prepare.main()


def marks_of(scene, views, points=POINTS):
    """Return where the views show two points of the unit sphere's coordinates, as --scale-by has it but for the end."""
    matrices, words = datasets.read_matrices(scene / "cameras.npz", 6), []
    for view in views:
        for point in points:
            u, v, w = (matrices[f"world_mat_{view}"] @ matrices[f"scale_mat_{view}"] @ (*point, 1))[:3]
            words.append(f"{view}:{u / w:.3f},{v / w:.3f}")
    return " ".join(words)


def test_a_scene_in_place(scene, monkeypatch, capsys):
    before = datasets.load_scene_cameras(scene)
    run(monkeypatch, scene, "--scale-by", marks_of(scene, (1, 3, 4)) + " = 0.21")
    after = datasets.load_scene_cameras(scene)
    for old, new in zip(before[:2], after[:2]):     # what the networks see stays
        np.testing.assert_allclose(new, old, atol=1e-4)
    ends = POINTS @ after[2][:3, :3].T + after[2][:3, 3]
    assert abs(np.linalg.norm(ends[0] - ends[1]) - 0.21) < 1e-4
    said = capsys.readouterr().out
    size = [float(word) for word in re.search(r"measures about (\S+) x (\S+) x (\S+) in", said).groups()]
    assert abs(size[0] / (1.42 * after[2][0, 0]) - 1) < 0.1 and sorted(size, reverse=True) == size
    assert (scene / scale.KEPT).is_file()
    run(monkeypatch, scene, "--scale-by", marks_of(scene, (0, 2)) + " = 5.0")    # again: from any unit
    ends = POINTS @ datasets.load_scene_cameras(scene)[2][:3, :3].T
    assert abs(np.linalg.norm(ends[0] - ends[1]) - 5.0) < 2e-3


def test_a_scene_that_is_made(scene, monkeypatch):
    (scene / "image").rename(scene / "images")
    run(monkeypatch, scene, "--output", "mine", "--scale-by", marks_of(scene, (1, 4)) + "=3")
    before, scaled = np.load(scene / "cameras.npz"), np.load("mine/cameras.npz")
    grown = np.linalg.norm(POINTS[0] - POINTS[1]) * make_scene.SCALE / 3
    for view in range(6):
        ratio = (before[f"world_mat_{view}"][:3] @ np.diag((1, 1, 1, 1 / grown)))
        np.testing.assert_allclose(scaled[f"world_mat_{view}"][:3] / scaled[f"world_mat_{view}"][2, 2],
                                   ratio / ratio[2, 2], rtol=2e-3, atol=2e-3 * np.abs(ratio / ratio[2, 2]).max())


@pytest.mark.parametrize("text, words", [
    ("1:2,3", "must end in ="), ("1:2,3 = x", "must end in ="), ("1:2,3 1:4,5 2:2,3 2:4,5 = -1", "more than 0"),
    ("1:2,3 1:4,5 2:2;3 2:4,5 = 1", "'2:2;3' is not view:x,y"), ("1:2,3 1:4,5 = 1", "at least two views"),
    ("1:2,3 1:4,5 2:4,5 = 1", "view 2 has 1 mark;"), ("1:2,3 1:4,5 9:2,3 9:4,5 = 1", "no view 9"),
    ("1:2,3 1:4,5 2:2,3 2:4,500 = 1", "outside the image of 64x64"), (FAR, "do not show one point"),
    ("= 1", "at least two views"), ("1:2,3 1:4,5 2:2,3 2:4,5 = inf", "must end in =")])
def test_wrong_marks_are_refused_in_one_line(text, words, scene, monkeypatch, capsys):
    before = (scene / "cameras.npz").read_bytes()
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(scene), "--scale-by", text])
    with pytest.raises(SystemExit) as end:
        helper.run(prepare.main)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and words in said[0]
    assert (scene / "cameras.npz").read_bytes() == before and not (scene / scale.KEPT).exists()


def test_points_at_one_place_or_seen_from_one_side_are_refused(scene):
    same = marks_of(scene, (0, 3), POINTS[[0, 0]]) + " = 1"
    cameras = scale.scene_cameras(scene, datasets.scene_files(scene)[0])
    with pytest.raises(helper.UserError, match="at one place"):
        scale.factor(scale.read_marks(same), cameras)
    with pytest.raises(helper.UserError, match="from one side"):
        scale.factor(scale.read_marks(marks_of(scene, (0,)) + " " + marks_of(scene, (0,)).replace("0:", "1:") + " = 1"),
                     [cameras[0], cameras[0]])


CLICKS = """
function click(figure, place, x, y) {   // pixels of the photograph
  const element = document.querySelectorAll("figure")[figure], select = element.querySelector("select");
  select.value = place; select.dispatchEvent(new Event("change"));
  const frame = element.querySelector(".frame"), box = frame.getBoundingClientRect(), view = VIEWS[place];
  frame.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + 5, clientY: box.top + 5, bubbles: true}));
  frame.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: box.left + (x + 0.5) / view.width * box.width,
                                               clientY: box.top + (y + 0.5) / view.height * box.height}));
}
addEventListener("load", () => {
  PLACES
  const input = document.getElementById("distance");
  input.value = "0,21"; input.dispatchEvent(new Event("input"));
});
"""


def test_the_page_prints_the_option(scene, monkeypatch):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium here to open the page with (apt-get install chromium)")
    run(monkeypatch, scene, "--scale-by")
    page = (scene.parent / "prepare_toy_scale.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", page)
    marks = [word.partition(":") for word in marks_of(scene, (1, 4)).split()]
    places = "".join(f"click({int(view == '4')}, {view}, {place});\n" for view, _, place in marks)
    page = page.replace("</body>", "<script>" + CLICKS.replace("PLACES", places) + "</script></body>")
    (scene / "page.html").write_text(page)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={scene / 'profile'}",
         "--enable-logging=stderr", "--window-size=1300,900", "--virtual-time-budget=2000", "--dump-dom",
         (scene / "page.html").resolve().as_uri()], capture_output=True, timeout=120)
    assert "CONSOLE" not in done.stderr.decode(errors="replace")
    option = html.unescape(re.search(r'<code id="option">(.*?)</code>', done.stdout.decode())[1])
    command, _, text = option.partition(' --scale-by "')
    assert command.startswith("python prepare.py ") and command.endswith("toy") and text.endswith(' = 0.21"')
    run(monkeypatch, scene, "--scale-by", text[:-1])
    ends = POINTS @ datasets.load_scene_cameras(scene)[2][:3, :3].T
    assert abs(np.linalg.norm(ends[0] - ends[1]) / 0.21 - 1) < 0.01    # the page rounds to a tenth of a pixel


def test_names_on_the_page_are_texts_and_nothing_else(scene):
    strange = scene.parent / "<b>&</script>"[:5]
    scene.rename(strange)
    (strange / "image" / "000.png").rename(strange / "image" / "00'<script>x.png")
    scale_page.write_page(scene.parent / "page.html", strange, "python <!--")
    page = (scene.parent / "page.html").read_text()
    assert "<script>x" not in page and "<title>Scale of <b>" not in page and "<!--" not in page[20:]
    views = json.loads(re.search(r"VIEWS = (\[.*?\]);\n", page)[1])
    assert views[0]["name"] == "00'<script>x.png" and [view["index"] for view in views] == list(range(6))
