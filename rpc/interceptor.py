"""Around every RPC: requests that parse, one log line, its metrics, and no internals on the wire."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import functools
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from rpc import budget
from rpc.access import Access, Refusal, identity, key_name
from rpc.budget import REQUEST_ID_KEY, Budget
from rpc.retry import retry_metadata
from rpc.shares import Shares
from rpc.telemetry import MethodMetrics
from rpc.tracing import Tracer

log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Gate = Callable[[Context], Awaitable[None]]
    Parse = Callable[[bytes], Any]

MAX_UNASKED = 128
"""Calls that may wait long for their request, in one room; a server that bounds its calls leaves room for more."""
ALL_OTHERS = "/"
"""Stands for every method that has no room of its own."""

# All others that wait have this long. A request comes with its call, but many calls may come at one moment.
_HASTE_SECONDS = 1.0
# Streams that answer for as long as somebody asks: each of their requests has to come in time, not the first alone.
_ANSWERING = ("/grpc.reflection.",)
# When to try again where there is no room: calls end all the time, streams now and then.
_RETRY_SECONDS = 1.0
# Orchestrators poll health several times a second; their calls would drown the others in the log.
_QUIET = ("/grpc.health.v1.Health/",)


class Guard(grpc.aio.ServerInterceptor):
    """
    Stand between grpc.aio and the handlers; one interceptor, because each costs every message its share.

    - Bytes that are not the method's request message are INVALID_ARGUMENT. grpc.aio would answer UNKNOWN with the
      parser's words, so handlers are registered for bytes, and parsing happens in here.
    - An unexpected exception is INTERNAL with an id, its record in the log. grpc.aio would send its text.
    - Each call is one line in the log, health checks aside.
    - Calls of the methods in ``metrics`` are counted and timed. What grpc itself refuses never comes here.
    - Callers that ``access`` refuses are turned away before their request is read.

    A cancelled handler re-raises: swallowing ``CancelledError`` leaks in grpc.aio (grpc#43360).

    - A stream whose peer takes no message for too long is ABORTED: it would hold its place for ever.
    - A call whose peer sends no request for too long is ABORTED for the same reason. Where :data:`MAX_UNASKED` wait
      for theirs already, one of whoever has the most of them has a second in all: silent calls keep out no others.
      So is a stream whose peer sends no further request for too long.
    - Calls beyond those that a room holds, or a caller's share of them, are RESOURCE_EXHAUSTED. A call leaves its
      room when its answer was taken: those who take none fill their own share.
    - A stream whose API key is removed, or expires, is ended at its next request.

    Args:
        metrics: By path, as of :func:`rpc.telemetry.method_metrics`.
        access: Who may call what; None lets in everybody.
        tracer: Traces each call, health checks aside; None traces nothing.
        parsers: What parses the requests of a method, by its path, in place of its own parser. May raise
            :class:`UnfitError`.
        idle_seconds: How long a message may wait to be taken; None is without end.
        request_seconds: How long a request may take to come; None is without end.
        pause_seconds: How long a stream may bring no further request; None is without end.
        has_certificates: Whether callers may show certificates; looking for one takes its time for each call.
        rooms: How many calls there may be, by ``/package.Service/Method``, or by ``/package.Service/`` for the rest
            of a service, or by :data:`ALL_OTHERS`; what is in none is not bounded.
    """

    def __init__(
        self,
        metrics: Mapping[str, MethodMetrics] | None = None,
        *,
        access: Access | None = None,
        tracer: Tracer | None = None,
        parsers: Mapping[str, Parse] | None = None,
        idle_seconds: float | None = None,
        request_seconds: float | None = None,
        pause_seconds: float | None = None,
        has_certificates: bool = True,
        rooms: Mapping[str, Shares] | None = None,
    ) -> None:
        self._metrics = metrics or {}
        self._access = access
        self._tracer = tracer
        self._parsers = parsers or {}
        self._gates: dict[str, Gate] = {}
        self._idle_seconds = idle_seconds
        self._request_seconds = request_seconds
        # By room: calls of one kind that are silent hurry no others.
        self._unasked: dict[Shares | None, _Silence | None] = {}
        self._pausing = _Silence(pause_seconds) if pause_seconds is not None else None
        self._has_certificates = has_certificates
        self._rooms = rooms or {}
        self._running = _Running()
        # As many as there are methods.
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one method, once; refuse the call where its caller may not."""
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            # No handler: unknown method, answered UNIMPLEMENTED by grpc itself.
            if handler is None:
                return None
            guarded = self._guarded[method] = _guard(handler, self._rules(method), self._running)
        if self._access is not None:
            refusal = self._access.check(method, handler_call_details.invocation_metadata)
            if refusal is not None:
                return _refusing(method, self._metrics.get(method), self._access, refusal, self._running)
        return guarded

    def add_gate(self, method: str, gate: Gate) -> None:
        """
        Let something end calls before their request is read, which spares what reading it costs.

        Args:
            method: ``/package.Service/Method``, before its first call.
            gate: Ends a call by aborting its context, in the task that handles it.
        """
        self._gates[method] = gate

    async def wait_idle(self) -> None:
        """Wait until no handler runs."""
        await self._running.none.wait()

    def _rules(self, method: str) -> _Rules:
        service = method[: method.rfind("/") + 1]
        room = next((self._rooms[name] for name in (method, service, ALL_OTHERS) if name in self._rooms), None)
        if room not in self._unasked:
            seconds = self._request_seconds
            self._unasked[room] = _Silence(seconds, MAX_UNASKED) if seconds is not None else None
        return _Rules(
            method=method,
            metrics=self._metrics.get(method),
            access=self._access,
            tracer=self._tracer,
            parser=self._parsers.get(method),
            gate=self._gates.get(method),
            idle_seconds=self._idle_seconds,
            unasked=self._unasked[room],
            pausing=self._pausing,
            has_certificates=self._has_certificates,
            room=room,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """What holds for the calls of one method; as of :class:`Guard`."""

    method: str
    metrics: MethodMetrics | None
    access: Access | None = None
    tracer: Tracer | None = None
    parser: Parse | None = None
    gate: Gate | None = None
    idle_seconds: float | None = None
    unasked: _Silence | None = None
    pausing: _Silence | None = None
    has_certificates: bool = True
    room: Shares | None = None


class _Running:
    """How many handlers run; use as ``with``, once for each."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self._count += 1
        self.none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.none.set()


def _guard(handler: Handler, rules: _Rules, running: _Running) -> Handler:
    unasked, idle_seconds = rules.unasked, rules.idle_seconds
    parse = rules.parser or handler.request_deserializer or bytes
    open_request: Any
    respond: Any
    if handler.request_streaming:
        open_request = functools.partial(_each_parsed, rules)
        respond = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        open_request = _parsed if unasked is None else functools.partial(_first_parsed, unasked)
        respond = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def unary(data: Any, context: Context) -> Any:
        call = _Call(rules, context)
        try:
            await call.enter()
            request = open_request(parse, data, call)
            response = await respond(request if handler.request_streaming else await request, context)
            call.tell_budget()
            return response
        except asyncio.CancelledError:
            call.is_cut = True
            raise
        except grpc.aio.AbortError:
            raise
        except _EndedError as error:
            await context.abort(error.code, str(error))
        except grpc.aio.BaseError:
            call.is_cut = True
            raise
        except Exception:
            await call.fail()
        finally:
            call.end()

    async def stream(data: Any, context: Context) -> None:
        call, responses, patience = _Call(rules, context), None, _Patience(idle_seconds)
        try:
            await call.enter()
            request = open_request(parse, data, call)
            responses = respond(request if handler.request_streaming else await request, context)
            is_first = True
            async for response in responses:
                if is_first and idle_seconds is not None:
                    # With the first message they would wait too, and grpc.aio would send them again with the status.
                    await context.send_initial_metadata(())
                    is_first = False
                with patience:
                    await context.write(response)
        except asyncio.CancelledError:
            if not patience.ran_out:
                call.is_cut = True
                raise
            patience.take_back()
            # First what the stream holds is given back: the status too waits until the peer reads.
            if responses is not None:
                await responses.aclose()
            await call.give_up(patience.seconds)
        except grpc.aio.AbortError:
            raise
        except _EndedError as error:
            await context.abort(error.code, str(error))
        except grpc.aio.BaseError:
            # The peer is gone, and grpc.aio says so of what was to be sent to it.
            call.is_cut = True
            raise
        except Exception:
            await call.fail()
        finally:
            patience.end()
            try:
                if responses is not None:
                    await responses.aclose()
            finally:
                call.end()

    wrap: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
        # For one request as well where it may take too long: grpc.aio itself would wait for it, before all this.
    }[bool(handler.request_streaming) or unasked is not None, bool(handler.response_streaming)]
    respond_guarded = stream if handler.response_streaming else unary

    async def counted(data: Any, context: Context) -> Any:
        working = respond_guarded(data, context)
        del data
        with running:
            try:
                return await working
            except grpc.aio.AbortError as error:
                # grpc.aio keeps it with the call, which its frames hold in turn: without this, all that a refused call
                # had sent would stay until the garbage collector's rarest round.
                error.__context__ = None
                raise error.with_traceback(None) from None

    guarded: Handler = wrap(counted, None, handler.response_serializer)
    return guarded


def _refusing(
    method: str, metrics: MethodMetrics | None, access: Access, refusal: Refusal, running: _Running
) -> Handler:
    async def refuse(_requests: object, context: Context) -> None:
        with running:
            call = _Call(_Rules(method=method, metrics=metrics), context)
            call.is_quiet = access.is_flooded(refusal, context)
            try:
                await access.refuse(refusal, context, is_flooded=call.is_quiet)
            finally:
                call.end()

    # For streams whatever the method takes: of those grpc.aio reads no request before it calls the handler.
    handler: Handler = grpc.stream_stream_rpc_method_handler(refuse)
    return handler


async def _parsed(parse: Parse, data: bytes, call: _Call) -> Any:
    call.receive(data)
    try:
        return parse(data)
    except DecodeError:
        # Raised and not refused here: a stream may read its requests in another task than it answers in.
        raise call.malformed() from None
    except UnfitError as error:
        raise _EndedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None


async def _first_parsed(unasked: _Silence, parse: Parse, _: AsyncIterator[bytes], call: _Call) -> Any:
    # Read by hand: an iterator that is left after its first message would be closed by a task of its own.
    data = await unasked.wait(call.read(), call.caller)
    if data is None:
        raise call.malformed()
    return await _parsed(parse, data, call)


async def _each_parsed(rules: _Rules, parse: Parse, stream: AsyncIterator[bytes], call: _Call) -> AsyncIterator[Any]:
    requests = aiter(stream)
    silence = rules.unasked
    while True:
        message = anext(requests, None)
        data = await (message if silence is None else silence.wait(message, call.caller))
        if data is None:
            return
        call.check_key()
        yield await _parsed(parse, data, call)
        if not rules.method.startswith(_ANSWERING):
            silence = rules.pausing


class UnfitError(Exception):
    """A parser's: the request is INVALID_ARGUMENT, and the caller is told these words."""


class _EndedError(Exception):
    """The call ends here, for a reason that the caller is told."""

    def __init__(self, code: grpc.StatusCode, words: str) -> None:
        super().__init__(words)
        self.code = code


class _Silence:
    """
    Calls that wait for a request, in the order in which they began to; one timer for all of them.

    Args:
        seconds: How long each may wait.
        most: Of these calls; where more wait, some of them wait less long. None is as many as there are.
    """

    def __init__(self, seconds: float, most: int | None = None) -> None:
        self._seconds = seconds
        self._most = most
        self._waits: dict[_Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, message: Awaitable[bytes | None], caller: str) -> bytes | None:
        """
        Return the message, None where there is none any more.

        Raises:
            _EndedError: It did not come in time.
        """
        wait = self._begin(caller)
        try:
            return await message
        except asyncio.CancelledError:
            if not wait.take_back():
                raise
            raise _EndedError(grpc.StatusCode.ABORTED, self._words()) from None
        finally:
            wait.is_over = True
            self._waits.pop(wait, None)

    def _words(self) -> str:
        if self._most is None:
            return f"no request came for {self._seconds:g} s; open the stream again when there is one"
        return f"no request came within {self._seconds:g} s, or less where many calls wait for theirs"

    def _begin(self, caller: str) -> _Wait:
        loop = asyncio.get_running_loop()
        now = loop.time()
        wait = _Wait(caller, now, now + self._seconds)
        self._waits[wait] = None
        if self._timer is None:
            self._timer = loop.call_at(wait.ends, self._look)
        if self._most is not None and len(self._waits) > self._most:
            hurried = self._oldest_of_most()
            del self._waits[hurried]
            loop.call_at(max(now, hurried.began + _HASTE_SECONDS), hurried.run_out)
        return wait

    def _oldest_of_most(self) -> _Wait:
        ((caller, _),) = Counter(wait.caller for wait in self._waits).most_common(1)
        return next(wait for wait in self._waits if wait.caller == caller)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for wait in list(self._waits):
            if wait.ends > loop.time():
                self._timer = loop.call_at(wait.ends, self._look)
                break
            del self._waits[wait]
            wait.run_out()


class _Wait:
    """One task's wait for a request."""

    __slots__ = ("_ran_out", "_task", "began", "caller", "ends", "is_over")

    def __init__(self, caller: str, began: float, ends: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._ran_out = False
        self.caller = caller
        self.began = began
        self.ends = ends
        self.is_over = False

    def run_out(self) -> None:
        """Cancel the wait, unless it has ended."""
        if not self.is_over:
            self._ran_out = True
            self._task.cancel()

    def take_back(self) -> bool:
        """Tell whether the cancellation that has arrived is this one's; asyncio is then told that it is done with."""
        return self._ran_out and self._task.uncancel() == 0


class _Call:
    """
    One call on its way: its place, and what log and metrics say of it.

    Attributes:
        caller: Who calls, as of :func:`rpc.access.identity`.
    """

    def __init__(self, rules: _Rules, context: Context) -> None:
        self.is_cut = False
        self.is_quiet = rules.method.startswith(_QUIET)
        self._rules = rules
        self._context = context
        self._has_ended = False
        self._started = time.perf_counter()
        # Asked for now: a cancelled stream is closed after its call is freed, and asking then crashes (grpc 1.85).
        self._peer = context.peer()
        self._metadata = context.invocation_metadata()
        self.caller = identity(context, peer="" if rules.has_certificates else self._peer)
        key = key_name()
        self._key = {"key": key} if key else {}
        self._budget: Budget | None = None
        if not self.is_quiet:
            self._budget = budget.begin(self._metadata)
            context.set_trailing_metadata(((REQUEST_ID_KEY, self._budget.request_id),))
        self._tracer = None if self.is_quiet else rules.tracer
        self._span = self._tracer.begin(rules.method, self._metadata) if self._tracer else None
        if rules.metrics is not None:
            rules.metrics.begin()

    async def enter(self) -> None:
        """Take a place in the method's room and pass its gate, or end the call, which raises."""
        if self._rules.room is not None:
            await self._take_place(self._rules.room)
        if self._rules.gate is not None:
            await self._rules.gate(self._context)

    async def _take_place(self, room: Shares) -> None:
        if room.lack(self.caller, 1):
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            words = f"overloaded: {room.refuse(self.caller, 1, 'calls')}; try again later"
            await self._context.abort(code, words, retry_metadata(code, words, _RETRY_SECONDS))
        room.take(self.caller, 1)
        # The task is grpc's own: it ends when the status was taken, or nobody is left to take it.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(functools.partial(_give_back, room, self.caller))

    def check_key(self) -> None:
        """
        Look at the caller's key again.

        Raises:
            _EndedError: It opens this method no more.
        """
        if self._rules.access is not None:
            refusal = self._rules.access.check(self._rules.method, self._metadata)
            if refusal is not None:
                raise _EndedError(refusal.code, refusal.details)

    async def read(self) -> bytes | None:
        """Return the request, None where none comes."""
        data = await self._context.read()
        return data if isinstance(data, bytes) else None

    def receive(self, data: bytes) -> None:
        if self._rules.metrics is not None:
            self._rules.metrics.receive(len(data))

    def tell_budget(self) -> None:
        """Tell the caller the call's id and what its time went into, behind the answer that follows."""
        if self._budget is not None:
            self._context.set_trailing_metadata(self._budget.metadata(time.perf_counter() - self._started))

    def malformed(self) -> _EndedError:
        """Return what ends a call whose bytes are not its method's request."""
        words = f"request: not a valid message for {self._rules.method}"
        return _EndedError(grpc.StatusCode.INVALID_ARGUMENT, words)

    async def give_up(self, seconds: float) -> None:
        # Told now: the status waits for a peer that may never read.
        self.end(grpc.StatusCode.ABORTED.name)
        await self._context.abort(
            grpc.StatusCode.ABORTED, f"nothing was taken for {seconds:g} s; open the stream again where you are"
        )

    async def fail(self) -> None:
        incident = uuid.uuid4().hex[:12]
        log.exception("rpc failed", method=self._rules.method, incident=incident)
        await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error, logged as {incident}")

    def end(self, code: str = "") -> None:
        """Tell log and metrics how it ended, once."""
        if self._has_ended:
            return
        self._has_ended = True
        seconds, code = time.perf_counter() - self._started, code or self._code()
        if self._rules.metrics is not None:
            self._rules.metrics.end(code, seconds)
        if self._tracer is not None and self._span is not None:
            self._tracer.end(self._span, code, self._budget.fields() if self._budget else {})
        if not self.is_quiet and log.is_enabled_for(logging.INFO):
            spent = {"request_id": self._budget.request_id, **self._budget.fields()} if self._budget else {}
            fields = {"code": code, "seconds": round(seconds, 6), "peer": self._peer, **self._key, **spent}
            log.info("rpc", method=self._rules.method, **fields)

    def _code(self) -> str:
        if self.is_cut or self._context.cancelled():
            return grpc.StatusCode.CANCELLED.name
        # grpc.aio keeps OK as None or 0 until the status is sent, and an abort as the code it was given.
        code: grpc.StatusCode | int | None = self._context.code()
        code = code or grpc.StatusCode.OK
        return code.name if isinstance(code, grpc.StatusCode) else str(code)


def _give_back(room: Shares, caller: str, _: asyncio.Task[Any]) -> None:
    room.give_back(caller, 1)


class _Patience:
    """
    Cancels the task it is made in when one of its ``with`` blocks takes too long; one timer for any number of them.

    Attributes:
        ran_out: Whether it did: the cancellation is then this one's, and taken back.
    """

    def __init__(self, seconds: float | None) -> None:
        self.ran_out = False
        self.seconds = seconds or 0.0
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since: float | None = None
        self._timer = self._loop.call_later(self.seconds, self._look) if seconds else None

    def __enter__(self) -> None:
        self._since = self._loop.time()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def end(self) -> None:
        """Cancel nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        waited = 0.0 if self._since is None else now - self._since
        if waited < self.seconds:
            self._timer = self._loop.call_later(self.seconds - waited, self._look)
            return
        assert self._task is not None
        self.ran_out = True
        self._task.cancel()

    def take_back(self) -> None:
        """Uncount the cancellation that has arrived; asyncio.timeout and its like look at the count."""
        assert self._task is not None
        self._task.uncancel()
