"""``@each`` runs every case and lists the failed ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.each import each


def run(test: Callable[..., Any], **fixtures: object) -> None:
    cast("Callable[..., None]", test)(**fixtures)


def test_every_case_runs_in_its_own_folder(tmp_path: Path) -> None:
    seen: list[object] = []
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent/there").touch()

    @each("name", ["a", "b"], fresh="lent")
    def odd_fails(tmp_path: Path, lent: Path, name: str) -> None:
        seen.append((name, sorted(p.name for p in lent.iterdir()), list(tmp_path.iterdir())))
        (tmp_path / name).touch()
        (lent / name).touch()
        assert name == "b"

    with pytest.raises(AssertionError) as caught:
        run(odd_fails, tmp_path=tmp_path, lent=tmp_path / "lent")
    assert seen == [("a", ["there"], []), ("b", ["there"], [])]
    assert str(caught.value).splitlines()[0] == "1 of 2 cases failed"
    assert caught.value.__cause__ is not None


@each("outcomes, expected", [("skip pass", "skip"), ("fail skip", "fail"), ("skip fail", "fail")])
def test_a_skipped_case_hides_no_failure(outcomes: str, expected: str) -> None:
    ran: list[str] = []
    ends: dict[str, Any] = {"skip": pytest.skip, "fail": pytest.fail, "pass": str}

    @each("outcome", outcomes.split())
    def cases(outcome: str) -> None:
        ran.append(outcome)
        ends[outcome]("why")

    error = pytest.skip.Exception if expected == "skip" else AssertionError
    with pytest.raises(error, match="why"):
        run(cases)
    assert ran == outcomes.split()
