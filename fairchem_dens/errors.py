"""What may end a run, other than settings that are wrong (those are a `ValueError`)."""

from __future__ import annotations


class TooManyBadSteps(ArithmeticError):  # noqa: N818  # it says what happened
    """Loss or gradient were not finite in too many steps in a row; the weights are those before them."""


class CheckpointNotWritten(OSError):  # noqa: N818
    """A checkpoint could not be written. A file that was there before is as it was."""


class UnreadableRecord(ValueError):  # noqa: N818
    """A structure of a data set is missing, damaged or not what training needs; names file and record.

    Attributes:
        place: the file and the number of the record in it, as a line of text.
        problem: what is wrong.
    """

    def __init__(self, message: str, place: str = "", problem: str = "") -> None:
        super().__init__(message)
        self.place, self.problem = place, problem

    def __reduce__(self) -> tuple[type[UnreadableRecord], tuple[str, str, str]]:
        # Out of a loader worker it travels pickled.
        return type(self), (str(self), self.place, self.problem)
