"""Versions that are what was published, and those that are not: Triton never gets to see the latter."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from serving.control import TritonControl
from training.errors import ManifestError
from training.release import manifest, versions


@dataclass(frozen=True, slots=True)
class Inspection:
    """The versions of one model that Triton would load."""

    sound: tuple[int, ...]
    damaged: dict[int, str] = field(default_factory=dict)
    """What is wrong with a version, by number."""
    kept: tuple[int, ...] = ()
    """Sound ones that the model's configuration alone would leave out."""

    @property
    def is_as_configured(self) -> bool:
        """Whether Triton loads just these by the model's own configuration."""
        return not self.damaged and not self.kept


def inspect(repository: Path, model: str, *, also: Iterable[int] = ()) -> Inspection:
    """
    Read every file of the versions that Triton would load by the model's configuration, and of those routed to.

    A version without a manifest is held to the digest in its card, if it has one; where its configuration cannot be
    read, all versions are looked at, and the rest is Triton's to say.

    Args:
        repository: Where the model is.
        model: Name in there.
        also: Further versions to keep, where they are there.
    """
    folder = repository / model
    configured = _configured(folder)
    wanted = {*configured, *versions.routed(folder), *also}.intersection(_there(folder))
    sound, damaged = [], {}
    for version in sorted(wanted):
        try:
            manifest.verify(folder / str(version), model=model, version=version)
            sound.append(version)
        except (ManifestError, OSError) as error:
            damaged[version] = str(error)
    return Inspection(tuple(sound), damaged, tuple(version for version in sound if version not in configured))


async def load(control: TritonControl, repository: Path, model: str, inspection: Inspection) -> None:
    """
    Have Triton load the sound versions of a model, or what is new among them, and no other.

    Args:
        control: Connected to the Triton.
        repository: The one that it serves from.
        model: Name in there.
        inspection: What :func:`inspect` found a moment ago.

    Raises:
        ControlError: Triton could not; the versions that ran before go on running.
    """
    config = None if inspection.is_as_configured else _only(repository / model, inspection.sound)
    await control.load(model, config=config)


def _there(folder: Path) -> list[int]:
    return [version for version in versions.published(folder) if (folder / str(version)).is_dir()]


def _configured(folder: Path) -> list[int]:
    there = _there(folder)
    try:
        policy = _config(folder).version_policy
    except (OSError, ValueError):
        return there
    match policy.WhichOneof("policy_choice"):
        case "all":
            return there
        case "specific":
            return [version for version in there if version in policy.specific.versions]
    # Triton's own default is the newest.
    return there[-max(policy.latest.num_versions, 1) :]


def _only(folder: Path, chosen: tuple[int, ...]) -> str:
    """Return the model's configuration as JSON, which is how Triton takes one that is not on disk."""
    config = _config(folder)
    config.version_policy.specific.versions[:] = chosen
    return json_format.MessageToJson(config, preserving_proto_field_name=True)


def _config(folder: Path) -> model_config_pb2.ModelConfig:
    try:
        return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"{folder / 'config.pbtxt'}: {error}") from error
