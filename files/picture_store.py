"""The pictures of a large scene in one memory-mapped file, of which a training reads only the pixels that it draws.

The file has the colours and the mask of all views, 4 bytes per pixel, then the regions of the masks, then a description
in JSON and its length. It may be removed at any time; the next start makes it anew.
"""
import contextlib
import json
import mmap
import os
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from tqdm import tqdm

from files import folders, writing
from helper import UserError

MAGIC = b"IDRPICS1"
END = struct.Struct("<8sQ")     # the magic, and the length of the JSON before it
MOST_ABOUT = 1 << 26            # bytes of JSON; 500 views need 20,000
MOST_RUNS = 1 << 30             # runs per region
WORKING_BYTES = 24              # per pixel of a picture, while it is decoded and its regions are found


class Region(NamedTuple):
    """Some pixels of an image, as runs along its rows in ascending order: kilobytes for millions of pixels."""
    starts: np.ndarray      # (K,) int32, flat index of each run's first pixel
    before: np.ndarray      # (K + 1,) int32, number of pixels in the runs before each, and of all

    @classmethod
    def of(cls, chosen: np.ndarray) -> "Region":
        """Return the Region of the pixels where `chosen` (H, W) bool is True."""
        flat = chosen.ravel()
        edges = [np.flatnonzero(flat[1:] != flat[:-1]) + 1, [len(flat)] if flat[-1] else []]
        edges = np.concatenate([[0] if flat[0] else [], *edges]).astype(np.int32)
        starts, ends = edges[::2].copy(), edges[1::2]
        return cls(starts, np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32))

    @property
    def size(self) -> int:
        """The number of pixels."""
        return int(self.before[-1])

    def pixels(self, numbers: np.ndarray) -> np.ndarray:
        """Return the flat indices, int32, of the pixels with these `numbers`, counted from 0 in ascending order."""
        run = np.searchsorted(self.before, numbers, side="right") - 1
        return self.starts[run] + (numbers - self.before[run]).astype(np.int32)


class PictureStore:
    """The pictures in a file: images (N, H, W, 3) uint8 and masks (N, H, W) bool, as in a datasets.Scene."""

    def __init__(self, path: Path, content: mmap.mmap, about: dict):
        """path, content: the file; about: its description, checked by described."""
        count, (height, width) = len(about["runs"]), about["size"]
        pixels = np.frombuffer(content, np.uint8, count * height * width * 4).reshape(count, height, width, 4)
        self.images, self.masks, self.content = pixels[..., :3], pixels[..., 3].view(bool), content
        self.path, self.runs, self.view_bytes = path, about["runs"], height * width * 4
        self.offsets = pixels.nbytes + np.cumsum([0, *map(region_bytes, about["runs"])])
        self.asking = ThreadPoolExecutor(1)     # to ask for 512 pixels takes 3.5 ms

    def regions(self, view: int) -> List[Region]:
        """Return the regions of a view that were given to build. Raises UserError if they cannot be."""
        found, offset = [], int(self.offsets[view])
        self._ask(offset // mmap.PAGESIZE * mmap.PAGESIZE, int(self.offsets[view + 1]))     # at once, not page by page
        for count in self.runs[view]:
            both = np.frombuffer(self.content, np.int32, 2 * count + 1, offset)
            starts, before = both[:count], both[count:]
            lengths, last = np.diff(before), self.view_bytes // 4
            if before[0] != 0 or (lengths <= 0).any() or (np.diff(starts) < lengths[:-1]).any() or count and not (
                    0 <= starts[0] and starts[-1] + lengths[-1] <= last):
                raise UserError(f"{self.path}: damaged; remove it, and the next start makes it anew")
            found.append(Region(starts, before))
            offset += both.nbytes
        return found

    def fetch(self, view: int, pixels: np.ndarray) -> None:
        """Let the system read the pixels, flat indices of a view, from the disk meanwhile, and nothing around them."""
        self.asking.submit(self._ask_for_pages, view * self.view_bytes + pixels.astype(np.int64) * 4)

    def _ask_for_pages(self, places: np.ndarray) -> None:
        """Ask for the pages of places (n,) int64 in the file."""
        if hasattr(mmap, "MADV_RANDOM"):
            self.content.madvise(mmap.MADV_RANDOM)
        for start in (np.unique(places // mmap.PAGESIZE) * mmap.PAGESIZE).tolist():
            self._ask(start, start + mmap.PAGESIZE)

    def _ask(self, start: int, end: int) -> None:
        """Let the system read the file's bytes from start, a page's first, to end."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self.content.madvise(mmap.MADV_WILLNEED, start, end - start)


def region_bytes(runs: Sequence[int]) -> int:
    """Return the bytes of a view's regions of so many runs."""
    return sum(4 * (2 * count + 1) for count in runs)


# --- reading ----------------------------------------------------------------------------------------------------------

def open_store(path: Path, key: str, count: int) -> Optional[PictureStore]:
    """Return the store at `path`; None if there is none, or if it is damaged or of other pictures.

    key: what the pictures and their processing are told by; count: number of views
    """
    try:
        with open(str(path), "rb") as file:
            about = described(file, key, count)
            return about and PictureStore(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), about)
    except (OSError, ValueError, OverflowError):
        return None


def described(file, key: str, count: int) -> Optional[dict]:
    """Return the description in an open file if it is whole and has this key and count, else None."""
    total = file.seek(0, os.SEEK_END)
    if total < END.size:
        return None
    file.seek(total - END.size)
    magic, length = END.unpack(file.read(END.size))
    if magic != MAGIC or length > min(MOST_ABOUT, total - END.size):
        return None
    file.seek(total - END.size - length)
    try:
        about = json.loads(file.read(length).decode())
        (height, width), runs = about["size"], about["runs"]
        whole = [height, width, *(number for view in runs for number in view)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if about.get("key") != key or len(runs) != count or any(len(view) != 3 for view in runs) or not all(
            type(number) is int and 0 <= number < MOST_RUNS for number in whole):
        return None
    size = count * height * width * 4 + sum(map(region_bytes, runs)) + length + END.size
    return about if size == total and min(height, width) > 0 else None


# --- writing ----------------------------------------------------------------------------------------------------------

class View(NamedTuple):
    """What the store keeps of a view."""
    image: np.ndarray       # (H, W, 3) uint8
    mask: np.ndarray        # (H, W) bool
    regions: List[Region]   # three


def build(path: Path, key: str, views: Tuple[int, int, int], read: Callable[[int], View],
          workers: int = 1) -> PictureStore:
    """Write the store of pictures to `path`, in parallel and with a progress bar, and return it, opened.

    views: number, height and width; read: view to View, which is called by so many threads (workers).
    Raises UserError if the file cannot be written, and what `read` raises.
    """
    count, height, width = views
    with writing.replacing(path) as temporary, open(str(temporary), "r+b") as file:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()       # of other pictures; two would take twice the space

        def put(number):
            view = read(number)
            pixels = cv2.merge((view.image, view.mask.view(np.uint8)))
            if pixels.shape != (height, width, 4):
                raise ValueError(f"view {number} has {pixels.shape}")
            write_at(file.fileno(), pixels, number * pixels.nbytes)
            return view.regions

        with ThreadPool(workers) as pool:
            found = list(tqdm(pool.imap(put, range(count)), f"preparing {path}", count, unit="view", leave=False,
                              dynamic_ncols=True))
        parts = [part for regions in found for region in regions for part in region]
        about = {"key": key, "size": [height, width], "runs": [[len(r.starts) for r in regions] for regions in found]}
        text = json.dumps(about).encode()
        file.seek(count * height * width * 4)
        for part in parts:
            file.write(np.ascontiguousarray(part, np.int32))
        file.write(text + END.pack(MAGIC, len(text)))
    store = open_store(path, key, count)
    if store is None:
        raise UserError(f"{path}: cannot be read back; remove it and start again")
    return store


def write_at(handle: int, array: np.ndarray, offset: int) -> None:
    """Write all bytes of an array at an offset of a file that other threads write to, too. Raises OSError."""
    left = memoryview(np.ascontiguousarray(array)).cast("B")
    while left:
        done = os.pwrite(handle, left, offset)
        left, offset = left[done:], offset + done


def num_workers(pixels: int) -> int:
    """Return how many threads may each work at a picture of so many pixels."""
    return int(np.clip(free_memory() // 3 // (WORKING_BYTES * pixels), 1, os.cpu_count() or 1))


def free_memory() -> int:
    """Return the bytes of memory that this process may still take; 2 GB where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError, ValueError):      # a container's own limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(limit - used, 0))
    return min(found, default=2 << 30)


def why_not(path: Path, size: int) -> str:
    """Return why a file of `size` bytes cannot be written to `path`, "" if it can."""
    folder, freed = path.parent, path.stat().st_size if path.exists() else 0
    if not os.access(str(folder), os.W_OK):
        return "cannot be written"
    free = shutil.disk_usage(str(folder)).free + freed
    return f"has {free / 1e9:.1f} GB left" if free < size * 1.01 + (1 << 24) else ""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder; without locks, wait for nothing."""
    try:
        handle = os.open(str(folder), os.O_RDONLY)
    except OSError:     # Windows does not open folders
        yield
        return
    try:
        told = False
        while folders.lock(handle) is False:
            if not told:
                print(f"waiting for another process, which prepares the pictures of {folder}", file=sys.stderr)
            told = True
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)
