"""From a trained network to a candidate for publication: calibrated, measured, ready to be exported."""

from pathlib import Path

from training.config import DataConfig
from training.evaluation.assessment import Assessment, assess
from training.evaluation.subjects import NetworkSubject
from training.model import Network
from training.reading import Data, batches_of
from training.release.manner import manner_of
from training.release.precision import Choice
from training.release.publish import DatasetCard, Draft


def draft(
    network: Network,
    data: Data,
    config: DataConfig,
    *,
    name: str,
    source: Path,
    precision: Choice = "float32",
) -> tuple[Draft, Assessment]:
    """
    Fit the temperature on the validation split, then measure the calibrated network on the test split.

    Without a validation split the temperature is 1, and the test split's images have to judge a lower precision.
    Without a test split the validation split is measured on, too.

    Args:
        network: On the device to measure it on, without norms; put into evaluation mode.
        data: What it was trained on, as the streamer describes it.
        config: Where to read it.
        name: Of the model.
        source: Folder of the run.
        precision: To be exported in.

    Raises:
        TrainingError: An answer is not finite, or there is no split to measure on.
        streamer.errors.StreamerError: A stream broke for good.
    """
    assessment = assess(
        NetworkSubject(network),
        batches_of(config, data.judging),
        validation=batches_of(config, data.validation) if data.validation else (),
        fitted_on=data.validation.name if data.validation else "",
        source=source,
        kind="checkpoint",
        dataset=data.dataset.name,
        split=data.judging,
        class_names=data.class_names,
    )
    return drafted(assessment, data, name=name, precision=precision), assessment


def drafted(assessment: Assessment, data: Data, *, name: str, precision: Choice = "float32") -> Draft:
    """Return what is to be published of a network that was assessed; arguments as of :func:`draft`."""
    return Draft(
        name=name,
        class_names=data.class_names,
        metrics=assessment.evaluation.metrics(data.class_names),
        dataset=DatasetCard(
            name=data.dataset.name,
            num_train=data.train.num_samples,
            fingerprint=data.train.fingerprint.hex(),
        ),
        precision=precision,
        temperature=assessment.temperature,
        examples=assessment.examples,
        manner=manner_of(assessment.examples.images),
    )
