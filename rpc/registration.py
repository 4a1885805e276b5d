"""How services are added to a server."""

from collections.abc import Mapping, Sequence
from typing import Any

import grpc


class ByName:
    """
    A server to which generated code adds a service, whose methods are then looked up by name at each call.

    That code also registers each method. For those grpc.aio keeps a task each, and sets up a wait for all of them anew
    with each call (1.85, ``AioServer._server_main_loop``): thirty methods cost a call a tenth more.

    Args:
        server: The server itself.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Hand on what finds methods by their names."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Register nothing."""
