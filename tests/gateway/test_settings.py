import pytest

from gateway.settings import GatewaySettings
from rpc.settings import SettingsError, load


def test_options_win_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_GATEWAY_PORT", "1234")
    monkeypatch.setenv("SLUICE_GATEWAY_MAX_PIXELS", "1000")
    settings = load(GatewaySettings, port=0)

    assert (settings.port, settings.max_pixels) == (0, 1000)


def test_port_out_of_range_is_named() -> None:
    with pytest.raises(SettingsError, match="--port = 70000: input should be less than or equal to 65535"):
        load(GatewaySettings, port=70000)


def test_batch_that_could_never_be_admitted_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"max_batch_images \(1024\) must not exceed max_in_flight \(10\)"):
        load(GatewaySettings, max_in_flight=10)
