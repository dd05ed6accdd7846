"""Folders that a process locks while it writes there, and the clean-up of files that killed processes left."""
import contextlib
import os
import re
import shlex
import tempfile
from pathlib import Path

from helper import UserError

UNFINISHED = ".idr-unfinished-"     # prefix of temporary files; 8 random characters and the suffix follow


def run_folder(conf, monitor_path):
    """Return the folder of a run, `{monitor_path}_{scan}`; scan is the name of the scene's folder."""
    return Path(f"{monitor_path}_{Path(os.path.abspath(conf.data.path)).name}")


@contextlib.contextmanager
def new_run_folder(folder):
    """Create and lock the folder of a new run, and yield it. Rename an earlier run of that name to {name}.{number}.

    Raises UserError if another process has the folder locked, or if it cannot be created.
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
                continue        # another process renamed it after mkdir
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --monitor-path") from error
        # The folder is ours only if it is empty once locked: another process may have used it in between.
        with holding(folder, handle):
            remove_unfinished(folder)
            if not any(folder.iterdir()):
                yield folder
                return
            move_aside(folder)


def move_aside(folder):
    """Rename a run's folder, which this process holds, to {name}.{number} with the first free number."""
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
    """Remove the temporary files that killed processes left in a run's folder. Files in use are locked and stay."""
    for place in (Path(folder), Path(folder) / "validation", Path(folder) / "renders"):
        for path in place.glob(f"{UNFINISHED}*"):
            if re.fullmatch(re.escape(UNFINISHED) + r"\w{8}(\.[^.]*)?", path.name) and path.is_file():
                with contextlib.suppress(OSError), path.open("rb") as file:     # may be gone by now
                    if lock(file.fileno()):
                        path.unlink()


def lock(handle):
    """Lock an open file or folder until it is closed.

    Returns True; False if another process holds the lock; None if the system or the file system has no locks.
    """
    try:
        import fcntl  # missing on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def stands_at(handle, path):
    """Return whether `path` still names the open file or folder `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(str(path)))
    except OSError:
        return False


def check_new(path):
    """Raise UserError if `path` exists and is not an empty folder."""
    target = Path(os.path.abspath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path}: exists already and is not empty; choose another --output or remove it")


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder beside `path`, and rename it to `path` if the block succeeds.

    Raises UserError if `path` exists and is not an empty folder, or if it cannot be written.
    """
    target = Path(os.path.abspath(path))
    try:
        check_new(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=str(target.parent)) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            yield folder
            folder.rename(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error


HELD = {}       # {folder that this process holds: its handle, or None where folders cannot be opened (Windows)}


@contextlib.contextmanager
def held(folder):
    """Lock `folder` within the block, and yield it.

    Without locks in the system or the file system, other processes are not kept out. Raises UserError if another
    process holds the folder, or if it cannot be opened.
    """
    try:
        handle = hold(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be opened ({error.strerror})") from error
    with holding(folder, handle):
        yield folder


def hold(folder):
    """Open and lock `folder`, and return its handle, or None on Windows.

    Raises OSError if it cannot be opened, and UserError if another process holds it.
    """
    while hasattr(os, "O_DIRECTORY"):
        handle = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
        if lock(handle) is False:
            os.close(handle)
            raise UserError(f"{folder}: another training writes there; wait for its end or choose another "
                            "--monitor-path")
        if stands_at(handle, folder):
            return handle
        os.close(handle)    # renamed by its holder before we had the lock; try again


@contextlib.contextmanager
def holding(folder, handle):
    """Register a folder that `hold` opened for check_held; close its handle, and so unlock it, after the block."""
    HELD[Path(folder)] = handle
    try:
        yield
    finally:
        del HELD[Path(folder)]
        if handle is not None:
            os.close(handle)


def check_held(path):
    """Raise UserError if a folder that this process holds, and that is or contains `path`, was moved or removed."""
    for folder, handle in HELD.items():
        if handle is not None and folder in (Path(path), *Path(path).parents) and not stands_at(handle, folder):
            place = ""
            with contextlib.suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{handle}")      # Linux gives the current name
            if stands_at(handle, place):
                raise UserError(f"{folder}: was renamed to {place} during the training, which therefore stops; "
                                f"--resume {shlex.quote(place)} continues from its last state")
            raise UserError(f"{folder}: was removed or moved during the training, which therefore stops; start "
                            "again, or --resume FOLDER if you moved it")
