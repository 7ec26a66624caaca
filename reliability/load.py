"""Long work: many images with flat memory, and a server that is killed under load.

python -m reliability.load                          # 50,000 images, 10,000 requests
python -m reliability.load --images 5000 --requests 2000
"""

from __future__ import annotations

import argparse
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

__all__ = ["evaluate_and_quantize", "serve_killed"]

FEW = 20  # the same work on a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # times the memory of the small run
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([peak, done.returncode, done.stderr.decode()]))
"""


def main() -> int:
    """Run everything, print a table; return 1 if memory grew or an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        folder = Path(name)
        bundle = exported(folder / "bundle", "van_digits")
        rows = [
            *evaluate_and_quantize(folder, bundle, arguments.images),
            serve_killed(bundle, arguments.requests),
        ]
    columns = ["load", "how much", "what happened", "held"]
    result = {"columns": columns, "rows": rows, "faults": [r for r in rows if r[3] != "yes"]}
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(map(" | ".join, rows)))
    return int(bool(result["faults"]))


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what so many generated images took in two commands, against a few of them."""
    figures: dict[str, list[tuple[int, float, int, str]]] = {"evaluate": [], "quantize": []}
    for number in (count // FEW, count):
        images = _generated(folder / str(number), number)
        manifest = folder / f"{number}.toml"
        manifest.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
        plainest = ("--method", "minmax", "--no-equalize", "--no-bias-correction", "--force")
        words = {
            "evaluate": ("--artefact", "fp32"),
            "quantize": ("--precision", "int8", "--calibration", str(manifest), *plainest),
        }
        for command, more in words.items():
            figures[command].append(_measured(command, bundle, "--images", images, *more))
    rows = []
    for command, ((small, *_), (large, seconds, *_)) in figures.items():
        wrong = [f"; exit code {c}: {said[-200:]}" for _, _, c, said in figures[command] if c > 1]
        detail = f"peak {large / 1e6:.0f} MB, {small / 1e6:.0f} MB for {count // FEW:,}"
        held = "yes" if large <= FLAT * small and not wrong else "NO"
        much = f"{count:,} images, {seconds:.0f} s"
        rows.append([f"`{command}` over generated images", much, "".join([detail, *wrong]), held])
    return rows


def _generated(folder: Path, count: int) -> Path:
    """Return a folder of ten classes with so many images of noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(folder / str(number % 10) / f"{number}.png", compress_level=0)
    return folder


def _measured(*words: str | Path) -> tuple[int, float, int, str]:
    """Return a command's peak memory in bytes, seconds, exit code and what it said."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "van_deploy", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak, code, said = json.loads(done.stdout)
    return int(peak), time.monotonic() - start, int(code), str(said)


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


if __name__ == "__main__":
    raise SystemExit(main())
