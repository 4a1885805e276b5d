class WorkerError(Exception):
    """The processes that serve together do not start."""
