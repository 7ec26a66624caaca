"""Entries of a manifest with placeholder values."""

from collections.abc import Iterable
from typing import Any

from van_deploy.bundle import Artifact, Origin
from van_deploy.config import BatchRange
from van_deploy.manifest import NetworkInfo
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.variants import VARIANTS, WeightsSource

WEIGHTS = Origin(name="weights", sha256="0" * 64)


def network_info(name: str = "m", **changes: Any) -> NetworkInfo:
    """Return the description of a network with ``changes``."""
    values: dict[str, Any] = {
        "name": name,
        "weights": WeightsSource(name, "", "random", "0" * 64, 0, "top level", ()),
        "architecture": VARIANTS["van_b0"].config,
        "parameters": 4105800,
        "preprocessing": OFFICIAL,
        "class_names": None,
        "batch": BatchRange(1, 2, 4),
        "versions": {"van-deploy": "0"},
    }
    return NetworkInfo(**{**values, **changes})


def artifact_entry(
    name: str, kind: Any, precision: Any, file: str, files: Iterable[str] = (), **more: Any
) -> Artifact:
    """Return an artifact; the digests of its files are added when it is recorded."""
    more = {"made_from": WEIGHTS, "made_with": {}, **more}
    digests = dict.fromkeys(files or [file], "")
    return Artifact(name=name, kind=kind, precision=precision, file=file, files=digests, **more)
