from typing import Literal

import pytest

from training.config import ScheduleConfig
from training.schedule import learning_rate


def rates(name: Literal["one-cycle", "cosine"]) -> list[float]:
    config = ScheduleConfig(name=name, warmup=0.25, start=0.04, end=1e-4)
    return [learning_rate(progress / 100, 1e-3, config) for progress in range(101)]


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_rate_rises_to_the_peak_and_falls_to_the_end(name: Literal["one-cycle", "cosine"]) -> None:
    values = rates(name)

    assert values[:26] == sorted(values[:26])
    assert values[25:] == sorted(values[25:], reverse=True)
    assert [values[0], values[25], values[100]] == pytest.approx([4e-5, 1e-3, 1e-7])


def test_way_up_of_the_cosine_schedule_is_a_line() -> None:
    assert rates("cosine")[10] == pytest.approx(4e-5 + (1e-3 - 4e-5) * 0.4)


def test_without_a_warm_up_the_first_rate_is_the_peak() -> None:
    assert learning_rate(0.0, 1e-3, ScheduleConfig(warmup=0)) == pytest.approx(1e-3)
