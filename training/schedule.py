"""The learning rate over a run: plain functions of progress."""

import math

from training.config import ScheduleConfig


def learning_rate(progress: float, peak: float, config: ScheduleConfig) -> float:
    """
    Return the learning rate at a point of the run: up to the peak, then down along a cosine.

    Args:
        progress: 0 at the first step, 1 at the end; values outside are clamped.
        peak: Highest rate.
        config: Shape and length of the way up, first and last rate.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        rising = _cosine if config.name == "one-cycle" else _line
        return peak * rising(config.start, 1.0, progress / config.warmup)
    return peak * _cosine(1.0, config.end, (progress - config.warmup) / (1 - config.warmup))


def _line(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
