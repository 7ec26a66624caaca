"""The outcome of one run with a fault, as every part of this folder reports it."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """What was done, what happened, and a message if that is a failure.

    Attributes:
        what: the fault, load or kind of input: a row of the table.
        text: what happened, such as the exit code.
        failure: the message of a failure.
        runs: how many runs ended so.
    """

    what: str
    text: str
    failure: str = ""
    runs: int = 1
