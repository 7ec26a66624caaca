"""Nothing here tells anybody that it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from van_deploy.environment.privacy import imported_quietly, without_ray_reports


def test_openvino_is_imported_with_a_stand_in_for_its_reporter() -> None:
    """OpenVINO 2026.4 resolves www.google-analytics.com when it is imported otherwise."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    code = (
        "import sys\n"
        "asked = []\n"
        "sys.addaudithook(lambda e, d: asked.append(d[0]) if e == 'socket.getaddrinfo' else None)\n"
        "from van_deploy.environment.privacy import imported_quietly\n"
        "import time\n"
        "print(bool(imported_quietly('openvino').__version__))\n"
        "time.sleep(0.5)\n"  # reports are sent from a thread
        "print(asked, 'openvino_telemetry' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout == "True\n[] False\n"


def test_a_reporter_that_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", mine)
    assert imported_quietly("json").__name__ == "json"
    assert sys.modules["openvino_telemetry"] is mine


def test_a_failed_import_leaves_nothing_behind() -> None:
    with pytest.raises(ImportError):
        imported_quietly("there_is_no_such_module")
    assert "openvino_telemetry" not in sys.modules


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_ray_reports_only_if_the_user_said_so(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    if before:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", before)
    without_ray_reports()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == after
