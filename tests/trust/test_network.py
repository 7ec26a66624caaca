"""Nothing but the download of weights uses the network: every command with sockets refused.

All commands run one after the other in one process, on one bundle. Its Python and that of
every process it starts load a ``sitecustomize`` whose audit hook refuses whatever leaves
the machine and writes it down, so that a refusal somebody swallows is seen too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from van_deploy.cli.app import COMMANDS

HOOK = """
import json, os, sys

LOOPBACK = ("127.", "::1", "localhost")


def _refuse(event, details):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = details[1]
        if not isinstance(address, tuple):  # a Unix socket, or an address given before
            return
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = details[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not host or str(host).startswith(LOOPBACK):
        return
    with open(os.environ["REFUSALS"], "a", encoding="utf-8") as file:
        file.write(json.dumps([event, str(host), sys.argv[:3]]) + "\\n")
    raise OSError(101, "the network is refused in this test")


sys.addaudithook(_refuse)
"""

DRIVER = """
import json, sys
from typer.testing import CliRunner
from van_deploy.cli.app import app

done = {}
for words in json.load(open(sys.argv[1], encoding="utf-8")):
    result = CliRunner().invoke(app, words)
    fault = result.exception
    told = "" if fault is None or isinstance(fault, SystemExit) else repr(fault)
    done[" ".join(words)] = [result.exit_code, result.stderr, told]
json.dump(done, open(sys.argv[2], "w", encoding="utf-8"))
"""

RTX = find_spec("tensorrt_rtx") is not None


def commands(folder: Path) -> list[list[str]]:
    """Return every command on ``van_digits`` but `serve`, small; `run` goes over the bundle."""
    bundle, pictures = str(folder / "b"), str(folder / "pictures")
    key, baseline = str(folder / "k.pem"), str(folder / "baseline.json")
    lines = [
        ["list"],
        ["doctor", "--json"],
        ["info", "van_digits"],
        ["info", "van_b1"],
        ["export", "van_digits", "--output", bundle],
        ["quantize", bundle, "--precision", "fp16"],
        ["info", bundle],
        ["run", "van_digits", "--output", bundle, "--precision", "fp16", "--allow-skip", "engines"],
        ["verify", bundle, "--no-modules", "--allow-skip", "engines"],
        ["drift", bundle, "--level", "stage", "--count", "1", "--artefact", "fp16"],
        ["evaluate", bundle, "--images", pictures, "--artefact", "fp32"],
        ["check", bundle, "--baseline", baseline, "--update", "--allow-skip", "engines"],
        ["inspect", bundle],
        ["predict", bundle, f"{bundle}/golden/0.png"],
        ["package", "triton", bundle, "--output", str(folder / "triton")],
        [
            *("bench", bundle, "--runners", "ort-cpu", "--batches", "1", "--seconds", "0.1"),
            *("--calls", "2", "--limit", "0.2", "--rounds", "1", "--warmup", "0", "--no-save"),
        ],
        ["report", bundle],
        ["sign", "--new-key", key],
        ["sign", bundle, "--key", key],
        ["verify-signature", bundle, "--public-key", f"{key}.pub"],
        ["predict", bundle, f"{bundle}/golden/0.png", "--require-signature", f"{key}.pub"],
    ]
    if RTX:
        lines.insert(6, ["build", bundle, "--target", "sm_89", "--optimization-level", "0"])
    return lines


def refusing(folder: Path) -> dict[str, str]:
    """Return an environment in which every Python refuses to leave the machine."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(HOOK)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
        "REFUSALS": str(folder / "refusals"),
        "HF_HOME": str(folder / "hub"),
        "COLUMNS": "100",
    }


def refusals(folder: Path) -> list[list[object]]:
    file = folder / "refusals"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[object]]]:
    """Run every command once; return the folder, and exit code, stderr and fault of each."""
    folder = tmp_path_factory.mktemp("network")
    generator = np.random.default_rng(0)
    for name in "0123456789":
        (folder / "pictures" / name).mkdir(parents=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / name / "x.png")
    (folder / "commands.json").write_text(json.dumps(commands(folder)))
    subprocess.run(
        [
            *(sys.executable, "-c", DRIVER),
            *(str(folder / "commands.json"), str(folder / "done.json")),
        ],
        env=refusing(folder),
        check=True,
        capture_output=True,
        timeout=500,
    )
    return folder, json.loads((folder / "done.json").read_text())


@pytest.mark.slow
def test_every_command_works_and_none_asks_for_the_network(
    ran: tuple[Path, dict[str, list[object]]],
) -> None:
    folder, done = ran
    assert {words: fault for words, (_, _, fault) in done.items() if fault} == {}
    allowed = {"check": (0, 1)}  # speed and random images may fail a gate; that is its verdict
    wrong = {
        words: stderr
        for words, (code, stderr, _) in done.items()
        if code not in allowed.get(words.split()[0], (0,))
    }
    assert wrong == {}
    assert refusals(folder) == []
    tried = {words.split()[0] for words in done} | {"serve"} | ({"build"} if not RTX else set())
    assert tried == set(COMMANDS)


@pytest.mark.slow
def test_the_server_answers_on_this_machine_and_asks_no_other(
    ran: tuple[Path, dict[str, list[object]]],
) -> None:
    folder, _ = ran
    out = folder / "serve.json"
    with out.open("w") as stdout:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "van_deploy", "serve", str(folder / "b")),
                *("--port", "0", "--json"),
            ],
            env=refusing(folder),
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
    try:
        until = time.monotonic() + 60
        while not out.read_text().rstrip().endswith("}"):
            assert time.monotonic() < until
            assert server.poll() is None
            time.sleep(0.1)
        url = str(json.loads(out.read_text())["url"]).rstrip("/")
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    assert refusals(folder) == []


@pytest.mark.slow
def test_a_download_is_refused_by_the_same_hook(tmp_path: Path) -> None:
    """The hook sees what asks for the network, and the refusal is one message with code 5."""
    result = subprocess.run(
        [sys.executable, "-m", "van_deploy", "export", "van_b0", "--output", str(tmp_path / "b")],
        env=refusing(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 5, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert {host for _, host, _ in refusals(tmp_path)} == {"huggingface.co"}
    assert not (tmp_path / "b").exists()
    assert re.search(r"offline|network|reach|connect", result.stderr, re.IGNORECASE)
