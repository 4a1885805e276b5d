"""The line in containers, on a real engine: from images to right answers, and nothing left."""

import asyncio
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.client import Classification, ImageClient
from sluice.health import ask_streamer, ask_triton
from streamer.client import Plan, SampleClient
from tests.compose.engine import BASE_IMAGE, Project, docker
from tests.pairs import share_ordered_right

pytestmark = [pytest.mark.containers, pytest.mark.timeout(2400)]

SERVICES = ("triton", "gateway", "streamer")
USER = "10001"


def address(project: Project, name: str) -> str:
    return f"127.0.0.1:{project.variables[f'SLUICE_{name}_PORT']}"


def image_bytes(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def place_of_triton(project: Project) -> str:
    """Return the IP address of Triton's container."""
    return project.inspect("triton", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")


async def digits(project: Project) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    async with SampleClient(address(project, "STREAMER")) as client:
        batches = [batch async for batch in client.batches(Plan(dataset="mnist", split="test", batch_size=500))]
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])


@pytest.mark.parametrize("override", [(), ("gpu",), ("data",), ("gpu", "data")], ids="+".join)
def test_files_are_valid_together(compose: list[str], override: tuple[str, ...]) -> None:
    files = ("compose.yaml", *(f"compose.{name}.yaml" for name in override))
    done = Project(compose, "sluice-test-config", files, {"SLUICE_DATA": "/data"}).compose("config", "--quiet")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_light_images_hold_no_torch_and_stay_small(built_project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    images = {service: built_project.image(service) for service in (*SERVICES, "train")}
    base = image_bytes(BASE_IMAGE)
    above = {service: image_bytes(image) - base for service, image in images.items()}
    with capsys.disabled():
        sizes = ", ".join(f"{service} {size / 1e6:.0f} MB" for service, size in above.items())
        print(f"\nimages above {BASE_IMAGE} ({base / 1e6:.0f} MB): {sizes}")

    look = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
    torch = {
        service: docker("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", look)
        for service, image in images.items()
    }

    assert above["gateway"] < 350e6
    assert above["streamer"] < 350e6
    assert torch == {"triton": "True", "gateway": "False", "streamer": "False", "train": "True"}


def test_gateway_without_a_model_is_healthy_and_says_how_to_make_one(project: Project) -> None:
    health = project.run("gateway", "sluice", "health", "gateway", "--allow-no-model")

    assert health.returncode == 0
    assert "docker compose run --rm train" in health.stdout
    assert project.run("gateway", "sluice", "health", "gateway").returncode == 1
    assert "docker compose run --rm train" in project.compose("logs", "--no-color", "gateway").stdout


@pytest.mark.parametrize("service", SERVICES)
def test_every_process_of_a_container_has_the_user_without_rights(project: Project, service: str) -> None:
    users = docker("top", project.container(service), "-eo", "uid,pid").split()[2::2]

    assert users
    assert set(users) == {USER}


def test_triton_is_reached_from_the_gateway_alone(project: Project) -> None:
    """By name and by address, over HTTP and gRPC; what else may answer there is no Triton."""
    ip = place_of_triton(project)
    asked = [("triton", f"{host}:8000") for host in ("triton", ip)]
    asked += [("streamer", f"{host}:8001") for host in ("triton", ip)]  # the same health protocol
    answers = {
        service: [project.run(service, "sluice", "health", how, "--address", where).returncode for how, where in asked]
        for service in ("gateway", "streamer")
    }

    assert docker("port", project.container("triton")) == ""
    assert answers == {"gateway": [0, 0, 0, 0], "streamer": [1, 1, 1, 1]}
    assert not ask_triton(f"{ip}:8000", timeout_seconds=3).is_well
    assert not ask_streamer(f"{ip}:8001", timeout_seconds=3).is_well


@pytest.mark.parametrize("name", ["GATEWAY_METRICS", "STREAMER_METRICS"])
def test_metrics_are_read_from_the_host(project: Project, name: str) -> None:
    with urllib.request.urlopen(f"http://{address(project, name)}/metrics", timeout=10) as answer:
        assert answer.status == 200


def test_model_trained_in_its_container_is_right_through_the_published_port(
    trained_project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    async def classify() -> float:
        images, labels = await digits(trained_project)
        async with ImageClient(address(trained_project, "GATEWAY")) as client:
            await client.wait_ready(timeout_seconds=60)
            answers = await client.classify_batch(list(images))
        given = [answer.label if isinstance(answer, Classification) else -1 for answer in answers]

        assert len(labels) == 1000
        return float(np.mean(np.array(given) == labels))

    accuracy = asyncio.run(classify())
    with capsys.disabled():
        print(f"\n{accuracy:.1%} of 1,000 held-out digits right through the published port")

    assert accuracy >= 0.97


def test_pictures_of_one_digit_are_more_alike_than_of_two(
    trained_project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    async def compare() -> float:
        return await share_ordered_right(address(trained_project, "GATEWAY"), *await digits(trained_project))

    share = asyncio.run(compare())
    with capsys.disabled():
        print(f"\n{share:.1%} of 1,000 pairs of one digit score higher than a pair of two")

    assert share >= 0.95


def test_second_run_publishes_version_2_and_the_gateway_routes_to_it(trained_project: Project) -> None:
    done = trained_project.compose("run", "--rm", "-T", "train", "--recipe", "smoke", "--force", timeout_seconds=300)
    assert done.returncode == 0, done.stderr

    async def versions() -> tuple[int, ...]:
        async with ImageClient(address(trained_project, "GATEWAY")) as client:
            return (await client.models())[0].versions

    assert asyncio.run(versions()) == (2, 1)


def test_triton_that_died_is_back_with_its_model(trained_project: Project) -> None:
    """The container ends with the server, so that the engine's restart policy sees it."""
    kill = "kill -9 $(grep -lx tritonserver /proc/[0-9]*/comm | cut -d/ -f3)"
    trained_project.healthy_after(lambda: trained_project.run("triton", "sh", "-c", kill), "triton", seconds=120)

    async def serve() -> None:
        async with ImageClient(address(trained_project, "GATEWAY")) as client:
            await client.wait_ready(timeout_seconds=60)

    asyncio.run(serve())

    assert trained_project.inspect("triton", "{{.RestartCount}}") == "1"


def test_run_that_is_stopped_ends_at_once_and_publishes_nothing(project: Project) -> None:
    name = f"{project.name}-stopped-run"
    done = project.compose("run", "--detach", "--name", name, "train", "--epochs", "1000")
    assert done.returncode == 0, done.stderr
    with subprocess.Popen(["docker", "logs", "--follow", name], stderr=subprocess.PIPE, text=True) as logs:
        assert logs.stderr is not None
        next(line for line in logs.stderr if line.startswith("training mnist"))
        users = docker("top", name, "-eo", "uid,pid").split()[2::2]
        seconds, code = stopped(name)

    assert set(users) == {USER}
    assert (seconds < 10, code) == (True, 143)
    docker("rm", name)


@pytest.mark.parametrize("service", ["gateway", "streamer", "triton"])
def test_sigterm_ends_a_container_cleanly_within_its_grace(project: Project, service: str) -> None:
    grace = int(project.inspect(service, "{{.Config.StopTimeout}}"))
    container = project.container(service)
    seconds, code = stopped(container)
    docker("start", container)

    assert seconds < grace
    assert code == 0


def stopped(container: str) -> tuple[float, int]:
    """Stop a container with SIGTERM and its own grace; return how long that took and its exit status."""
    started = time.monotonic()
    docker("stop", container)
    return time.monotonic() - started, int(docker("inspect", "--format", "{{.State.ExitCode}}", container))


def test_down_with_volumes_leaves_nothing(project: Project) -> None:
    assert project.left()
    project.down()

    assert project.left() == []
