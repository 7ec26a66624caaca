"""Long work: many images with flat memory, and a server that is killed under load.

python -m reliability.load                          # 50,000 images, 10,000 requests
python -m reliability.load --images 5000 --requests 2000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from reliability.requests import started
from reliability.trials import finished, van_deploy

__all__ = ["evaluate_many", "quantize_many", "serve_killed"]

IMAGES = 50_000
FEW = 20  # the same work on a twentieth of the images
REQUESTS = 10_000
CLIENTS = 64
KILLS = 5
WORDS = ("--artefact", "fp32-uint8", "--threads", "1", "--no-compare")  # of `serve`
RETRY_S = 0.05
FLAT = 1.1  # times the memory of the small run


def main() -> int:
    """Run everything, print a table; return 1 if memory grew or an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        folder = Path(name)
        bundle = folder / "bundle"
        code, stderr = finished(
            van_deploy("export", "van_digits", "--output", bundle, "--embed-preprocess", "uint8")
        )
        if code:
            raise SystemExit(stderr)
        rows = [
            *evaluate_many(folder, bundle, arguments.images),
            *quantize_many(folder, bundle, arguments.images),
            serve_killed(bundle, arguments.requests),
        ]
    columns = ["load", "how much", "what happened", "held"]
    result = {"columns": columns, "rows": rows, "faults": [r for r in rows if r[3] != "yes"]}
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(map(" | ".join, rows)))
    return int(bool(result["faults"]))


def evaluate_many(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what evaluating so many generated images took, against a few of them."""
    few, many = (_generated(folder / f"evaluate-{n}", n) for n in (count // FEW, count))
    words = ("evaluate", bundle, "--artefact", "fp32", "--images")
    return [_row("evaluate", count, [_measured(*words, images) for images in (few, many)])]


def quantize_many(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what calibrating on so many generated images took, against a few of them."""
    figures = []
    for number in (count // FEW, count):
        images = _generated(folder / f"evaluate-{number}", number)
        manifest = folder / f"calibration-{number}.toml"
        manifest.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
        figures.append(
            _measured(
                *("quantize", bundle, "--precision", "int8", "--images", images, "--force"),
                *("--calibration", manifest, "--method", "minmax", "--no-refine", "--no-equalize"),
            )
        )
    return [_row("quantize", count, figures)]


def _row(command: str, count: int, figures: list[tuple[int, float, int, str]]) -> list[str]:
    (small, _, few_code, _), (large, seconds, code, said) = figures
    held = large <= FLAT * small and code in (0, 1) and few_code in (0, 1)
    detail = f"peak {large / 1e6:.0f} MB, {small / 1e6:.0f} MB for {count // FEW:,}"
    wrong = "" if code in (0, 1) else f"; exit code {code}: {said[-200:]}"
    return [
        f"`{command}` over generated images",
        f"{count:,} images, {seconds:.0f} s",
        detail + wrong,
        "yes" if held else "NO",
    ]


def _generated(folder: Path, count: int) -> Path:
    """Return a folder of classes with so many pictures of noise, made where missing."""
    from PIL import Image

    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(folder / str(number % 10) / f"{number}.png", compress_level=0)
    return folder


def _measured(*words: str | Path) -> tuple[int, float, int, str]:
    """Return a command's peak memory in bytes, seconds, exit code and what it said."""
    program = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024\n"
        "print(json.dumps([peak, done.returncode, done.stderr.decode()]))\n"
    )
    command = [sys.executable, "-c", program, sys.executable, "-m", "van_deploy"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *map(str, words)],
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
    from van_deploy.bundle import Bundle
    from van_deploy.data import check_images
    from van_deploy.runners.network import Network

    with Network(Bundle.open(bundle), "fp32-uint8") as network:
        pixels = check_images("van_digits", network.preprocessing, 16).values
        expected = np.concatenate([network.logits(pixels[i : i + 1]) for i in range(len(pixels))])
    start = time.monotonic()
    answers = asyncio.run(_killed_under_load(bundle, pixels, expected, count))
    seconds = time.monotonic() - start
    held = answers["right"] == count and not answers["wrong"]
    return [
        f"`serve` under {CLIENTS} clients, killed {answers['kills']} times and started again",
        f"{count:,} requests, {seconds:.0f} s",
        f"{answers['right']:,} right, {answers['wrong']} wrong; "
        f"asked again {answers['again']} times",
        "yes" if held else "NO",
    ]


async def _killed_under_load(
    bundle: Path, pixels: Any, expected: Any, count: int
) -> dict[str, int]:
    import urllib.parse

    answers = {"right": 0, "wrong": 0, "again": 0, "kills": 0}
    server, url = await asyncio.to_thread(started, bundle, *WORDS)
    port = int(urllib.parse.urlsplit(url).port or 0)
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            which = number % len(pixels)
            while (found := await _asked(port, pixels[which])) is None:
                answers["again"] += 1
                await asyncio.sleep(RETRY_S)
            near = np.abs(found - expected[which]).max() <= 1e-4 * np.abs(expected).max()
            answers["right" if near else "wrong"] += 1

    async def killer() -> None:
        nonlocal server
        rng = random.Random(0)
        for kill in range(KILLS):
            while answers["right"] < count * (kill + rng.random()) / (KILLS + 1):
                await asyncio.sleep(0.01)
            server.kill()
            await asyncio.to_thread(server.wait)
            answers["kills"] += 1
            server, _ = await asyncio.to_thread(started, bundle, *WORDS, port=port)

    try:
        await asyncio.gather(killer(), *(client() for _ in range(CLIENTS)))
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait)
    return answers


async def _asked(port: int, pixels: Any) -> Any:
    """Return the logits of one picture, or None if no whole answer came."""
    raw = pixels.tobytes()
    tensor = {
        "name": "pixels",
        "shape": [1, *pixels.shape],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    wanted = [{"name": "logits", "parameters": {"binary_data": False}}]
    head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    lines = [
        "POST /v2/models/van_digits-fp32-uint8/infer HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(head) + len(raw)}",
        f"Inference-Header-Content-Length: {len(head)}",
    ]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + head + raw)
            answer = await reader.read()
        finally:
            writer.close()
    except OSError:
        return None
    status, _, rest = answer.partition(b"\r\n")
    if b" 200 " not in status + b" ":
        return None
    try:
        document = json.loads(rest.partition(b"\r\n\r\n")[2])
    except ValueError:  # cut off in the middle
        return None
    return np.array(document["outputs"][0]["data"], np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
