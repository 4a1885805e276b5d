import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import structlog
import torch
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving import keeper, soundness
from serving.control import TritonControl
from serving.errors import ControlError, PortTakenError, TritonStartError
from serving.installation import Installation
from serving.settings import TritonSettings
from serving.triton import EmbeddedTriton, servable_models
from tests.serving.conftest import add_model, add_version, flip_a_bit, free_ports, on_free_ports, processes_with, seal

real = [pytest.mark.triton, pytest.mark.asyncio(loop_scope="session")]

Array = np.ndarray[Any, Any]


def images(count: int) -> Array:
    return np.random.default_rng(count).integers(0, 256, (count, 1, 28, 28), np.uint8)


def by_torch(module: torch.jit.ScriptModule, batch: Array) -> tuple[Array, Array]:
    with torch.inference_mode():
        probabilities, embeddings = module(torch.from_numpy(batch))
    return probabilities.numpy(), embeddings.numpy()


async def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what only /proc and /dev/shm can tell, and no event does."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - of other processes: no event tells
            await asyncio.sleep(0.02)


def left_of(settings: TritonSettings, prefix: str) -> list[str]:
    """Processes and ports of the server with these settings that are still there, and regions in shared memory."""
    regions = [region.name for region in keeper.SHARED_MEMORY.glob(f"{prefix}*")]
    ports = []
    for port in (settings.http_port, settings.grpc_port, settings.metrics_port):
        with socket.socket() as probe:
            if probe.connect_ex((settings.host, port)) == 0:
                ports.append(f"port {port}")
    return processes_with(prefix) + regions + ports


@pytest_asyncio.fixture(loop_scope="session")
async def control(triton: EmbeddedTriton) -> AsyncIterator[TritonControl]:
    async with TritonControl(triton.address) as connection:
        yield connection


class TestServing:
    """One real server, started once; each test has a model of its own in it."""

    pytestmark = real

    async def test_repository_without_versions_comes_up_ready(self, control: TritonControl) -> None:
        await control.wait_ready(timeout_seconds=30)

        assert await control.versions("mnist") == []

    async def test_answers_equal_torchscripts(self, control: TritonControl, repository: Path) -> None:
        add_model(repository, "equal")
        module = add_version(repository, "equal", 1)
        await control.load("equal")

        for count in (1, 5, 64):
            probabilities, embeddings = await control.infer("equal", images(count))
            expected = by_torch(module, images(count))
            np.testing.assert_allclose(probabilities, expected[0], atol=1e-5)
            np.testing.assert_allclose(embeddings, expected[1], atol=1e-5)

    async def test_only_requested_outputs_are_returned(
        self, control: TritonControl, triton: EmbeddedTriton, repository: Path
    ) -> None:
        add_model(repository, "asked")
        add_version(repository, "asked", 1)
        await control.load("asked")
        request = service_pb2.ModelInferRequest(model_name="asked", raw_input_contents=[images(1).tobytes()])
        request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 28, 28])
        request.outputs.add(name="embedding__1")

        async with grpc.aio.insecure_channel(triton.address) as channel:
            answer = await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)

        assert [(output.name, list(output.shape)) for output in answer.outputs] == [("embedding__1", [1, 500])]
        assert len(answer.raw_output_contents[0]) == 2000

    async def test_calls_at_once_run_in_batches(self, control: TritonControl, repository: Path) -> None:
        add_model(repository, "batched")
        module = add_version(repository, "batched", 1)
        await control.load("batched")
        batch = images(64)
        before = await control.statistics("batched")  # warm-up counts too

        answers = await asyncio.gather(
            *(control.infer("batched", batch[index % 64][None]) for index in range(256)),
        )

        # Triton counts a batch a moment after it has answered it.
        async with asyncio.timeout(30):
            while (after := await control.statistics("batched")).inferences < before.inferences + 256:
                pass  # each turn is a request
        assert after.inferences == before.inferences + 256
        assert after.executions - before.executions < 256 / 3
        received = np.concatenate([probabilities for probabilities, _ in answers[:64]])
        np.testing.assert_allclose(received, by_torch(module, batch)[0], atol=1e-5)

    async def test_second_version_leaves_the_first_running(self, control: TritonControl, repository: Path) -> None:
        add_model(repository, "twice")
        first = add_version(repository, "twice", 1)
        await control.load("twice")
        second = add_version(repository, "twice", 2)
        await control.load("twice")

        assert await control.versions("twice") == [1, 2]
        for version, module in ((1, first), (2, second), (None, second)):
            probabilities, _ = await control.infer("twice", images(3), version=version)
            np.testing.assert_allclose(probabilities, by_torch(module, images(3))[0], atol=1e-5)

    async def test_damaged_version_is_named_and_leaves_the_others_running(
        self, control: TritonControl, repository: Path
    ) -> None:
        add_model(repository, "damaged")
        add_version(repository, "damaged", 1)
        await control.load("damaged")
        add_version(repository, "damaged", 2)
        (repository / "damaged" / "2" / "model.pt").write_text("no archive")

        with pytest.raises(ControlError, match=r"damaged/2/model\.pt is no TorchScript") as failure:
            await control.load("damaged")

        assert "At:" not in str(failure.value)
        assert await control.versions("damaged") == [1]
        await control.infer("damaged", images(1))

    async def test_changed_version_is_refused_before_it_runs(self, control: TritonControl, repository: Path) -> None:
        add_model(repository, "changed")
        for version in (1, 2):
            add_version(repository, "changed", version)
            seal(repository, "changed", version)
        # A whole module, and a good one: only its digest tells.
        shutil.copy(repository / "changed" / "1" / "model.pt", repository / "changed" / "2" / "model.pt")

        with pytest.raises(ControlError, match=r"changed/2/model\.pt is not what was published"):
            await control.load("changed")

    async def test_damaged_version_is_passed_over_and_the_ones_around_it_serve(
        self, control: TritonControl, repository: Path
    ) -> None:
        add_model(repository, "around")
        for version in (1, 2, 3):
            add_version(repository, "around", version)
            folder = seal(repository, "around", version)
            if version == 2:
                flip_a_bit(folder / "model.pt")
            found = soundness.inspect(repository, "around")
            await soundness.load(control, repository, "around", found)

        assert list(found.damaged) == [2]
        assert await control.versions("around") == [1, 3]

    async def test_unloaded_model_refuses_and_can_be_loaded_again(
        self, control: TritonControl, repository: Path
    ) -> None:
        add_model(repository, "gone")
        add_version(repository, "gone", 1)
        await control.load("gone")
        await control.unload("gone")

        assert await control.versions("gone") == []
        with pytest.raises(ControlError, match="'gone'"):
            await control.infer("gone", images(1))
        await control.load("gone")
        await control.infer("gone", images(1))

    async def test_bad_shape_is_refused_and_the_next_image_answered(
        self, control: TritonControl, repository: Path
    ) -> None:
        add_model(repository, "shapes")
        add_version(repository, "shapes", 1)
        await control.load("shapes")

        with pytest.raises(ControlError, match=r"unexpected shape for input 'image'"):
            await control.infer("shapes", np.zeros((1, 1, 27, 28), np.uint8))
        with pytest.raises(ControlError, match="batch-size must be <= 64"):
            await control.infer("shapes", images(65))
        await control.infer("shapes", images(1))

    async def test_taken_port_is_named_with_its_option(
        self, triton: EmbeddedTriton, triton_settings: TritonSettings, installation: Installation
    ) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(triton_settings, name)
            second = triton_settings.model_copy(update={**free_ports(), name: port})
            option = f"--{name.replace('_', '-')} or SLUICE_TRITON_{name.upper()}"

            with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*{option}"):
                await EmbeddedTriton(second, installation).start()


OWNER = """
import asyncio, sys
from pathlib import Path
from rpc.settings import cache_folder
from serving.installation import install
from serving.settings import TritonSettings
from serving.triton import EmbeddedTriton

async def own(repository: str, log_file: str, *ports: str) -> None:
    http, grpc, metrics = map(int, ports)
    settings = TritonSettings(model_repository=Path(repository), log_file=Path(log_file),
                              http_port=http, grpc_port=grpc, metrics_port=metrics)
    async with EmbeddedTriton(settings, await install(cache_folder(), print)) as triton:
        print("ready", flush=True)
        await triton.wait()

asyncio.run(own(*sys.argv[1:]))
"""


class TestEnd:
    """Servers that end, each in its own way."""

    pytestmark = real

    @pytest.fixture
    def settings(self, tmp_path: Path) -> TritonSettings:
        """One model with one version, in a folder with a space in its name."""
        add_model(tmp_path / "my models", "mnist")
        add_version(tmp_path / "my models", "mnist", 1)
        return on_free_ports(model_repository=tmp_path / "my models", log_file=tmp_path / "triton.log")

    @pytest_asyncio.fixture(loop_scope="session")
    async def owner(self, settings: TritonSettings) -> AsyncIterator[asyncio.subprocess.Process]:
        """A process that owns a Triton, and is about to be killed; by the end of the test at the latest."""
        ports = (settings.http_port, settings.grpc_port, settings.metrics_port)
        arguments = (settings.model_repository, settings.log_file, *ports)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OWNER, *map(str, arguments)), stdout=asyncio.subprocess.PIPE
        )
        yield process
        if process.returncode is None:
            process.kill()
            await process.communicate()

    async def test_stop_leaves_nothing(self, settings: TritonSettings, installation: Installation) -> None:
        triton = EmbeddedTriton(settings, installation)
        await triton.start()
        waiting = asyncio.create_task(triton.wait())
        async with TritonControl(triton.address) as control:
            assert await control.versions("mnist") == [1]
        assert len(left_of(settings, triton._prefix)) == 7, "keeper, server, stub, region, three ports"

        await triton.stop()
        await triton.stop()

        assert await waiting == 0
        assert left_of(settings, triton._prefix) == []

    async def test_installation_in_a_folder_with_a_space_is_refused(
        self, settings: TritonSettings, installation: Installation
    ) -> None:
        elsewhere = dataclasses.replace(installation, backends=Path("/my cache/backends"))

        with pytest.raises(TritonStartError, match="set SLUICE_CACHE to a folder without"):
            await EmbeddedTriton(settings, elsewhere).start()

    async def test_model_that_fails_to_load_is_logged_and_the_rest_served(
        self, settings: TritonSettings, installation: Installation
    ) -> None:
        add_model(settings.model_repository, "broken")
        add_version(settings.model_repository, "broken", 1)
        (settings.model_repository / "broken" / "1" / "model.pt").write_text("no archive")

        with structlog.testing.capture_logs() as logs:
            async with EmbeddedTriton(settings, installation) as triton, TritonControl(triton.address) as control:
                await control.infer("mnist", images(1))

        assert [(line["model"], line["version"], line["log_level"]) for line in logs] == [("broken", 1, "warning")]
        assert "is no TorchScript" in logs[0]["reason"]

    async def test_start_with_a_damaged_version_serves_the_others_of_its_model(
        self, settings: TritonSettings, installation: Installation
    ) -> None:
        add_version(settings.model_repository, "mnist", 2)
        flip_a_bit(seal(settings.model_repository, "mnist", 2) / "model.pt")

        with structlog.testing.capture_logs() as logs:
            async with EmbeddedTriton(settings, installation) as triton, TritonControl(triton.address) as control:
                assert await control.versions("mnist") == [1]

        assert [(line["event"], line["version"]) for line in logs] == [("version refused", 2)]
        assert "mnist/2/model.pt: not what was published" in logs[0]["reason"]

    async def test_killed_owner_leaves_nothing(
        self, settings: TritonSettings, owner: asyncio.subprocess.Process
    ) -> None:
        assert owner.stdout is not None
        assert await owner.stdout.readline() == b"ready\n"

        owner.kill()
        await owner.communicate()

        await until(lambda: left_of(settings, f"sluice_*_{owner.pid}_") == [])

    async def test_owner_killed_while_models_load_leaves_nothing(
        self, settings: TritonSettings, owner: asyncio.subprocess.Process
    ) -> None:
        """The moment at which Triton by itself loses its stubs."""
        await until(
            lambda: any("triton_python_backend_stub" in line for line in left_of(settings, f"sluice_*_{owner.pid}_"))
        )

        owner.kill()
        await owner.communicate()

        await until(lambda: left_of(settings, f"sluice_*_{owner.pid}_") == [])

    async def test_killed_keeper_ends_the_start_and_leaves_nothing(
        self, settings: TritonSettings, installation: Installation
    ) -> None:
        """While models load, so that the stub would stay for ever."""
        triton = EmbeddedTriton(settings, installation)
        starting = asyncio.create_task(triton.start())
        await until(lambda: any("triton_python_backend_stub" in line for line in left_of(settings, triton._prefix)))
        assert triton._process is not None
        triton._process.kill()

        with pytest.raises(TritonStartError, match=f"status {-signal.SIGKILL} while starting"):
            await starting

        await until(lambda: left_of(settings, triton._prefix) == [], seconds=10)


class TestStart:
    """What does not need Triton itself: a shell script stands where its binary would."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Installation:
        (tmp_path / "tritonserver").write_text("#!/bin/sh\nexec sleep 300\n")
        (tmp_path / "tritonserver").chmod(0o755)
        return Installation(binary=tmp_path / "tritonserver", backends=tmp_path, library_folders=())

    @pytest.fixture
    def settings(self, tmp_path: Path) -> TritonSettings:
        (tmp_path / "models").mkdir()
        log_file = tmp_path / "logs" / "triton.log"
        return on_free_ports(model_repository=tmp_path / "models", log_file=log_file, stop_grace_seconds=0)

    async def test_server_that_ends_shows_the_end_of_this_starts_log(
        self, settings: TritonSettings, server: Installation
    ) -> None:
        settings.log_file.parent.mkdir()
        settings.log_file.write_text("an earlier start\n")
        server.binary.write_text("#!/bin/sh\necho no such thing\nexit 3\n")

        with pytest.raises(TritonStartError, match="status 3 while starting") as failure:
            await EmbeddedTriton(settings, server).start()

        assert str(failure.value).endswith("triton.log:\nno such thing")

    async def test_server_that_is_not_live_in_time_is_ended(
        self, settings: TritonSettings, server: Installation
    ) -> None:
        hasty = settings.model_copy(update={"ready_timeout_seconds": 0.3})

        triton = EmbeddedTriton(hasty, server)
        with pytest.raises(TritonStartError, match=r"not live after 0\.3 s \(SLUICE_TRITON_READY_TIMEOUT_SECONDS\)"):
            await triton.start()

        assert left_of(settings, triton._prefix) == []

    async def test_cancelled_start_leaves_nothing(self, settings: TritonSettings, server: Installation) -> None:
        triton = EmbeddedTriton(settings, server)
        starting = asyncio.create_task(triton.start())
        await until(lambda: left_of(settings, triton._prefix) != [])
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

        assert left_of(settings, triton._prefix) == []

    async def test_missing_repository_is_named(self, settings: TritonSettings, server: Installation) -> None:
        settings.model_repository.rmdir()

        with pytest.raises(TritonStartError, match=r"no model repository .*models \(SLUICE_MODEL_REPOSITORY\)"):
            await EmbeddedTriton(settings, server).start()

    async def test_address_of_another_machine_is_refused(self, settings: TritonSettings, server: Installation) -> None:
        elsewhere = settings.model_copy(update={"host": "192.0.2.1"})

        with pytest.raises(TritonStartError, match=r"cannot listen on 192\.0\.2\.1:\d+.*SLUICE_TRITON_HOST"):
            await EmbeddedTriton(elsewhere, server).start()

    async def test_large_log_is_set_aside(self, settings: TritonSettings, server: Installation) -> None:
        settings.log_file.parent.mkdir()
        settings.log_file.touch()
        os.truncate(settings.log_file, 17 << 20)
        server.binary.write_text("#!/bin/sh\nexit 1\n")

        with pytest.raises(TritonStartError):
            await EmbeddedTriton(settings, server).start()

        assert settings.log_file.with_name("triton.log.1").stat().st_size == 17 << 20
        assert settings.log_file.stat().st_size < 1000

    async def test_output_goes_to_standard_error_where_the_log_file_says_so(
        self, settings: TritonSettings, server: Installation, capfd: pytest.CaptureFixture[str]
    ) -> None:
        server.binary.write_text("#!/bin/sh\necho no such thing\nexit 3\n")

        with pytest.raises(TritonStartError, match="status 3 while starting; what it said stands above"):
            await EmbeddedTriton(settings.model_copy(update={"log_file": Path("-")}), server).start()

        assert capfd.readouterr().err == "no such thing\n"


def test_servable_are_models_with_configuration_and_version(tmp_path: Path) -> None:
    for path in ("b/1", "a/12", "staged/.staged-1", "latest/latest", "zero/0", "unconfigured/1"):
        (tmp_path / path).mkdir(parents=True)
    for model in ("b", "a", "staged", "latest", "zero"):
        (tmp_path / model / "config.pbtxt").touch()
    (tmp_path / "README.md").touch()

    assert servable_models(tmp_path) == ["a", "b"]
