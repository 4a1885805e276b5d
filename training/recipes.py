"""Named runs: functions that return a full config; a variant calls another and changes fields."""

from collections.abc import Callable

from training.config import BudgetConfig, DataConfig, EmaConfig, ModelConfig, OptimConfig, TrainConfig


def mnist() -> TrainConfig:
    """
    Train for accuracy: twenty epochs, about 20 minutes of full MNIST on two quiet cores, two of the small set.

    What a network of this kind is taught with since He et al. (2015, arXiv 1512.03385) and Smith & Topin (2018): SGD
    with momentum in one cycle, batch norm; and what Simard et al. (2003) found for handwriting: elastic distortions.
    Gradients are clipped for runs of few steps, which come to the peak of the rate too soon and would not recover.
    """
    return TrainConfig(
        data=DataConfig(batch_size=256, train_split="train[:95%]", validation_split="train[95%:]"),
        model=ModelConfig(batch_norm=True, dropout=0.4),
        optim=OptimConfig(name="sgd", lr=0.1, weight_decay=5e-4, label_smoothing=0.05, clip_norm=2.0),
        ema=EmaConfig(decay=0.999),
        augmentation="augment-v1(rotate=12,shift=2,scale=12,shear=8,elastic=1.2)",
        budget=BudgetConfig(seconds=None, max_epochs=20),
    )


def smoke() -> TrainConfig:
    """Train one epoch and no more: shows that the line works, not how good the network is."""
    return TrainConfig(budget=BudgetConfig(seconds=None, max_epochs=1))


DEFAULT_RECIPE = "mnist"

RECIPES: dict[str, Callable[[], TrainConfig]] = {"mnist": mnist, "smoke": smoke}
