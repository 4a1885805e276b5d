"""What can go wrong in training, by cause."""

import math


class TrainingError(Exception):
    """Root of everything training raises on purpose; the message says what to do."""


class ConfigError(TrainingError):
    """A recipe, a field or a value of a run's config is none; the message says which are allowed."""


class DivergedError(TrainingError):
    """The loss or the gradients are no longer finite; nothing of that step reached the weights."""

    def __init__(self, step: int, loss: float, *, norm: float = 0.0) -> None:
        cause = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        super().__init__(f"step {step}: {cause}; training stopped before it reached the weights. Try a lower --lr")
        self.step = step


class StoppedError(TrainingError):
    """Somebody asked a run to stop; its state is kept."""

    def __init__(self, step: int, signal: int, folder: object) -> None:
        super().__init__(f"stopped after step {step}; `sluice train --resume {folder}` goes on from there")
        self.step = step
        self.signal = signal
        """Number of the signal that asked."""


class RankError(TrainingError):
    """A rank of several cannot join the others, or has lost them."""


class TrackingError(TrainingError):
    """A run cannot be tracked where it was asked for; nothing has begun."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged or made for another network."""


class ExportError(TrainingError):
    """The TorchScript module does not answer like the network it was made from."""


class PublishError(TrainingError):
    """The model repository cannot take the version."""


class ManifestError(PublishError):
    """A file of a version is not what was published."""


class PromotionError(PublishError):
    """The candidate is worse than the version it would replace; the message says in what, by how much."""


class SearchError(TrainingError):
    """A search cannot begin or go on; the message names what stands in the way."""
