"""Run the benchmarks of this project and write their tables to docs/benchmarks.md.

    python -m benchmarks                          # all sections
    python -m benchmarks --only startup,export    # some sections; the others are not changed
    python -m benchmarks --only export variant=van_b0 rounds=1

Each section is a function that runs in its own process and returns a
:class:`~benchmarks.table.Table`. Its docstring and table replace the text between its marks on the
page, with the date, the machine and the versions of the run.

``checkpoint=FILE calib=FOLDER eval=FOLDER`` are trained weights, their calibration and evaluation
images; by default the network and the images in the package.
"""

import argparse
import functools
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil

from benchmarks.table import ROOT, Table, names_of, run_in_process, write_section
from van_deploy.report.render_markdown import markdown_table

PAGE = ROOT / "docs" / "benchmarks.md"
BUSY_PERCENT = 10.0  # CPU load above which the page notes that the machine was under load


@functools.cache
def _sections() -> dict[str, Callable[..., Table]]:
    """Return the sections by name, in order; the processes that run them import only their own."""
    from benchmarks import accuracy, serve, speed

    sections = (
        *(speed.startup, speed.export, speed.running, speed.rivals),
        *(accuracy.gates, accuracy.precision, accuracy.ablation, serve.serve),
    )
    return {section.__name__: section for section in sections}


def main() -> int:
    """Run the requested sections; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE", help="of the sections")
    parser.add_argument("--only", **names_of(_sections()), help="sections: %(default)s")
    options = parser.parse_args()
    names, values = options.only, dict(v.partition("=")[::2] for v in options.values)
    if unknown := set(values) - {key for name in names for key in _parameters(name)}:
        parser.error(f"no section takes a value '{min(unknown)}'")
    return max(_run_section(name, values) for name in names)


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_sections()[name]).parameters


def _run_section(name: str, values: Mapping[str, str]) -> int:
    """Run one section and write it to the page; return 1 after a failure."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    busy, start = psutil.cpu_percent(interval=1.0), time.perf_counter()
    given = {key: values[key] for key in _parameters(name) if key in values}
    try:
        typed = {key: type(_parameters(name)[key].default)(text) for key, text in given.items()}
        table: Table = run_in_process(_sections()[name], **typed)
    except Exception as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    if busy > BUSY_PERCENT:
        table.notes.append(f"**The machine was under load**: {busy:.0f} % busy before the start.")
    text = (inspect.getdoc(_sections()[name]) or "").partition("\n\nArgs:")[0]
    command = " ".join(["python -m benchmarks --only", name, *map("=".join, given.items())])
    rows = markdown_table(table.columns, table.rows, _numeric_columns(table.rows))
    notes = "\n".join(f"- {note}" for note in table.notes)
    introduction = "## " + text.replace(".\n\n", "\n\n", 1) + "\n\n"
    write_section(PAGE, name, command, seconds, f"{rows}\n\n{notes}", introduction)
    return 0


def _numeric_columns(rows: Iterable[list[Any]]) -> set[int]:
    pattern = re.compile(r"[-+\d.,]*(\s|$|\d)")
    columns = enumerate(zip(*rows, strict=True))
    return {index for index, cells in columns if all(map(pattern.match, cells))}


if __name__ == "__main__":
    raise SystemExit(main())
