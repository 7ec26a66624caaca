"""Restricted hosts: without network access, PyTorch, writable installation, UTF-8 or streams.

The commands of a host run in one process, on one bundle. Its Python and that of every child process
load a ``sitecustomize`` that hides modules, and whose audit hook blocks and logs all connections to
other machines, so that blocked connections are found even if the error is caught.
"""

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reliability.load import run_server
from supply_chain.pins import resolve_dependencies
from tests.artifacts import Subject
from tests.conftest import ROOT
from tests.each import each
from tests.plans import add_plan
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.cli.app import COMMANDS

WITHIN_S = 500
RTX = find_spec("tensorrt_rtx") is not None
HOOK = """
import json, os, sys

sys.modules.update(dict.fromkeys(json.loads(os.environ["BLOCKED"])))

def refuse(event, details):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = details[1]  # no tuple: a Unix socket, or an address given before
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = details[0]
    else:
        return
    if host and not os.fsdecode(host).startswith(("127.", "::1", "localhost")):
        with open(os.environ["REFUSALS"], "a", encoding="utf-8") as file:
            file.write(os.fsdecode(host) + "\\n")
        raise OSError(101, "the network is refused in this test")

sys.addaudithook(refuse)
"""
DRIVER = """
import json, sys
from typer.testing import CliRunner
from van_deploy.cli.app import app

def run(line):
    result = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr

json.dump({line: run(line) for line in sys.argv[2:]}, open(sys.argv[1], "w", encoding="utf-8"))
"""


class Host:
    """A host without network and without some modules; its files are in ``folder``."""

    def __init__(self, folder: Path, blocked: Sequence[str] = ()) -> None:
        self.out, self.refused = folder / "out.json", folder / "refusals"
        (folder / "site").mkdir(parents=True)
        (folder / "site/sitecustomize.py").write_text(HOOK)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        paths = os.pathsep.join((f"{folder}/site", str(ROOT), os.environ.get("PYTHONPATH", "")))
        own = {"PYTHONPATH": paths, "REFUSALS": str(self.refused), "BLOCKED": json.dumps(blocked)}
        self.environment = {**kept, **own, "HF_HOME": f"{folder}/hub", "COLUMNS": "100"}

    def run(self, *lines: str) -> dict[str, list[Any]]:
        """Return exit code, stdout and stderr of each command, by its line."""
        words, pipes = (sys.executable, "-c", DRIVER, str(self.out), *lines), subprocess.PIPE
        done = subprocess.run(
            words, env=self.environment, text=True, stdout=pipes, stderr=pipes, timeout=WITHIN_S
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(self.out.read_text()))

    def refusals(self) -> set[str]:
        return set(self.refused.read_text().split()) if self.refused.exists() else set()


def every_command(folder: Path, images: Path) -> list[str]:
    """Return small runs of every command except `serve` on ``van_digits``."""
    bundle, key, public = folder / "b", folder / "k", folder / "k.pub"
    for words in ("genpkey -algorithm ed25519 -out k", "pkey -pubout -in k -out k.pub"):
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True)
    once = "--batches 1 --seconds 0.1 --calls 2 --limit 0.2 --rounds 1 --warmup 0 --no-save"
    build = f"build {bundle} --target sm_89 --optimization-level 0"
    return [
        *("list", "doctor --json", "info van_b1", f"export van_digits --output {bundle}"),
        *(f"quantize {bundle} --precision fp16", *([build] if RTX else []), f"info {bundle}"),
        f"run van_digits --output {bundle} --precision fp16 --allow-skip engines",
        f"verify {bundle} --no-modules --allow-skip engines",
        f"drift {bundle} --level stage --count 1 --artifact fp16",
        f"evaluate {bundle} --images {images} --artifact fp32",
        f"check {bundle} --baseline {folder}/base.json --update --allow-skip engines",
        *(f"inspect {bundle}", f"package triton {bundle} --output {folder}/triton"),
        *(f"bench {bundle} --runners ort-cpu {once}", f"report {bundle}"),
        *(f"sign {bundle} --key {key}", f"verify-signature {bundle} --public-key {public}"),
        f"predict {bundle} {bundle}/golden/0.png --require-signature {public}",
    ]


@pytest.mark.slow
def test_no_command_needs_the_network(tmp_path: Path, digits: Subject) -> None:
    host = Host(tmp_path)
    done = host.run(*every_command(tmp_path, digits.labelled))
    assert {line: found[2] for line, found in done.items() if found[0]} == {}
    with (
        run_server(tmp_path / "b", environment=host.environment) as (_, url),
        urlopen(f"{url}/v2/health/ready") as answer,
    ):
        assert answer.status == 200
    assert host.refusals() == set()
    assert {line.split()[0] for line in done} | {"serve", "build"} == set(COMMANDS)
    # The hook sees what does ask, and the refusal is one message.
    asks = f"export van_b0 --output {tmp_path}/new"
    code, _, stderr = host.run("list", asks)[asks]
    assert (code, stderr[:7]) == (5, "error: ")
    assert re.search(r"offline|network|reach|connect", stderr, re.IGNORECASE)
    assert host.refusals() == {"huggingface.co"}
    assert not (tmp_path / "new").exists()


# --- without PyTorch: only the packages of requirements-runtime.txt ------------------------------


def missing_modules() -> list[str]:
    """Return the top-level modules that are missing with requirements-runtime.txt only."""
    lines = (ROOT / "requirements-runtime.txt").read_text().splitlines()
    texts = [text for line in lines if (text := line.partition("#")[0].strip())]
    there = {"van-deploy", *resolve_dependencies(map(Requirement, texts))}
    modules = metadata.packages_distributions().items()
    return sorted(m for m, owners in modules if not there & set(map(canonicalize_name, owners)))


def test_host_without_pytorch_and_weights(digits: Subject, tmp_path: Path) -> None:
    blocked = missing_modules()
    assert {"torch", "timm", "torchvision"} <= set(blocked)
    path = Path(shutil.copytree(digits.bundle.path, tmp_path / "bundle"))
    add_plan(Bundle.open(path))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["weights"]["path"] = "/nowhere/weights.safetensors"
    (path / MANIFEST).write_text(json.dumps(manifest))
    host, skips = Host(tmp_path / "host", blocked), "--allow-skip engines --allow-skip runtimes"
    found = host.run(
        *(f"verify {path} --json", f"predict {path} {path}/golden/0.png --json"),
        *(f"inspect {path}/model.onnx", f"info {path}", f"report {path}"),
        f"drift {path} --against golden --level stage",
        f"check {path} --baseline {tmp_path}/base.json --update {skips}",
        *("doctor", f"export van_digits --output {tmp_path}/out"),
    )
    done = {line.split()[0]: outputs for line, outputs in found.items()}
    verdicts = json.loads(done["verify"][1])["artifacts"]
    assert [verdicts[name]["outcome"] for name in ("fp32", "fp16", "int8")] == ["pass"] * 3
    assert verdicts["plan-sm_89"]["reason"] == "engine not executed: no GPU"
    codes = {name: found[0] for name, found in done.items() if found[0]}
    assert codes == {"verify": 1, "export": 3}, "an engine that nobody allowed to skip"
    assert done["export"][2].startswith("error: This needs ")
    answer = str(int(digits.samples.logits[0].argmax()))
    assert str(json.loads(done["predict"][1])["predictions"][0]["top"][0]["index"]) == answer
    with run_server(path, environment=host.environment) as (_, url):
        image = (path / "golden/0.png").read_bytes()
        request = Request(f"{url}/predict", image, {"Content-Type": "image/png"})
        with urlopen(request, timeout=60) as response:
            assert answer in json.dumps(json.load(response))


# --- unusual environments: names, locales, streams, folders -------------------------------------

# Makes INSTALLED read-only, and the home folder unknown.
READ_ONLY_HOOK = """
import os, pwd, sys

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
INSTALLED = os.path.realpath(os.environ["INSTALLED"]) + os.sep
pwd.getpwuid = {}.__getitem__

def refuse(event, details):
    writing = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writing or event in CHANGES) and isinstance(details[0], (str, bytes)):
        if os.path.realpath(os.fsdecode(details[0])).startswith(INSTALLED):
            raise OSError(30, "Read-only file system", os.fsdecode(details[0]))

sys.addaudithook(refuse)
"""
LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "latin-1": {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
    "utf-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
}


@pytest.mark.slow
def test_non_ascii_names_in_any_locale(wheel: ZipFile, tmp_path: Path) -> None:
    """The bundle is exported in the C locale; all names are non-ASCII."""
    installed, hooks, folder = (tmp_path / name for name in ("site", "hooks", "Bänder 文件"))
    wheel.extractall(installed)
    hooks.mkdir()
    folder.mkdir()
    (hooks / "sitecustomize.py").write_text(READ_ONLY_HOOK)
    kept = ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    kept_values = {name: os.environ[name] for name in kept if name in os.environ}
    own = {"PYTHONPATH": f"{hooks}{os.pathsep}{installed}", "INSTALLED": str(installed)}

    def run(locale: str, *words: str, code: int = 0) -> str:
        pipes: Any = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        environment = {**kept_values, **own, "PYTHONUTF8": "0", **LOCALES[locale]}
        command = [sys.executable, "-m", "van_deploy", *words]
        done = subprocess.run(command, cwd=folder, env=environment, check=False, **pipes)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return str(done.stderr if code else done.stdout)

    bundle = "mein Bündel 一"
    run("ascii", "export", "van_digits", "--output", bundle)
    shutil.copy(folder / bundle / "golden/0.png", folder / "Größe eins.png")
    for locale in LOCALES:
        for words in (("info", bundle), ("predict", bundle, "Größe eins.png")):
            stdout = run(locale, *words, "--json")
            assert locale == "latin-1" or json.loads(stdout)
        assert run(locale, "predict", bundle, "½ nichts.png", code=5).startswith("error: ")
    run("ascii", "package", "triton", bundle, "-o", "Triton für alle")
    run("utf-8", "report", bundle, "-o", "Bericht ½ eins.html")
    assert str(installed) in run("utf-8", "info", "van_digits", "--json")
    assert not list(installed.rglob("*.pyc")), "something was written"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    at = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["sh", "-c", command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=at, check=False)


@each("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str) -> None:
    """A service or a shell may start a program without standard streams."""
    done = shell(f"{sys.executable} -m van_deploy report nosuch {closed}")
    assert done.returncode == 5
    assert done.stderr == "" if "2>" in closed else done.stderr.startswith("error: There is no ")


def test_deleted_working_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    done = shell(f"mkdir {gone}; cd {gone}; rmdir {gone}; {sys.executable} -m van_deploy list")
    assert done.returncode == 5
    assert done.stderr.startswith("error: The working folder cannot be used: ")
