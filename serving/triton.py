"""The embedded Triton as a process: started ready, stopped without a trace."""

import asyncio
import contextlib
import errno
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NoReturn, Self

import structlog

from rpc.address import joined
from serving import keeper, orphans, soundness
from serving.control import TritonControl
from serving.errors import BeyondHealingError, ControlError, PortTakenError, ServingError, TritonStartError
from serving.healer import Healer
from serving.installation import Installation, install
from serving.settings import TritonSettings

log = structlog.get_logger(__name__)

_STANDARD_ERROR = Path("-")
_MAX_LOG_BYTES = 16 << 20
_TAIL_BYTES = 4096
_TAIL_LINES = 12
# A stub imports torch before it says that it is there; from a cold disk that may take longer than Triton's 30 s.
_STUB_TIMEOUT_SECONDS = 90
# What the keeper may need beyond the grace it gives: killing, reaping, sweeping.
_KEEPER_SECONDS = 5.0
_PORT_RETRY_SECONDS = 0.02
_VERSION = re.compile(r"[1-9][0-9]*")
# After a restart that was for nothing the next one waits, while Triton runs: a better model may be published.
_FIRST_RESTART_SECONDS = 30.0
_LONGEST_RESTART_SECONDS = 1800.0
_STEADY_SECONDS = 600.0


class EmbeddedTriton:
    """
    One Triton of our own; ``async with`` starts and stops it.

    However the owning process ends, SIGKILL included, a keeper process ends server and stubs and removes their
    shared memory (:mod:`serving.keeper`). Start once.

    Args:
        settings: Where it listens and what it serves.
        installation: From :func:`serving.installation.install`.
    """

    def __init__(self, settings: TritonSettings, installation: Installation) -> None:
        self._settings = settings
        self._installation = installation
        self._prefix = orphans.new_prefix()
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0
        self._inspections: dict[str, soundness.Inspection] = {}

    @property
    def address(self) -> str:
        """``host:port`` of its gRPC protocol."""
        return joined(self._settings.host, self._settings.grpc_port)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """
        Start Triton with every model that has a version, and wait until it serves.

        A version that does not load, or is not what was published, is logged as a warning and left out; a repository
        without any version is fine.
        Cancelling this, or an error, leaves nothing running.

        Raises:
            PortTakenError: Something else listens on one of the ports.
            TritonStartError: There is no model repository, the installation's path holds a space, or Triton ended
                or was not live in time.
        """
        repository = self._settings.model_repository
        if not repository.is_dir():
            raise TritonStartError(f"there is no model repository {repository} (SLUICE_MODEL_REPOSITORY)")
        if any(map(str.isspace, str(self._installation.backends))):
            # Triton's Python backend hands this path to a shell without quotes, and refuses links.
            raise TritonStartError(
                f"Triton cannot run from {self._installation.backends}, which has a space in it: "
                "set SLUICE_CACHE to a folder without one"
            )
        await orphans.clear(self._settings.stop_grace_seconds + _KEEPER_SECONDS)
        require_free_ports(self._settings)
        self._inspections = await asyncio.to_thread(_inspect_all, repository)
        try:
            await self._spawn()
            await self._wait_live()
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Return the exit status once the server has ended, by itself or by :meth:`stop`; safe to cancel."""
        assert self._process is not None, "wait() comes after start()"
        return await self._process.wait()

    async def stop(self) -> None:
        """
        Let requests in flight finish for ``stop_grace_seconds``, then end everything; does nothing the second time.

        Cancelling this kills at once.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                async with asyncio.timeout(self._settings.stop_grace_seconds + _KEEPER_SECONDS):
                    await process.wait()
        except TimeoutError:
            log.warning("triton's keeper did not finish and is killed")
        finally:
            if process.returncode is None:
                process.kill()
            # Finds nothing unless the keeper was killed before it could clean up.
            orphans.kill(self._prefix)
            await process.wait()

    def kill_stubs(self, model: str, version: int) -> None:
        """End the processes that one version of a model runs in; Triton does not bring them back."""
        orphans.kill_stubs(self._prefix, f"{model}/{version}")

    async def _spawn(self) -> None:
        with self._open_log() as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", keeper.__file__),
                *(str(os.getpid()), self._prefix, str(self._settings.stop_grace_seconds)),
                # By env(1), so that the keeper's own Python does not get Triton's library path.
                *("env", *(f"{name}={value}" for name, value in self._environment().items())),
                *self._command(),
                cwd=self._settings.model_repository,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _open_log(self) -> IO[bytes]:
        path = self._settings.log_file
        if path == _STANDARD_ERROR:
            return open(os.dup(2), "ab")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
            file = path.open("ab")
        except OSError as error:
            raise TritonStartError(f"cannot write {path}: {error.strerror} (SLUICE_TRITON_LOG_FILE)") from error
        self._log_start = file.tell()
        return file

    def _environment(self) -> Mapping[str, str]:
        folders = [str(folder) for folder in self._installation.library_folders]
        threads = str(self._settings.intra_op_threads)
        return {
            "LD_LIBRARY_PATH": _path(*folders, os.environ.get("LD_LIBRARY_PATH")),
            # The stub's interpreter finds its packages by the python3 that comes first.
            "PATH": _path(str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Spinning between batches would take the cores from Triton and the gateway.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def _command(self) -> list[str]:
        settings = self._settings
        python = {
            "shm-region-prefix-name": self._prefix,
            "stub-timeout-seconds": str(_STUB_TIMEOUT_SECONDS),
        }
        return [
            str(self._installation.binary),
            # Relative, and started in there: the path goes through a shell, unquoted, on its way to the stub.
            "--model-repository=.",
            f"--backend-directory={self._installation.backends}",
            *(f"--backend-config=python,{name}={value}" for name, value in python.items()),
            # With a model that has no version, --load-model=* would end the server.
            "--model-control-mode=explicit",
            # One version that does not load would keep the others of its model from loading: that comes afterwards, as
            # does a model of which more has to be kept than its configuration says.
            *(f"--load-model={model}" for model, found in self._inspections.items() if found.is_as_configured),
            "--exit-on-error=false",
            # Completing a configuration costs a stub, and 3 s, for each model; ours are complete, as libtorch asks.
            "--disable-auto-complete-config",
            "--strict-readiness=true",
            f"--exit-timeout-secs={math.ceil(settings.stop_grace_seconds)}",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            "--grpc-infer-allocation-pool-size=512",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
        ]

    async def _wait_live(self) -> None:
        async with TritonControl(self.address) as control:
            live = asyncio.create_task(self._live(control))
            ended = asyncio.create_task(self.wait())
            try:
                await asyncio.wait({live, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not live.done():
                    raise TritonStartError(f"Triton ended with status {ended.result()} while starting{self._tail()}")
                live.result()
                await self._load_the_rest(control)
                await _warn_of_failures(control)
            except ControlError as error:
                raise TritonStartError(f"{error} (SLUICE_TRITON_READY_TIMEOUT_SECONDS){self._tail()}") from error
            finally:
                live.cancel()
                ended.cancel()
                await asyncio.wait({live, ended})

    async def _load_the_rest(self, control: TritonControl) -> None:
        for model, found in self._inspections.items():
            for version, reason in found.damaged.items():
                log.warning("version refused", model=model, version=version, reason=reason)
            if not found.is_as_configured and found.sound:
                # What Triton says against one is in its index, where the next step finds it.
                with contextlib.suppress(ControlError):
                    await soundness.load(control, self._settings.model_repository, model, found)

    async def _live(self, control: TritonControl) -> None:
        seconds = self._settings.ready_timeout_seconds
        await control.wait_live(seconds)
        try:
            async with asyncio.timeout(seconds):
                # Triton opens these some 50 ms after gRPC; who reads its metrics at once shall find them.
                for port in (self._settings.http_port, self._settings.metrics_port):
                    while not await _accepts(self._settings.host, port):  # noqa: ASYNC110 - no event tells of it
                        await asyncio.sleep(_PORT_RETRY_SECONDS)
        except TimeoutError as error:
            raise ControlError(f"Triton does not listen on its HTTP ports after {seconds:g} s") from error

    def _tail(self) -> str:
        """Return the end of what this start has logged, as the rest of a message."""
        path = self._settings.log_file
        if path == _STANDARD_ERROR:
            return "; what it said stands above"
        try:
            with path.open("rb") as file:
                file.seek(max(self._log_start, path.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return f"; its log is {path}"
        # Without the tables that Triton draws of its options.
        plain = [line for line in lines if line.strip() and not line.startswith(("+", "|"))]
        return "; the end of {}:\n{}".format(path, "\n".join(plain[-_TAIL_LINES:]))


async def serve(settings: TritonSettings, *, on_ready: Callable[[str], None], report: Callable[[str], None]) -> None:
    """
    Run the embedded Triton until this is cancelled; cancelled again, kill it.

    A model that stops answering is loaded again, and where that does not help, Triton is started again:
    :mod:`serving.healer`.

    Args:
        settings: Addresses, folders and limits.
        on_ready: Told the gRPC address once models can be loaded and asked.
        report: Told about an installation, in lines.

    Raises:
        ServingError: It cannot be had or started here, or it died.
    """
    installation = await install(settings.cache, report)
    loop, pause = asyncio.get_running_loop(), 0.0
    announce: Callable[[str], None] = on_ready
    while True:
        since = loop.time()
        # The connection goes last: nothing that is under way is cancelled, it ends with Triton.
        async with (
            TritonControl(joined(settings.host, settings.grpc_port)) as control,
            EmbeddedTriton(settings, installation) as triton,
        ):
            announce(triton.address)
            healer = Healer(control, settings.model_repository, triton.kill_stubs, restart_after_seconds=pause)
            try:
                await _watched(triton, healer, settings)
            except BeyondHealingError as error:
                log.warning("triton restarting", reason=str(error))
        if loop.time() - since > _STEADY_SECONDS + pause:
            pause = 0.0
        pause = min(max(_FIRST_RESTART_SECONDS, 2 * pause), _LONGEST_RESTART_SECONDS)
        announce = _say_nothing


async def _watched(triton: EmbeddedTriton, healer: Healer, settings: TritonSettings) -> NoReturn:
    ended, healing = asyncio.create_task(triton.wait()), asyncio.create_task(healer.run())
    try:
        await asyncio.wait({ended, healing}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await healing
        place = "the lines above" if settings.log_file == _STANDARD_ERROR else settings.log_file
        raise ServingError(f"Triton ended with status {await ended}; {place} may say why")
    finally:
        ended.cancel()
        healing.cancel()
        await asyncio.wait({ended, healing})


def _say_nothing(address: str) -> None:
    """Who waited for the address has it."""


def servable_models(repository: Path) -> list[str]:
    """Return the models with a configuration and at least one version, sorted."""
    return sorted(
        model.name
        for model in repository.iterdir()
        if (model / "config.pbtxt").is_file()
        and any(_VERSION.fullmatch(entry.name) and entry.is_dir() for entry in model.iterdir())
    )


def require_free_ports(settings: TritonSettings) -> None:
    """
    Check that Triton could listen on each of its ports now.

    Raises:
        PortTakenError: Something listens there already.
        TritonStartError: The address is not one of this machine, or may not be used.
    """
    for name in ("http_port", "grpc_port", "metrics_port"):
        port: int = getattr(settings, name)
        address = joined(settings.host, port)
        try:
            socket.create_server(
                (settings.host, port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            ).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                option = f"--{name.replace('_', '-')} or SLUICE_TRITON_{name.upper()}"
                raise PortTakenError(
                    f"cannot listen on {address}: it is taken; choose another with {option}"
                ) from error
            reason = error.strerror or error
            raise TritonStartError(f"cannot listen on {address}: {reason} (SLUICE_TRITON_HOST)") from error


def _inspect_all(repository: Path) -> dict[str, soundness.Inspection]:
    return {model: soundness.inspect(repository, model) for model in servable_models(repository)}


async def _accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _warn_of_failures(control: TritonControl) -> None:
    for state in await control.states():
        if state.reason and state.reason != "unloaded" and not state.ready:
            log.warning("model not loaded", model=state.model, version=state.version, reason=state.reason)


def _path(*parts: str | None) -> str:
    return os.pathsep.join(part for part in parts if part)
