"""
How the commands get in at a gateway: TLS and API key, from options, the environment, or its own settings.

Health checks pass through here, so that nothing is imported but where it is needed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpc.tls import ClientTls

KEY_VARIABLE = "SLUICE_API_KEY"
"""Of the environment, holds a key; none is taken from a command line, which every process of a machine can read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """What command line and environment say of it."""

    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None
    api_key_file: Path | None = None

    def client_tls(self, *, is_own: bool) -> "ClientTls | None":
        """
        Return the TLS to use, None without.

        Args:
            is_own: Whether the gateway is the one of the settings here: what is not said is then taken from them, and
                its own certificate is trusted.

        Raises:
            SettingsError: Settings or certificate cannot be used.
        """
        own = own_tls() if is_own else None
        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_key or self.tls_server_name):
            return own
        from rpc.tls import ClientTls

        given = ClientTls(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key, server_name=self.tls_server_name)
        if own is None or self.tls:
            return given
        shown = given if given.cert or given.key else own
        return ClientTls(
            ca=given.ca or own.ca, cert=shown.cert, key=shown.key, server_name=given.server_name or own.server_name
        )

    def api_key(self) -> str | None:
        """
        Return the key to show, None without.

        Raises:
            SettingsError: The file cannot be read.
        """
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            return self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            from rpc.settings import SettingsError

            reason = error.strerror if isinstance(error, OSError) else "it holds no text"
            raise SettingsError(f"--api-key-file {self.api_key_file}: cannot be read: {reason}") from error


def own_tls() -> "ClientTls | None":
    """
    Return how the gateway of the settings here is asked on its own machine, None without TLS.

    Raises:
        SettingsError: Settings or certificate cannot be used.
    """
    from gateway.settings import GatewaySettings
    from rpc.settings import load

    tls = load(GatewaySettings).tls
    if tls is None:
        return None
    from rpc.tls import to_own_server

    return to_own_server(tls)
