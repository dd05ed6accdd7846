"""Run our scripts as a user does, from a folder and each in a process of its own.

A new Python spends a second on imports. So the processes are copies (forks) of one that has imported what our scripts
import. Run as a script, this file is that one.
"""
import functools
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, status=0, anew=False):
    """Run one of our scripts in the folder `cwd`; return its standard output followed by its standard error.

    anew: start a new Python, in which nothing is imported yet. Each script is run so at least once.
    """
    command = [str(ROOT / command[0]), *map(str, command[1:])]
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as error:
        if anew:
            ended = subprocess.run([sys.executable, *command], cwd=str(cwd), stdout=out, stderr=error).returncode
        else:
            ended = run_in_copy(command, str(cwd), out, error)
        said = ""
        for file in (out, error):
            file.seek(0)
            said += file.read()
    assert ended == status, f"status {ended}\n{said}"
    return said


def refused(*command, cwd):
    """Run a script that must fail with status 2 and one line, and write nothing; return the line."""
    before = sorted(p for p in cwd.rglob("*"))
    said = [line for line in run(*command, cwd=cwd, status=2).splitlines() if "[nnabla][INFO]" not in line]
    said = [line for line in said if not line.startswith("computing on ")]
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert sorted(p for p in cwd.rglob("*")) == before, "something was written"
    return said[0]


@functools.lru_cache(maxsize=None)
def original():
    """Return the process whose copies the scripts are. It ends with this one, which closes its standard input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_in_copy(command, cwd, out, error):
    """Run `command` with the open files `out` and `error`, as this process's environment is. Return its status."""
    print(json.dumps([command, cwd, [out.name, error.name], dict(os.environ)]), file=original().stdin, flush=True)
    return int(original().stdout.readline())


def next_command():
    """Copy this process for every command that comes; return only in the copies, with the command to run there."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command, cwd, streams, environment = json.loads(line)
        process = os.fork()
        if process == 0:
            for number, path in enumerate([os.devnull, *streams]):
                os.dup2(os.open(path, os.O_RDWR), number)
            sys.stdin = open(0)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            return command
        ended = os.waitpid(process, 0)[1]
        print(-os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended), file=answers, flush=True)
    sys.exit()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for script in ("convert", "evaluate", "extract", "make_scene", "prepare", "report", "synthesize", "train"):
        __import__(script)
    gc.collect()
    gc.freeze()     # else the first collection in a copy touches, and so copies, all memory
    sys.argv = next_command()
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)    # tearing the modules down would touch all memory, too
