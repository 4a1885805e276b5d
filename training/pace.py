"""How fast a run is, and how many epochs it has time for."""

import time
from collections.abc import Callable

from training.config import BudgetConfig

# The first steps allocate memory and choose kernels; their time says nothing about the rest.
_UNREPRESENTATIVE_STEPS = 4


class Pace:
    """
    The clock of a run, going on over restarts, and the plan that follows from it.

    Args:
        budget: Time or epochs.
        num_samples: Samples in one epoch.
        decide: Makes of the number of epochs that fit here what all ranks go by.
    """

    def __init__(
        self, budget: BudgetConfig, num_samples: int, *, decide: Callable[[int], int] = lambda epochs: epochs
    ) -> None:
        self._budget = budget
        self._num_samples = num_samples
        self._decide = decide
        self._started = self._clock_from = time.perf_counter()
        self._steps = self._clocked = 0
        self.samples = 0
        """Samples trained on."""
        self.epochs = budget.max_epochs
        """Epochs planned; changes when the rate does."""
        self.progress = 0.0
        """Share of the run that is done: 0..1, and never less than it was."""

    @property
    def rate(self) -> float:
        """Samples a second since the first few steps of this process, above 0."""
        return max(self._clocked, 1) / max(time.perf_counter() - self._clock_from, 1e-9)

    @property
    def elapsed_seconds(self) -> float:
        """Time spent on the run, over all processes."""
        return time.perf_counter() - self._started

    def begin_step(self) -> float:
        """Return the progress with which the next step is to be taken."""
        # A plan that grew must not take the schedule back: the rate then rests where it is.
        self.progress = max(self.progress, self.samples / (self.epochs * self._num_samples))
        return self.progress

    def end_step(self, num_samples: int, *, epochs_done: int) -> None:
        """Count a step's samples."""
        self._steps += 1
        self.samples += num_samples
        self._clocked += num_samples
        if self._steps == _UNREPRESENTATIVE_STEPS:
            self._clock_from, self._clocked = time.perf_counter(), 0
        if self._steps == 4 * _UNREPRESENTATIVE_STEPS:
            self.plan(done=epochs_done)

    def plan(self, *, done: int) -> None:
        """Fit the number of epochs to the rate measured so far."""
        self.epochs = self._decide(
            self._budget.epochs(
                self._num_samples, done=done, elapsed_seconds=self.elapsed_seconds, samples_per_second=self.rate
            )
        )

    def resume(self, *, samples: int, epochs: int, progress: float, elapsed_seconds: float) -> None:
        """Go on where another process stopped."""
        self.samples, self.epochs, self.progress = samples, epochs, progress
        self._started = time.perf_counter() - elapsed_seconds
