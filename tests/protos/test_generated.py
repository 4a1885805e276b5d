from pathlib import Path

import pytest

from protos.generate import ROOT, generate

GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generated_files(folder: Path) -> dict[str, bytes]:
    files = (path for pattern in GENERATED for path in (folder / "protos").rglob(pattern))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_committed_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    generate(tmp_path)

    fresh, committed = generated_files(tmp_path), generated_files(ROOT)
    assert sorted(fresh) == sorted(committed)
    for name, content in fresh.items():
        if committed[name] != content:
            pytest.fail(f"{name} is not what its .proto generates: run `make protos`")
