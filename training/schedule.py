"""The schedule of a training: learning rate and alpha of each step, the epochs, and what is due at their ends."""
import math
from typing import NamedTuple

from config.settings import Train


def reached(fractions, step, steps) -> int:
    """Return how many of the fractions of a run of so many `steps` are reached before its `step`, counted from 0.

    A fraction is reached after the nearest whole number of steps.
    """
    return sum(step >= int(fraction * steps + 0.5) for fraction in fractions)


def learning_rate_factor(train: Train, step) -> float:
    """Return the factor of the learning rates at a step: the halvings so far, times the annealing.

    The annealing falls from 1 to the end e as e ** x (exponential) or e + (1 - e) (1 + cos(pi x)) / 2 (cosine; SGDR,
    arXiv 1608.03983), where x is the fraction of the run that is done.
    """
    factor = 0.5 ** reached(train.learning_rate_halved_at, step, train.steps)
    done, end = step / train.steps, train.learning_rate_end
    if train.learning_rate_annealing == "cosine":
        factor *= end + (1 - end) * (1 + math.cos(math.pi * done)) / 2
    elif train.learning_rate_annealing == "exponential":
        factor *= end ** done
    return factor


def alpha(train: Train, step) -> float:
    """Return the sharpness of the soft mask at a step."""
    return train.alpha * 2.0 ** reached(train.alpha_doubled_at, step, train.steps)


class Epochs(NamedTuple):
    """The epochs of a run, counted from 0; the run's end may cut the last one short."""
    steps: int      # of the run
    length: int     # steps of an epoch

    @property
    def last(self) -> int:
        """The number of the last epoch."""
        return (self.steps - 1) // self.length

    def end(self, epoch) -> int:
        """Return the number of steps that are done when an epoch ends."""
        return min((epoch + 1) * self.length, self.steps)

    def is_due(self, epoch, times) -> bool:
        """Return whether an action that is due `times` times, evenly over the run, is due at the end of an epoch.

        It is due in the first epoch's end at or after each of these points, so always after the last step, and at most
        once per epoch.
        """
        return self.end(epoch) * times // self.steps > max(self.end(epoch - 1), 0) * times // self.steps
