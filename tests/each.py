"""Runs many small cases in one test: ``@each`` is ``parametrize`` with a single test item.

For cases that take milliseconds and share their fixtures. All cases run; a failure lists every
failed case with the traceback of the first. Without a failure, a case that is skipped skips the
test. ``tmp_path`` is a new folder for each case, and
the fixture ``fresh`` is copied for each; a case must not change other fixtures.
"""

import copy
import functools
import inspect
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

Test = TypeVar("Test", bound=Callable[..., None])


def each(
    names: str | tuple[str, ...], cases: Iterable[Any], *, fresh: str = ""
) -> Callable[[Test], Test]:
    """Return a decorator that runs a test once for each case, as one item.

    Args:
        names: argument names, as for ``pytest.mark.parametrize``.
        cases: one value each, or one for each name.
        fresh: a fixture (a folder or an object) to copy for each case.
    """
    chosen = tuple(names.replace(" ", "").split(",")) if isinstance(names, str) else names
    listed = [case if len(chosen) > 1 else (case,) for case in cases]

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run_cases(**fixtures: Any) -> None:
            failed: list[tuple[Any, BaseException]] = []
            skipped: list[BaseException] = []
            for number, values in enumerate(listed):
                kwargs = {**fixtures, **dict(zip(chosen, values, strict=True))}
                if "tmp_path" in kwargs:
                    kwargs["tmp_path"] /= str(number)
                    kwargs["tmp_path"].mkdir()
                if fresh:
                    kwargs[fresh] = _copy(kwargs[fresh], number)
                try:
                    test(**kwargs)
                except pytest.skip.Exception as skip:
                    skipped.append(skip)
                except (Exception, pytest.fail.Exception) as error:
                    failed.append((values, error))
            if failed:
                lines = [f"{_short(values)}: {_short(error)}" for values, error in failed]
                message = "\n".join([f"{len(failed)} of {len(listed)} cases failed", *lines])
                raise AssertionError(message) from failed[0][1]
            if skipped:
                raise skipped[0]

        others = [p for name, p in signature.parameters.items() if name not in chosen]
        run_cases.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return cast(Test, run_cases)

    assert listed, "there is no case"
    return decorate


def _copy(value: object, number: int) -> object:
    """Return a copy of a folder, next to it, or of an object."""
    if not isinstance(value, Path):
        return copy.deepcopy(value)
    target = value.with_name(f"{value.name}-{number}")
    return Path(shutil.copytree(value, target, symlinks=True))


def _short(value: object) -> str:
    text = " ".join((str(value) if isinstance(value, BaseException) else repr(value)).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
