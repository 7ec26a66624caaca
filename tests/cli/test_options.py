"""Options on the command line: parsed values, refused values, and help."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from van_deploy import api
from van_deploy.bundle import Bundle


@each(
    ("words", "expected"),
    [
        ("quantize --scope a{1,2} --scope b", {"scope": ["a{1,2}", "b"]}),
        ("quantize --eval x --no-equalize", {"evaluate": "x", "equalize": False}),
        ("build --target sm_86,sm_89 --target sm_90", {"targets": ["sm_86", "sm_89", "sm_90"]}),
        (
            "build --batch 1:2:4 --optimization-level 2",
            {"batch": ["1:2:4"], "optimization_level": 2},
        ),
        ("bench --batches 3,4 --seconds 0.5", {"batches": [3, 4], "seconds": 0.5}),
    ],
)
def test_options_become_arguments_of_the_api(
    digits_bundle: Bundle, cli: Cli, words: str, expected: dict[str, Any]
) -> None:
    called: dict[str, Any] = {}

    def record(_: api.Bundle, force: bool = False, save: bool = True, **options: Any) -> None:
        called.update(options)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        for method in ("quantize", "build", "benchmark"):
            patch.setattr(api.Bundle, method, record)
        cli(*words.split(), digits_bundle.path)
    assert called == expected


@each(
    ("words", "code", "message"),
    [
        ("nonsense", 2, "nonsense"),
        ("list --nonsense", 2, "--nonsense"),
        ("doctor x", 2, "x"),
        (f"info {'a' * 5000}", 5, "File name too long"),
        (f"inspect {'a' * 300}", 5, "File name too long"),
        (f"predict {'a' * 300} x", 5, "File name too long"),
        ("bench BUNDLE --streams 0", 2, "'--streams' is 0: it should be greater than or equal to"),
        ("bench BUNDLE --rounds 3.0", 2, "'--rounds' is '3.0': it should be a whole number."),
        ("bench BUNDLE --seconds nan", 2, "'--seconds' is nan: it should be a finite number."),
        ("build BUNDLE --target ada", 2, "'--target' is 'ada': it should be compute capabilities"),
        ("build BUNDLE --workspace lots", 2, "'--workspace' is 'lots': it should be a number and"),
        ("build BUNDLE --on ray", 2, "--on needs --matrix"),
        ("quantize BUNDLE --precision int4", 2, "'--precision' is 'int4': it should be 'fp16', '"),
        ("quantize BUNDLE --no-bias-correction", 2, "--equalize shifts channels, which needs cor"),
        ("quantize BUNDLE --calibration none", 5, "There is no calibration set called 'none'."),
        ("quantize BUNDLE --scope resnet", 2, "The scope 'resnet' is none of pointwise"),
        ("quantize BUNDLE --keep block9", 2, "'block9' matches no module or node to keep in FP32."),
        ("quantize BUNDLE --images /nowhere", 5, "'/nowhere' cannot be read: No such file"),
        ("verify BUNDLE --images x", 2, "--images needs the original network"),
        ("verify BUNDLE --artifact fp8", 5, "has no artifact 'fp8'; it has: fp32."),
    ],
)
def test_invalid_requests_write_nothing(
    digits_bundle: Bundle, cli: Cli, words: str, code: int, message: str
) -> None:
    path = str(digits_bundle.path)  # a shared bundle: the run fails if one writes to it
    assert message in cli.fails(code, *words.replace("BUNDLE", path).split())
