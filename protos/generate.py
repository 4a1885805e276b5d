"""
Compile every .proto of this folder; run from the repository root: ``python -m protos.generate [OUT]``.

Compiled with ``-I .`` from the root, modules are ``protos.streamer.v1.sample_service_pb2`` and cannot
clash with the ``streamer`` package.
"""

import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """
    Write messages, services and their type stubs for every .proto below ``out``.

    Raises:
        RuntimeError: The compiler refused a file; its own message is on stderr.
    """
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    # The stub generators live beside this interpreter, which need not be on PATH.
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    flags = [f"--{kind}_out={out}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *plugins, *flags, *sources])
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {', '.join(sources)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
