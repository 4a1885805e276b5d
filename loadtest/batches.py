"""The batches Triton formed: its own counters before and after, by model, version and batch size."""

import asyncio
import http.client
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from rpc.address import is_loopback

_ANSWER_SECONDS = 2.0
_IMAGES, _EXECUTIONS = "nv_inference_count", "nv_inference_exec_count"


@dataclass(frozen=True, slots=True)
class Ran:
    """What one version of a model ran."""

    images: int = 0
    batches: int = 0
    sizes: Mapping[int, int] = field(default_factory=dict)
    """Batches by their number of images; empty where only totals are known."""

    @property
    def mean(self) -> float:
        """Images a batch; 0 where there was none."""
        return self.images / self.batches if self.batches else 0.0

    def since(self, before: "Ran") -> "Ran":
        """Return what was added; everything, where the counters began anew."""
        if self.images < before.images or self.batches < before.batches:
            return self
        added = Counter(self.sizes)
        added.subtract(before.sizes)
        return Ran(self.images - before.images, self.batches - before.batches, dict(sorted((+added).items())))


Counts = Mapping[tuple[str, int], Ran]
"""By model and version."""


def difference(before: Counts, after: Counts) -> Counts:
    """Return what ran in between, without what did not run."""
    added = {key: ran.since(before.get(key, Ran())) for key, ran in after.items()}
    return {key: ran for key, ran in added.items() if ran.batches}


def parse_metrics(text: str) -> Counts:
    """
    Read the totals in Triton's Prometheus metrics.

    Raises:
        ValueError: It is no text of metrics, or not Triton's.
    """
    values: dict[tuple[str, int], dict[str, int]] = {}
    for family in text_string_to_metric_families(text):
        # The family's name: the parser gives a counter's samples OpenMetrics' ending.
        if family.name not in (_IMAGES, _EXECUTIONS):
            continue
        for sample in family.samples:
            key = sample.labels.get("model", ""), int(sample.labels.get("version", 0))
            values.setdefault(key, {})[family.name] = int(sample.value)
    if not values:
        raise ValueError(f"no {_IMAGES} in it")
    return {key: Ran(found.get(_IMAGES, 0), found.get(_EXECUTIONS, 0)) for key, found in values.items()}


class TritonCounters:
    """
    Reads Triton's counters; open inside ``async with``.

    Args:
        address: ``host:port`` of its gRPC protocol, which knows the sizes of batches.
        metrics_address: ``host:port`` of its metrics, which know totals; asked where gRPC does not answer.
    """

    def __init__(self, address: str, metrics_address: str) -> None:
        self._address = address
        self._metrics_address = metrics_address

    async def __aenter__(self) -> Self:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", int(not is_loopback(self._address))),
        ]
        self._channel = grpc.aio.insecure_channel(self._address, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def read(self) -> Counts | None:
        """Return the counters now, within a few seconds; None where Triton cannot be asked from here."""
        totals, sized = await asyncio.gather(self._from_metrics(), self._from_statistics())
        if totals is None or sized is None:
            return totals if sized is None else sized
        return {key: Ran(ran.images, ran.batches, sized.get(key, Ran()).sizes) for key, ran in totals.items()}

    async def _from_metrics(self) -> Counts | None:
        try:
            return parse_metrics(await asyncio.to_thread(_get, self._metrics_address))
        except (OSError, ValueError, http.client.HTTPException):
            return None

    async def _from_statistics(self) -> Counts | None:
        call = self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=_ANSWER_SECONDS)
        try:
            response = await call
        except grpc.aio.AioRpcError:
            return None
        finally:
            call.cancel()
        return {
            (one.name, int(one.version or 0)): Ran(
                one.inference_count,
                one.execution_count,
                {entry.batch_size: entry.compute_infer.count for entry in one.batch_stats},
            )
            for one in response.model_stats
        }


def _get(address: str) -> str:
    # http_proxy is for the world outside.
    proxies = urllib.request.ProxyHandler({} if is_loopback(address) else None)
    with urllib.request.build_opener(proxies).open(f"http://{address}/metrics", timeout=_ANSWER_SECONDS) as answer:
        text: str = answer.read().decode()
        return text
