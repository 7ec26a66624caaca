"""Download the four public VAN classifiers, export and verify them (``make public-weights``).

It needs a network; so far it ran only with the tests' local hub server. For every
variant with public ImageNet-1K weights::

    python -m training.public_weights [--output DIR] [--imagenet FOLDER] [VARIANT ...]

- the official file is downloaded, at the revision and with the SHA-256 that
  :data:`~van_deploy.model.variants.VARIANTS` pins, if any; both are printed;
- it is exported, and the bundle verified against PyTorch;
- with ``--imagenet``, a folder of the 50,000 validation images in any layout that
  ``van-deploy evaluate`` reads, the FP32 graph's top-1 is compared with the published one.

The exit code is 1 if a digest, a check or an accuracy is incorrect.
"""

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


def run_command(*arguments: str | Path) -> tuple[int, str]:
    """Run ``van-deploy`` and return its exit code and standard output."""
    command = [sys.executable, "-m", "van_deploy", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return result.returncode, result.stdout


def check_variant(variant: Variant, output: Path, imagenet: Path | None) -> str:
    """Check a variant's public weights and print the results; return an error message or ""."""
    if not variant.weights:
        return "has no public weights"
    try:
        file = find_weights(variant.weights, expect_sha256=variant.sha256)
    except VanDeployError as error:
        return error.message
    commit = next((p.name for p in file.path.parents if p.parent.name == "snapshots"), "?")
    pinned = variant.sha256 or "(not yet: pin the line above)"
    print(f"{variant.name}: {variant.weights}, {file.path.stat().st_size:,} bytes")
    print(f"  revision  {commit}\n  sha256    {file.sha256}\n  pinned    {pinned}")
    bundle, text = output / variant.name, ""
    commands: list[tuple[str | Path, ...]] = [("export", variant.name, "-o", bundle)]
    commands += [("verify", bundle), ("evaluate", bundle, "--images", imagenet or "", "--json")]
    for name, *arguments in commands if imagenet else commands[:2]:
        code, text = run_command(name, *arguments)
        print(f"  {name:8}  {'passed' if code == 0 else f'exit code {code}'}")
        if code:
            return f"{name} ended with exit code {code}"
    if imagenet is None:
        print("  top-1     not measured (no --imagenet)")
        return ""
    top1 = 100 * json.loads(text)["accuracy"]["fp32"]["top1"]
    result = f"top-1 is {top1:.2f} %, published {variant.top1} %"
    print(f"  {result}")
    return result if abs(top1 - (variant.top1 or 0.0)) > TOLERANCE else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the given variants, or all with public weights; return the exit code."""
    public = [name for name, variant in VARIANTS.items() if variant.weights]
    parser = argparse.ArgumentParser(description="Download, export and check the public weights.")
    parser.add_argument("variants", nargs="*", default=public, metavar="VARIANT")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the bundles")
    parser.add_argument("--imagenet", type=Path, help="ImageNet's validation images")
    args = parser.parse_args(arguments)
    try:
        variants = [get_variant(name) for name in args.variants]
    except VanDeployError as error:
        parser.error(error.message)
    errors = {v.name: check_variant(v, args.output, args.imagenet) for v in variants}
    for name, message in errors.items():
        print(f"{name}: {message or 'passed'}")
    return int(any(errors.values()))


if __name__ == "__main__":
    sys.exit(main())
