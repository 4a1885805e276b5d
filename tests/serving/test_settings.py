from pathlib import Path

import pytest

from rpc.settings import SettingsError, load
from serving.settings import TritonSettings

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_defaults_listen_on_loopback() -> None:
    settings = load(TritonSettings)

    assert settings.host == "127.0.0.1"
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (8000, 8001, 8002)


def test_option_outweighs_environment_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sluice.toml").write_text("[triton]\nhttp_port = 1\ngrpc_port = 2\nmetrics_port = 3\n")
    monkeypatch.setenv("SLUICE_TRITON_GRPC_PORT", "20")
    monkeypatch.setenv("SLUICE_TRITON_METRICS_PORT", "30")

    settings = load(TritonSettings, metrics_port=300)

    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (1, 20, 300)


def test_model_repository_comes_from_the_shared_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", "elsewhere")

    assert load(TritonSettings).model_repository == Path("elsewhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grpc_port", 0),
        ("http_port", 65536),
        ("ready_timeout_seconds", 0),
        ("stop_grace_seconds", -1),
        ("intra_op_threads", 0),
    ],
)
def test_value_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"--{field.replace('_', '-')} = {value}"):
        load(TritonSettings, **{field: value})


def test_two_equal_ports_are_refused() -> None:
    with pytest.raises(SettingsError, match="three different ports"):
        load(TritonSettings, grpc_port=8000)
