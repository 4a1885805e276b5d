"""What a training run is: one frozen value, saved with the run."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["auto", "float32", "bfloat16"]

USUAL_TEST = "test"
"""Split that data sets keep for the end, and some do not have."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(_Frozen):
    """Where samples come from and in which order."""

    streamer: str = "127.0.0.1:50052"
    """Address of the streamer, host:port; several, separated by commas, share the work."""
    dataset: str = "mnist"
    """Data set name as the streamer lists it."""
    train_split: str = Field("train[:90%]", min_length=1)
    """What is trained on: a split, or a slice of one."""
    validation_split: str = "train[90%:]"
    """What chooses the best epoch; best without a sample of the training split. Empty: the last epoch is the best."""
    test_split: str = Field(USUAL_TEST, min_length=1)
    """What the finished network is measured on, once; chooses nothing. Where data has no test: the validation split."""
    batch_size: int = Field(128, ge=1, le=8192)
    """Samples a step, over all ranks together; the last step of an epoch takes what is left."""
    prefetch_batches: int = Field(4, ge=1, le=64)
    """Batches read ahead of the training step; bounds the reader's memory."""


class ModelConfig(_Frozen):
    """Training aids; the network served is the given one without them."""

    batch_norm: bool = False
    """Normalise each convolution's output over the batch; folded into the convolution when training is over."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Share of activations dropped in front of the last two layers."""


class OptimConfig(_Frozen):
    """The optimizer's step."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or stochastic gradient descent with Nesterov's momentum."""
    lr: float = Field(1.5e-3, gt=0, le=10)
    """Peak learning rate; about 100 times as high for sgd as for adamw."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd; adamw's first moment has the same decay."""
    weight_decay: float = Field(0.05, ge=0, le=1)
    """Of weights, not of biases and norms. AdamW's is decoupled: about 100 times as high as for sgd."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Probability mass spread over all classes in the target."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of all gradients together; longer ones are shortened to it. None: as they are."""


class ScheduleConfig(_Frozen):
    """The learning rate over a run, as a share of its peak."""

    name: Literal["one-cycle", "cosine"] = "one-cycle"
    """The way up: a cosine (Smith & Topin 2018, arXiv 1708.07120), or a line; the way down is a cosine for both."""
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of the run in which the rate rises."""
    start: float = Field(0.04, gt=0, le=1)
    """Rate of the first step, as a share of the peak."""
    end: float = Field(1e-4, ge=0, le=1)
    """Rate of the last step, as a share of the peak."""


class EmaConfig(_Frozen):
    """An exponential moving average of the weights, which is what gets validated and published."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share that the average keeps in one step; 0.999 looks about 1,000 steps back. None: no average."""
    every: int = Field(8, ge=1, le=1000)
    """Steps between two updates, each of which reads all weights; the decay is that of so many steps."""


class BudgetConfig(_Frozen):
    """How long to train: as many epochs as fit into a time, from the rate measured in the first steps."""

    seconds: float | None = Field(180.0, gt=0)
    """Time to fill with whole epochs; none means exactly ``max_epochs``."""
    min_samples: int = Field(1, ge=1)
    """Samples trained on, rounded up to whole epochs, even where the time is over before."""
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


class CheckpointConfig(_Frozen):
    """When the state of the run is kept, and with it the best epoch so far; at the end it is in any case."""

    seconds: float = Field(60.0, gt=0)
    """Longest time in which a crash can lose work; the step after it ends with a checkpoint."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """Epochs between two checkpoints, besides; none: only the time counts."""


class TrainConfig(_Frozen):
    """A whole training run."""

    name: str = Field("mnist", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the model in the repository."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds weights, dropout, augmentation and the order of the samples."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    augmentation: str = Field("", max_length=512)
    """Transform of training samples, done by the streamer, such as augment-v1(rotate=12); see docs/transforms.md."""
    budget: BudgetConfig = BudgetConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: Precision = "auto"
    """Arithmetic of the training step; weights stay float32. Auto: bfloat16 where the processor is made for it."""
    deterministic: bool = False
    """The same bits on every run on this machine; takes budget.seconds none, as the clock never repeats."""
    compile: bool = False
    """Let torch.compile make the step faster; takes a minute at the start, and on a CPU a C++ compiler."""
    log_steps: int = Field(20, ge=1, le=100_000)
    """Steps between two lines of metrics.jsonl; on a GPU the loss is read no more often."""

    @model_validator(mode="after")
    def _repeats_without_a_clock(self) -> Self:
        if self.deterministic and self.budget.seconds is not None:
            raise ValueError("deterministic needs budget.seconds none: how many epochs fit into a time never repeats")
        return self
