"""How long does the host take to launch a kernel, beside the launch itself? The GPU is simulated and computes nothing.

A launch on a GPU returns before the GPU has finished, so this is the time that small weights take. The launcher of the
simulated GPU does nothing: the figures have everything that Python does for a launch, and not CUDA's part. They are the
best of many rounds, because other work on the machine only adds to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the simulated GPU needs a newer Triton")

from software_gpu import SoftwareGpu

import expo
from expo.execution import gpu_fallback
from expo.kernels import extrapolate, selftest, whole_model
from expo.tensors import gpu_calls, gpu_tensors
from expo.tensors.live import Live

CPU = torch.device("cpu")
LAYERS = 32  # of nine tensors each; with the embedding, the last norm and the head a model has 291, as Llama-2-7B
SIDE = 16  # the sizes of tensors have no effect here
ROUNDS, CALLS, LIST_CALLS = 40, 20, 3
MOST_OF_CHECKED = 1 / 3  # a repeated call takes at most this share of the time of a call that is checked in full
MOST_OF_WALK = 1 / 4  # Live takes at most this share of the time of a walk over all parameters, beside the launch
ALPHA = 0.3


class IdleGpu(SoftwareGpu):
    """A simulated GPU whose launches do nothing."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let tensors on the CPU count as a GPU's that has passed the self-test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(selftest, "_passed", {CPU})
    monkeypatch.setattr(gpu_fallback, "_given_up", {})
    monkeypatch.setattr(gpu_tensors, "on_gpu", lambda _: True)
    monkeypatch.setattr(gpu_calls, "tables", gpu_calls.TableCache())
    monkeypatch.setattr("expo.tensors.live._on_cpu", lambda _: False)
    with IdleGpu().active():
        yield


class Layer(torch.nn.Module):
    """The nine parameters of a layer of a language model, in two inner modules and two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = (
            torch.nn.ModuleDict({name: torch.nn.Linear(SIDE, SIDE, bias=False) for name in names})
            for names in ("qkvo", "gud")
        )
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(SIDE) for _ in range(2)])


def make_model() -> torch.nn.Module:
    """Return a model with the parameters of Llama-2-7B and tiny sizes, in bf16."""
    layers = torch.nn.ModuleList([Layer() for _ in range(LAYERS)])
    ends = (torch.nn.Embedding(SIDE, SIDE), torch.nn.RMSNorm(SIDE), torch.nn.Linear(SIDE, SIDE, bias=False))
    return torch.nn.ModuleList([layers, *ends]).bfloat16()


def best_seconds(*calls: Callable[[], Any], repeats: int = CALLS) -> list[float]:
    """Return the shortest time of each call; the calls take turns, so that other work affects all of them."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / repeats)
    return best


def record(benchmark: Any, call: Callable[[], Any], **seconds: float) -> None:
    """Let pytest-benchmark time a call, and add figures to its own, in microseconds."""
    benchmark.group = "the host's part of a launch"
    benchmark.pedantic(call, rounds=ROUNDS, iterations=LIST_CALLS, warmup_rounds=1)
    benchmark.extra_info.update({f"{name}_us": round(value * 1e6, 2) for name, value in seconds.items()})


def launch_table(table: whole_model.Table) -> None:
    """Launch the only group of a table as Triton's users do."""
    (group,) = table.groups
    whole_model.whole_model[group.programs,](
        group.table, ALPHA, *group.constants.values(), whole_model.SEGMENT, whole_model.PROGRAM_ELEMENTS, True,
        **extrapolate.OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["other outs", "in place", "iterators"])
def test_lists(benchmark: Any, form: str) -> None:
    """Time a repeated call for the same 291 tensors, and the same call with an empty cache."""
    models = [make_model() for _ in range(3)]
    give = iter if form == "iterators" else list
    sft, aligned, other = ([*model.parameters()] for model in models)
    outs = other if form == "other outs" else aligned

    def call() -> None:
        expo.extrapolate(give(sft), give(aligned), ALPHA, out=give(outs))  # type: ignore[call-overload]

    def call_checked() -> None:
        gpu_calls.tables.clear()
        call()

    checked, repeated = best_seconds(call_checked, call, repeats=LIST_CALLS)
    record(benchmark, call, best=repeated, checked=checked)
    assert len(sft) == 291
    assert repeated <= MOST_OF_CHECKED * checked


def test_one_tensor(benchmark: Any) -> None:
    """Time a call for one tensor, and Triton's own launch alone."""
    sft, aligned, out = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(3))

    def call() -> None:
        expo.extrapolate(sft, aligned, ALPHA, out=out)

    def launch() -> None:
        extrapolate.extrapolate[(1,)](
            sft, aligned, out, SIDE * SIDE, ALPHA, extrapolate.PROGRAM_ELEMENTS, True, **extrapolate.OPTIONS
        )

    whole, alone = best_seconds(call, launch)
    record(benchmark, call, best=whole, launch=alone, above_launch=whole - alone)
    assert whole <= 2 * alone


def test_live(benchmark: Any) -> None:
    """Time the setting of an alpha, Triton's own launch alone, and a walk over all parameters of the model."""
    model, sft = make_model(), make_model()
    live = Live(model, sft)
    alphas = iter(range(1, 1_000_000))

    def set_alpha() -> None:
        live.alpha = next(alphas) / 1e6

    set_alpha()
    (table,) = live._tables.values()

    def walk() -> None:
        for parameter in model.parameters():
            parameter.data_ptr()

    setting, alone, walking = best_seconds(set_alpha, lambda: launch_table(table), walk)
    record(benchmark, set_alpha, best=setting, launch=alone, walk=walking, above_launch=setting - alone)
    assert setting - alone <= MOST_OF_WALK * walking
