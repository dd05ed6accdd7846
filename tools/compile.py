"""Have Numba compile, ahead of the first training, what it compiles at the first call (some 15 s).

The result is kept in __pycache__ until its source changes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.step import compile_functions  # noqa: E402

compile_functions()
