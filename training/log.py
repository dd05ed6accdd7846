"""Logs of a training, written by nnabla's monitors: a series of each loss and measure, and the time."""
import re
import time
from pathlib import Path

import numpy as np
from nnabla.monitor import MonitorSeries, MonitorTimeElapsed

from files import writing

STEP_SERIES = ("loss", "color", "mask", "eikonal", "hits", "learning_rate", "alpha")
VALIDATION_SERIES = ("psnr", "camera_rotation", "camera_translation")


class EpochLog:
    """Logs of each epoch: the means of the step series, the time, and the measures of validations."""

    def __init__(self, folder, epochs, state=None, first_step=0, validated_until=0):
        """Open the log, and keep the lines of an earlier start before first_step and validated_until.

        folder: where the series are written, None to write nothing
        epochs: schedule.Epochs of the run; what its end cuts off of an epoch gets a line, too
        state: checkpoints.State of the run to resume
        first_step: number of the next step
        validated_until: the first epoch whose validation is still to come
        """
        self.series = {name: MonitorSeries(name, interval=epochs.length, verbose=False) for name in STEP_SERIES}
        self.time = MonitorTimeElapsed("time", interval=epochs.length, verbose=False)
        self.validations = {name: MonitorSeries(name, interval=1, verbose=False) for name in VALIDATION_SERIES}
        for name, monitor in {**self.series, "time": self.time, **self.validations}.items():
            if folder:      # set the path directly, as a Monitor would truncate an earlier file
                monitor.sp = str(folder / f"{name}.{'timer' if name == 'time' else 'series'}.txt")
                keep_lines(monitor.sp, validated_until if name in self.validations else first_step)
            monitor.flush_at = -1 if name in self.validations else first_step - first_step % epochs.length - 1
        self.folder, self.epochs, self.num_hits, self.had_no_hits = folder, epochs, None, False
        if state:
            for name in STEP_SERIES:
                self.series[name].buf = state.series.get(name, np.empty(0)).tolist()
            now = time.time()
            self.time.start, self.time.lap = now - state.progress["elapsed"], now - state.progress["lap"]

    def add(self, step, **values):
        """Add the values of a step, one for each of STEP_SERIES. Raises UserError if a file cannot be written."""
        if step + 1 == self.epochs.steps:
            for monitor in (*self.series.values(), self.time):
                monitor.interval = 1
        with writing.writing(f"{self.folder}/*.series.txt"):
            self.num_hits = sum(self.series["hits"].buf) + values["hits"]
            for name, value in values.items():
                self.series[name].add(step, value)
            self.time.add(step)

    def add_validation(self, epoch, **values):
        """Add the measures of an epoch, some of VALIDATION_SERIES. Raises UserError if a file cannot be written."""
        with writing.writing(self.folder / "*.series.txt"):
            for name, value in values.items():
                self.validations[name].add(epoch, value)

    def lost_the_surface(self):
        """Return whether no ray hit the surface in the last epoch, but one did in the epoch before."""
        before, self.had_no_hits = self.had_no_hits, self.num_hits == 0
        return self.had_no_hits and not before

    def times(self):
        """Return the seconds of the run so far ("elapsed", without interruptions) and of this epoch ("lap")."""
        now = time.time()
        return {"elapsed": now - self.time.start, "lap": now - self.time.lap}

    def buffers(self):
        """Return the values of the unfinished epoch, {name: list of numbers}."""
        return {name: series.buf for name, series in self.series.items()}


def keep_lines(path, until):
    """Keep only the complete lines of a monitor's file whose first number is below `until`.

    Does nothing if there is no file. Raises UserError if the file cannot be written.
    """
    if not Path(path).exists():
        return
    with writing.writing(path):
        lines = Path(path).read_text().splitlines(keepends=True)
        kept = [line for line in lines if re.match(r"\d+ .*\n", line) and int(line.split()[0]) < until]
    if kept != lines:
        writing.write_bytes(path, "".join(kept).encode())
