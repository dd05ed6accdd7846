"""Folders that a process holds while it writes there: run folders, scenes, and what killed processes left in them."""
import contextlib
import os
import re
import shlex
import tempfile
from pathlib import Path

from helper import UserError

UNFINISHED = ".idr-unfinished-"     # how a temporary file's name begins, before 8 random characters and the suffix


def run_folder(conf, monitor_path):
    """Return the folder of a run, `{monitor_path}_{scan}`, where scan is the name of the scene's folder."""
    return Path(f"{monitor_path}_{Path(os.path.abspath(conf.data.path)).name}")


@contextlib.contextmanager
def new_run_folder(folder):
    """Make the folder of a new run, yield it and hold it within the block; an earlier run of that name is kept, under a
    name with a number.

    Of several processes that do this at once, one gets the folder. For the others, and where it cannot be made, this
    raises UserError.
    """
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            try:
                handle = hold(folder)
            except FileNotFoundError:
                if folder.is_symlink():
                    raise
                continue        # another process has moved it since the line before
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --monitor-path") from error
        # The folder belongs to the process that holds it and finds it empty.
        with holding(folder, handle):
            remove_unfinished(folder)
            if not any(folder.iterdir()):
                yield folder
                return
            move_aside(folder)


def move_aside(folder):
    """Give a run's folder, which this process holds, the first name with a number that is free."""
    number = 1
    while os.path.lexists(f"{folder}.{number}"):
        number += 1
    try:
        folder.rename(f"{folder}.{number}")
    except OSError as error:
        raise UserError(f"{folder}: holds an earlier run and cannot be renamed ({error.strerror}); choose another "
                        "--monitor-path") from error
    print(f"{folder} held an earlier run; it is now {folder}.{number}")


def remove_unfinished(folder):
    """Remove what processes that were killed while they wrote to a run's folder have left there."""
    for place in (Path(folder), Path(folder) / "validation", Path(folder) / "renders"):
        for path in place.glob(f"{UNFINISHED}*"):
            if re.fullmatch(re.escape(UNFINISHED) + r"\w{8}(\.[^.]*)?", path.name) and path.is_file():
                with contextlib.suppress(OSError), path.open("rb") as file:     # another process may have removed it
                    if lock(file.fileno()):
                        path.unlink()


def lock(handle):
    """Lock an open file or folder until it is closed; return False where another process has it locked, None where the
    system or the file system has no locks."""
    try:
        import fcntl  # not on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def stands_at(handle, path):
    """Whether what is open as `handle` is what stands at `path` now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(str(path)))
    except OSError:
        return False


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder beside `path`, which is absent or empty; rename it to `path` if the block succeeds.

    Raises UserError where `path` holds anything, or cannot be written.
    """
    target = Path(os.path.abspath(path))
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{path}: is there already, and not empty; choose another --output or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=str(target.parent)) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            yield folder
            folder.rename(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output")


HELD = {}       # {folder that this process holds: its handle, or None where a folder cannot be opened}


@contextlib.contextmanager
def held(folder):
    """Hold `folder` for this process within the block; yields it. UserError where another process holds it, or where it
    cannot be opened.

    Where the system or the folder's file system has no locks, no other process is kept away.
    """
    try:
        handle = hold(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be opened ({error.strerror})") from error
    with holding(folder, handle):
        yield folder


def hold(folder):
    """Open and lock the folder that stands at the path `folder`; return its handle, None on Windows.

    Raises OSError, and UserError where another process holds it.
    """
    while hasattr(os, "O_DIRECTORY"):
        handle = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
        if lock(handle) is False:
            os.close(handle)
            raise UserError(f"{folder}: another training writes there; wait for its end or choose another "
                            "--monitor-path")
        if stands_at(handle, folder):
            return handle
        os.close(handle)    # who held it before has moved it


@contextlib.contextmanager
def holding(folder, handle):
    """Within, check_held watches over a folder that `hold` has given the handle of; then it is let go."""
    HELD[Path(folder)] = handle
    try:
        yield
    finally:
        del HELD[Path(folder)]
        if handle is not None:
            os.close(handle)


def check_held(path):
    """Raise UserError where `path` lies in a folder that this process holds (or is it) and that was moved."""
    for folder, handle in HELD.items():
        if handle is not None and folder in (Path(path), *Path(path).parents) and not stands_at(handle, folder):
            place = ""
            with contextlib.suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{handle}")      # Linux knows it by its present name
            if stands_at(handle, place):
                raise UserError(f"{folder}: was renamed to {place} while the training wrote there, so it ends; "
                                f"--resume {shlex.quote(place)} goes on from its last state")
            raise UserError(f"{folder}: was removed or moved away while the training wrote there, so it ends; start "
                            "again, or --resume FOLDER if you moved it")
