"""Places a program meets: packages that are absent, a read-only installation, odd names."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.each import each

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "ray", "cryptography"),
    *("uvicorn", "prometheus_client", "tritonclient", "sklearn", "skimage", "scipy"),
)

# Heavy packages are imported once; a fork for each absent one imports what names it and
# runs the light commands. test_architecture.py imports every module without all of them.
ABSENT = """
import importlib, json, os, pkgutil, sys, traceback
import numpy, onnx, onnxscript, timm, torch, torchvision, typer, rich.table, huggingface_hub

for package in json.loads(sys.argv[1]):
    try:
        importlib.import_module(package)
    except ImportError:
        pass

from typer.testing import CliRunner

class Absent:
    def __init__(self, package): self.package = package
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def tried(package):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent(package))
    import van_deploy
    for found in pkgutil.walk_packages(van_deploy.__path__, "van_deploy."):
        spec = found.module_finder.find_spec(found.name)
        if found.ispkg or package in open(spec.origin, encoding="utf-8").read():
            importlib.import_module(found.name)
    from van_deploy.cli.app import app
    for words in (["--help"], ["list"], ["doctor"]):
        result = CliRunner().invoke(app, words)
        if result.exit_code != 0:
            raise SystemExit(f"{words}: {result.exit_code} {result.stderr} {result.exception!r}")

wrong = {}
for package in json.loads(sys.argv[1]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            tried(package)
        except BaseException:
            os.write(write, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 4096), b""))
    os.close(read)
    _, status = os.waitpid(child, 0)
    if said or status:
        wrong[package] = f"{status} {said.decode()}"
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_it_starts_without_each_optional_package() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ABSENT, json.dumps(OPTIONAL)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ran.stdout, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == {}


# --- an installation elsewhere, on a bad day -------------------------------------------------

# Nothing may be written below INSTALLED, and nobody knows a home folder.
HOOK = """
import os, pwd, sys

INSTALLED = os.path.realpath(os.environ["INSTALLED"])


def _nobody(*_):
    raise KeyError("getpwuid(): uid not found")


pwd.getpwuid = _nobody


def _read_only(event, details):
    if event == "open":
        path, mode, flags = details
        writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
        path, writing = details[0], True
    else:
        return
    if writing and isinstance(path, (str, bytes)):
        if os.path.realpath(os.fsdecode(path)).startswith(INSTALLED + os.sep):
            raise OSError(30, "Read-only file system", os.fsdecode(path))


sys.addaudithook(_read_only)
"""


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package as a wheel installs it."""
    target = tmp_path_factory.mktemp("site")
    wheel.extractall(target)
    return target


class Elsewhere:
    """Runs the installed program in a folder whose name is awkward."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.installed, self.folder = installed, folder
        self.hooks = folder.parent / "hooks"
        self.hooks.mkdir()
        (self.hooks / "sitecustomize.py").write_text(HOOK)

    def run(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        kept = ("PATH", "OMP_NUM_THREADS", "SYSTEMROOT", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        ran = subprocess.run(
            [sys.executable, "-m", "van_deploy", *words],
            cwd=self.folder,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join([str(self.hooks), str(self.installed)]),
                "INSTALLED": str(self.installed),
                **extra,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        text = [stream.decode("utf-8", "replace") for stream in (ran.stdout, ran.stderr)]
        assert "Traceback" not in text[1], text[1]
        return subprocess.CompletedProcess(ran.args, ran.returncode, *text)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
UTF8 = {"LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def elsewhere(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Return the program, with a bundle made in the plain C locale, all names non-ASCII."""
    folder = tmp_path_factory.mktemp("away") / "Bücher und Bänder 文件"
    folder.mkdir()
    away = Elsewhere(installed, folder)
    made = away.run("export", "van_digits", "--output", "mein Bündel 一", **ASCII)
    assert made.returncode == 0, made.stderr
    assert str(installed) in away.run("info", "van_digits", "--json", **UTF8).stdout
    shutil.copy(folder / "mein Bündel 一/golden/0.png", folder / "Größe eins.png")
    return away


@pytest.mark.slow
@pytest.mark.parametrize("locale", [ASCII, LATIN, UTF8], ids=["ascii", "latin-1", "utf-8"])
def test_names_of_any_language_in_any_locale(elsewhere: Elsewhere, locale: dict[str, str]) -> None:
    bundle = "mein Bündel 一"
    commands: list[tuple[str, ...]] = [
        ("info", bundle, "--json"),
        ("predict", bundle, "Größe eins.png", "--json"),
    ]
    if locale is not LATIN:  # the two extremes are tried; these write files and take longer
        commands.append(("package", "triton", bundle, "-o", "Triton für alle"))
        commands.append(("report", bundle, "-o", "Bericht ½ eins.html"))
    for words in commands:
        ran = elsewhere.run(*words, **locale)
        assert ran.returncode == 0, ran.stderr
        if "--json" in words and locale is not LATIN:
            assert json.loads(ran.stdout)
    missing = elsewhere.run("predict", bundle, "es gibt ½ nichts.png", **locale)
    assert (missing.returncode, missing.stdout) == (5, "")
    assert missing.stderr.startswith("error: ")
    assert not list(elsewhere.installed.rglob("*.pyc")), "something was written"


@each("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str) -> None:
    """A service, or a shell, may start a program without them."""
    command = f"{sys.executable} -m van_deploy report nosuch {closed}"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 5
    assert "Traceback" not in ran.stderr
    assert ran.stderr == "" if "2>" in closed else ran.stderr.startswith("error: There is no ")


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    command = f"mkdir {gone}; cd {gone}; rmdir {gone}; {sys.executable} -m van_deploy list"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert ran.returncode == 5
    assert ran.stderr.startswith("error: The working folder cannot be used: ")


# --- Python versions -------------------------------------------------------------------------


def test_the_sources_parse_as_python_3_10() -> None:
    """Newer syntax is an error here; newer functions of the library are ruff's and mypy's."""
    for folder in ("van_deploy", "tests", "supply_chain", "benchmarks", "reliability"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
