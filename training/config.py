"""What a training run is: one frozen value, saved with the run."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["float32", "bfloat16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(_Frozen):
    """Where samples come from and in which order."""

    streamer: str = "127.0.0.1:50052"
    """Address of the streamer, host:port."""
    dataset: str = "mnist"
    """Data set name as the streamer lists it."""
    batch_size: int = Field(128, ge=1, le=8192)
    """Samples a step; the last step of an epoch takes what is left."""
    prefetch_batches: int = Field(4, ge=1, le=64)
    """Batches read ahead of the training step; bounds the reader's memory."""


class OptimConfig(_Frozen):
    """AdamW under a one-cycle schedule (Smith & Topin 2018, arXiv 1708.07120)."""

    lr: float = Field(1.5e-3, gt=0, le=1)
    """Peak learning rate."""
    weight_decay: float = Field(0.05, ge=0, le=1)
    """Decoupled weight decay."""
    warmup: float = Field(0.2, gt=0, lt=1)
    """Share of the run in which the rate rises."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Probability mass spread over all classes in the target."""


class BudgetConfig(_Frozen):
    """How long to train: as many epochs as fit into a time, from the rate measured in the first steps."""

    seconds: float | None = Field(180.0, gt=0)
    """Time to fill with whole epochs; none means exactly ``max_epochs``."""
    min_samples: int = Field(40_000, ge=1)
    """Samples trained on, rounded up to whole epochs, even where the machine is slower than the time allows."""
    max_epochs: int = Field(25, ge=1, le=10_000)
    """Never more than this, however fast the machine."""

    def epochs(self, num_samples: int, *, done: int, elapsed_seconds: float, samples_per_second: float) -> int:
        """
        Return how many epochs the run is to have in all; call again when the rate has changed.

        Args:
            num_samples: Samples in one epoch, at least 1.
            done: Epochs finished so far.
            elapsed_seconds: Time spent so far.
            samples_per_second: Rate to expect from here on, above 0.
        """
        least = min(-(-self.min_samples // num_samples), self.max_epochs)
        if self.seconds is None:
            return self.max_epochs
        remaining = max(self.seconds - elapsed_seconds, 0.0)
        affordable = done + int(remaining * samples_per_second / num_samples)
        return max(least, done, min(affordable, self.max_epochs))


class TrainConfig(_Frozen):
    """A whole training run."""

    name: str = Field("mnist", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the model in the repository."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds weights, dropout and the order of the samples."""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig = BudgetConfig()
    dropout: float = Field(0.3, ge=0, lt=1)
    """Share of activations dropped in front of the last two layers."""
    precision: Precision = "bfloat16"
    """Arithmetic of the training step; weights stay float32."""
