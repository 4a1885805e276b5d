import numpy as np
import pytest

from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemorySplit
from training.config import DataConfig
from training.errors import TrainingError
from training.reading import describe


@pytest.mark.parametrize(
    ("side", "num_classes", "message"),
    [
        (40, 2, r"split train\[:90%\]: images are \(40, 40\), the network takes \(28, 28\): PLACE:stretch"),
        (28, 1, "'shoes': has one class; at least two are needed"),
    ],
)
async def test_data_that_the_network_cannot_learn_from_is_named(side: int, num_classes: int, message: str) -> None:
    images, labels = np.zeros((20, side, side), np.uint8), np.zeros(20, np.uint8)
    splits = {name: MemorySplit(name, images, labels, num_classes) for name in ("train", "test")}
    settings = StreamerSettings(port=0, metrics_port=0)
    async with StreamerServer(settings, [Dataset("shoes", (), splits)]) as server:
        with pytest.raises(TrainingError, match=message):
            await describe(DataConfig(streamer=server.address, dataset="shoes"))
