"""What can go wrong in training, by cause."""


class TrainingError(Exception):
    """Root of everything training raises on purpose; the message says what to do."""


class DivergedError(TrainingError):
    """The loss is no longer finite; nothing of that step reached the weights."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"step {step}: the loss is {loss}; training stopped before it reached the weights. Try a lower --lr"
        )
        self.step = step


class CheckpointError(TrainingError):
    """A checkpoint is missing, half-written or made for another network."""


class ExportError(TrainingError):
    """The TorchScript module does not answer like the network it was made from."""


class PublishError(TrainingError):
    """The model repository cannot take the version."""
