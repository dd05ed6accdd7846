"""Loops in Python that Numba compiles, and threads to run them in."""
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import numba

# Decorates a loop: compiled at the first call, cached beside its file. No fastmath, so that products and sums round as
# NumPy's do.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

# Decorates a part of a compiled loop that has a name of its own. It becomes part of each loop that calls it: Numba
# optimises a function anew with all that it calls, so each level of calls between compiled functions takes seconds.
inlined = numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")

# Decorates a function of numbers: it then takes arrays, too, as NumPy's do, and loops that are compiled may call it.
elementwise = numba.vectorize(cache=True)


def plain(value):
    """Return a NamedTuple, and those in it, as tuples.

    Numba finds the type of an argument quickly if it is an array, a number, or a plain tuple of up to four arrays. Of
    others it goes through all fields in each call, in Python: half a millisecond for what a training step takes.
    """
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def in_threads(function: Callable, count: int, size: int) -> list:
    """Call a function that releases the GIL for slices of `size` that make up range(count), in all cores' threads.

    Returns its results, in the slices' order.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda start: function(slice(start, min(start + size, count))), range(0, count, size)))
