"""Mutations are put where they were chosen, whatever stands around them, and nowhere else."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from reliability.mutants import AREAS, Mutant, candidates, found_in, mutated
from reliability.mutate import MUTANTS, Row, table
from tests.each import each

SOURCE = '''
class Limits:
    def passes(self, value: float) -> bool:
        """Return whether it is within."""
        if value < 1 and self.strict:
            return False
        total = value + 1
        total += 1
        print(f"{total + 1}")
        if total < 0:
            raise ValueError(f"{total - 1}")
        return min(total, 7) < self.limit
'''
AT = Mutant("gates", "checks/gates.py", "Limits.passes", "value < 1", 0, "value <= 1")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "van_deploy/checks").mkdir(parents=True)
    (tmp_path / "van_deploy/checks/gates.py").write_text(SOURCE)
    return tmp_path


def test_what_can_be_put_into_a_function(tree: Path) -> None:
    found = {(m.fragment, m.becomes) for m in candidates(tree, "gates")}
    assert found == {
        ("if value < 1 and self.strict:", "if not (value < 1 and self.strict):"),
        ("value < 1 and self.strict", "value < 1 or self.strict"),
        ("value < 1", "value <= 1"),
        ("1", "2"),
        ("return False", "return None"),
        ("value + 1", "value - 1"),
        ("total += 1", "pass"),
        ("print(f'{total + 1}')", "pass"),
        ("if total < 0:", "if not total < 0:"),
        ("total < 0", "total <= 0"),
        ("0", "1"),
        ("raise ValueError(f'{total - 1}')", "pass"),
        ("return min(total, 7) < self.limit", "return None"),
        ("min(total, 7) < self.limit", "min(total, 7) <= self.limit"),
        ("min(total, 7)", "max(total, 7)"),
        ("7", "8"),
    }


def test_every_candidate_changes_the_code_in_one_place(tree: Path) -> None:
    sound = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in candidates(tree, "gates"):
        changed = mutated(SOURCE, mutant)
        assert changed is not None, mutant
        lines = changed[0].splitlines()
        differing = [i for i, (a, b) in enumerate(zip(sound, lines, strict=True)) if a != b]
        assert len(differing) == 1, mutant


def test_it_is_found_behind_other_lines_and_in_another_file(tree: Path) -> None:
    path = tree / "van_deploy/checks/gates.py"
    moved = tree / "van_deploy/rules.py"
    moved.write_text("# moved\n\n\n" + path.read_text())
    path.unlink()
    place = found_in(tree, AT)
    assert place is not None
    assert (place[0], place[2]) == (moved, 8)
    assert "if value <= 1 and self.strict" in place[1]


def test_a_fault_may_be_written_by_hand() -> None:
    changed = mutated(SOURCE, replace(AT, becomes="value < self.other"))
    assert changed is not None
    assert "if value < self.other and self.strict" in changed[0]


@each(
    "gone",
    [
        replace(AT, function="Limits.fails"),
        replace(AT, fragment="value < 2"),
        replace(AT, occurrence=1),
    ],
)
def test_code_that_is_gone(tree: Path, gone: Mutant) -> None:
    assert found_in(tree, gone) is None


def test_the_list_has_ten_of_each_area_or_more() -> None:
    mutants = [Mutant(**entry) for entry in json.loads(MUTANTS.read_text(encoding="utf-8"))]
    assert len(set(mutants)) == len(mutants)
    assert min(sum(m.area == area for m in mutants) for area in AREAS) >= 10


def test_the_table_counts_and_escapes() -> None:
    rows = [
        Row(AT, "checks/gates.py:5", "killed", "tests/checks/test_x.py::test_y", 1.5),
        Row(replace(AT, fragment="a | b"), "checks/gates.py", "code removed", "", 0.0),
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "1 killed, 0 survived, 1 code removed"
    assert lines[4] == (
        "| checks/gates.py:5 | Limits.passes | `value < 1` → `value <= 1` | killed | "
        "checks/test_x.py::test_y | 1.5 |"
    )
    assert "`a \\| b`" in lines[5]
