"""A real Triton server, for tests and benchmarks: it comes out of a wheel and needs no container.

The wheel ``nvidia-pytriton`` holds ``tritonserver`` 2.51 (release 24.10) with its libraries and
the Python backend. It is unpacked into a cache folder, not installed: it pins NumPy below 2.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

__all__ = ["PYTHON", "Triton", "triton_running", "tritonserver_folder"]

WHEEL = "nvidia-pytriton==0.7.0"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LOAD_S = 120


@dataclass(frozen=True)
class Triton:
    """A server that is running, or that ended by itself.

    Attributes:
        http: host and port of HTTP.
        grpc: host and port of gRPC.
        metrics: address of the metrics.
        log: what it wrote.
        process: itself.
    """

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen[bytes]

    def said(self) -> str:
        """Return its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def tritonserver_folder() -> Path:
    """Return the folder of the unpacked wheel, which is fetched where it is not there.

    Raises:
        RuntimeError: this is no 64-bit Linux on x86, or pip cannot get the wheel.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise RuntimeError(f"{WHEEL} is for Linux on x86-64 only")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "van-deploy"
    folder = cache / WHEEL.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if folder.is_dir():
            return folder
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip cannot get {WHEEL}: {done.stderr.strip()[-300:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        server = unpacked / "pytriton/tritonserver"
        for program in (server / "bin/tritonserver", *server.glob("python_backend_stubs/*/*")):
            program.chmod(0o755)
        os.replace(unpacked, folder)
    return folder


@contextlib.contextmanager
def triton_running(repository: Path, folder: Path, *, threads: int = 2) -> Iterator[Triton]:
    """Serve a model repository until the block ends; loaded, or ended by itself, before it begins.

    Args:
        repository: the folder ``models/`` of a package.
        folder: for the log and the backends; made here.
        threads: that answer HTTP.

    Raises:
        RuntimeError: the server cannot be had, or neither loads nor ends.
    """
    wheel = tritonserver_folder()
    server = wheel / "pytriton/tritonserver"
    folder.mkdir(parents=True)
    backends = Path(shutil.copytree(server / "backends", folder / "backends"))
    stub = server / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")  # as an image has the one for its own Python
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (each.getsockname()[1] for each in free)
    command = [str(server / "bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={backends}", "--disable-auto-complete-config"]
    for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    libraries = [str(wheel / "nvidia_pytriton.libs")]
    if not Path(f"/usr/lib/x86_64-linux-gnu/libpython{PYTHON}.so.1.0").exists():
        libraries.append(str(sysconfig.get_config_var("LIBDIR")))
    with (log := folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--http-thread-count={threads}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
            start_new_session=True,
        )
    addresses = (f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"http://127.0.0.1:{metrics}/metrics")
    triton, deadline = Triton(*addresses, log, process), time.monotonic() + LOAD_S
    try:
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://{triton.http}/v2/health/ready", timeout=5).close()
                break
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Triton is not ready after {LOAD_S} s:\n{triton.said()[-2000:]}"
                )
            time.sleep(0.2)
        yield triton
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the Python backend's own processes
        process.wait(10)
