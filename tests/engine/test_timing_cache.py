"""One timing cache for several builds at once: nothing learnt is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from van_deploy.engine import timing_cache
from van_deploy.engine.backend import Backend
from van_deploy.errors import ConversionError

ADD = """
import sys, time
from pathlib import Path
from van_deploy.engine.timing_cache import merge_into_file

def slowly(now):
    time.sleep(0.1)
    return now + sys.argv[2].encode()

merge_into_file(Path(sys.argv[1]), slowly)
"""


def test_processes_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "caches" / "timing.cache"
    writers = [subprocess.Popen([sys.executable, "-c", ADD, str(path), letter]) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(path.read_bytes()) == sorted(b"abc")
    monkeypatch.setattr(timing_cache, "LOCK_WAIT_S", 0.05)
    with (
        FileLock(path.with_name(".timing.cache.lock")),
        pytest.raises(ConversionError, match="Another build has held the timing cache"),
    ):
        timing_cache.merge_into_file(path, lambda now: now)


def test_a_failed_merge_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"old")

    def fail(now: bytes) -> bytes:
        raise KeyError(now)

    with pytest.raises(KeyError):
        timing_cache.merge_into_file(path, fail)
    assert path.read_bytes() == b"old"


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")
def test_the_calls_are_those_of_the_bindings(rtx: Backend, tmp_path: Path) -> None:
    """On RTX they do nothing, but they are the calls that TensorRT has."""
    trt = rtx.module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    path = tmp_path / "timing.cache"
    held = timing_cache.attach_(config, path)
    timing_cache.save(config, held, path)
    assert path.exists()
