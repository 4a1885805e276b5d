"""Several Tritons as one: each batch goes to the least loaded of those that work."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import structlog

from gateway.coalesce import Infer, Rows
from gateway.errors import GatewayError, UnknownVersionError, UnreachedError
from gateway.triton import Metadata, Output, ReadyVersion, Triton, has_not_left, version_number

log = structlog.get_logger(__name__)

# Batches that fail one after the other until their Triton gets no more; as in Envoy's outlier detection, but fewer, as
# each is many images.
EJECTED_AFTER = 3
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Endpoint:
    """
    One Triton, and how it does.

    Attributes:
        triton: The way to it.
        versions: What it has ready, by model and version; as of the last look.
        is_reachable: Whether the last look had an answer, and no inference since found it gone.
        num_images: Images it is working on.
        num_ejections: How often it was left out for a version, as others did better.
    """

    def __init__(self, triton: Triton) -> None:
        self.triton = triton
        self.versions: dict[tuple[str, int], ReadyVersion] = {}
        self.is_reachable = True
        self.num_images = 0
        self.num_ejections = 0
        self._num_failed: Counter[tuple[str, int]] = Counter()
        self._ejected: set[tuple[str, int]] = set()
        # By version: on the event loop's clock.
        self._answered_at: dict[tuple[str, int], float] = {}
        self._looking: asyncio.Task[GatewayError | None] | None = None

    @property
    def address(self) -> str:
        """``host:port``."""
        return self.triton.address

    def is_ejected(self, model: str, version: int) -> bool:
        """Tell whether it gets nothing for a version, 0 for any of the model, while others can do its work."""
        return (model, version) in self._ejected or (not version and any(name == model for name, _ in self._ejected))

    def has(self, model: str, version: int = 0) -> bool:
        """Tell whether a version, of whatever kind, was ready at the last look; 0 is any of the model."""
        index = self.triton.index
        return (model, version) in index or (not version and any(name == model for name, _ in index))

    def answered_at(self, model: str, version: int) -> float:
        """Return when a version last answered anybody, on the event loop's clock; long ago where it never did."""
        return self._answered_at.get((model, version), -math.inf)

    def answered(self, model: str, version: int) -> None:
        """Note that a version answered somebody."""
        # What is not the gateway's own is never asked for; so there are no more than it serves.
        if (model, version) in self.versions:
            self._answered_at[model, version] = asyncio.get_running_loop().time()

    def look(self) -> "asyncio.Task[GatewayError | None]":
        """Learn what it has ready, with whoever is at it already; the task tells what went wrong."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return self._looking

    def stop_looking(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()

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
            self.answered(model, version)
        finally:
            self.num_images -= num_images

    async def _look(self) -> GatewayError | None:
        try:
            ready = await self.triton.ready_versions()
        except GatewayError as error:
            # What it had is kept: it may be back in a moment, and the probe judges it.
            self.is_reachable = False
            return error
        self.is_reachable = True
        self.versions = {(one.name, one.version): one for one in ready}
        # Nothing is kept of versions that are gone.
        for gone in (self._ejected | self._num_failed.keys() | self._answered_at.keys()) - self.versions.keys():
            self._ejected.discard(gone)
            self._num_failed.pop(gone, None)
            self._answered_at.pop(gone, None)
        return None


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

    async def ready_versions(self) -> Sequence[ReadyVersion]:
        """
        Return every ready version that keeps the gateway's contract, whoever has it; instances count together.

        One that said nothing the last time is not waited for where another answers: what it has comes with the next.

        Raises:
            GatewayError: None of them says.
        """
        awaited = [endpoint.look() for endpoint in self.endpoints if endpoint.is_reachable]
        others = [endpoint.look() for endpoint in self.endpoints if not endpoint.is_reachable]
        errors = [error for error in await asyncio.gather(*awaited) if error is not None]
        if len(errors) == len(awaited):
            errors += [error for error in await asyncio.gather(*others) if error is not None]
        if len(errors) == len(self.endpoints):
            raise errors[0]
        return [self._together(*key) for key in {key: None for one in self.endpoints for key in one.versions}]

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
                except (UnreachedError, UnknownVersionError):
                    tried.append(endpoint)
                    # Nobody took it: another may, once. What may have been taken may be what ended its Triton.
                    if len(tried) == 2 or not self._others(name, version, tried):
                        raise

        return infer

    async def infer(self, request: Any) -> Any:
        """
        Return the answer to a ModelInfer of Triton's own protocol, of who has the model and the least to do.

        Not to be cancelled: what has begun goes on at Triton. Where nobody took it another may, once.

        Raises:
            grpc.aio.AioRpcError: There is none; in Triton's words.
        """
        name, version = request.model_name, version_number(request.model_version)

        async def infer(endpoint: Endpoint) -> Any:
            endpoint.num_images += 1
            try:
                answer = await endpoint.triton.begin("ModelInfer", request)
            except grpc.aio.AioRpcError as error:
                endpoint.is_reachable &= not has_not_left(error)
                raise
            finally:
                endpoint.num_images -= 1
            endpoint.answered(answer.model_name, version_number(answer.model_version))
            return answer

        return await self._whoever_can(name, version, infer, lambda error: _is_absent(error) or has_not_left(error))

    async def control(self, method: str, request: Any) -> Any:
        """
        Return the answer to anything but an inference, in good time, of who has what is asked about and answers.

        Raises:
            grpc.aio.AioRpcError: There is none; in Triton's words.
        """
        name, version = getattr(request, "name", ""), version_number(getattr(request, "version", ""))
        return await self._whoever_can(
            name,
            version,
            lambda endpoint: endpoint.triton.control(method, request),
            lambda error: _is_absent(error) or error.code() in _SILENT,
        )

    def num_having(self, model: str) -> int:
        """Return how many have a model ready, at least 1."""
        return max(sum(endpoint.has(model) for endpoint in self.endpoints), 1)

    async def close(self, timeout_seconds: float) -> None:
        """Let what is running there end, which callers may have left long ago, then close the channels."""
        for endpoint in self.endpoints:
            endpoint.stop_looking()
        await asyncio.gather(*(endpoint.triton.close(timeout_seconds) for endpoint in self.endpoints))

    async def _whoever_can(
        self,
        model: str,
        version: int,
        ask: Callable[[Endpoint], Awaitable[Any]],
        may_ask_another: Callable[[grpc.aio.AioRpcError], bool],
    ) -> Any:
        """
        Ask who has a version of a model and the least to do; where nobody has it, any of the model, or anybody.

        Args:
            model: Empty for none.
            version: 0 for any.
            ask: Asks one.
            may_ask_another: Tells by its error whether another may be asked, once.
        """
        first, *others = sorted(
            self.endpoints,
            key=lambda one: (
                not one.has(model, version),
                not one.has(model),
                not one.is_reachable,
                one.is_ejected(model, version),
                one.num_images,
            ),
        )
        try:
            return await ask(first)
        except grpc.aio.AioRpcError as error:
            second = next((one for one in others if one.is_reachable), None)
            if second is None or not may_ask_another(error):
                raise
            try:
                return await ask(second)
            except grpc.aio.AioRpcError:
                # The first was the one to know.
                raise error from None

    def _together(self, name: str, version: int) -> ReadyVersion:
        able = self.with_version(name, version)
        working = [one for one in able if one.is_reachable and not one.is_ejected(name, version)] or able
        return replace(
            able[-1].versions[name, version],
            num_instances=sum(one.versions[name, version].num_instances for one in working),
            # Any of them may get a batch.
            max_batch_size=min(one.versions[name, version].max_batch_size for one in able),
        )

    def _chosen(self, name: str, version: int, tried: Sequence[Endpoint]) -> Endpoint:
        able = self._others(name, version, tried)
        if not able:
            raise UnknownVersionError(f"model_version: {name} has no version {version} ready")
        # Where all are ejected, all are tried: nobody may be shut out by us alone.
        working = [endpoint for endpoint in able if not endpoint.is_ejected(name, version)]
        return min(working or able, key=lambda endpoint: endpoint.num_images)

    def _others(self, name: str, version: int, tried: Sequence[Endpoint]) -> list[Endpoint]:
        return [endpoint for endpoint in self.with_version(name, version) if endpoint not in tried]


def _is_absent(error: grpc.aio.AioRpcError) -> bool:
    """Tell whether Triton says that it does not have what is asked for."""
    return error.code() is grpc.StatusCode.NOT_FOUND or "not at ready state" in (error.details() or "")
