"""What a bundle's manifest must look like before anything believes it.

The manifest of a bundle from somewhere else is input like any other. Its form is
checked once, when it is read, so that the rest of the program can take it as it is;
a section that is missing is one message, wherever it is first wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from van_deploy.errors import BundleError
from van_deploy.forms import (
    LONGEST_TEXT,
    Form,
    count,
    list_of,
    name,
    number,
    one_of,
    optional,
    require_encodable,
    require_form,
    size,
    table,
    table_of,
    text,
)

__all__ = ["Section", "require_manifest"]


class Section(dict[str, Any]):
    """A table of the manifest. A key that is not there is a :class:`BundleError`."""

    def __missing__(self, key: str) -> Any:
        """Refuse the manifest.

        Raises:
            BundleError: always.
        """
        raise BundleError(
            f"The bundle's manifest says nothing about '{key}'.",
            "Export the model again with this version of van-deploy.",
        )


def require_manifest(manifest: Mapping[str, Any]) -> None:
    """Return if every section that is there has the form it should have.

    Raises:
        ValueError: one has not; the message names it.
    """
    require_encodable(manifest)
    require_form(manifest, _SECTIONS)
    for key, artefact in manifest["artefacts"].items():
        require_form(key, name, "the name of an artefact")
        require_form(artefact, _ARTEFACT, f"artefacts.{key}")


def _tensor(value: Any) -> bool:
    """Return whether it describes an input or an output of a graph."""
    if not (table(value) and text(value.get("dtype"))):
        return False
    return list_of(lambda length: text(length) or count(length), at_least=1)(value.get("shape"))


_ARTEFACT: Mapping[str, Form] = {
    "kind": text,
    "precision": one_of("fp32", "fp16", "int8"),
    "file": text,
    "files": table_of(text),
    "made_from": table_of(text),
    "made_with": table,
    "key": text,
    "facts": {
        "inputs": table_of(_tensor),
        "outputs": table_of(_tensor),
        "operators": table_of(count),
        "nodes": count,
        "embedded": text,
        "profiles": list_of(text),
        "backend": text,
    },
}

_SECTIONS: Mapping[str, Form] = {
    "name": name,
    "artefacts": table_of(table),
    "checks": table_of(table),
    "written": text,
    "preprocessing": {
        "image_size": size,
        "mean": list_of(number, at_least=1),
        "std": list_of(lambda value: number(value) and value > 0, at_least=1),
        "interpolation": text,
        "crop_pct": lambda value: number(value) and 0 < value <= 1,
        "source": text,
    },
    "batch": {"min": size, "opt": size, "max": size},
    "architecture": {
        "embed_dims": list_of(size, at_least=1),
        "depths": list_of(size, at_least=1),
        "mlp_ratios": list_of(number, at_least=1),
        "num_classes": size,
        "in_chans": size,
    },
    "weights": {
        "format": text,
        "sha256": text,
        "spec": text,
        "path": optional(text),
    },
    "class_names": optional(
        list_of(lambda value: isinstance(value, str) and len(value) <= LONGEST_TEXT)
    ),
    "canary": {"file": text, "sha256": text, "image": text, "top5": list_of(table)},
}
