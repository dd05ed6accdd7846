"""Compile all Numba functions, by a tiny training step. It takes about 30 s, which the first training then saves.

Numba keeps the compiled code in __pycache__ until the source changes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.step import compile_functions  # noqa: E402

compile_functions()
