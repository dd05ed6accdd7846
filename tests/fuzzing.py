"""Shared by the property tests of readers: damaged bytes, and the promise that every reader must keep.

`make test` tries the same few cases each time; `make fuzz` tries thousands of new ones.
"""
import contextlib
import os
import resource
import time

import hypothesis.strategies as st

import helper

MOST_SECONDS = 10
MOST_MEMORY = 1 << 30       # bytes that a reader may allocate

# Values that break readers: zeros, all bits set, the largest and smallest integers, NaN and infinity (float64), 1e9.
TELLING_BYTES = [bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f", b"\x80" + bytes(7),
                 b"\x00\x00\x00\x00\x00\x00\xf8\x7f", b"\x00\x00\x00\x00\x00\x00\xf0\x7f", b"\x00\xca\x9a\x3b"]


@st.composite
def damaged(draw, whole):
    """Draw a copy of `whole` with one to four cuts, changes, duplications or removals."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, max(len(content) - 1, 0))), draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["cut", "bit", "bytes", "telling", "double", "remove"]))
        if kind == "cut":
            del content[place:]
        elif kind == "bit" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            content[place:place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "telling":
            content[place:place + 8] = draw(st.sampled_from(TELLING_BYTES))
        elif kind == "double":
            content[place:place] = content[place:place + length]
        else:
            del content[place:place + length]
    return bytes(content)


@contextlib.contextmanager
def bounded_memory():
    """Limit further allocations within the block to MOST_MEMORY bytes; more raise MemoryError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def keeps_its_promise(read):
    """Call read(), which must return or raise a one-line UserError within MOST_SECONDS and MOST_MEMORY.

    Return its result or the UserError.
    """
    start = time.monotonic()
    with bounded_memory():
        try:
            result = read()
        except helper.UserError as error:
            result = error
            assert str(error).strip() and len(str(error)) < 2000
    assert time.monotonic() - start < MOST_SECONDS
    return result
