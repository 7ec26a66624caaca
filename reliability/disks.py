"""Disks that fill up, and disks that cannot be written."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from reliability.trials import Trials, bundle_is_whole, finished, require, van_deploy

__all__ = ["full_disk", "read_only", "small_disk"]

SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Give a file system of that size, mounted on ``folder``.

    Raises:
        PermissionError: this process may not mount one.
    """
    folder.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        raise PermissionError("there is no `mount` here")
    options = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(options, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip() or "mount failed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(
    folder: Path, count: int, only: Sequence[str] = ("export", "quantize", "build")
) -> list[Trials]:
    """Run export, quantize and build where the disk fills up at ever later writes."""
    base = folder / "full-base"
    require(van_deploy("export", "van_digits", "--output", base))
    size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) // 1024
    commands: dict[str, list[str]] = {
        "export": ["export", "van_digits", "--output"],
        "quantize": ["quantize", "--precision", "fp16"],
        "build": ["build", "--target", "sm_89"],
    }
    return [_full_disk_of(name, commands[name], base, size, folder / "disk") for name in only]


def _full_disk_of(name: str, words: list[str], base: Path, used: int, disk: Path) -> Trials:
    trials = Trials(f"disk full during `{name}`, free space from {SIZES_KIB[0]} KiB up")
    for free in SIZES_KIB:
        exists = name != "export"
        try:
            with small_disk(disk, free + (used + 64 if exists else 0)):
                target = disk / "bundle"
                if exists:
                    shutil.copytree(base, target)
                temporary = disk / "tmp"
                temporary.mkdir()
                place: list[str | Path] = [target]
                command = [words[0], *(place if exists else []), *words[1:]]
                command += [] if exists else place
                code, stderr = finished(van_deploy(*command, TMPDIR=str(temporary)))
                problem = bundle_is_whole(target)
                if problem:
                    trials.broken.append(f"{free} KiB free: {problem}")
                if "Traceback" in stderr or code not in (0, 3):
                    trials.broken.append(f"{free} KiB free: {code} {stderr[-600:]}")
                trials.count("went through" if code == 0 else f"exit code {code}, nothing changed")
        except PermissionError as error:
            trials.skipped = f"no file system may be mounted here: {error}"
            return trials
    return trials


def read_only(folder: Path, count: int) -> list[Trials]:
    """Run every command that reads, and every one that writes, on a read-only bundle."""
    trials = Trials("a bundle on a read-only file system")
    base = folder / "read-only-base"
    require(van_deploy("export", "van_digits", "--output", base))
    disk = folder / "ro"
    try:
        with small_disk(disk, 20_000):
            target = disk / "bundle"
            shutil.copytree(base, target)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            cases: Sequence[tuple[list[str | Path], set[int]]] = (
                (["info", target], {0}),
                (["inspect", target], {0}),
                (["predict", target, base / "golden/0.png"], {0}),
                (["verify", target, "--no-modules"], {0, 3, 5}),
                (["drift", target, "--level", "stage"], {0, 3, 5}),
                (["quantize", target, "--precision", "fp16"], {3, 5}),
                (["build", target, "--target", "sm_89"], {3, 5}),
                (["export", "van_digits", "--output", target, "--force"], {3, 5}),
            )
            for words, allowed in cases:
                code, stderr = finished(van_deploy(*words))
                if code not in allowed or "Traceback" in stderr:
                    trials.broken.append(f"{words[0]}: {code} {stderr[-400:]}")
                trials.count(f"`{words[0]}` {'works' if code == 0 else f'ends with {code}'}")
            problem = bundle_is_whole(target)
            if problem:
                trials.broken.append(problem)
    except PermissionError as error:
        trials.skipped = f"no file system may be mounted here: {error}"
    return [trials]
