"""The errors a user can cause, and nothing else; anything outside this tree is a bug.

    ExpoError
    ├── UsageError       an argument that makes no sense: a wrong alpha, rule or engine name       (exit code 2)
    ├── EngineError      an engine asked for by name that cannot run here                          (exit code 2)
    ├── CheckpointError  an input that is missing, damaged or of a kind that cannot be read        (exit code 3)
    ├── PlanError        two readable inputs that cannot be merged                                 (exit code 3)
    ├── OutputError      an output that could not be written                                       (exit code 4)
    ├── RankError        another process of the same merge that failed, died, or sees other inputs  (exit code 4)
    └── Cancelled        the caller asked to stop; nothing stands at the output's path              (exit code 130)

A message says what, where (file and tensor), both values, and the fix.
"""


class ExpoError(Exception):
    """Base of every expected error; `str(error)` is a message for a person.

    Attributes:
        hints: Sentences that the caller of the code that failed added: what is left, and how to go on.
    """

    exit_code = 1
    hints: tuple[str, ...] = ()

    def add_hints(self, *hints: str) -> None:
        """Add sentences to the message."""
        self.hints = (*self.hints, *hints)

    def __str__(self) -> str:
        return "; ".join(filter(None, (super().__str__(), *self.hints)))


class UsageError(ExpoError, ValueError):
    """An argument that makes no sense."""

    exit_code = 2


class EngineError(ExpoError, RuntimeError):
    """An engine asked for by name that cannot run on this machine or on these tensors."""

    exit_code = 2


class CheckpointError(ExpoError):
    """An input that is missing, damaged, or of a kind that cannot be read."""

    exit_code = 3


class PlanError(ExpoError):
    """Two readable inputs that cannot be merged; the message lists every reason at once."""

    exit_code = 3


class OutputError(ExpoError):
    """An output that could not be written; the inputs are untouched and nothing stands at the output's path."""

    exit_code = 4


class RankError(ExpoError):
    """Another process of the same merge failed, died, or sees other inputs; kind: the name of its exception."""

    exit_code = 4

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Cancelled(ExpoError):
    """The caller's `cancel` event was set; what is done is kept for a merge that resumes."""

    exit_code = 130
