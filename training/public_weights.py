"""Download the four public VAN classifiers, export each, and check it (``make public-weights``).

For a host with a network; never run against the real hub so far, only against
the tests' local one. For every variant with public ImageNet-1K weights::

    python -m training.public_weights [--output DIR] [--imagenet FOLDER] [VARIANT ...]

- the official file is downloaded through the ordinary loader, at the revision
  that :data:`~van_deploy.model.variants.VARIANTS` pins, if it pins one;
- its SHA-256 is printed beside the pinned one, or to be pinned;
- it is exported, and the bundle verified against PyTorch;
- with ``--imagenet``, a folder of the 50,000 validation images in any layout that
  ``van-deploy evaluate`` reads, the FP32 graph's top-1 is compared with the published one.

Exit code 1 where a digest, a check or an accuracy is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from van_deploy.errors import VanDeployError
from van_deploy.model.hub import fetch_weights
from van_deploy.model.variants import VARIANTS, Variant, variant_named

TOLERANCE = 0.15
"""Percentage points: the papers round to 0.1, and decoders differ by a few images."""


def command(*words: str | Path) -> tuple[int, str]:
    """Return the exit code and the standard output of ``van-deploy`` with ``words``."""
    arguments = [sys.executable, "-m", "van_deploy", *map(str, words)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def checked(variant: Variant, output: Path, imagenet: Path | None) -> list[str]:
    """Return what is wrong with a variant's public weights, and print what was found."""
    file = variant.weights
    if file is None:
        return [f"{variant.name} has no public weights"]
    got, path, sha256, _ = fetch_weights(file.repo_id, file.filename, revision=file.revision)
    commit = next((part.name for part in path.parents if part.parent.name == "snapshots"), "?")
    print(f"{variant.name}: {got}, {path.stat().st_size:,} bytes")
    print(f"  revision  {commit}\n  pinned    {file.revision}")
    print(f"  sha256    {sha256}\n  pinned    {file.sha256 or '(not yet: pin the line above)'}")
    faults = [] if file.sha256 in ("", sha256) else ["the SHA-256 is not the pinned one"]
    bundle = output / variant.name
    for words in (("export", variant.name, "-o", bundle), ("verify", bundle)):
        code, _ = command(*words)
        print(f"  {words[0]:8}  {'passed' if code == 0 else f'exit code {code}'}")
        faults += [f"{words[0]} ended with exit code {code}"] if code else []
    if imagenet is None or faults:
        print(f"  top-1     not measured ({'something failed' if faults else 'no --imagenet'})")
        return faults
    code, text = command("evaluate", bundle, "--images", imagenet, "--json")
    if code:
        return [f"evaluate ended with exit code {code}"]
    top1 = 100 * json.loads(text)["accuracy"]["fp32"]["top1"]
    print(f"  top-1     {top1:.2f} %\n  published {variant.top1} %")
    if abs(top1 - (variant.top1 or 0.0)) > TOLERANCE:
        faults.append(f"top-1 is {top1:.2f} %, published {variant.top1} %")
    return faults


def attempted(name: str, output: Path, imagenet: Path | None) -> list[str]:
    """Return what is wrong with a variant's public weights, that they cannot be had included."""
    try:
        return checked(variant_named(name), output, imagenet)
    except VanDeployError as error:
        return [error.message]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the variants that were named, or all with public weights; return the exit code."""
    public = [name for name, variant in VARIANTS.items() if variant.weights]
    parser = argparse.ArgumentParser(description="Download, export and check the public weights.")
    parser.add_argument("variants", nargs="*", default=public, metavar="VARIANT")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the bundles")
    parser.add_argument("--imagenet", type=Path, help="ImageNet's validation images")
    chosen = parser.parse_args(arguments)
    faults = {name: attempted(name, chosen.output, chosen.imagenet) for name in chosen.variants}
    for name, found in faults.items():
        print(f"{name}: {'; '.join(found) or 'as published'}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
