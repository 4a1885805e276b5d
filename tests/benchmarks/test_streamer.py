import re
from pathlib import Path

import pytest

from benchmarks import streamer


def _run(only: str, folder: Path, mosaic_python: Path) -> str:
    output = folder / "streamer.md"
    streamer.main(["--quick", "--only", only, "--output", str(output), "--mosaic-python", str(mosaic_python)])
    return output.read_text()


def _has_numbers(text: str, name: str) -> bool:
    """Tell whether the row of this contender, in whatever way it contended, is full of them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = [row for row in rows if " / " not in row[0]]  # those of factors
    cells = [cell for row in rows if row[0].partition(", ")[0] == name.partition(", ")[0] for cell in row[1:] if cell]
    return len(cells) >= 4 and all(re.fullmatch(r"[\d.,]+", cell) for cell in cells)


def test_rows_have_their_numbers_or_say_why_not(tmp_path: Path) -> None:
    text = _run("mosaic,seed", tmp_path, mosaic_python=tmp_path / "none")

    assert all(_has_numbers(text, name) for name in (streamer.PULL, *streamer.names_of(["seed"]))), text
    assert f"{streamer.MOSAIC}: not installed" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_of_a_whole_run_have_their_numbers(tmp_path: Path) -> None:
    text = _run(",".join(streamer.SUITES), tmp_path, mosaic_python=tmp_path / "none")

    names = [name for name in streamer.names_of(list(streamer.SUITES)) if name != streamer.MOSAIC]
    assert all(_has_numbers(text, name) for name in names), text


def test_what_is_no_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        streamer.main(["--only", "pull,push"])

    assert "push" in capsys.readouterr().err
