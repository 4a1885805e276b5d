"""``sluice``: runs a command; what its user can put right becomes one line and an exit status."""

import os
import sys

from sluice.readiness import end_with_parent

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_ASKING = ("classify", "compare", "health", "loadtest", "route")

# Errors that carry a message for the user, by the package that raises them; imported only when one came up.
_ROOTS = (
    ("rpc.settings", "SettingsError", EXIT_USAGE),
    ("rpc.lifecycle", "PortTakenError", EXIT_FAILED),
    ("rpc.lifecycle", "ServerDiedError", EXIT_FAILED),
    ("rpc.processes.errors", "WorkerError", EXIT_FAILED),
    ("streamer.errors", "StreamerError", EXIT_FAILED),
    ("gateway.errors", "GatewayError", EXIT_FAILED),
    ("gateway.client", "ClientError", EXIT_FAILED),
    ("serving.errors", "ServingError", EXIT_FAILED),
    ("training.errors", "TrainingError", EXIT_FAILED),
    ("loadtest.errors", "LoadTestError", EXIT_FAILED),
    ("sluice.supervisor", "ServiceError", EXIT_FAILED),
)


def main() -> None:
    """Run the command line and exit."""
    end_with_parent()
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as raised:
        error = _first(raised)
        status = _status_of(error)
        if status is None:
            raise
        _complain(error)
        sys.exit(status)


def _run() -> None:
    if sys.argv[1:2] and sys.argv[1] in _ASKING:
        # gRPC would print its own account of a TLS handshake that failed, beside ours.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if sys.argv[1:2] == ["health"]:
        # Run every few seconds in every container, and all commands together take four times as long to import.
        from sluice.health import main as check

        sys.exit(check(sys.argv[2:]))
    from sluice.commands import app

    app(prog_name="sluice")


def _complain(problem: object) -> None:
    from sluice.supervisor import ERROR_PREFIX

    print(f"{ERROR_PREFIX}{problem}", file=sys.stderr)


def _first(error: Exception) -> Exception:
    """Return what a group of concurrent tasks failed with first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _status_of(error: Exception) -> int | None:
    if isinstance(error, ModuleNotFoundError) and error.name:
        _complain(f"{error.name} is not installed; pip install '.[all]' in the sources brings every part")
        sys.exit(EXIT_FAILED)
    for module, name, status in _ROOTS:
        # Only a module that is loaded can have raised it.
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(error, getattr(loaded, name)):
            return status
    # A file, a folder or the output cannot be used; the error says which and why.
    return EXIT_FAILED if isinstance(error, OSError) else None


if __name__ == "__main__":
    main()
