"""What can be asked of a build, and how people write it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.each import each
from van_deploy.config import BatchRange, BuildOptions, EngineSettings, HardwareCompatibility
from van_deploy.errors import UsageError
from van_deploy.schema import validated

SIZE = "should be a number and a unit, such as 4GiB."
TARGET = "should be compute capabilities such as sm_89; sm_86+sm_89 is one plan for both."


@each(
    ("written", "size"),
    [
        *(("1024", 1024), ("4GiB", 4 << 30), ("4G", 4 << 30), ("0.5 gb", 1 << 29)),
        *(("16k", 16384), ("1TiB", 1 << 40)),
    ],
)
def test_sizes_are_binary(written: str, size: int) -> None:
    assert validated(BuildOptions, {"workspace": written}).workspace_bytes == size


def test_a_table_becomes_the_options_of_each_plan_and_survives_json() -> None:
    spellings = ["sm_89", "SM86", "8.0", "75", "sm_120+8.0"]
    table = {"targets": spellings, "batch": ["1:2:4"], "workspace": "1GiB", "tf32": False}
    settings = validated(EngineSettings, table)
    targets = [("sm_89",), ("sm_86",), ("sm_80",), ("sm_75",), ("sm_80", "sm_120")]
    assert settings.targets == tuple(targets)
    options = settings.of(("sm_89",))
    assert options == BuildOptions(
        targets=("sm_89",), profiles=(BatchRange(1, 2, 4),), workspace_bytes=1 << 30, tf32=False
    )
    level = HardwareCompatibility.AMPERE_PLUS
    more = options.changed(hardware_compatibility=level, version_compatible=True)
    assert validated(BuildOptions, more.as_dict()) == more
    own = EngineSettings().of(("sm_86",), BatchRange(1, 3, 9))
    assert own == BuildOptions(targets=("sm_86",), profiles=(BatchRange(1, 3, 9),))


@each(
    ("options", "message"),
    [
        *(
            ({"workspace_bytes": text}, f"'workspace_bytes=' is {text!r}: it {SIZE}")
            for text in ("", "four", "4 elephants", "-1G", "1e3")
        ),
        *(
            ({"targets": ("sm_89", text)}, f"'targets=' is {text!r}: it {TARGET}")
            for text in ("", "ada", "sm_", "sm_8", "sm_86+")
        ),
        ({"targets": ("sm_86", "8.6")}, "targets= names a plan twice."),
        ({"optimization_level": 6}, "'optimization_level=' is 6: it should be less than or equal"),
        ({"optimization_level": -1}, "'optimization_level=' is -1: it should be greater than or"),
        ({"workspace_bytes": 0}, "'workspace_bytes=' is 0: it should be greater than 0."),
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
        EngineSettings(**options)
    assert caught.value.message.startswith(message)
    with pytest.raises(UsageError, match="should have at least 1 item"):
        BuildOptions(profiles=())
