"""What can go wrong in the gateway, by cause; the servicer alone knows the gRPC status of each."""


class GatewayError(Exception):
    """Base of everything the gateway answers with on purpose; its text may be shown to a caller."""


class InvalidRequestError(GatewayError):
    """
    The caller's to fix.

    Attributes:
        field: Path of the field that is wrong, e.g. ``image.raw.pixels`` or ``images[3].encoded``.
        reason: What is wrong with it and what is allowed.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class InvalidImageError(InvalidRequestError):
    """One image cannot be used; in a batch it fails alone. An empty field is the image itself."""

    def within(self, parent: str) -> "InvalidImageError":
        """Return the same error as seen from the message that holds the image in field ``parent``."""
        return InvalidImageError(f"{parent}.{self.field}" if self.field else parent, self.reason)


class UnknownModelError(GatewayError):
    """No model of that name, or no such version of it, answers now."""


class UnknownVersionError(UnknownModelError):
    """The model is there; the version asked for is not, or no longer."""


class RouteError(GatewayError):
    """What is said of which version answers makes no sense."""


class OverloadedError(GatewayError):
    """
    Refused at once because too much is in flight; nothing was begun.

    Attributes:
        retry_after_seconds: When another try has a chance.
    """

    def __init__(self, reason: str, *, retry_after_seconds: float) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class TooLateError(GatewayError):
    """Not begun: the caller's own deadline left no time for it, which says nothing of Triton."""


class UpstreamError(GatewayError):
    """Triton, or the way to it, is the cause."""


class UpstreamUnavailableError(UpstreamError):
    """Triton cannot be reached, or has no model to answer with yet; another try may succeed."""


class UnreachedError(UpstreamUnavailableError):
    """No connection to a Triton could be made: nothing of the call has left."""


class ReplacedError(UpstreamUnavailableError):
    """The default version went away between looking it up and asking it; its successor can be asked."""


class UpstreamTimeoutError(UpstreamError):
    """No answer within the caller's deadline or the gateway's own limit; the call may still be running."""


class UpstreamFailedError(UpstreamError):
    """Triton was reached and failed to run the model."""


class UpstreamContractError(UpstreamError):
    """Triton answered, or was asked, something that the model's contract does not allow, such as NaN."""
