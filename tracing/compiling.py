"""Loops in Python that Numba compiles."""
import numba

# Decorates a loop: compiled at the first call, cached beside its file. No fastmath, so that products and sums round as
# NumPy's do.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

# Decorates a function of numbers: it then takes arrays, too, as NumPy's do, and loops that are compiled may call it.
elementwise = numba.vectorize(cache=True)
