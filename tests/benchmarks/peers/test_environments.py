from pathlib import Path

import pytest

from benchmarks.peers.environments import PEERS, EnvironmentMissingError, Peer
from benchmarks.peers.running import DOORS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_peer_that_is_not_installed_says_what_does_it(peer: Peer) -> None:
    with pytest.raises(EnvironmentMissingError, match=r"benchmarks\.peers setup"):
        peer.versions()


def test_environment_of_other_versions_is_not_ready(cache: Path) -> None:
    peer = PEERS[0]
    peer.folder.mkdir(parents=True)
    mark = peer.folder / "complete"

    mark.write_text("\n".join(peer.requirements) + "\n")
    assert peer.is_installed
    mark.write_text("litserve==0.1\n")
    assert not peer.is_installed


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_every_peer_is_asked_in_its_way(peer: Peer) -> None:
    body, content_type = DOORS[peer.package].body(b"\x89PNG")

    assert body
    assert content_type
