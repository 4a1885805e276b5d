"""What keeps a load test from starting; what goes wrong while it runs is counted, not raised."""


class LoadTestError(Exception):
    """Base of everything raised here on purpose."""


class NoImagesError(LoadTestError):
    """There is nothing to send; the message says where images can come from."""


class StartError(LoadTestError):
    """The server did not answer the first call, so there is nothing to measure."""


class CallError(LoadTestError):
    """
    A call that failed.

    Attributes:
        code: Name of its gRPC status, or a name of ours.
        details: The server's words, or grpc's.
    """

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}" if details else code)
        self.code = code
        self.details = details
