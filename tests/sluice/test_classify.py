from pathlib import Path

import pytest
from PIL import Image

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from sluice.classify import run
from tests.digits import seven
from tests.gateway.fake_triton import FakeTriton, label_of


@pytest.mark.parametrize("verbose", [True, False])
async def test_verbose_says_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    Image.fromarray(seven()).save(tmp_path / "seven.png")
    files = [tmp_path / "seven.png", tmp_path / "none.png"]
    async with FakeTriton() as triton:
        settings = GatewaySettings(port=0, metrics_port=0, triton=triton.address, model_repository=tmp_path)
        async with GatewayServer(settings) as gateway:
            failed = await run(files, server=gateway.address, model="", as_json=False, verbose=verbose)
    out, err = capsys.readouterr()

    assert failed
    assert f"{files[0]}: {label_of(seven())} (91.0%)\n" in out
    told = [line for line in err.splitlines() if line.startswith("call ")]
    assert len(told) == verbose
    assert all("decode " in line and "left in a batch of 1" in line for line in told)
