"""
A search whose trials only pretend: ``toy_search.py FOLDER``. Prints the number of each trial that has ended.

A process of its own, as tests kill it. What trials did is in ``FOLDER/trials/ID/epochs``, a line for each epoch.
"""

import os
import signal
import sys
import time
from pathlib import Path

from training.search.cluster import connected
from training.search.logbook import Logbook, Trial

# Long enough that a search is not over before a test has read a line and killed something.
EPOCH_SECONDS = 0.3


def trial(values: dict[str, float], *, search: str, folder: str, streamer: str) -> None:
    from ray import tune

    own = Path(folder) / tune.get_context().get_trial_id()
    own.mkdir(parents=True, exist_ok=True)
    epochs = own / "epochs"
    done = len(epochs.read_text().splitlines()) if epochs.exists() else 0
    for epoch in range(done + 1, 5):
        time.sleep(EPOCH_SECONDS)
        if streamer == "broken":
            raise ValueError("the data is broken")
        with epochs.open("a") as file:
            file.write(f"{epoch}\n")
        score = 1 - abs(values["optim.lr"] - 0.001) + epoch / 1000
        tune.report({"epoch": epoch, "validation_accuracy": score, "validation_loss": 1 - score})
        if streamer == "killed" and epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    told: set[int] = set()

    def tell(trials: tuple[Trial, ...]) -> None:
        for one in trials:
            if one.is_over and one.number not in told:
                told.add(one.number)
                print(one.number, flush=True)

    fate = sys.argv[2] if len(sys.argv) > 2 else ""
    with connected(None):
        from training.search import tuning

        is_whole = tuning.run(Logbook(Path(sys.argv[1])), tell, streamer=fate, trainable=trial)
    print("whole" if is_whole else "stopped", flush=True)


if __name__ == "__main__":
    main()
