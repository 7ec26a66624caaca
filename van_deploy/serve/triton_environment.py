"""The execution environment of Triton's Python backend: ONNX Runtime for the server's Python.

NVIDIA's images have no ONNX Runtime for Python. So the package brings one, as a virtual
environment in one archive, which Triton unpacks: ``bin/activate`` and ``bin/python3`` for
finding it, ``pyvenv.cfg``, and the packages. The interpreter stays the image's own.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from van_deploy.errors import ConversionError
from van_deploy.serve.templates import filled

__all__ = ["environment_name", "write_environment"]

INTERPRETER = "/usr/bin/python3"  # in NVIDIA's images, which are Ubuntu
GLIBC_MINORS = (31, 28, 27, 24, 17)  # 2.31 is that of Ubuntu 20.04, the oldest image known here


def environment_name(python: str) -> str:
    """Return what the archive for a Python such as ``3.12`` is called.

    >>> environment_name("3.12")
    'environment-python3.12.tar.gz'
    """
    return f"environment-python{python}.tar.gz"


def write_environment(archive: Path, python: str, onnxruntime: str) -> dict[str, str]:
    """Write the environment and return the versions of the packages in it.

    Args:
        archive: file to write, ``.tar.gz``.
        python: version of the server's Python, such as ``3.12``.
        onnxruntime: version of ONNX Runtime.

    Raises:
        ConversionError: pip cannot get the packages.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-") as folder:
        root = Path(folder)
        packages = root / f"lib/python{python}/site-packages"
        _install(packages, python, [f"onnxruntime=={onnxruntime}", "numpy"])
        (root / "bin").mkdir()
        (root / "bin/activate").write_text(filled("activate.txt", {}), encoding="utf-8")
        (root / "bin/python3").symlink_to(INTERPRETER)
        home = f"home = {Path(INTERPRETER).parent}\ninclude-system-site-packages = false\n"
        (root / "pyvenv.cfg").write_text(home, encoding="utf-8")
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            for path in sorted(root.rglob("*")):
                tar.add(path, path.relative_to(root).as_posix(), False, filter=_anonymous)
        infos = (path.name.split("-") for path in packages.glob("*.dist-info"))
        return {name: version.removesuffix(".dist") for name, version, *_ in sorted(infos)}


def _install(folder: Path, python: str, requirements: list[str]) -> None:
    """Let pip put packages for that Python and this kind of processor into ``folder``."""
    machine = platform.machine()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--target", str(folder), "--only-binary=:all:", "--python-version", python]
    for minor in GLIBC_MINORS:
        command += ["--platform", f"manylinux_2_{minor}_{machine}"]
    command += ["--platform", f"manylinux2014_{machine}", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ConversionError(
            f"pip cannot get {' and '.join(requirements)} for Python {python}: "
            f"{(errors or done.stderr.splitlines() or ['it said nothing'])[-1]}",
            "Check the connection to the package index, or choose a --triton-release whose "
            "Python has such a wheel.",
        )
    shutil.rmtree(folder / "bin", ignore_errors=True)  # scripts that name this interpreter


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry without what differs from one run or machine to the next."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
