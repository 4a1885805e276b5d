"""What can go wrong around the embedded Triton, by cause; every message says what to do."""


class ServingError(Exception):
    """Base of all errors of this package."""


class UnsupportedHostError(ServingError):
    """The embedded Triton cannot run on this machine, or not with this Python."""


class InstallationError(ServingError):
    """The embedded Triton, or a library it needs, could not be had."""


class TritonStartError(ServingError):
    """Triton ended, or was not ready in time; the message holds the end of its log."""


class PortTakenError(TritonStartError):
    """Something else listens where Triton should; the message names the address and the option."""


class ControlError(ServingError):
    """Triton refused, failed or did not answer a request."""


class BeyondHealingError(ServingError):
    """Models do not answer, and loading them again does not help; starting Triton again may."""
