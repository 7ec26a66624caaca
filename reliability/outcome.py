"""The outcome of one run with a fault, as every part of this folder reports it."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """What was done, what happened, and a message if that is a failure.

    Attributes:
        what: the fault, load or kind of input: a row of the table.
        text: what happened, such as the exit code.
        failure: the message of a failure.
        count: number of runs.
    """

    what: str
    text: str
    failure: str = ""
    count: int = 1
