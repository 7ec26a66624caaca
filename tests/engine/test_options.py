"""What can be asked of a build, and how people write it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.each import each
from van_deploy.config import (
    BatchRange,
    BuildOptions,
    EngineSettings,
    HardwareCompatibility,
    Profiling,
)
from van_deploy.config.fields import parse_size, parse_target
from van_deploy.errors import UsageError


def plain(values: dict[str, object]) -> dict[str, Any]:
    """Return values as a file or a caller without types would give them."""
    return values


@each(
    ("text", "size"),
    [
        ("1024", 1024),
        ("4GiB", 4 << 30),
        ("4G", 4 << 30),
        ("0.5 gb", 1 << 29),
        ("16k", 16384),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_targets_in_every_spelling() -> None:
    spellings = ("sm_89", "SM89", "8.9", "89", "sm_120+8.0")
    assert [parse_target(text) for text in spellings] == [*[("sm_89",)] * 4, ("sm_80", "sm_120")]


@each("text", ["", "four", "4 elephants", "-1G", "1e3"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildOptions(**plain({"workspace_bytes": text}))
    assert caught.value.message == (
        f"'workspace_bytes=' is {text!r}: it should be a number and a unit, such as 4GiB."
    )


@each("text", ["", "ada", "sm_", "sm_8", "sm_86+"])
def test_what_is_not_a_target(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        EngineSettings(**plain({"targets": ("sm_89", text)}))
    assert caught.value.message == (
        f"'targets=' is {text!r}: it should be compute capabilities such as sm_89; "
        "sm_86+sm_89 is one plan for both."
    )


@each(
    ("options", "message"),
    [
        ({"optimization_level": 6}, "'optimization_level=' is 6: it should be less than or equal"),
        ({"optimization_level": -1}, "'optimization_level=' is -1: it should be greater than or"),
        ({"workspace_bytes": 0}, "'workspace_bytes=' is 0: it should be greater than 0."),
        ({"profiles": ()}, "'profiles=' is []: it should have at least 1 item"),
        ({"profiles": ("8:4:2",)}, "The batch range 8:4:2 is not min <= opt <= max."),
        (
            {"profiles": ("1:2",)},
            "'profiles=' is '1:2': it should be min:opt:max, such as 1:8:32, or one size.",
        ),
        ({"tf32": "no"}, "'tf32=' is 'no': it should be true or false."),
        ({"tf23": True}, "The key 'tf23=' is unknown."),
    ],
)
def test_what_no_backend_could_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildOptions(**options)
    assert caught.value.message.startswith(message)
    assert caught.value.remedy


def test_a_plan_named_twice() -> None:
    with pytest.raises(UsageError, match="targets= names a plan twice"):
        EngineSettings(**plain({"targets": ("sm_86", "8.6")}))


def test_options_survive_json() -> None:
    options = BuildOptions(
        profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16)),
        targets=("sm_86", "sm_89"),
        hardware_compatibility=HardwareCompatibility.AMPERE_PLUS,
        version_compatible=True,
        workspace_bytes=1 << 30,
        optimization_level=5,
        tf32=False,
        profiling=Profiling.DETAILED,
    )
    assert BuildOptions.from_dict(options.as_dict()) == options


def test_a_table_becomes_the_options_of_each_plan() -> None:
    written = {"targets": ["sm_89"], "batch": ["1:2:4"], "workspace": "1GiB", "tf32": False}
    table = EngineSettings(**plain(written))
    assert table.of(("sm_89",)) == BuildOptions(
        targets=("sm_89",), profiles=(BatchRange(1, 2, 4),), workspace_bytes=1 << 30, tf32=False
    )
    own = EngineSettings().of(("sm_86",), BatchRange(1, 3, 9))
    assert own == BuildOptions(targets=("sm_86",), profiles=(BatchRange(1, 3, 9),))
