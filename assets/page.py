"""mesh.html: a page in which a mesh turns, with its textures, its wireframe, a light and a ruler."""
import base64
import gzip
import html
import json
from pathlib import Path
from typing import Union

import trimesh
from trimesh import resources, util

from assets.baking import Asset
from assets.formats import Facts, colored_glb, textured_glb

QUALITY = 90        # of the textures' JPEG
HERE = Path(__file__).resolve().parent


def page(shape: Union[trimesh.Trimesh, Asset], title: str, facts: Facts) -> str:
    """Return a self-contained HTML page that turns a mesh or an Asset, upright with y up, seen first from +z.

    facts: its unit and per_unit are those of the page's ruler.
    """
    if isinstance(shape, Asset):
        content = textured_glb(shape, facts, lit=shape.light is None, quality=QUALITY)
    else:
        content = colored_glb(shape, facts, lit=True)
    packed = base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
    values = {"$TITLE": html.escape(title), "$FACTS": json.dumps(facts._asdict()).replace("<", "\\u003c"),
              "$THREE": three_js(), "$VIEWER": (HERE / "viewer.js").read_text(encoding="utf-8"), "$MODEL": packed}
    text = (HERE / "viewer.html").read_text(encoding="utf-8")
    for name in ("$VIEWER", "$THREE", "$TITLE", "$FACTS", "$MODEL"):    # the title, a stranger's, after the code
        text = text.replace(name, values[name], 1)
    return text


def three_js() -> str:
    """Return three.js with its GLTFLoader, which trimesh brings along (MIT licence, revision 140)."""
    template = util.decompress(resources.get_bytes("templates/viewer.zip"), file_type="zip")
    text = template["viewer.html.template"].read().decode("utf-8")
    start, end = text.index("<script>") + len("<script>"), text.index("var camera,controls,scene,renderer")
    return text[start:end]
