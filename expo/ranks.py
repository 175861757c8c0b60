"""The public module for programs that a launcher starts several times: `with expo.ranks.join() as ranks: ...`."""

from .merging.launcher import join, launched

__all__ = ["join", "launched"]
