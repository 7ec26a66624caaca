"""Refused requests of all commands."""

import shlex

from tests.cli.conftest import HAS_RTX
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.model.embedded import EMBEDDED_WEIGHTS

RTX = [
    ("build BUNDLE --target sm_90 --backend tensorrt-rtx", 2, "does not build for sm_90"),
    ("build BUNDLE --target sm_89 --version-compatible", 2, "has no --version-compatible"),
    ("build BUNDLE --target sm_89 --timing-cache x", 2, "has no --timing-cache"),
    ("build BUNDLE --target sm_89 --hardware-compatibility ampere-plus", 2, "has no --hardware-co"),
]
NO_GPU = [("build BUNDLE", 2, "needs a target GPU, and none is given")]


@each(
    ("words", "code", "message"),
    [
        *RTX * HAS_RTX,
        *NO_GPU * (HAS_RTX and nvidia_driver() is None),
        ("nonsense", 2, "nonsense"),
        ("list --nonsense", 2, "--nonsense"),
        ("doctor x", 2, "x"),
        (f"info {'a' * 5000}", 5, "File name too long"),
        (f"inspect {'a' * 300}", 5, "File name too long"),
        (f"predict {'a' * 300} x", 5, "File name too long"),
        ("bench BUNDLE --rounds 3.0", 2, "'--rounds' is '3.0': it should be a whole number."),
        ("bench BUNDLE --seconds nan", 2, "'--seconds' is nan: it should be a finite number."),
        ("build BUNDLE --target ada", 2, "'--target' is 'ada': it should be compute capabilities"),
        ("build BUNDLE --precision ,", 2, "'--precision' is []: it should have at least 1 item"),
        ("build --matrix x.toml --target sm_89", 2, "--matrix conflicts with --target."),
        ("build BUNDLE --workspace lots", 2, "'--workspace' is 'lots': it should be a number and"),
        ("build BUNDLE --on ray", 2, "--on needs --matrix"),
        ("quantize BUNDLE --no-bias-correction", 2, "--equalize shifts channels and"),
        ("quantize BUNDLE -p fp16 --no-bias-correction", 2, "--no-bias-correction is for INT8, a"),
        ("quantize BUNDLE -p bf16 --method minmax", 2, "--method is for INT8, and --precision is"),
        ("quantize BUNDLE --evaluations 3", 2, "--evaluations limits the search for --max-drop"),
        ("quantize BUNDLE --target cpu --no-keep-defaults", 2, "--no-keep-defaults is for FP16 an"),
        ("quantize BUNDLE --calibration none", 5, "There is no calibration set called 'none'."),
        ("quantize BUNDLE --scope x{1,2}", 2, "The scope 'x{1,2}' is none of pointwise"),
        ("quantize BUNDLE --keep block9", 2, "'block9' matches no module or node to keep in FP32."),
        ("quantize BUNDLE --images /nowhere", 5, "'/nowhere' cannot be read: No such file"),
        (f"export {EMBEDDED_WEIGHTS} --name m --precision int8 -o BUNDLE/x", 5, "INT8 needs cal"),
        (
            "quantize BUNDLE --images= ",
            2,
            "'--images' is '': it should be a path; . is the working",
        ),
        ("export van_digits --set model.labels= ", 2, "'--set model.labels' is '': it should be a"),
        ("export ''", 2, "'model=' is '': it should be a path."),
        ("info ''", 2, "'spec=' is '': it should be a path."),
        ("report BUNDLE --output .", 5, "'.' is a folder. Give the path of the HTML file."),
        ("report BUNDLE --output BUNDLE/manifest.json", 5, "manifest.json' is a file of a bundle."),
        ("report BUNDLE --output BUNDLE/golden/0.png", 5, "golden/0.png' is a file of a bundle."),
        ("evaluate BUNDLE --images x --ray-address a", 2, "--ray-address needs --on ray. Add --on"),
        ("export van_digits --output= ", 2, "A path is empty. Give a path"),
        ("verify ''", 2, "A path is empty. Give a path"),
        ("serve BUNDLE --host= ", 2, "'--host' is '': it should have at least 1 character."),
        ("predict BUNDLE ''", 2, "A path is empty. Give a path"),
        ("drift BUNDLE --against golden --images x", 2, "--images needs --against weights."),
        ("check BUNDLE --baseline x --class-order names", 2, "--class-order needs --evaluate."),
        ("verify BUNDLE --images x", 2, "--images needs the original network"),
        ("verify BUNDLE --artifact fp8", 5, "has no artifact 'fp8'; it has: fp32."),
    ],
)
def test_invalid_requests_write_nothing(
    digits_bundle: Bundle, cli: Cli, words: str, code: int, message: str
) -> None:
    path = str(digits_bundle.path)  # a shared bundle: the run fails if one writes to it
    assert message in cli.fails(code, *shlex.split(words.replace("BUNDLE", path)))
