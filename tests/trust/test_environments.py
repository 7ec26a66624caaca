"""Unusual environments: read-only installation, non-ASCII names, closed streams."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.each import each

# Makes INSTALLED read-only, and the home folder unknown.
HOOK = """
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
def test_non_ascii_names_in_any_locale(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The bundle is exported in the C locale; all names are non-ASCII."""
    installed, hooks, folder = (tmp_path / name for name in ("site", "hooks", "Bänder 文件"))
    wheel.extractall(installed)
    hooks.mkdir()
    folder.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK)
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
