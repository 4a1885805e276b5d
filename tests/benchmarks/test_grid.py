from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.grid import WAYS, Way, config_of, is_shipped

SHIPPED = (Path(__file__).parents[2] / "model_repository" / "mnist" / "config.pbtxt").read_text()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_config_differs_in_its_way_alone(way: Way) -> None:
    config = text_format.Parse(config_of(SHIPPED, way), model_config_pb2.ModelConfig())
    shipped = text_format.Parse(SHIPPED, model_config_pb2.ModelConfig())

    assert config.name == way.model
    assert [group.count for group in config.instance_group] == [way.instances]
    assert config.dynamic_batching.max_queue_delay_microseconds == way.delay_microseconds
    assert config.parameters["INTRA_OP_THREAD_COUNT"].string_value == str(way.threads)
    for one in (config, shipped):
        for field in ("name", "instance_group", "dynamic_batching", "parameters"):
            one.ClearField(field)
    assert config == shipped


def test_config_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="instance_group"):
        config_of('name: "mnist"\n', WAYS[0])


def test_one_way_is_how_the_line_runs_it() -> None:
    assert [str(way) for way in WAYS if is_shipped(way, 2)] == ["2 threads, 1 instance, delay 0 µs"]
