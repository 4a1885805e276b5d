"""The supervisor with real processes: `sluice streamer` on a tiny data set stands for any service."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.supervisor import Service, ServiceError, Supervisor


@pytest.fixture(scope="module")
def streamer(tmp_path_factory: pytest.TempPathFactory, tiny_mnist: Path) -> Service:
    arguments = ["streamer", "--port", "0", "--metrics-port", "0", "--data", str(tiny_mnist)]
    return Service(name="streamer", arguments=arguments, ready_seconds=30)


@pytest.fixture
def reports() -> asyncio.Queue[str]:
    return asyncio.Queue()


async def test_service_is_ready_once_started(tmp_path: Path, streamer: Service) -> None:
    async with Supervisor(tmp_path, print) as supervisor:
        host, port = (await supervisor.start(streamer)).rsplit(":", 1)
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_killed_service_is_named_and_comes_back(
    tmp_path: Path, streamer: Service, reports: asyncio.Queue[str]
) -> None:
    async with Supervisor(tmp_path, reports.put_nowait) as supervisor:
        await supervisor.start(streamer)
        os.kill(supervisor.pid("streamer"), signal.SIGKILL)

        assert await reports.get() == "streamer died (SIGKILL); starting it again in 0.5 s"
        assert await reports.get() == f"streamer is back on {supervisor.address('streamer')}"


async def test_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    service = Service(name="streamer", arguments=["streamer", "--port", "70000"], ready_seconds=30)
    async with Supervisor(tmp_path, print) as supervisor:
        with pytest.raises(ServiceError, match="streamer: --port = 70000"):
            await supervisor.start(service)


async def test_service_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    service = Service(name="python", arguments=["classify", "/dev/stdin"], ready_seconds=0.01)
    async with Supervisor(tmp_path, print) as supervisor:
        with pytest.raises(ServiceError, match="was not ready after 0 s"):
            await supervisor.start(service)


def test_services_end_when_the_supervisor_is_killed(tmp_path: Path, tiny_mnist: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from sluice.supervisor import Service, Supervisor
async def main():
    async with Supervisor(Path({str(tmp_path)!r}), print) as supervisor:
        arguments = ["streamer", "--port", "0", "--metrics-port", "0", "--data", {str(tiny_mnist)!r}]
        await supervisor.start(Service(name="s", arguments=arguments))
        print(supervisor.pid("s"), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        service = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()

    # A process's descriptor turns readable when it ends.
    ended, _, _ = select.select([service], [], [], 30)
    os.close(service)

    assert ended
