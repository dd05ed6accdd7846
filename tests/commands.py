"""Run our scripts as a user does, from a folder and each in a process of its own.

A new Python spends a second on imports. So the processes are copies (forks) of one that has imported what our scripts
import. Run as a script, this file is that one.
"""
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 300      # then a copy is ended by SIGALRM


class Ended(NamedTuple):
    status: int     # negative: the signal that ended the process
    out: str
    error: str


def run(*command, cwd, status=0, anew=False):
    """Run one of our scripts in the folder `cwd`; return its standard output followed by its standard error.

    anew: start a new Python, in which nothing is imported yet. Each script is run so at least once.
    """
    command = [ROOT / command[0], *map(str, command[1:])]
    if anew:
        done = subprocess.run([sys.executable, *command], cwd=str(cwd), capture_output=True, text=True)
        ended = Ended(done.returncode, done.stdout, done.stderr)
    else:
        ended, = run_copies([command], cwd)
    assert ended.status == status, ended
    return ended.out + ended.error


def refused(*command, cwd):
    """Run a script that must fail with status 2 and one line, and write nothing; return the line."""
    before = sorted(p for p in cwd.rglob("*"))
    said = [line for line in run(*command, cwd=cwd, status=2).splitlines() if "[nnabla][INFO]" not in line]
    said = [line for line in said if not line.startswith("computing on ")]
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert sorted(p for p in cwd.rglob("*")) == before, "something was written"
    return said[0]


def run_copies(commands, cwd, environments=None):
    """Run Python files, all at once, with this process's environment if there is no other. Return an Ended for each.

    commands: for each process the path of a file and its arguments. They can import our modules.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [(Path(folder, f"{number}.out"), Path(folder, f"{number}.err")) for number in range(len(commands))]
        jobs = zip([list(map(str, command)) for command in commands], [list(map(str, pair)) for pair in streams],
                   environments or [dict(os.environ)] * len(commands))
        print(json.dumps([str(cwd), list(jobs)]), file=original().stdin, flush=True)
        statuses = json.loads(original().stdout.readline())
        return [Ended(status, out.read_text(), error.read_text()) for status, (out, error) in zip(statuses, streams)]


@functools.lru_cache(maxsize=None)
def original():
    """Return the process whose copies the scripts are. It ends with this one, which closes its standard input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def load_kernels():
    """Load all that Numba has compiled and kept of our functions, which takes each process 0.6 s at the first calls."""
    from numba.core.dispatcher import Dispatcher
    values = [value for module in list(sys.modules.values()) for value in vars(module).values()]
    for kernel in {value for value in values if isinstance(value, Dispatcher)}:
        if hasattr(kernel._cache, "_cache_file"):
            for signature, *_ in kernel._cache._cache_file._load_index():
                kernel.compile(signature)


def next_job():
    """Copy this process for every job that comes. Return only in the copies, as the process that the job asks for."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        cwd, jobs = json.loads(line)
        processes = []
        for job in jobs:
            processes.append(os.fork())
            if processes[-1] == 0:
                return become(cwd, *job)
        ended = [os.waitpid(process, 0)[1] for process in processes]
        statuses = [-os.WTERMSIG(end) if os.WIFSIGNALED(end) else os.WEXITSTATUS(end) for end in ended]
        print(json.dumps(statuses), file=answers, flush=True)
    sys.exit()


def become(cwd, command, streams, environment):
    """Make this copy the process of a command."""
    signal.alarm(MOST_SECONDS)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate([null, *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in streams)]):
        os.dup2(file, number)
    sys.stdin = open(0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for script in ("convert", "evaluate", "extract", "make_scene", "prepare", "report", "synthesize", "train"):
        __import__(script)
    load_kernels()
    sys.modules["report"].plot("", {"": (np.arange(2), np.arange(2))})      # the first plot imports matplotlib
    gc.collect()
    gc.freeze()     # else the first collection in a copy touches, and so copies, all memory
    next_job()
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        status = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)    # tearing the modules down would touch all memory, too
