"""Long work: many images with flat memory, and a server that is killed under load."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.table import process_cost
from reliability.clients import Load, drive, exported, infer_requests, started

IMAGES, REQUESTS = 50_000, 10_000
FEW = 20  # the same work on a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # times the memory of the small run


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each load, and those that did not hold.

    Args:
        count: of images and of requests; None for 50,000 and 10,000.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        bundle = exported(Path(name) / "bundle", "van_digits")
        rows = evaluate_and_quantize(Path(name), bundle, count or IMAGES)
        rows.append(serve_killed(bundle, count or REQUESTS))
    faults = [" | ".join(row) for row in rows if row[3] != "yes"]
    return ["load", "how much", "what happened", "held"], rows, faults


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what so many images of noise took in two commands, against a few of them."""
    manifest, rng, rows = folder / "images.toml", np.random.default_rng(0), []
    few = count // FEW
    plainest = ("--method", "minmax", "--no-equalize", "--no-bias-correction", "--force")
    for number in range(count):
        place = folder / ("few" if number < few else "more") / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png", compress_level=0)
    for command, more in (
        ("evaluate", ("--artefact", "fp32")),
        ("quantize", ("--precision", "int8", "--calibration", str(manifest), *plainest)),
    ):
        found = []
        for images, number in ((folder / "few", few), (folder / "more", count - few)):
            manifest.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
            words = [command, str(bundle), "--images", str(images), *more]
            found.append(process_cost([sys.executable, "-m", "van_deploy", *words]))
        (_, small), (seconds, large) = found
        detail = f"peak {large / 1e6:.0f} MB, {small / 1e6:.0f} MB for {few:,}"
        much = f"{count:,} images, {seconds:.0f} s"
        held = "yes" if large <= FLAT * small else "NO"
        rows.append([f"`{command}` over generated images", much, detail, held])
    return rows


def serve_killed(bundle: Path, count: int) -> list[str]:
    """Return what became of requests to a server that is killed five times and started again.

    Every client asks again until it is answered; every answer is compared.
    """
    words = ("--artefact", "fp32-uint8", "--threads", "1", "--no-compare")
    requests = infer_requests(bundle, "fp32-uint8", 16)
    server, url = started(bundle, *words)
    port, kills, done, found = int(url.rsplit(":", 1)[1]), 0, threading.Event(), Load()
    rng = random.Random(0)

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
    what = f"`serve` under {CLIENTS} clients, killed {kills} times and started again"
    right = f"{found.answered - found.wrong:,} right, {found.wrong} wrong"
    held = found.answered == count and not found.wrong and kills == KILLS
    detail = f"{right}; sent again {found.again} times"
    return [what, f"{count:,} requests", detail, "yes" if held else "NO"]
