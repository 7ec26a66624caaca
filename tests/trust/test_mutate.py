"""Mutations change the code in one place, and never a message or a type."""

from __future__ import annotations

import ast
from pathlib import Path

from reliability.mutate import AREAS, chosen, mutants_of, mutated

ROOT = Path(__file__).parents[2]
SOURCE = '''
LIMIT = 7
class Limits:
    def passes(self, value: float = 1) -> bool:
        """Return whether it is within."""
        if value < 1 and self.strict:
            return False
        total = value + 1
        total += 2
        print(f"{total + 3}")
        if total < 0:
            raise ValueError(f"{total - 4}")
        return min(total, 7) < self.limit
'''


def test_what_can_be_put_into_a_function() -> None:
    assert {(m.before, m.after) for m in mutants_of(SOURCE, "gates", "x.py")} == {
        ("value < 1 and self.strict", "value < 1 or self.strict"),
        ("value < 1", "value <= 1"),
        ("1", "2"),
        ("value + 1", "value - 1"),
        ("total += 2", "pass"),
        ("2", "3"),
        ("total < 0", "total <= 0"),
        ("0", "1"),
        ("raise ValueError(f'{total - 4}')", "pass"),
        ("min(total, 7) < self.limit", "min(total, 7) <= self.limit"),
        ("min(total, 7)", "max(total, 7)"),
        ("7", "8"),
    }


def test_every_mutant_changes_one_line() -> None:
    sound = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in mutants_of(SOURCE, "gates", "x.py"):
        lines = mutated(SOURCE, mutant).splitlines()
        assert sum(a != b for a, b in zip(sound, lines, strict=True)) == 1, mutant


def test_the_choice_is_seeded_and_has_as_many_of_each_area() -> None:
    found = chosen(ROOT, 12)
    assert found == chosen(ROOT, 12)
    assert [sum(m.area == area for m in found) for area in AREAS] == [2] * len(AREAS)
