"""One streamer as a reader sees it: a connection, and what is asked over it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.address import is_loopback
from streamer import slicing
from streamer.errors import DataChangedError, InvalidPlanError, ReaderError, RefusedError
from streamer.plan import Plan
from streamer.reading.answers import Batch, BrokenError, DatasetInfo, SplitInfo, dataset_info, error_of
from streamer.reading.pull import Pull

WINDOW_BYTES = 8 * 1024**2
"""Images and labels that may be on their way in a stream, beside one batch, unless its reader says otherwise."""

_UNARY_SECONDS = 10.0


class Replica:
    """
    A channel to one streamer, from :meth:`open` to :meth:`close`, in one event loop.

    Args:
        address: ``host:port``.
        max_message_bytes: Largest message accepted.
        window_bytes: Images and labels that may be on their way in each stream, beside one batch.
        stall_seconds: A stream that is silent for so long counts as broken.
    """

    def __init__(self, address: str, *, max_message_bytes: int, window_bytes: int, stall_seconds: float) -> None:
        self.address = address
        self._max_message_bytes = max_message_bytes
        self._window_bytes = window_bytes
        self._stall_seconds = stall_seconds
        self._channel: grpc.aio.Channel | None = None

    def open(self) -> None:
        """Make the channel; it connects when it is first used."""
        options = _options(self.address, self._max_message_bytes)
        self._channel = grpc.aio.insecure_channel(self.address, options=options)

    async def close(self) -> None:
        """Cancel what is under way."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def pause(self, seconds: float) -> None:
        """Wait before it is asked again; less where it was out of reach and is back sooner."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._returned()

    async def _returned(self) -> None:
        channel, was_away = self._open_channel(), False
        while True:
            state = channel.get_state(try_to_connect=True)
            if was_away and state is grpc.ChannelConnectivity.READY:
                return
            was_away = was_away or state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
            await channel.wait_for_state_change(state)

    async def datasets(self) -> list[DatasetInfo]:
        """
        List what it serves.

        Raises:
            BrokenError: No answer.
            RefusedError: It answers with an error.
        """
        stub = SampleServiceStub(self._open_channel())
        try:
            answer = await stub.ListDatasets(pb.ListDatasetsRequest(), timeout=_UNARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_of(self.address, error) from error
        # What grpc.aio makes of an answer that cannot be parsed.
        if answer is None:
            raise BrokenError("an answer that cannot be read")
        return [dataset_info(dataset) for dataset in answer.datasets]

    async def split_info(self, plan: Plan) -> SplitInfo:
        """
        Return what it says of the plan's split; errors are those of :meth:`datasets`.

        Asked twice: this answer has no checksum, and an epoch is as long as it says. Data other than the plan's is
        refused with DataChangedError.
        """
        channel = self._channel
        try:
            answers = await asyncio.gather(self.datasets(), self.datasets())
            info, again = (self._info(plan, answer) for answer in answers)
            if info != again:
                raise BrokenError("two answers that differ")
        except (BrokenError, RefusedError):
            self._renew(channel)
            raise
        return info

    def _info(self, plan: Plan, answer: list[DatasetInfo]) -> SplitInfo:
        datasets = {dataset.name: dataset for dataset in answer}
        if plan.dataset not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise RefusedError(self.address, "NOT_FOUND", f"dataset: no {plan.dataset!r}; known are {known}")
        try:
            base, part = slicing.find(plan.split, datasets[plan.dataset].splits)
        except InvalidPlanError as error:
            raise RefusedError(self.address, "INVALID_ARGUMENT", str(error)) from error
        info = base if part is None else base.sliced(part, plan.split)
        if plan.fingerprint and plan.fingerprint != info.fingerprint:
            found, wanted = info.fingerprint.hex(), plan.fingerprint[:32].hex()
            problem = f"plan.fingerprint: this replica serves {found}, not {wanted}"
            raise DataChangedError(self.address, "FAILED_PRECONDITION", problem)
        return info

    async def wait_serving(self, *, wait_for_connection: bool) -> None:
        """
        Wait until its health says that it serves.

        Raises:
            BrokenError: It cannot be reached, or went away.
        """
        stub = health_pb2_grpc.HealthStub(self._open_channel())
        call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=wait_for_connection)
        try:
            async for answer in call:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            raise BrokenError("health ended")
        except grpc.aio.AioRpcError as error:
            raise BrokenError(error.details() or error.code().name) from error
        finally:
            call.cancel()

    def read(self, plan: Plan, info: SplitInfo, start_position: int, end_position: int) -> AsyncGenerator[Batch, None]:
        """
        Read batches by one call of PullBatches, as :meth:`streamer.reading.pull.Pull.batches` yields them.

        Args:
            plan: With the fingerprint that is expected.
            info: Of the plan's split.
            start_position: Of the first global batch.
            end_position: Only global batches that begin before it; 0 means to the end of the epoch.
        """
        channel = self._open_channel()
        return Pull(
            channel,
            self.address,
            plan,
            info,
            start_position=start_position,
            end_position=end_position,
            window_bytes=self._window_bytes,
            stall_seconds=self._stall_seconds,
        ).batches(on_failure=lambda: self._renew(channel))

    def _renew(self, failed: grpc.aio.Channel | None) -> None:
        """
        Connect anew for what is asked from now on, as one damaged header can spoil all that follow on a connection.

        Calls under way keep theirs, and with the last of them it goes.
        """
        if failed is not None and failed is self._channel:
            self.open()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise ReaderError("SampleClient is closed: use it inside `async with SampleClient(...) as client`")
        return self._channel


def _options(address: str, max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # A reader that stops holds less than 1 MB, where gRPC's own guess at the link lets 6 to 8 MB come; measured on
        # loopback at the same rate. Over a long link the window caps the rate at 512 KiB in each round trip.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 512 * 1024),
        ("grpc.http2.max_frame_size", 256 * 1024),
        # A streamer whose machine is gone is noticed within 30 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # The pace of attempts is Retry's; gRPC's own would grow to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Clients in one process have a connection each: one core serves one connection.
        ("grpc.use_local_subchannel_pool", 1),
        # Without it, http_proxy in the environment takes even the calls to this machine.
        ("grpc.enable_http_proxy", int(not is_loopback(address))),
    ]
