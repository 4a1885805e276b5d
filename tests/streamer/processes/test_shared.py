import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamer.processes.shared import SharedSplit
from tests.streamer.packed import random_split

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shared() -> Iterator[SharedSplit]:
    """1,000 samples of 300 classes, whose labels take two bytes."""
    shared = SharedSplit.of(random_split(num_classes=300))
    yield shared
    os.close(shared.descriptor)


def test_split_is_what_it_was(shared: SharedSplit) -> None:
    split, opened = (
        random_split(num_classes=300),
        SharedSplit.from_json(json.loads(json.dumps(shared.as_json()))).open(),
    )

    np.testing.assert_array_equal(opened.images, split.images)
    np.testing.assert_array_equal(opened.labels, split.labels)
    assert (opened.name, opened.num_classes, opened.fingerprint) == (split.name, split.num_classes, split.fingerprint)
    assert opened.labels.dtype == split.labels.dtype == np.dtype("<u2")


def test_another_process_sees_the_same_memory(shared: SharedSplit) -> None:
    program = (
        "import json, sys; from streamer.processes.shared import SharedSplit; "
        "from streamer.sources.split import MemorySplit; "
        "opened = SharedSplit.from_json(json.loads(sys.argv[1])).open(); "
        "print(MemorySplit(opened.name, opened.images, opened.labels, opened.num_classes).fingerprint.hex())"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, json.dumps(shared.as_json())],
        cwd=ROOT,
        pass_fds=(shared.descriptor,),
        capture_output=True,
        check=True,
        text=True,
    )
    assert said.stdout.strip() == shared.fingerprint.hex()


def test_nobody_can_change_it(shared: SharedSplit) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(shared.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(shared.descriptor, 0)
    with pytest.raises(ValueError, match="read-only"):
        shared.open().images[0] = 0


def test_it_takes_no_name_anywhere(shared: SharedSplit) -> None:
    assert os.readlink(f"/proc/self/fd/{shared.descriptor}").endswith("(deleted)")
