"""A real S3 server in a process of its own: SeaweedFS, on free ports of loopback."""

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import obstore
from obstore.store import S3Store

KEY, SECRET = "reader", "not-a-secret"
_PORTS = ("master", "volume", "filer", "s3")


def executable() -> str | None:
    """Return where the server is, or None."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


class S3Server:
    """The server; a bucket appears with the first object written to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        numbers = iter(_free_ports(2 * len(_PORTS)))
        self._ports = {name: (next(numbers), next(numbers)) for name in _PORTS}
        self.endpoint = f"http://127.0.0.1:{self._ports['s3'][0]}"
        who = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [who]}))

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def environment(self) -> dict[str, str]:
        """What a client of it needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self, *, wait: bool = True) -> None:
        ports = {f"{name}.port": both[0] for name, both in self._ports.items()}
        ports |= {f"{name}.port.grpc": both[1] for name, both in self._ports.items()}
        options: dict[str, object] = {
            "dir": self._folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "filer": "true",
            "s3": "true",
            "s3.config": self._folder / "s3.json",
            "s3.iam": "false",
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.telemetry": "false",
            # Raft of its own kind takes 10 s to elect the only master when it comes back; a volume server that finds no
            # leader 1.8 s after its start looks again after 5 s.
            "master.raftHashicorp": "true",
            "master.resumeState": "false",
            "master.electionTimeout": "100ms",
            "master.heartbeatInterval": "30ms",
            "master.volumeSizeLimitMB": 64,
            # Each bucket takes seven.
            "volume.max": 64,
            **ports,
        }
        command = [str(executable()), "server", *(f"-{name}={value}" for name, value in options.items())]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        if wait:
            self._wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self.kill()
        for _, grpc_port in self._ports.values():
            for left in glob.glob(f"/tmp/seaweedfs-*-{grpc_port}.sock"):
                os.unlink(left)

    def put(self, url: str, content: bytes) -> None:
        """Write an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        obstore.put(self._store(bucket), key, content)

    def get(self, url: str) -> bytes:
        """Read an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return bytes(obstore.get(self._store(bucket), key).bytes())

    def _store(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "proxy_url": self.endpoint, "proxy_excludes": "127.0.0.1"},
            retry_config={"max_retries": 0},
        )

    def _wait(self) -> None:
        """Write objects until one is taken: it opens its port long before it can."""
        ends_at = time.monotonic() + 60
        while True:
            try:
                return self.put("s3://readiness/probe", b"1")
            except Exception as error:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > ends_at:
                    raise RuntimeError((self._folder / "log").read_text()[-2000:]) from error
                time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
