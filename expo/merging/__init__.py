"""Merge two checkpoints into a third: `MergeJob`, the coordinator of rank 0, the worker of each rank, and the result.

`merge` opens a `MergeJob` and exchanges values with the other ranks through a `SingleProcess` or a `ProcessGroup`. On
rank 0 a `Coordinator` stages, completes and commits the outputs; on every rank a `RankWorker` computes a part of them.
"""
