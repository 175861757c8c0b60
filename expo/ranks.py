"""The ranks of one merge, for programs that a launcher starts several times: `with expo.ranks.join() as ranks: ...`."""

from .merging.process_group import join, launched

__all__ = ["join", "launched"]
