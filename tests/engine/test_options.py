"""What can be asked of a build, and how people write it."""

from __future__ import annotations

import pytest
from van_deploy.engine.options import (
    BuildOptions,
    HardwareCompatibility,
    Profiling,
    parse_size,
    parse_target,
    parse_targets,
)

from van_deploy.config import BatchRange
from van_deploy.errors import UsageError


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("text", ["", "four", "4 elephants", "-1G", "1e3"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.remedy == "Write a number and a unit, such as 4GiB."


def test_targets_in_every_spelling() -> None:
    assert [parse_target(t) for t in ("sm_89", "SM89", "8.9", "89", "12.0", "sm_120")] == [
        *["sm_89"] * 4,
        *["sm_120"] * 2,
    ]


def test_commas_make_plans_and_plus_joins_them() -> None:
    assert parse_targets("sm_89+sm_86,8.0") == (("sm_86", "sm_89"), ("sm_80",))


@pytest.mark.parametrize("text", ["", "ada", "sm_", "sm_8", "sm_86,"])
def test_what_is_not_a_target(text: str) -> None:
    with pytest.raises(UsageError, match="is not a target"):
        parse_targets(text)


def test_a_target_named_twice() -> None:
    with pytest.raises(UsageError, match="names a target twice"):
        parse_targets("sm_86,8.6")


@pytest.mark.parametrize("level", [-1, 6])
def test_levels_that_do_not_exist(level: int) -> None:
    with pytest.raises(UsageError, match=f"no optimization level {level}"):
        BuildOptions(optimization_level=level)


def test_a_workspace_of_nothing() -> None:
    with pytest.raises(UsageError, match="0 bytes is none"):
        BuildOptions(workspace_bytes=0)


def test_no_profile() -> None:
    with pytest.raises(UsageError, match="No batch profile"):
        BuildOptions(profiles=())


def test_min_above_max_is_refused_before_tensorrt_sees_it() -> None:
    with pytest.raises(UsageError, match="8:4:2 is not 1 <= min <= opt <= max"):
        BatchRange.parse("8:4:2")


def test_options_survive_json() -> None:
    options = BuildOptions(
        profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16)),
        targets=("sm_86", "sm_89"),
        hardware_compatibility=HardwareCompatibility.AMPERE_PLUS,
        version_compatible=True,
        workspace_bytes=1 << 30,
        optimization_level=5,
        tf32=False,
        strip_weights=True,
        refit=True,
        profiling=Profiling.DETAILED,
    )
    assert BuildOptions.from_dict(options.as_dict()) == options
