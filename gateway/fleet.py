"""Several Tritons as one: each batch goes to the least loaded of those that work."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

from gateway.coalesce import Infer, Rows
from gateway.errors import (
    GatewayError,
    UnknownVersionError,
    UpstreamError,
    UpstreamUnavailableError,
)
from gateway.models import LoadedVersion
from gateway.triton import Metadata, Output, Triton

log = structlog.get_logger(__name__)

# Batches that fail one after the other until their Triton gets no more; as in Envoy's outlier detection, but fewer, as
# each is many images.
EJECTED_AFTER = 3


class Endpoint:
    """
    One Triton, and how it does.

    Attributes:
        triton: The way to it.
        versions: What it has ready, by model and version; as of the last look.
        num_images: Images it is working on.
        num_ejections: How often it was left out for a version, as others did better.
    """

    def __init__(self, triton: Triton) -> None:
        self.triton = triton
        self.versions: dict[tuple[str, int], LoadedVersion] = {}
        self.num_images = 0
        self.num_ejections = 0
        self._num_failed: Counter[tuple[str, int]] = Counter()
        self._ejected: set[tuple[str, int]] = set()

    @property
    def address(self) -> str:
        """``host:port``."""
        return self.triton.address

    def is_ejected(self, model: str, version: int) -> bool:
        """Tell whether it gets nothing for a version, 0 for any of the model, while others can do its work."""
        return (model, version) in self._ejected or (not version and any(name == model for name, _ in self._ejected))

    def worked(self, model: str, version: int) -> None:
        """Note that the probe had its answer: it is taken back."""
        self._num_failed.pop((model, version), None)
        if self.is_ejected(model, version):
            self._ejected.remove((model, version))
            log.info("triton readmitted", address=self.address, model=model, version=version)

    def failed(self, model: str, version: int, error: GatewayError, *, times: int = 1) -> None:
        """Note that a version did not answer."""
        key = model, version
        self._num_failed[key] += times
        if self._num_failed[key] >= EJECTED_AFTER and key not in self._ejected:
            self._ejected.add(key)
            self.num_ejections += 1
            log.warning("triton ejected", address=self.address, model=model, version=version, reason=str(error))

    @contextmanager
    def working_on(self, model: str, version: int, num_images: int) -> Iterator[None]:
        """Count images for as long as the block lasts, and take in how it ended."""
        self.num_images += num_images
        try:
            yield
        except UnknownVersionError:
            raise
        except GatewayError as error:
            self.failed(model, version, error)
            raise
        else:
            self._num_failed.pop((model, version), None)
        finally:
            self.num_images -= num_images


class Fleet:
    """
    All Tritons of a gateway.

    Args:
        addresses: ``host:port`` of each, at least one.
        control_timeout_seconds: Deadline of every RPC to them but inferences.
        outgoing: Gives the metadata to send with each inference.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        control_timeout_seconds: float,
        outgoing: Callable[[], Metadata] | None = None,
    ) -> None:
        self.endpoints = [
            Endpoint(Triton(address, control_timeout_seconds=control_timeout_seconds, outgoing=outgoing))
            for address in addresses
        ]

    @property
    def may_cancel(self) -> bool:
        """Whether all of them bear an inference that is cancelled."""
        return all(endpoint.triton.may_cancel for endpoint in self.endpoints)

    async def ready_versions(self) -> Sequence[LoadedVersion]:
        """
        Return every ready version that keeps the gateway's contract, whoever has it.

        Raises:
            UpstreamError: None of them says.
        """
        looks = await asyncio.gather(*(self._look_at(endpoint) for endpoint in self.endpoints))
        errors = [error for error in looks if error is not None]
        if len(errors) == len(self.endpoints):
            raise errors[0]
        return list({key: one for endpoint in self.endpoints for key, one in endpoint.versions.items()}.values())

    def with_version(self, name: str, version: int) -> list[Endpoint]:
        """Return those that have a version ready."""
        return [endpoint for endpoint in self.endpoints if (name, version) in endpoint.versions]

    def asking(self, name: str, version: int, output: Output, width: int) -> Infer:
        """Return what sends images to one output of a version, at whichever Triton has the least to do."""
        senders = {endpoint: endpoint.triton.asking(name, version, output, width=width) for endpoint in self.endpoints}

        async def infer(pixels: bytes, num_images: int) -> Rows:
            tried = list[Endpoint]()
            while True:
                endpoint = self._chosen(name, version, tried)
                try:
                    with endpoint.working_on(name, version, num_images):
                        return await senders[endpoint](pixels, num_images)
                except UpstreamUnavailableError:
                    tried.append(endpoint)
                    # Nobody took it: another may, once.
                    if len(tried) == 2 or not self._others(name, version, tried):
                        raise

        return infer

    def begin(self, method: str, request: Any) -> asyncio.Task[Any]:
        """
        Start an RPC of Triton's own protocol at who has the model and the least to do; nobody cancels it.

        Returns:
            Task of the answer. It raises ``grpc.aio.AioRpcError``, in Triton's words.
        """
        endpoint = self._with_model(request.model_name, request.model_version)
        endpoint.num_images += 1
        call = endpoint.triton.begin(method, request)

        def ended(call: asyncio.Task[Any]) -> None:
            endpoint.num_images -= 1

        call.add_done_callback(ended)
        return call

    async def control(self, method: str, request: Any) -> Any:
        """
        Return the answer of who works to anything but an inference, in good time.

        Raises:
            grpc.aio.AioRpcError: There is none; in Triton's words.
        """
        name = getattr(request, "name", "")
        return await self._with_model(name, getattr(request, "version", "")).triton.control(method, request)

    async def close(self, timeout_seconds: float) -> None:
        """Let what is running there end, which callers may have left long ago, then close the channels."""
        await asyncio.gather(*(endpoint.triton.close(timeout_seconds) for endpoint in self.endpoints))

    def _with_model(self, name: str, version: str) -> Endpoint:
        """
        Return who has a version of a model and the least to do; where nobody has it, any of the model, or anybody.

        Args:
            name: The model.
            version: As a caller wrote it; empty for any.
        """
        number = int(version) if version.isdecimal() else 0
        able = (
            self.with_version(name, number)
            or [one for one in self.endpoints if any(model == name for model, _ in one.versions)]
            or self.endpoints
        )
        return min(able, key=lambda endpoint: (endpoint.is_ejected(name, number), endpoint.num_images))

    def _chosen(self, name: str, version: int, tried: Sequence[Endpoint]) -> Endpoint:
        able = self._others(name, version, tried)
        if not able:
            raise UnknownVersionError(f"model_version: {name} has no version {version} ready")
        # Where all are ejected, all are tried: nobody may be shut out by us alone.
        working = [endpoint for endpoint in able if not endpoint.is_ejected(name, version)]
        return min(working or able, key=lambda endpoint: endpoint.num_images)

    def _others(self, name: str, version: int, tried: Sequence[Endpoint]) -> list[Endpoint]:
        return [endpoint for endpoint in self.with_version(name, version) if endpoint not in tried]

    async def _look_at(self, endpoint: Endpoint) -> UpstreamError | None:
        try:
            ready = await endpoint.triton.ready_versions()
        except UpstreamError as error:
            # What it had is kept: it may be back in a moment, and the probe judges it.
            return error
        endpoint.versions = {(one.name, one.version): one for one in ready}
        return None
