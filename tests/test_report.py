"""Test the page of a run: its content, that it fetches nothing, that a browser draws it, that it never stops a run."""
import html
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import time

import imageio.v2 as imageio
import numpy as np
import pytest

import report
from commands import run_copies
from conftest import ROOT, write_demo_config
from files import folders, writing

STEPS, PANEL = 4, (24, 32)      # steps per epoch; height and width of a render


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run as written by train.py after 105 of 140 epochs, with three validations."""
    folder = tmp_path / "results_a & b"
    (folder / "validation").mkdir(parents=True)
    write_demo_config(folder / "demo.yaml", {}, train={"steps": 140 * STEPS, "mask_weight": 400.0})
    ends = np.arange(105) * STEPS + STEPS - 1
    for name, values in (("loss", 3 / (1 + ends)), ("color", 1 / (1 + ends)), ("mask", 0 * ends),
                         ("eikonal", 1 / (2 + ends)), ("hits", 50 + ends / 20), ("alpha", 50 + 0 * ends),
                         ("learning_rate", 1e-3 + 0 * ends)):
        write_series(folder, name, ends, values)
    times = (f"{end} 2.0 {STEPS} {2.0 * (i + 1)}\n" for i, end in enumerate(ends))
    (folder / "time.timer.txt").write_text("".join(times))
    write_series(folder, "psnr", [34, 69, 104], [15.5, 16.5, 22.25])
    for epoch, level in ((34, 60), (69, 120), (104, 180)):
        panels = [np.full(PANEL + (3,), value, np.uint8) for value in (10, level, 200, 250)]
        writing.write_image(folder / "validation" / f"epoch_{epoch:05d}.png", np.concatenate(panels, axis=1))
        shape = np.full((2 * PANEL[0], 4 * 2 * PANEL[1], 3), 90, np.uint8)
        writing.write_image(folder / "validation" / f"epoch_{epoch:05d}_shape.png", shape)
    (folder / "model_00104.h5").write_bytes(b"")
    (folder / "state.h5").write_bytes(b"")
    return folder


def write_series(folder, name, steps, values):
    (folder / f"{name}.series.txt").write_text("".join(f"{int(s)} {v:g}\n" for s, v in zip(steps, values)))


def page_of(folder, running=False):
    report.write(folder, running)
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page):
    """Return the visible text of a page in one line."""
    return html.unescape(" ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S).split()))


def test_it_tells_how_far_the_run_is_and_how_to_go_on(run):
    text = text_of(page_of(run))
    assert "stopped" in text and "step 420 of 560" in text and "22.25 dB" in text
    assert "training time 3 min 30 s" in text and "a step 500 ms" in text and "left, about 1 min 10 s" in text
    folder = shlex.quote(str(run))
    assert f"python train.py --config {shlex.quote(str(run / 'demo.yaml'))} --resume {folder}" in text
    assert "mask_weight 400.0" in text and "[32, 33, 34, 35, 36, 37]" in text


def test_it_loads_itself_anew_only_while_the_run_is_on(run):
    assert 'http-equiv="refresh"' in page_of(run, running=True)
    assert 'http-equiv="refresh"' not in page_of(run, running=False)
    ends = np.arange(140) * STEPS + STEPS - 1
    write_series(run, "loss", ends, 1 + 0 * ends)
    page = page_of(run, running=True)
    assert 'http-equiv="refresh"' not in page and "complete" in text_of(page)


def test_the_latest_validation_is_shown_panel_by_panel(run, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "picture", lambda image, words, *width: shown.append((image, words)) or "")
    page_of(run)
    levels = {words: (int(image[0, 0, 0]), image.shape[:2]) for image, words in shown}
    assert levels["photograph"] == (10, PANEL) and levels["render, 22.25 dB"] == (180, PANEL)
    assert levels["normals"] == (200, PANEL) and levels["depth, white is near"] == (250, PANEL)
    assert [levels[f"render after {n} epochs"][0] for n in (35, 70, 105)] == [60, 120, 180]
    sides = [image.shape[:2] for image, words in shown if "another side" in words]
    assert sides == [(2 * PANEL[0], 2 * PANEL[1])] * 4


def test_measures_are_shown_unless_they_are_of_an_earlier_model(run):
    write_series(run, "psnr_held_out_views", [0], [22.604])
    assert "PSNR, held-out views 22.60 dB" in text_of(page_of(run))
    time.sleep(0.02)
    (run / "model_00139.h5").write_bytes(b"")
    assert "held-out views 22.60" not in text_of(page_of(run))


def write_glb(path, tree):
    text = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<4sIIII", b"glTF", 2, 20 + len(text), len(text), 0x4E4F534A) + text)


def test_the_asset_is_linked_with_what_is_noted_in_it(run):
    noted = {"faces": 50000, "vertices": 25000, "watertight": True, "volume": 12.5, "extent": [1.0, 2.0, 3.25],
             "unit": "cm", "per_unit": 1.0}
    write_glb(run / "my asset.glb", {"asset": {"extras": noted}})
    page = page_of(run)
    assert 'href="my%20asset.glb"' in page
    assert "Faces 50,000 Vertices 25,000 Watertight yes" in text_of(page)
    assert "Extent 1 × 2 × 3.25 cm Volume 12.5 cm³" in text_of(page)
    write_glb(run / "my asset.glb", {"asset": {"extras": {**noted, "watertight": False, "volume": None}}})
    text = text_of(page_of(run))
    assert "Watertight no" in text and "Volume" not in text


@pytest.mark.parametrize("change", [{"faces": "<img>"}, {"extent": [1.0]}, {"extent": None}, {"unit": 3},
                                    {"volume": 1e99}])
def test_an_asset_whose_notes_are_odd_is_linked_without_them(run, change):
    noted = {"faces": 5, "vertices": 2, "watertight": True, "volume": 1.0, "extent": [1.0, 2.0, 3.0], "unit": "cm"}
    write_glb(run / "a.glb", {"asset": {"extras": {**noted, **change}}})
    page = page_of(run)
    assert 'href="a.glb"' in page and "Watertight" not in page


def test_a_broken_asset_is_linked_without_notes(run):
    (run / "a.glb").write_bytes(b"glTF" + bytes(3))
    page = page_of(run)
    assert 'href="a.glb"' in page and "Watertight" not in page


def test_a_run_without_an_epoch_and_a_line_that_is_being_written(run):
    with (run / "loss.series.txt").open("a") as file:
        file.write("423 0.0")
    assert "step 420 of 560" in text_of(page_of(run))
    for path in (*run.glob("*.txt"), *run.glob("validation/*")):
        path.unlink()
    text = text_of(page_of(run))
    assert "step 0 of 560" in text and "No epoch is done yet" in text and "None yet" in text


def test_a_failure_is_one_line_once_and_ends_nothing(run, monkeypatch):
    monkeypatch.setattr(report, "TOLD", set())
    (run / "validation" / "epoch_00104.png").write_bytes(b"no picture")
    said = []
    for _ in range(2):
        report.keep(run, due=True, tell=said.append)
    assert len(said) == 1 and "not made" in said[0] and "\n" not in said[0]
    assert not (run / "report.html").exists()
    with pytest.raises(ZeroDivisionError), report.last_page(run):
        raise ZeroDivisionError


def test_a_page_is_made_where_it_is_due_or_old(run):
    report.keep(run, due=False, tell=print)
    page = run / "report.html"
    page.write_text("young")
    report.keep(run, due=False, tell=print)
    assert page.read_text() == "young"
    report.keep(run, due=True, tell=print)
    assert page.read_text() != "young"


STRANGE = ["<img src=x onerror=alert(1)>\"'&", "o$\\frac{$", "n" * 255, "a\nb", os.fsdecode(b"\xff\x1b[2J")]


@pytest.mark.parametrize("name", STRANGE, ids=range(len(STRANGE)))
def test_a_strange_name_is_a_text_and_nothing_else(run, name):
    folder = run.rename(run.with_name(name))
    done, = run_copies([[ROOT / "report.py", folder]], ROOT)
    assert done.status == 0 and done.error == "", done.error
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert " ".join(name.encode(errors="replace").decode().split()) in text_of(page)
    assert "$" not in "".join(re.findall(r"<text.*?</text>", page, re.S))


def test_a_scenes_name_is_a_text_and_nothing_else(run):
    path = "data/<img src=x onerror=alert(1)>$\\frac{$&"
    write_demo_config(run / "demo.yaml", {}, data={"path": path}, train={"steps": 140 * STEPS})
    page = page_of(run)
    assert "<img src=x" not in page and "<img src=x onerror=alert(1)>$\\frac{$&" in text_of(page)
    assert "<title>75% &lt;img" in page


def test_a_plot_takes_no_text_for_a_formula():
    line = np.arange(3.0), np.arange(3.0)
    assert "$\\frac{$" in html.unescape(report.plot("o$\\frac{$", {"$\\frac{$": line, "b": line}))


def test_by_hand(run):
    def by_hand(folder):
        return run_copies([[ROOT / "report.py", folder]], ROOT)[0]

    done = by_hand(run)
    assert done.status == 0 and done.out.strip() == str(run / "report.html")
    with folders.held(run):
        assert by_hand(run).status == 0
    assert "running" in text_of((run / "report.html").read_text(encoding="utf-8"))
    for folder in (run / "validation", run / "nowhere", run / ("n" * 300)):
        done = by_hand(folder)
        assert done.status == 2 and len(done.error.splitlines()) == 1 and str(folder) in done.error


@pytest.mark.parametrize("spoil", [False, True])
def test_a_browser_draws_it_without_complaint_or_a_request(run, spoil):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium here to open the page with (apt-get install chromium)")
    page = page_of(run)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page)
    if spoil:       # to show that the check below detects a request
        page = page.replace("</h1>", '</h1><img src="http://127.0.0.1:9/x.png">')
    (run / "page.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={run / 'profile'}", "--enable-logging=stderr", "--window-size=800,1200",
         "--virtual-time-budget=1000", f"--screenshot={run / 'page.png'}", (run / "page.html").resolve().as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    console = [line for line in done.stdout.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert bool(console) == spoil, console
    drawn = imageio.imread(run / "page.png")[..., :3]
    assert (drawn == 180).all(axis=-1).sum() > 1000      # the render is drawn
