"""Long work: many images with flat memory, and a server that is killed under load."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from reliability.clients import Load, drive, exported, infer_requests, started

IMAGES, REQUESTS = 50_000, 10_000
FEW = 20  # the same work on a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # times the memory of the small run
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([peak, done.returncode, done.stderr.decode()]))
"""


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each load, and those that did not hold.

    Args:
        count: of images and of requests; None for 50,000 and 10,000.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        folder = Path(name)
        bundle = exported(folder / "bundle", "van_digits")
        rows = evaluate_and_quantize(folder, bundle, count or IMAGES)
        rows.append(serve_killed(bundle, count or REQUESTS))
    faults = [" | ".join(row) for row in rows if row[3] != "yes"]
    return ["load", "how much", "what happened", "held"], rows, faults


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what so many generated images took in two commands, against a few of them."""
    manifest = folder / "images.toml"
    plainest = ("--method", "minmax", "--no-equalize", "--no-bias-correction", "--force")
    words = {
        "evaluate": ("--artefact", "fp32"),
        "quantize": ("--precision", "int8", "--calibration", str(manifest), *plainest),
    }
    figures: dict[str, list[tuple[int, float, str]]] = {command: [] for command in words}
    for number in (count // FEW, count):
        images = _generated(folder / str(number), number)
        manifest.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
        for command, more in words.items():
            figures[command].append(_measured(command, bundle, "--images", images, *more))
    rows = []
    for command, ((small, _, first), (large, seconds, second)) in figures.items():
        detail = f"peak {large / 1e6:.0f} MB, {small / 1e6:.0f} MB for {count // FEW:,}"
        held = "yes" if large <= FLAT * small and not first + second else "NO"
        much = f"{count:,} images, {seconds:.0f} s"
        rows.append([f"`{command}` over generated images", much, f"{detail}{first}{second}", held])
    return rows


def _generated(folder: Path, count: int) -> Path:
    """Return a folder of ten classes with so many images of noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png", compress_level=0)
    return folder


def _measured(*words: str | Path) -> tuple[int, float, str]:
    """Return a command's peak memory in bytes, its seconds, and what went wrong, if anything."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "van_deploy", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak, code, said = json.loads(done.stdout)
    wrong = f"; exit code {code}: {said[-200:]}" if code > 1 else ""
    return int(peak), time.monotonic() - start, wrong


def serve_killed(bundle: Path, count: int) -> list[str]:
    """Return what became of requests to a server that is killed five times and started again.

    Every client asks again until it is answered; every answer is compared.
    """
    words = ("--artefact", "fp32-uint8", "--threads", "1", "--no-compare")
    requests = infer_requests(bundle, "fp32-uint8", 16)
    server, url = started(bundle, *words)
    port, kills, done, found = int(url.rsplit(":", 1)[1]), 0, threading.Event(), Load()
    start, rng = time.monotonic(), random.Random(0)

    def killer() -> None:
        nonlocal server, kills
        while kills < KILLS and not done.is_set():
            enough = count * (kills + rng.random()) / (KILLS + 1)
            while found.answered < enough and not done.wait(0.01):
                pass
            server.kill()
            server.wait()
            server, _ = started(bundle, *words, port=port)
            kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        drive(url, requests, found, count, CLIENTS, retry=True)
    finally:
        done.set()
        thread.join()
        server.terminate()
        server.wait()
    held = found.answered == count and not found.wrong and kills == KILLS
    return [
        f"`serve` under {CLIENTS} clients, killed {kills} times and started again",
        f"{count:,} requests, {time.monotonic() - start:.0f} s",
        f"{found.answered - found.wrong:,} right, {found.wrong} wrong; sent again {found.again} "
        "times",
        "yes" if held else "NO",
    ]
