"""A real Triton server from a wheel, without a container, for tests and benchmarks.

The wheel ``nvidia-pytriton`` contains ``tritonserver`` 2.51 (release 24.10) with its libraries and
the Python backend. It is unpacked into a cache folder, not installed: it pins NumPy below 2.
"""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

WHEEL = "nvidia-pytriton==0.7.0"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LOAD_S = 120


class TritonServer(NamedTuple):
    """A server that is running or has exited.

    Attributes:
        http: host and port of HTTP.
        grpc: host and port of gRPC.
        metrics: URL of the metrics.
        log: path of the log file.
        process: the process.
    """

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen[bytes]

    def log_text(self) -> str:
        """Return the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def install_tritonserver() -> Path:
    """Return the folder of the unpacked wheel; download it first where it is missing.

    Raises:
        RuntimeError: this is not Linux on x86-64, or pip cannot download the wheel.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise RuntimeError(f"{WHEEL} is for Linux on x86-64 only")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "van-deploy"
    folder = cache / WHEEL.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not folder.is_dir():
            words = ("install", "-q", "--no-deps", "--no-compile", f"--target={scratch}/new")
            command = [sys.executable, "-m", "pip", *words, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pip cannot get {WHEEL}: {done.stderr.strip()[-300:]}")
            os.replace(f"{scratch}/new", folder)
    return folder


@contextlib.contextmanager
def run_tritonserver(repository: Path, folder: Path) -> Iterator[TritonServer]:
    """Serve a model repository inside the block, which starts when Triton is ready or has exited.

    Args:
        repository: the folder ``models/`` of a package.
        folder: a new folder for the log and the backends.

    Raises:
        RuntimeError: the server cannot be downloaded, or is neither ready nor exits in time.
    """
    wheel = install_tritonserver()
    server = wheel / "pytriton/tritonserver"
    folder.mkdir(parents=True)
    backends = Path(shutil.copytree(server / "backends", folder / "backends"))
    stub = server / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")  # as in images, for their own Python version
    command = [str(server / "bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={backends}", "--disable-auto-complete-config"]
    addresses, free = dict[str, str](), contextlib.ExitStack()
    for name in ("http", "grpc", "metrics"):
        host, port = free.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()
        command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        addresses[name] = f"{host}:{port}"
    free.close()
    addresses["metrics"] = f"http://{addresses['metrics']}/metrics"
    libraries = f"{wheel}/nvidia_pytriton.libs"
    # The backend finds the system's own Python library, and needs no other with its packages.
    if not Path(f"/usr/lib/x86_64-linux-gnu/libpython{PYTHON}.so.1.0").exists():
        libraries += f":{sysconfig.get_config_var('LIBDIR')}"
    with (log := folder / "log").open("wb") as output:
        streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    triton = TritonServer(**addresses, log=log, process=process)
    ready, deadline = f"http://{triton.http}/v2/health/ready", time.monotonic() + LOAD_S
    try:
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(ready, timeout=5).close()
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"Triton is not ready: {triton.log_text()[-2000:]}")
            time.sleep(0.2)
        yield triton
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the Python backend's own processes
        process.wait(10)
