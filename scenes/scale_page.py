"""The page on which the two points of --scale-by are clicked: one file, without a server or any request."""
import base64
import html
import json

import cv2
import numpy as np
from tqdm import tqdm

import datasets
from files import pictures, writing

MOST_VIEWS = 24     # on the page, spread evenly
LONGEST = 1600      # pixels of a photograph on the page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Scale of TITLE</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 16px; background: #fafafa; color: #222 }
main { display: flex; gap: 12px } figure { flex: 1; margin: 0; min-width: 0 } select { width: 100%; font: inherit }
.frame { position: relative; cursor: crosshair; margin-top: 6px } .frame img { width: 100%; display: block }
.mark { position: absolute; width: 15px; height: 15px; margin: -8px; border: 2px solid; border-radius: 50%;
  pointer-events: none; background: radial-gradient(currentColor 1px, transparent 2px) }
.mark b { position: absolute; left: 16px; top: -6px; text-shadow: 0 0 3px #fff, 0 0 3px #fff }
.one { color: #d60000 } .two { color: #0047d6 }
#lens { position: fixed; width: 180px; height: 180px; border: 1px solid #444; display: none; pointer-events: none;
  image-rendering: pixelated; background: #222 no-repeat }
#lens::before, #lens::after { content: ""; position: absolute; background: #f0f }
#lens::before { left: 90px; top: 78px; width: 1px; height: 25px }
#lens::after { left: 78px; top: 90px; width: 25px; height: 1px }
#option { display: block; padding: 8px; background: #fff; border: 1px solid #bbb; min-height: 1.4em; user-select: all;
  overflow-wrap: anywhere } input { font: inherit; width: 8em }
</style></head><body>
<h1>Scale of TITLE</h1>
<p>Choose two photographs that look from different sides. In each, click <b class="one">point 1</b>, then
<b class="two">point 2</b>: two points whose distance you know, such as the ends of a ruler or of an edge. Click near a
point to move it. Then type their distance; its unit becomes the scene's, such as 0.21 for 21 cm in metres.</p>
<p><label>Distance: <input id="distance" inputmode="decimal" placeholder="0.21"></label>
<button id="copy">Copy</button> <button id="clear">Clear</button></p>
<code id="option"></code><p id="hint"></p>
<main><figure><select></select><div class="frame"><img alt=""></div></figure>
<figure><select></select><div class="frame"><img alt=""></div></figure></main><div id="lens"></div>
<script>
"use strict";
const COMMAND = DATA_COMMAND, VIEWS = DATA_VIEWS;
const figures = [...document.querySelectorAll("figure")], marks = {}, lens = document.getElementById("lens");
const option = document.getElementById("option"), hint = document.getElementById("hint");
const distance = document.getElementById("distance");
function shown(figure) { return VIEWS[figure.querySelector("select").value]; }
function draw(figure) {
  const view = shown(figure), frame = figure.querySelector(".frame"), image = frame.querySelector("img");
  if (image.dataset.view !== String(view.index)) { image.src = view.src; image.dataset.view = view.index; }
  frame.querySelectorAll(".mark").forEach(mark => mark.remove());
  (marks[view.index] || []).forEach((point, which) => {
    const mark = document.createElement("div");
    mark.className = "mark " + (which ? "two" : "one");
    mark.innerHTML = "<b>" + (which + 1) + "</b>";
    mark.style.left = 100 * (point[0] + 0.5) / view.width + "%";
    mark.style.top = 100 * (point[1] + 0.5) / view.height + "%";
    frame.append(mark);
  });
}
function update() {
  figures.forEach(draw);
  const views = Object.keys(marks).map(Number).sort((a, b) => a - b).filter(view => marks[view].length === 2);
  const length = Number(distance.value.replace(",", "."));
  const ready = views.length >= 2 && length > 0;
  const words = views.map(view => marks[view].map(p => view + ":" + p.join(",")).join(" ")).join(" ");
  option.textContent = ready ? COMMAND + ' --scale-by "' + words + " = " + length + '"' : "";
  hint.textContent = ready ? "Paste this into the terminal." : views.length < 2 ?
    "Still to mark: both points in two photographs (" + views.length + " done)." : "Still to type: the distance.";
}
function pixel(event, frame, view) {
  const box = frame.getBoundingClientRect();
  const at = [(event.clientX - box.left) / box.width * view.width,
              (event.clientY - box.top) / box.height * view.height];
  return at.map(value => Math.round(10 * (value - 0.5)) / 10);
}
figures.forEach((figure, which) => {
  const select = figure.querySelector("select"), frame = figure.querySelector(".frame");
  VIEWS.forEach((view, place) => select.add(new Option("view " + view.index + ": " + view.name, place)));
  select.value = Math.min(VIEWS.length - 1, which * Math.max(1, Math.round(VIEWS.length / 8)));
  select.addEventListener("change", update);
  frame.addEventListener("click", event => {
    const view = shown(figure), point = pixel(event, frame, view), points = marks[view.index] = marks[view.index] || [];
    const away = points.map(p => Math.hypot(p[0] - point[0], p[1] - point[1]));
    const nearest = away.indexOf(Math.min(...away));
    if (points.length === 2 || nearest >= 0 && away[nearest] < 0.03 * view.width) points[nearest] = point;
    else points.push(point);
    update();
  });
  frame.addEventListener("mousemove", event => {
    const box = frame.getBoundingClientRect(), image = frame.querySelector("img"), zoom = 4;
    lens.style.display = "block";
    lens.style.left = event.clientX + 24 + "px"; lens.style.top = event.clientY + 24 + "px";
    lens.style.backgroundImage = "url(" + image.src + ")";
    lens.style.backgroundSize = zoom * box.width + "px " + zoom * box.height + "px";
    lens.style.backgroundPosition = 90 - zoom * (event.clientX - box.left) + "px " +
      (90 - zoom * (event.clientY - box.top)) + "px";
  });
  frame.addEventListener("mouseleave", () => { lens.style.display = "none"; });
});
distance.addEventListener("input", update);
document.getElementById("clear").addEventListener("click", () => {
  Object.keys(marks).forEach(view => delete marks[view]); update(); });
document.getElementById("copy").addEventListener("click", () => {
  getSelection().selectAllChildren(option); document.execCommand("copy"); });
update();
</script></body></html>
"""


def write_page(path, scene, command):
    """Write the page for the scene in the folder `scene` to the file `path`.

    command: what the option on the page follows, such as "python prepare.py data/shoe".
    """
    images, views = datasets.scene_files(scene)[0], []
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_VIEWS)).round().astype(int))
    for index in tqdm(chosen, desc="page", unit="view", dynamic_ncols=True):
        image = pictures.read_image(images[index])
        height, width = image.shape[:2]
        small = min(1.0, LONGEST / max(height, width))
        shrunk = cv2.resize(image, None, fx=small, fy=small, interpolation=cv2.INTER_AREA) if small < 1 else image
        content = cv2.imencode(".jpg", shrunk[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 85))[1].tobytes()
        views.append({"index": int(index), "name": images[index].name, "width": width, "height": height,
                      "src": "data:image/jpeg;base64," + base64.b64encode(content).decode()})
    page = PAGE.replace("TITLE", html.escape(scene.absolute().name))
    for name, value in (("DATA_COMMAND", command), ("DATA_VIEWS", views)):
        page = page.replace(name, json.dumps(value).replace("<", "\\u003c"), 1)
    writing.write_bytes(path, page.encode("utf-8", "replace"))
