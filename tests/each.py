"""Many small cases in one test: ``@each`` is ``parametrize`` that makes a single item.

For cases that take milliseconds and share their fixtures. All are tried; a failure names
every case that failed and shows the first one's traceback. ``tmp_path`` is a new folder for
each case, and a fixture named as ``fresh`` is copied for each; a case must leave others as they
were.
"""

from __future__ import annotations

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
        names: of the arguments that a case gives, as ``pytest.mark.parametrize`` takes them.
        cases: one value each, or as many as there are names.
        fresh: a fixture, a folder or an object, of which each case gets a copy of its own.
    """
    chosen = tuple(names.replace(" ", "").split(",")) if isinstance(names, str) else names
    listed = [case if len(chosen) > 1 else (case,) for case in cases]

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def looped(*arguments: Any, **fixtures: Any) -> None:
            failed: list[tuple[Any, BaseException]] = []
            for number, values in enumerate(listed):
                given = {**fixtures, **dict(zip(chosen, values, strict=True))}
                if "tmp_path" in given:
                    given["tmp_path"] = _folder(given["tmp_path"], number)
                if fresh:
                    given[fresh] = _copy(given[fresh], number)
                try:
                    test(*arguments, **given)
                except (Exception, pytest.fail.Exception) as error:
                    failed.append((values, error))
            if failed:
                lines = [f"{_short(values)}: {_short(error)}" for values, error in failed]
                told = "\n".join([f"{len(failed)} of {len(listed)} cases failed", *lines])
                raise AssertionError(told) from failed[0][1]

        left = [p for name, p in signature.parameters.items() if name not in chosen]
        looped.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return cast(Test, looped)

    assert listed, "there is no case"
    return decorate


def _copy(value: object, number: int) -> object:
    """Return a copy of a folder, beside it, or of an object."""
    if not isinstance(value, Path):
        return copy.deepcopy(value)
    target = value.with_name(f"{value.name}-{number}")
    return Path(shutil.copytree(value, target, symlinks=True))


def _folder(parent: Path, number: int) -> Path:
    folder = parent / str(number)
    folder.mkdir()
    return folder


def _short(value: object) -> str:
    text = " ".join((str(value) if isinstance(value, BaseException) else repr(value)).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
