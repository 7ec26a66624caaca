"""``van-deploy doctor``: what is installed, what it can do here, and what clashes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit
from van_deploy.environment.needs import Need

__all__ = ["doctor"]


def doctor(
    require: Annotated[
        list[Need] | None,
        typer.Option(
            metavar="NAME",
            help="Exit with code 3 unless NAME is here and usable; may be repeated. "
            f"One of {', '.join(need.value for need in Need)}.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is installed, what can be done on this machine, and what clashes.

    Example: van-deploy doctor --require onnxruntime --require gpu
    """
    from van_deploy.environment.machine import environment_here
    from van_deploy.environment.needs import diagnosis_of
    from van_deploy.environment.needs import require as require_
    from van_deploy.report.sections_engine import environment_blocks

    environment = environment_here(Path.cwd())
    emit(diagnosis_of(environment), as_json, environment_blocks)
    require_(environment, require or ())
