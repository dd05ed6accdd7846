"""Write report.html, a page about a training run, from the files in the run's folder.

    python report.py results_demo

train.py updates the page by itself. After extract.py or evaluate.py, this command adds their results. The page is a
single file that fetches nothing: plots are inline SVG, and pictures are inline, too.
"""
import argparse
import base64
import contextlib
import html
import io
import json
import os
import re
import shlex
import struct
import time
from pathlib import Path
from typing import Dict, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np

import helper
from config import settings
from files import folders, pictures, writing
from training import checkpoints

PAGE = "report.html"
REFRESH = 30        # seconds after which the browser reloads the page of a running training
PAGE_EVERY = 60     # seconds; after an epoch, an older page is written again
LARGE, SMALL = 640, 200         # maximum widths of pictures in pixels, which limit the size of the page
THUMBNAILS = 8      # number of earlier renders shown
MOST_NOTED = 1 << 20            # bytes of a GLB's description
TOLD = set()        # failures that were printed already

# The numbers of evaluate.py about renders: {series: (its label, its format)}, each with the prefixes of MEASURES.
RENDERED = {f"{name}_{views.replace('-', '_')}_views": (f"{label}, {views} views", form)
            for name, label, form in (("psnr", "PSNR", "{:.2f} dB"), ("ssim", "SSIM", "{:.3f}"),
                                      ("missed", "Masked pixels without a hit", "{:.2f} %"))
            for views in ("all", "trained", "held-out")}
MEASURES = {"": "rays through pixel centres, the paper's measure", "area_": "pixels as areas, that of the pictures"}

# Its numbers about the mesh: {series: (its label, its format)}
MEASURED = {
    "accuracy": ("Mesh to true surface", "{:.5f}"),
    "completeness": ("True surface to mesh", "{:.5f}"),
    "chamfer": ("Chamfer distance", "{:.5f}"),
    "normal_consistency": ("Normal consistency", "{:.4f}"),
    "dtu_accuracy": ("DTU accuracy", "{:.3f} mm"),
    "dtu_completeness": ("DTU completeness", "{:.3f} mm"),
    "dtu_chamfer": ("DTU Chamfer distance", "{:.3f} mm"),
}


def main():
    parser = argparse.ArgumentParser(description="Write report.html, the page of a training run.")
    parser.add_argument("folder", help="folder of the run, such as results_demo")
    folder = Path(parser.parse_args().folder)
    if not folder.is_dir():
        raise helper.UserError(f"{folder}: no such folder; name the folder of a training run")
    folders.remove_unfinished(folder)
    write(folder, running=is_held(folder))
    print(folder / PAGE)


def keep(folder, due, tell):
    """Write the page of a running training if it is due or old. A failure is one line, passed to `tell`."""
    page = folder / PAGE
    if due or not page.exists() or time.time() - page.stat().st_mtime > PAGE_EVERY:
        attempt(folder, running=True, tell=tell)


@contextlib.contextmanager
def last_page(folder):
    """Write the page once more when the block, a training, ends or fails."""
    try:
        yield
    finally:
        attempt(folder, running=False, tell=print)


def attempt(folder, running, tell):
    """Write the page. A failure does not end the training; it is passed to `tell` as one line, and only once.

    Raises UserError if the run's folder was moved.
    """
    folders.check_held(folder)
    try:
        write(folder, running)
    except Exception as error:
        said = f"{folder / PAGE}: not made ({type(error).__name__}: {' '.join(str(error).split())})"
        if said not in TOLD:
            TOLD.add(said)
            tell(said)


def write(folder, running):
    """Write the page of the run in `folder` atomically. Raises UserError if the folder holds no run."""
    writing.write_bytes(folder / PAGE, page(read_run(folder), running).encode(errors="replace"))


def is_held(folder):
    """Return whether a training is writing to the folder."""
    try:
        with folders.held(folder):
            return False
    except helper.UserError:
        return True


# --- reading a run ----------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """The content of a run's folder."""
    folder: Path
    config: Path                        # file of the configuration
    conf: settings.Configuration
    series: Dict[str, np.ndarray]       # {name: (N, 2)}, step or epoch, and value
    steps: int                          # per epoch; 1 while no epoch is done
    done: int                           # number of steps done
    laps: np.ndarray                    # (N, 2), last step and seconds of each epoch
    elapsed: float                      # seconds of all epochs


def read_run(folder):
    """Return the Run in `folder`. Raises UserError if the folder has no valid configuration."""
    configs = sorted(folder.glob("*.yaml"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise helper.UserError(f"{folder}: holds no configuration (.yaml); name the folder of a training run")
    series = {path.name[:-len(".series.txt")]: read_series(path) for path in sorted(folder.glob("*.series.txt"))}
    series = {name: values for name, values in series.items() if len(values)}
    timer = read_series(folder / "time.timer.txt", columns=4)
    ends = series.get("loss", np.zeros((0, 2)))[:, 0] + 1       # steps done after each epoch
    steps = int(ends[0]) if len(ends) else 1
    return Run(folder, configs[-1], settings.load_config(configs[-1]), series, steps,
               done=int(ends[-1]) if len(ends) else 0, laps=timer[:, [0, 1]],
               elapsed=timer[-1, 3] if len(timer) else 0.0)


def read_series(path, columns=2):
    """Return the numbers (N, columns) in a file of nnabla's monitors.

    Incomplete lines, which are being written, are left out. A missing file gives N = 0.
    """
    rows = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = [float(word) for word in line.split()]
            if len(row) == columns and line.endswith("\n"):
                rows.append(row)
    return np.array(rows).reshape(-1, columns)


def validations(folder, ending=""):
    """Return the pictures of validations, {epoch: path}, oldest first; ending: "" or "_shape"."""
    found = {re.fullmatch(rf"epoch_(\d+){ending}\.png", path.name): path for path in folder.glob("validation/epoch_*")}
    return {int(match.group(1)): path for match, path in sorted(found.items(), key=lambda item: item[1]) if match}


def measurements(run):
    """Return the last numbers by evaluate.py of the newest model, {name of the series: value}."""
    newest = max((path.stat().st_mtime for path in run.folder.glob("model_*.h5")), default=0)
    return {name: values[-1, 1] for name, values in run.series.items()
            if (run.folder / f"{name}.series.txt").stat().st_mtime >= newest}


# --- plots and pictures -----------------------------------------------------------------------------------------------

# Placeholder colours of the plots, and the page's CSS variables that replace them, for light and dark themes.
INK, RULE = "#010101", "#020202"
LINES = ("#030301", "#030302", "#030303", "#030304")
VARIABLES = {INK: "--muted", RULE: "--rule", **{line: f"--line{i}" for i, line in enumerate(LINES)}}


def plot(words, lines, log=False, step=False, from_zero=False):
    """Draw lines over the epochs, and return them as inline SVG.

    words: description for screen readers
    lines: {label: (x (N,), y (N,))}; labels are drawn if there are several
    log: logarithmic y axis, without values that are not positive
    step: draw steps, for values that are constant within an epoch
    from_zero: the y axis begins at 0
    """
    import matplotlib  # imported here, as it delays the start of a training
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": words, "axes.edgecolor": RULE, "text.color": INK,
             "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
             "axes.labelcolor": INK, "font.size": 10.5, "grid.color": RULE, "grid.linewidth": 0.6,
             "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.7), constrained_layout=True)
        axes = figure.add_subplot()
        for (label, (x, y)), colour in zip(lines.items(), LINES):
            y = np.where(y > 0, y, np.nan) if log else y
            marker = dict(marker="o", markersize=3) if len(x) <= 40 and not step else {}
            axes.plot(x, y, label=label, color=colour, linewidth=1.5, drawstyle="steps-pre" if step else None, **marker)
        if log and any((y > 0).any() for _, y in lines.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlim(0, max(1.02 * x[-1] for x, _ in lines.values()))
        if from_zero:
            axes.set_ylim(0, None)
        axes.set_xlabel("epochs")
        axes.grid(True, axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if len(lines) > 1:
            figure.legend(loc="outside upper center", ncol=2, frameon=False, handlelength=1.2, columnspacing=1.2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(file.getvalue(), words)


def inline_svg(svg, words):
    """Return an SVG of matplotlib without metadata, styles and ids, with the page's font and colours. words: label."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)       # ids would repeat, as a page has several plots
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
                 rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" '
                 rf'aria-label="{html.escape(words)}">', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    return re.sub("|".join(VARIABLES), lambda match: f"var({VARIABLES[match.group()]})", svg)


def picture(image, words, width=LARGE):
    """Return an image (H, W, 3) uint8 as an inline <img> of at most `width` pixels: PNG, or JPEG if that is large."""
    if image.shape[1] > width:
        height = max(round(image.shape[0] * width / image.shape[1]), 1)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    kind, data = "png", cv2.imencode(".png", image[..., ::-1])[1]
    if len(data) > 60000:
        kind, data = "jpeg", cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return (f'<img src="data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}" '
            f'width="{image.shape[1]}" height="{image.shape[0]}" alt="{html.escape(words)}">')


# --- the page ---------------------------------------------------------------------------------------------------------

def page(run, running):
    """Return the page of a Run as HTML; running: whether its training is running now."""
    folder, conf = run.folder.resolve(), run.conf
    done, wanted = run.done, conf.train.steps
    state = "complete" if done >= wanted else "running" if running else "stopped"
    scene = Path(conf.data.path).name
    share = min(done / wanted, 1.0)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if state == "running" else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"      # the browser fetches nothing
    parts = [section("Renders", renders(run)), section("Shape", shape(run)), section("On the way", thumbnails(run)),
             section("Curves", curves(run)), section("Measured", measured(run)),
             section("How to go on", commands(run, state)), section("Settings", keys(conf))]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}
<title>{"" if state == "complete" else f"{share:.0%} "}{html.escape(scene)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(scene)} <span class="state {state}">{state}</span></h1>
<p class="muted">{html.escape(folder.name)}, {time.strftime("%d %B %Y, %H:%M:%S").lstrip("0")}{
    "; the page loads itself anew" if state == "running" else ""}</p>
<div class="bar" role="progressbar" aria-valuenow="{share * 100:.0f}" aria-valuemin="0" aria-valuemax="100"
aria-label="steps done"><div style="width: {share:.2%}"></div></div>
{tiles(run, state)}
</header>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def section(title, content):
    """Return a section with a heading, or "" if it has no content."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def figures(items, kind):
    """Return a grid of figures; items: [(content, caption as HTML)]; kind: CSS classes."""
    return f'<div class="grid {kind}">' + "".join(
        f"<figure>{content}<figcaption>{caption}</figcaption></figure>\n" for content, caption in items) + "</div>"


def tiles(run, state):
    """Return the current numbers of the run, such as step, PSNR, loss and time."""
    series, wanted = run.series, run.conf.train.steps
    items = [("step", f"{run.done:,} <small>of {wanted:,}</small>")]
    if "psnr" in series:
        items.append((f"PSNR, view {run.conf.train.validation_view}", f"{series['psnr'][-1, 1]:.2f} <small>dB</small>"))
    if "loss" in series:
        items.append(("loss", f"{series['loss'][-1, 1]:.4f}"))
    if len(run.laps):
        lap = np.median(run.laps[-5:, 1])
        items.append(("training time", duration(run.elapsed)))
        items.append(("a step", f"{lap / run.steps * 1000:.0f} <small>ms</small>"))
        if state != "complete":
            items.append(("left, about", duration(lap / run.steps * (wanted - run.done))))
    return '<dl class="tiles">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items) \
        + "</dl>"


def validation_view(conf):
    """Return the name of the validation view, such as "view 3, held out"."""
    view = conf.train.validation_view
    return f"view {view}, held out" if view in conf.data.held_out_views else f"view {view}"


def epochs(count):
    """Return a number of epochs in words, such as "1,000 epochs"."""
    return f"{count:,} epoch{'s' if count != 1 else ''}"


def duration(seconds):
    """Return seconds in words as HTML, such as 2 h 5 min."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} <small>s</small>"
    if hours < 1:
        return f"{minutes:.0f} <small>min</small>" if minutes >= 10 else \
            f"{int(minutes)} <small>min</small> {int(seconds % 60)} <small>s</small>"
    return f"{int(hours)} <small>h</small> {int(minutes % 60)} <small>min</small>"


def renders(run):
    """Return the latest validation: photograph, render, normals, depth."""
    found = validations(run.folder)
    if not found:
        return f'<p class="muted">None yet: a view is rendered {run.conf.train.validations} times in the run, at the ' \
            'end of an epoch (train.validations).</p>'
    epoch, path = list(found.items())[-1]
    view, psnr = validation_view(run.conf), dict(run.series.get("psnr", []))
    captions = ("photograph", f"render, {psnr[epoch]:.2f} dB" if epoch in psnr else "render", "normals",
                "depth, white is near")
    panels = np.split(pictures.read_image(path), len(captions), axis=1)
    return f'<p class="muted">{view.capitalize()}, after {epochs(epoch + 1)}.</p>' + \
        figures([(picture(panel, caption), caption) for panel, caption in zip(panels, captions)], "four")


def shape(run):
    """Return the latest shaded surface from several sides, and links to the mesh if there is one."""
    found, content = validations(run.folder, "_shape"), ""
    panels = validations(run.folder)
    if found:
        epoch, path = list(found.items())[-1]
        image = pictures.read_image(path)
        height, width = pictures.read_image(panels[epoch]).shape[:2] if epoch in panels else (1, 4)
        # The number of images side by side; each has the proportions of a validation's panel.
        count = max(round(image.shape[1] / image.shape[0] / (width / 4 / height)), 1)
        items = [(picture(part, "the surface from another side"), "") for part in np.array_split(image, count, axis=1)]
        content = f'<p class="muted">The surface, as extract.py would mesh it, from cameras that lie far apart; ' \
            f'after {epochs(epoch + 1)}.</p>' + figures(items, "four bare")
    links = [f'<a href="{name}">{words}</a>' for name, words in
             (("mesh.html", "turn the mesh"), ("mesh.ply", "the mesh, mesh.ply")) if (run.folder / name).exists()]
    return content + (f'<p class="links">{" ".join(links)}</p>' if links else "") + asset(run)


def asset(run):
    """Return a link to the newest GLB in the run's folder, with what extract.py noted in it; "" if there is none."""
    files = sorted(run.folder.glob("*.glb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ""
    facts, rows = noted_facts(files[-1]), [("File size", f"{files[-1].stat().st_size / 1e6:.1f} MB")]
    if facts:
        unit = str(facts["unit"])
        rows[:0] = [("Faces", f"{facts['faces']:,}"), ("Vertices", f"{facts['vertices']:,}"),
                    ("Watertight", "yes" if facts["watertight"] else "no")]
        rows.append(("Extent", " × ".join(f"{length:.4g}" for length in facts["extent"]) + f" {unit}"))
        if facts["volume"] is not None:
            rows.append(("Volume", f"{facts['volume']:.4g} {unit}³"))
    name = files[-1].name
    return f'<p class="links"><a href="{html.escape(quote(os.fsencode(name)))}">the asset, ' \
        f'{html.escape(name)}</a></p>{table(rows)}'


def noted_facts(path):
    """Return what extract.py noted in a GLB, as formats.Facts names it, or None if that cannot be read or is not so."""
    with contextlib.suppress(Exception), open(str(path), "rb") as file:    # a stranger's file may hold anything
        magic, _, _, size, kind = struct.unpack("<4sIII4s", file.read(20))
        if (magic, kind) != (b"glTF", b"JSON") or size > MOST_NOTED:
            return None
        facts = json.loads(file.read(size))["asset"]["extras"]
        numbers = [facts["faces"], facts["vertices"], *facts["extent"], facts["volume"] or 0]
        if len(facts["extent"]) == 3 and all(type(n) in (int, float) and abs(n) < 1e30 for n in numbers):
            return {**facts, "watertight": facts["watertight"] is True, "unit": facts["unit"][:20]}
    return None


def thumbnails(run):
    """Return at most THUMBNAILS earlier renders, evenly spaced over the epochs."""
    found = list(validations(run.folder).items())
    if len(found) < 2:
        return ""
    psnr, items = dict(run.series.get("psnr", [])), []
    for index in np.unique(np.linspace(0, len(found) - 1, THUMBNAILS).round().astype(int)):
        epoch, path = found[index]
        image = np.split(pictures.read_image(path), 4, axis=1)[1]
        caption = epochs(epoch + 1) + (f"<br>{psnr[epoch]:.1f} dB" if epoch in psnr else "")
        items.append((picture(image, f"render after {epochs(epoch + 1)}", SMALL), caption))
    return figures(items, "eight")


def curves(run):
    """Return the plots: losses, PSNR, errors of trained cameras, hits, learning rate, alpha and time."""
    series, train = run.series, run.conf.train

    def over_epochs(name, factor=1.0):
        return (series[name][:, 0] + 1) / run.steps, series[name][:, 1] * factor

    items = []

    def add(title, value, lines, **how):
        items.append((plot(title, lines, **how), f"<b>{title}</b> <span>{value}</span>"))

    losses = {"total": ("loss", 1.0), "colour": ("color", 1.0), f"mask × {train.mask_weight:g}":
              ("mask", train.mask_weight), f"eikonal × {train.eikonal_weight:g}": ("eikonal", train.eikonal_weight)}
    losses = {label: over_epochs(*what) for label, what in losses.items() if what[0] in series}
    if losses:
        add("Loss", f"{series['loss'][-1, 1]:.4f}", losses, log=True)
    if "psnr" in series:
        add("PSNR", f"{series['psnr'][-1, 1]:.2f} dB, {validation_view(run.conf)}",
            {"PSNR": (series["psnr"][:, 0] + 1, series["psnr"][:, 1])})
    for name, title, unit in (("camera_rotation", "Cameras turned", "°"),
                              ("camera_translation", "Cameras moved", " of the sphere's radius")):
        if name in series:
            add(title, f"{series[name][-1, 1]:.3g}{unit}", {title: (series[name][:, 0] + 1, series[name][:, 1])},
                from_zero=True)
    for name, title, says, how in (
            ("hits", "Rays that hit in the mask", "{:.0f} of " + str(train.rays), {}),
            ("learning_rate", "Learning rate", "{:.3g}", {"step": True, "from_zero": True}),
            ("alpha", "Alpha, the sharpness of the mask", "{:g}", {"step": True, "from_zero": True})):
        if name in series:
            add(title, says.format(series[name][-1, 1]), {title: over_epochs(name)}, **how)
    if len(run.laps):
        add("Seconds an epoch", f"{run.laps[-1, 1]:.3g} s, {run.steps} steps",
            {"time": ((run.laps[:, 0] + 1) / run.steps, run.laps[:, 1])}, from_zero=True)
    return figures(items, "three") if items else '<p class="muted">No epoch is done yet.</p>'


def measured(run):
    """Return the measures of evaluate.py as tables: those of the renders, then those of the mesh."""
    found = measurements(run)
    return measures_of_renders(found) + table([(label, form.format(found[name]))
                                               for name, (label, form) in MEASURED.items() if name in found])


def measures_of_renders(found):
    """Return the table of both measures of the renders, "" if there are none; found: of `measurements`."""
    rows = [[label, *(form.format(found[prefix + name]) if prefix + name in found else "" for prefix in MEASURES)]
            for name, (label, form) in RENDERED.items() if any(prefix + name in found for prefix in MEASURES)]
    if not rows:
        return ""
    cells = [["th", "", *MEASURES.values()]] + [["td", *row] for row in rows]
    return '<div class="wide"><table>' + "".join(
        "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>\n"
        for kind, *row in cells) + "</table></div>"


def table(rows):
    """Return rows [(name, value)] as a description list, or "" if there are none."""
    return '<dl class="table">' + "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in rows) \
        + "</dl>" if rows else ""


def commands(run, state):
    """Return the commands to run next, in the folder where the run was started."""
    folder, config = shlex.quote(str(run.folder)), shlex.quote(str(run.config))
    resume = f"python train.py --config {config} --resume {folder}"
    model = f"--config {config} --model-load-path {folder}"
    says = {"complete": "The run is complete. To train on, raise train.steps in the configuration first.",
            "running": "Where the run is interrupted, this goes on with it.",
            "stopped": "The run was stopped before its end. This goes on with it."}[state]
    content = f"<p>{says}</p><pre>{html.escape(resume)}</pre>" if (run.folder / checkpoints.STATE_FILE).exists() else ""
    if any(run.folder.glob("model_*.h5")):
        lines = [f"python {script}.py {model}" for script in ("synthesize", "extract", "evaluate")]
        lines.append(f"python report.py {folder}")
        content += "<p>Views, the mesh and the measures of the newest model, and this page with them:</p>" \
            f"<pre>{html.escape(chr(10).join(lines))}</pre>"
    return content


def keys(conf):
    """Return the configuration, one table per section."""
    tables = "".join(f"<div><h3>{name}</h3>{table(vars(values).items())}</div>" for name, values in vars(conf).items())
    return f'<div class="grid three">{tables}</div>'


STYLE = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d2126; --muted: #646b74; --rule: #e2e3e0; --good: #2a8c55;
  --line0: #2468b0; --line1: #cf6a10; --line2: #2a8c55; --line3: #8659b5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f24; --ink: #e7e7e4; --muted: #9ba2ab; --rule: #30343b; --good: #58b985;
    --line0: #6aaaf2; --line1: #f09a4c; --line2: #58b985; --line3: #b994e3;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 16px/1.5 var(--sans); }
h1 { margin: 0; font-size: 30px; font-weight: 650; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; font-size: 20px; font-weight: 600; }
h3 { margin: 0 0 4px; font-size: 15px; font-weight: 600; color: var(--muted); }
p { margin: 0 0 12px; }
.muted { color: var(--muted); }
header .muted { margin: 4px 0 16px; }
.state { display: inline-block; vertical-align: middle; margin-left: 6px; padding: 2px 11px; border-radius: 20px;
  font-size: 14px; font-weight: 500; line-height: 1.5; border: 1px solid currentColor; color: var(--line1); }
.state.running { color: var(--line0); }
.state.complete { color: var(--good); }
.bar { height: 6px; border-radius: 3px; background: var(--rule); overflow: hidden; }
.bar div { height: 100%; background: var(--line0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0; }
.tiles div, .grid > *, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tiles div { padding: 10px 14px; }
.tiles dt { color: var(--muted); font-size: 13px; }
.tiles dd { margin: 0; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles small { font-size: 14px; font-weight: 400; color: var(--muted); }
.grid { display: grid; gap: 14px; }
.three { grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.four { grid-template-columns: repeat(4, 1fr); }
.eight { grid-template-columns: repeat(8, 1fr); gap: 10px; }
figure { margin: 0; overflow: hidden; }
figcaption { padding: 7px 12px 9px; font-size: 14px; color: var(--muted); }
.eight figcaption { padding: 5px 8px 7px; font-size: 12.5px; line-height: 1.35; }
.bare figcaption { display: none; }
.three figure { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.three figcaption { display: flex; justify-content: space-between; gap: 10px; padding: 10px 14px 2px; }
.three figcaption b { color: var(--ink); font-weight: 600; }
.three > div { padding: 12px 14px; }
img { display: block; width: 100%; height: auto; background: #fff; }
svg { display: block; width: 100%; height: auto; padding: 0 6px 6px; }
.links { margin-top: 12px; }
.links a { margin-right: 18px; }
a { color: var(--line0); }
pre { margin: 0 0 16px; padding: 12px 14px; overflow-x: auto; \
font: 13.5px/1.6 ui-monospace, Menlo, Consolas, monospace; }
.table { margin: 0; font-size: 14px; }
.table div { display: flex; justify-content: space-between; gap: 16px; padding: 3px 0;
  border-top: 1px solid var(--rule); }
.table div:first-child { border-top: 0; }
.table dt { color: var(--muted); }
.table dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
section > .table { max-width: 460px; }
.wide { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 18px 4px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th, td:first-child { color: var(--muted); font-weight: 400; }
@media (max-width: 720px) {
  body { padding: 18px 14px 40px; }
  h1 { font-size: 25px; }
  h2 { margin-top: 34px; }
  .four { grid-template-columns: repeat(2, 1fr); gap: 10px; }
  .eight { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; }
}
@media print { .grid > *, .tiles div { break-inside: avoid; } }
"""


if __name__ == "__main__":
    helper.run(main)
