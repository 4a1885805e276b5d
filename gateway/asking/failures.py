"""What a call can fail with, and what gRPC's statuses mean to a person."""

import grpc

# Trailing metadata of the gateway's own errors; what fails on the way there has none.
_REASON_KEY = "sluice-reason"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Of a refusal that does not say when to try again: grpc's own limit on concurrent calls.
_PUSHBACK_SECONDS = 1.0
# How grpc's words for a message above the limit end, which it gives the status of an overload.
_TOO_LARGE = "larger than max"


class ClientError(Exception):
    """Base of what a call can fail with; the gRPC error is its ``__cause__``."""


class ServerUnreachableError(ClientError):
    """No gateway answers at the address."""


class SecureConnectionError(ServerUnreachableError):
    """TLS is what keeps the client from the server; the message says why, and what to do."""


class UnauthenticatedError(ClientError):
    """The gateway asks for an API key, and was given none, or one that it does not take."""


class PermissionDeniedError(ClientError):
    """The API key is right, and does not open this call; the message names the scope that does."""


class ModelUnavailableError(ClientError):
    """The gateway answers, but has no model to answer with now; later it may."""


class ModelNotFoundError(ClientError):
    """No such model, or no such version of it; the message says which there are."""


class InvalidInputError(ClientError, ValueError):
    """The image or an option is not usable; the message names the field and what is allowed."""


class ImageError(InvalidInputError):
    """
    What is wrong with one image of a batch.

    Attributes:
        index: Its place among the images given.
    """

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class TooLargeError(InvalidInputError):
    """The request is above the gateway's message limit; with fewer images it may be below."""


class OverloadedError(ClientError):
    """
    The gateway refused the call because too much is in flight.

    Attributes:
        retry_after_seconds: When another try has a chance.
    """

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(ClientError, TimeoutError):
    """No answer in time."""


class ServerError(ClientError):
    """The gateway or its model failed; the gateway's log tells why."""


def error_of(address: str, error: grpc.aio.AioRpcError, *, seconds: float = 0.0) -> ClientError:
    """
    Return what a gRPC error means to a person, and what to do about it.

    Args:
        address: Of the gateway.
        error: What the call ended with.
        seconds: What the call had.
    """
    metadata = dict(error.trailing_metadata() or ())
    details = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidInputError(details)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFoundError(details)
        case grpc.StatusCode.UNAVAILABLE if _REASON_KEY in metadata:
            return ModelUnavailableError(details)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return unreachable(address, details)
        case grpc.StatusCode.UNAUTHENTICATED:
            return _unauthenticated(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if metadata.get(_REASON_KEY) == grpc.StatusCode.UNAUTHENTICATED.name:
            return _unauthenticated(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDeniedError(f"{details}; `sluice keys add` makes a key with other scopes")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if _PUSHBACK_KEY in metadata:
            pushback = float(metadata[_PUSHBACK_KEY]) / 1000
            return OverloadedError(details, retry_after_seconds=pushback)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if _TOO_LARGE in details:
            return TooLargeError(f"the gateway at {address} refused the request's size: {details}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(
                f"the gateway at {address} takes no more calls now: {details}",
                retry_after_seconds=_PUSHBACK_SECONDS,
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"no answer from {address} within {seconds:g} s; raise timeout_seconds")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ServerError(f"{address} is no Sluice gateway, or an older one: {details}")
    return ServerError(f"the gateway at {address} failed: {details}")


def insecure(address: str, problem: str) -> SecureConnectionError:
    """Return that TLS fails, as :mod:`rpc.diagnosis` found out."""
    return SecureConnectionError(f"no secure connection to {address}: {problem}")


def _unauthenticated(details: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"{details} (SLUICE_API_KEY, or `--api-key-file FILE`)")


def unreachable(address: str, details: str) -> ServerUnreachableError:
    """Return that nobody answers at ``address``, and what to look at."""
    return ServerUnreachableError(
        f"no gateway answers at {address}: {details}; is it running (`sluice up`), and is that its address?"
    )
