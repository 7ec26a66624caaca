"""Download the four public VAN classifiers, export each, and check it (``make public-weights``).

For a host with a network; never run against the real hub so far, only against
the tests' local one. For every variant with public ImageNet-1K weights::

    python -m training.public_weights [--output DIR] [--imagenet FOLDER] [VARIANT ...]

- the official file is downloaded through the ordinary loader, at the revision and with the
  SHA-256 that :data:`~van_deploy.model.variants.VARIANTS` pins, if it pins them; both are printed;
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
from van_deploy.model.files import find_weights
from van_deploy.model.variants import VARIANTS, Variant, get_variant

TOLERANCE = 0.15
"""Percentage points: the papers round to 0.1, and decoders differ by a few images."""


def command(*words: str | Path) -> tuple[int, str]:
    """Return the exit code and the standard output of ``van-deploy`` with ``words``."""
    done = subprocess.run(
        [sys.executable, "-m", "van_deploy", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stdout


def fault_of(variant: Variant, output: Path, imagenet: Path | None) -> str:
    """Return what is wrong with a variant's public weights, "" if nothing; print what was found."""
    if not variant.weights:
        return "has no public weights"
    try:
        found = find_weights(variant.weights, expect_sha256=variant.sha256)
    except VanDeployError as error:
        return error.message
    commit = next((p.name for p in found.path.parents if p.parent.name == "snapshots"), "?")
    pinned = variant.sha256 or "(not yet: pin the line above)"
    print(f"{variant.name}: {variant.weights}, {found.path.stat().st_size:,} bytes")
    print(f"  revision  {commit}\n  sha256    {found.sha256}\n  pinned    {pinned}")
    bundle = output / variant.name
    words: list[tuple[str | Path, ...]] = [("export", variant.name, "-o", bundle)]
    words += [("verify", bundle), ("evaluate", bundle, "--images", imagenet or "", "--json")]
    text = ""
    for asked in words if imagenet else words[:2]:
        code, text = command(*asked)
        print(f"  {asked[0]:8}  {'passed' if code == 0 else f'exit code {code}'}")
        if code:
            return f"{asked[0]} ended with exit code {code}"
    if imagenet is None:
        print("  top-1     not measured (no --imagenet)")
        return ""
    top1 = 100 * json.loads(text)["accuracy"]["fp32"]["top1"]
    told = f"top-1 is {top1:.2f} %, published {variant.top1} %"
    print(f"  {told}")
    return told if abs(top1 - (variant.top1 or 0.0)) > TOLERANCE else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the variants that were named, or all with public weights; return the exit code."""
    public = [name for name, variant in VARIANTS.items() if variant.weights]
    parser = argparse.ArgumentParser(description="Download, export and check the public weights.")
    parser.add_argument("variants", nargs="*", default=public, metavar="VARIANT")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the bundles")
    parser.add_argument("--imagenet", type=Path, help="ImageNet's validation images")
    chosen = parser.parse_args(arguments)
    variants = map(get_variant, chosen.variants)
    faults = {v.name: fault_of(v, chosen.output, chosen.imagenet) for v in variants}
    for name, fault in faults.items():
        print(f"{name}: {fault or 'as published'}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
