"""
One rank of a run in a process of its own, as a launcher starts it: ``ranked.py FOLDER CONFIG RANK STEP SIGNAL``.

CONFIG is that of the run as JSON; the rank named gets the signal when the step is taken. Where there is no such rank,
the run goes to its end.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from streamer.client import SplitInfo
from training.config import TrainConfig
from training.errors import TrainingError
from training.evaluation.evaluate import Evaluation
from training.loop import Step
from training.ranks import gathered
from training.run import assist, learn

ROOT = Path(__file__).parents[2]
LEDGER = "run.ledger"


class Watching:
    """An observer that looks at nothing."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None: ...

    def stepped(self, step: Step, num_samples: int) -> None: ...

    def validated(self, step: Step, evaluation: Evaluation) -> None: ...

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None: ...


def train(folder: Path, config: TrainConfig, *, hit: int, step: int, number: int) -> None:
    """Train as one of the ranks that the environment says, with ledgers in the folder."""
    with gathered() as ranks:

        @contextmanager
        def dying() -> Iterator[Callable[[], int | None]]:
            asked = iter(range(1, step))

            def ask() -> int | None:
                if ranks.rank != hit or next(asked, None) is not None:
                    return None
                if number == signal.SIGKILL:
                    os.kill(os.getpid(), number)
                return number

            yield ask

        if ranks.is_first:
            learn(config, folder, observer=Watching(), ledger=folder / LEDGER, stopping=dying(), ranks=ranks)
        else:
            assist(config, ranks, ledger=folder / LEDGER, stopping=dying())


def run(
    folder: Path, config: TrainConfig, size: int, *, hit: int = -1, step: int = 0, by: int = signal.SIGKILL
) -> list[tuple[int, str]]:
    """Start so many ranks, and return how each ended and what it said."""
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), config.model_dump_json(), str(hit), str(step), str(int(by))]
    command = [sys.executable, "-m", "tests.training.ranked", *arguments]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stderr=subprocess.PIPE, text=True)
        for place in environments(size)
    ]
    try:
        said = [process.communicate()[1] for process in processes]
        return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environments(size: int) -> list[dict[str, str]]:
    """Return what a launcher says to each rank."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


if __name__ == "__main__":
    _folder, _config, *_numbers = sys.argv[1:]
    _hit, _step, _number = map(int, _numbers)
    try:
        train(Path(_folder), TrainConfig.model_validate_json(_config), hit=_hit, step=_step, number=_number)
    except TrainingError as error:
        sys.exit(str(error))
