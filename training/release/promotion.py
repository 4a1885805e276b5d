"""Whether a candidate may take the place of the version that serves now: what speaks against it, in numbers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

Metrics = Mapping[str, float]
"""
A card's figures by name: ``accuracy`` and ``ece`` as shares, ``nll`` in nats, ``num_samples``, and for each class
``recall/<name>`` and ``support/<name>``, its number of samples.
"""

RECALL, SUPPORT = "recall/", "support/"

# Names in cards from before these had their present ones.
_FORMER = {"accuracy": "test_accuracy", "nll": "test_loss"}

_CONFIDENCE = 0.99
# Of a sample's loss, beyond which hardly any goes: the true class has a probability of 1 in 150.
_DEAREST_MISTAKE_NATS = 5.0
# Of a card that does not say how many samples it was measured on; the small test sets have as many.
_USUAL_SAMPLES = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """How much worse than the current version a candidate may be, noise aside."""

    accuracy: float = 0.001
    """Share of samples classified right."""
    worst_class: float = 0.01
    """Recall of any one class."""
    nll: float = 0.02
    """Mean negative log-likelihood, in nats."""
    ece: float = 0.01
    """Expected calibration error."""


@dataclass(frozen=True, slots=True)
class Objection:
    """One thing in which the candidate is worse than the margin and the noise of both measurements allow."""

    what: str
    candidate: float
    current: float
    allowed: float
    """Largest difference that would have passed."""

    def __str__(self) -> str:
        if math.isnan(self.candidate):
            return f"{self.what}: not measured; the current version has {self.current:.4f}"
        difference = abs(self.candidate - self.current)
        return (
            f"{self.what} {self.candidate:.4f}, the current version has {self.current:.4f}: "
            f"worse by {difference:.4f}, allowed is {self.allowed:.4f}"
        )


def objections(candidate: Metrics, current: Metrics, margins: Margins = Margins()) -> list[Objection]:
    """
    Return what speaks against replacing the current version; nothing where it may be replaced.

    A difference counts once it exceeds both its margin and what two versions that are equally good would differ by in
    99 of 100 measurements on that many samples. What the current version has no figure for is not judged; what only
    the candidate lacks speaks against it.

    Args:
        candidate: Figures of the version that wants to be published.
        current: Figures of the version that is the default now.
        margins: What is allowed.
    """
    found: list[Objection | None] = [
        _judge("accuracy", candidate, current, margins.accuracy, _share_variance, sign=1),
        _judge("nll", candidate, current, margins.nll, _loss_variance, sign=-1),
        _judge("ece", candidate, current, margins.ece, _calibration_variance, sign=-1),
    ]
    classes = [name for name in current if name.startswith(RECALL)]
    found += [
        _judge(name, candidate, current, margins.worst_class, _share_variance, sign=1, looks=len(classes))
        for name in classes
    ]
    return [objection for objection in found if objection is not None]


def _judge(
    name: str,
    candidate: Metrics,
    current: Metrics,
    margin: float,
    variance: Callable[[Metrics, str, float], float],
    *,
    sign: int,
    looks: int = 1,
) -> Objection | None:
    """Compare one figure, of which more is better where ``sign`` is 1; it is one of ``looks`` of its kind."""
    theirs, ours = _figure(current, name), _figure(candidate, name)
    if math.isnan(theirs):
        return None
    if math.isnan(ours):
        return Objection(name, ours, theirs, margin)
    spread = math.sqrt(variance(candidate, name, ours) + variance(current, name, theirs))
    # Of many classes one always looks worse: each gets its share of the one case in a hundred.
    noise = NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / looks) * spread
    allowed = max(margin, noise)
    return Objection(name, ours, theirs, allowed) if sign * (theirs - ours) > allowed else None


def _figure(metrics: Metrics, name: str) -> float:
    return metrics.get(name, metrics.get(_FORMER.get(name, name), math.nan))


def _num_samples(metrics: Metrics, name: str) -> float:
    total = metrics.get("num_samples", _USUAL_SAMPLES)
    if not name.startswith(RECALL):
        return max(total, 1.0)
    classes = sum(known.startswith(RECALL) for known in metrics)
    return max(metrics.get(SUPPORT + name.removeprefix(RECALL), total / max(classes, 1)), 1.0)


def _share_variance(metrics: Metrics, name: str, value: float) -> float:
    """Return that of a share of right answers; one added on each side keeps it above zero at both ends."""
    count = _num_samples(metrics, name)
    share = (value * count + 1) / (count + 2)
    return share * (1 - share) / count


def _loss_variance(metrics: Metrics, name: str, value: float) -> float:
    """Return an upper bound of a mean loss's: no loss is negative, so the mean square is at most largest times mean."""
    return _DEAREST_MISTAKE_NATS * max(value, 0.0) / _num_samples(metrics, name)


def _calibration_variance(metrics: Metrics, name: str, value: float) -> float:
    """Return that of the accuracy, which is what confidence is compared with."""
    accuracy = _figure(metrics, "accuracy")
    return _share_variance(metrics, "accuracy", 0.5 if math.isnan(accuracy) else accuracy)
