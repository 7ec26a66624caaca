"""Commands run in forks of a process that has imported everything.

What a command imports takes longer than what it does. In a fork that is there already,
so a trial takes only the work itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["Fork"]

NEEDED = (
    *("torch", "torch._dynamo", "torch.onnx", "torchvision", "timm", "onnx", "onnxscript"),
    *("onnxsim", "onnxruntime", "tensorrt_rtx", "van_deploy.run", "van_deploy.pipeline"),
    "van_deploy.cli.make",
)
TRACEBACK = 99  # exit code of a command that raised


class Fork:
    """``van-deploy`` with these words, in a process of its own that has begun.

    Args:
        words: of the command line.
        log: a file for what it says on stderr.
        first: called in the fork before the command.
    """

    def __init__(
        self, words: Sequence[str | Path], log: Path, first: Callable[[], object] = lambda: None
    ) -> None:
        """Begin it."""
        for name in NEEDED:
            with contextlib.suppress(ImportError):  # tensorrt_rtx is not everywhere
                importlib.import_module(name)
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            _be([*map(str, words)], log, first)

    def finished(self) -> tuple[int, str]:
        """Wait for its end; return the exit code and what it said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, self.log.read_text(errors="replace")


def _be(words: list[str], log: Path, first: Callable[[], object]) -> NoReturn:
    """Be the command; never return."""
    code = TRACEBACK
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import torch

        from van_deploy.cli.app import app

        torch.set_num_threads(1)
        first()
        app([*words, "--json"], prog_name="van-deploy", standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
