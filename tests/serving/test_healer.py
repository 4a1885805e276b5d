import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tritonclient.grpc import service_pb2

from serving.control import TritonControl
from serving.errors import BeyondHealingError, ControlError
from serving.healer import Healer, reload_pause
from serving.installation import Installation
from serving.triton import EmbeddedTriton, serve
from tests.gateway.fake_triton import Context, FakeTriton, confident
from tests.serving.conftest import CONFIG, add_model, add_version, flip_a_bit, on_free_ports, seal

BLANK: NDArray[np.uint8] = np.zeros((1, 1, 28, 28), np.uint8)
DEAD = grpc.StatusCode.INTERNAL, "Stub process 'mnist_0_0' is not healthy."


def test_pause_grows_to_its_longest_and_stays_there_for_weeks() -> None:
    assert [reload_pause(number, 5.0) for number in (0, 1, 2, 3, 100, 100_000)] == [0.0, 5.0, 10.0, 20.0, 300.0, 300.0]


class LoadedTriton(FakeTriton):
    """
    One whose models are loaded and unloaded.

    Attributes:
        told: What it was told to do, in order.
        on_load: Called at each load; it may raise ``LookupError`` with what is wrong.
        num_executions: What its statistics say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.changed = asyncio.Event()
        self.on_load: Callable[[], None] = lambda: None
        self.num_executions = 0

    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        self._note(f"unload {request.model_name}")
        self.models.pop(request.model_name, None)
        return service_pb2.RepositoryModelUnloadResponse()

    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        self._note(f"load {request.model_name}")
        try:
            self.on_load()
        except LookupError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        self.models[request.model_name] = [1]
        return service_pb2.RepositoryModelLoadResponse()

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        # Each look of the healer's is an event here.
        self._note("statistics")
        return service_pb2.ModelStatisticsResponse(
            model_stats=[service_pb2.ModelStatistics(name=request.name, execution_count=self.num_executions)]
        )

    def _note(self, what: str) -> None:
        self.told.append(what)
        self.changed.set()

    async def until_asked(self, *wanted: str, times: int = 1) -> None:
        async with asyncio.timeout(60):
            while self.told.count(wanted[-1]) < times:
                self.changed.clear()
                await self.changed.wait()
        assert [one for one in self.told if one in wanted] == [*wanted] * times


class TestOfAScriptedTriton:
    @pytest.fixture
    async def triton(self) -> AsyncIterator[LoadedTriton]:
        async with LoadedTriton() as server:
            yield server

    @pytest.fixture
    def healing(
        self, triton: LoadedTriton, tmp_path: Path
    ) -> Callable[..., contextlib.AbstractAsyncContextManager[asyncio.Task[None]]]:
        """Have a healer, one in a hurry, look after that Triton; killed stubs are noted there."""
        add_model(tmp_path, "mnist")
        (tmp_path / "mnist" / "1").mkdir()
        (tmp_path / "mnist" / "1" / "model.pt").touch()

        def kill(model: str, version: int) -> None:
            triton._note(f"kill {model}/{version}")
            triton.gate.set()

        @asynccontextmanager
        async def run(**options: float) -> AsyncIterator[asyncio.Task[None]]:
            hurry = {"interval_seconds": 0.02, "reload_pause_seconds": 0.02} | options
            async with TritonControl(triton.address) as control:
                task: asyncio.Task[None] = asyncio.create_task(Healer(control, tmp_path, kill, **hurry).run())
                yield task
                task.cancel()
                await asyncio.wait({task})
                triton.gate.set()

        return run

    async def test_model_that_fails_again_and_again_is_reloaded(self, triton: LoadedTriton, healing: Any) -> None:
        def cure() -> None:
            triton.failure = None

        triton.failure, triton.on_load = DEAD, cure
        with structlog.testing.capture_logs() as logs:
            async with healing():
                await triton.until_asked("kill mnist/1", "unload mnist", "load mnist")
                num_tried = len(triton.received)
                while len(triton.received) < num_tried + 3:  # it answers, and nothing more is done to it
                    triton.arrived.clear()
                    await triton.arrived.wait()

        assert num_tried == 3
        assert triton.told.count("load mnist") == 1
        assert [line["event"] for line in logs] == ["model reloading", "model reloaded"]
        assert "not healthy" in logs[0]["reason"]

    async def test_model_that_answers_nan_is_reloaded(self, triton: LoadedTriton, healing: Any) -> None:
        triton.answer = lambda images: confident(images) * np.nan
        async with healing():
            await triton.until_asked("unload mnist", "load mnist")

    async def test_hang_is_reloaded_and_never_asked_twice_at_once(self, triton: LoadedTriton, healing: Any) -> None:
        triton.gate.clear()
        async with healing(hang_seconds=0.2):
            await triton.until_asked("kill mnist/1", "unload mnist", "load mnist")

        assert triton.told.count("statistics") > 1
        assert triton.told.index("kill mnist/1") == triton.told.count("statistics")
        assert triton.num_cancelled == 0

    async def test_model_that_only_is_slow_is_left_alone(self, triton: LoadedTriton, healing: Any) -> None:
        triton.gate.clear()
        async with healing(hang_seconds=0.05):
            for look in range(2, 12):
                triton.num_executions += 1
                await triton.until_asked("statistics", times=look)

        assert set(triton.told) == {"statistics"}
        assert len(triton.received) == 1
        assert triton.num_cancelled == 0

    async def test_model_that_takes_something_else_is_left_alone(self, triton: LoadedTriton, healing: Any) -> None:
        triton.dims, triton.failure = [3, 224, 224], DEAD
        async with healing():
            await asyncio.sleep(0.5)  # nothing is to happen, and no event tells of that

        assert triton.received == []
        assert triton.told == []

    async def test_failed_load_is_tried_again(self, triton: LoadedTriton, healing: Any) -> None:
        failures = iter(["no such file"])

        def fail_once() -> None:
            triton.failure = None
            for text in failures:
                raise LookupError(text)

        triton.failure, triton.on_load = DEAD, fail_once
        async with healing():
            await triton.until_asked("load mnist", times=2)
            async with TritonControl(triton.address) as control:
                await control.infer("mnist", BLANK, version=1)

    async def test_loading_again_and_again_for_nothing_is_beyond_healing(
        self, triton: LoadedTriton, healing: Any
    ) -> None:
        triton.failure = DEAD
        async with healing() as task:
            with pytest.raises(
                BeyondHealingError, match=r"mnist does not answer, though it was loaded again: .*healthy"
            ):
                await asyncio.wait_for(task, 60)

        assert triton.told.count("load mnist") == 2

    async def test_model_beside_one_that_answers_is_never_beyond_healing(
        self, triton: LoadedTriton, healing: Any
    ) -> None:
        triton.models["other"] = [1]
        triton.rewrite = lambda response: None if response.model_name == "other" else spoil(response)
        async with healing() as task:
            await triton.until_asked("load mnist", times=4)
            assert not task.done()

    async def test_silent_triton_is_beyond_healing(self, triton: LoadedTriton, healing: Any) -> None:
        async with healing(silent_seconds=0.2) as task:
            await triton.stop()
            with pytest.raises(BeyondHealingError, match=r"nothing for 0\.2 s"):
                await asyncio.wait_for(task, 60)

    async def test_nothing_is_beyond_healing_soon_after_a_restart(self, triton: LoadedTriton, healing: Any) -> None:
        triton.failure = DEAD
        async with healing(restart_after_seconds=3600) as task:
            await triton.until_asked("load mnist", times=4)
            assert not task.done()


def spoil(response: Any) -> None:
    for index in range(len(response.raw_output_contents)):
        response.raw_output_contents[index] = np.full(10, np.nan, np.float32).tobytes()


def stubs_of(triton: EmbeddedTriton, model: str, version: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if program.endswith("_stub") and arguments[0] == f"./{model}/{version}/model.pt":
                found += [int(entry.name)] if triton._prefix in arguments[1] else []
    return found


async def answers(control: TritonControl, model: str, version: int, seconds: float) -> None:
    """Wait until a version answers again; that nobody tells."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await control.infer(model, BLANK, version=version)
                return
            except ControlError:
                await asyncio.sleep(0.1)


@pytest.mark.triton
@pytest.mark.asyncio(loop_scope="session")
class TestOfARealTriton:
    @pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
    async def test_model_whose_stub_is_struck_answers_again_without_what_is_damaged(
        self, triton: EmbeddedTriton, repository: Path, blow: signal.Signals
    ) -> None:
        model = f"struck-{blow}"
        add_model(repository, model)
        for version in (1, 2):
            add_version(repository, model, version)
            seal(repository, model, version)
        async with TritonControl(triton.address) as control:
            await control.load(model)
            flip_a_bit(repository / model / "2" / "model.pt")
            healing = asyncio.create_task(Healer(control, repository, triton.kill_stubs, interval_seconds=0.2).run())
            (stub,) = stubs_of(triton, model, 1)
            os.kill(stub, blow)
            with pytest.raises(ControlError, match="not healthy"):
                await control.infer(model, BLANK, version=1)

            await answers(control, model, 1, seconds=90)
            healing.cancel()
            await asyncio.wait({healing})

            assert await control.versions(model) == [1]
            assert stub not in stubs_of(triton, model, 1)

    @pytest.mark.slow
    async def test_triton_is_started_again_where_loading_does_not_help(
        self, installation: Installation, tmp_path: Path
    ) -> None:
        (tmp_path / "mnist" / "1").mkdir(parents=True)
        (tmp_path / "mnist" / "config.pbtxt").write_text(CONFIG[: CONFIG.index("model_warmup")])
        torch.jit.script(Stubborn()).save(tmp_path / "mnist" / "1" / "model.pt")  # type: ignore[no-untyped-call]  # so in torch
        settings = on_free_ports(model_repository=tmp_path, log_file=tmp_path / "triton.log", stop_grace_seconds=0)
        addresses: list[str] = []
        with structlog.testing.capture_logs() as logs:
            serving = asyncio.create_task(serve(settings, on_ready=addresses.append, report=print))
            async with asyncio.timeout(110):
                while "triton restarting" not in [line["event"] for line in logs]:  # noqa: ASYNC110 - told in the log
                    await asyncio.sleep(0.1)
                (address,) = addresses
                async with TritonControl(address) as control:
                    await control.wait_live(60)
                    assert not serving.done()
            serving.cancel()
            await asyncio.wait({serving})

        assert [line["event"] for line in logs][:5] == ["model reloading", "model reloaded"] * 2 + ["triton restarting"]
        assert len(addresses) == 1


class Stubborn(nn.Module):
    """Loads, and fails on blank images."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        assert int(image.sum()) > 0, "nothing to see"
        return torch.zeros(image.shape[0], 10), torch.zeros(image.shape[0], 500)
