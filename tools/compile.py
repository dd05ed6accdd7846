"""Compile the functions that Numba compiles, by tiny runs of all that calls them. The first real runs then need not.

    python tools/compile.py             # all
    python tools/compile.py training    # a training step alone; `scripts`: the rest. Both may run side by side.

Numba keeps the compiled code in __pycache__ until the source changes.
"""
import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", choices=("training", "scripts"))
    part = parser.parse_args().part
    if part:
        take_turns()
    if part != "scripts":
        from training.step import compile_functions  # imported here, as the other part needs more packages
        compile_functions()
    if part != "training":
        run_scripts()


def take_turns():
    """Let one process at a time write to Numba's cache. Two at once may give two signatures the same file."""
    import fcntl  # missing on Windows

    from numba.core.caching import IndexDataCacheFile
    save, folder = IndexDataCacheFile.save, os.open(str(ROOT), os.O_RDONLY)

    def save_alone(*args):
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            save(*args)
        finally:
            fcntl.flock(folder, fcntl.LOCK_UN)

    IndexDataCacheFile.save = save_alone


def run_scripts():
    """Make a tiny scene; draw and extract a network that has learnt nothing. Other scripts call the same functions."""
    import numpy as np

    import network
    from config import settings
    from training import checkpoints
    with tempfile.TemporaryDirectory() as folder:
        scene, config, model = f"{folder}/scene", str(ROOT / "config" / "demo.yaml"), f"{folder}/model.h5"
        run("make_scene", "--output", scene, "--views", "3", "--held-out", "1", "--size", "24")
        network.initialize(settings.load_config(config).network, np.random.default_rng(0))
        checkpoints.save_model(Path(model))
        model = ["--context", "cpu", "--config", config, "--set", f"data.path={scene}", "--set",
                 "data.held_out_views=[3]", "--set", "train.validation_view=3", "--model-load-path", model]
        run("synthesize", *model, "--normals")
        run("extract", *model, "--resolution", "32", "--output", f"{folder}/mesh.ply")
        run("extract", *model, "--resolution", "32", "--faces", "1000", "--texture", "64", "--highlights", "--upright",
            "--output", f"{folder}/asset.glb", f"{folder}/mesh.html")


def run(script, *arguments):
    """Run a script of ours in this process."""
    sys.argv = [script, *arguments]
    importlib.import_module(script).main()


if __name__ == "__main__":
    main()
