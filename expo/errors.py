"""The errors that a user can cause or meet. Every other exception is a bug.

    ExpoError
    ├── UsageError       an argument that makes no sense: a wrong alpha, rule or engine name       (exit code 2)
    ├── EngineError      an engine or a device that cannot do the work here                        (exit code 2)
    ├── CheckpointError  an input that is missing, damaged or of a kind that cannot be read        (exit code 3)
    ├── PlanError        two readable inputs that cannot be merged                                 (exit code 3)
    ├── OutputError      an output that could not be written                                       (exit code 4)
    ├── RankError        another process of the same merge that failed, died, or sees other inputs  (exit code 4)
    └── Cancelled        a request of the caller to stop; the output's path stays as it was        (exit code 130)

A message names the problem, the place (file and tensor), both values, and the fix.
"""


class ExpoError(Exception):
    """Base of every expected error; `str(error)` is a message for a person.

    Attributes:
        hints: Sentences that callers have added to the message: which files are left, and how to continue.
    """

    exit_code = 1
    hints: tuple[str, ...] = ()

    def add_hints(self, *hints: str) -> None:
        """Add sentences to the message."""
        self.hints = (*self.hints, *hints)

    def __str__(self) -> str:
        return "; ".join(filter(None, (super().__str__(), *self.hints)))


class UsageError(ExpoError, ValueError):
    """An error for an argument that makes no sense."""

    exit_code = 2


class EngineError(ExpoError, RuntimeError):
    """An error for an engine or a device that is missing, fails, or has too little memory for the work."""

    exit_code = 2


class CheckpointError(ExpoError):
    """An error for an input that is missing, damaged, or of a kind that cannot be read."""

    exit_code = 3


class PlanError(ExpoError):
    """An error for two readable inputs that cannot be merged; the message lists every reason at once."""

    exit_code = 3


class OutputError(ExpoError):
    """An error for an output that could not be written; the inputs and the output's path stay as they were."""

    exit_code = 4


class RankError(ExpoError):
    """An error for another process of the same merge that failed, died, or sees other inputs.

    Attributes:
        kind: The name of the other process's exception; "" if it is not known.
    """

    exit_code = 4

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Cancelled(ExpoError):
    """An error for a merge that the caller's `cancel` event has stopped; `resume` continues from the finished part."""

    exit_code = 130
