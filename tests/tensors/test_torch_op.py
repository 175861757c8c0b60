"""These tests check the operator torch.ops.expo.extrapolate: its schema, fake, gradients and use in torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import expo  # noqa: E402
import expo.op  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parents[2]
KINDS = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]


def pair(sft: torch.dtype = torch.bfloat16, aligned: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(37, 5).to(sft), torch.randn(37, 5).to(aligned)


@pytest.mark.parametrize(("sft", "aligned"), KINDS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(sft: torch.dtype, aligned: torch.dtype, strided: bool, grad: bool) -> None:
    s, a = pair(sft, aligned)
    s, a = (s.t(), a.t()) if strided else (s, a)
    torch.library.opcheck(torch.ops.expo.extrapolate, (s.requires_grad_(grad), a.requires_grad_(grad), 0.3))
    if not grad:
        torch.library.opcheck(torch.ops.expo.extrapolate_, (s, a, 0.3, torch.zeros_like(a)))


@pytest.mark.parametrize(("sft", "aligned"), KINDS)
def test_same_bits_as_the_function(sft: torch.dtype, aligned: torch.dtype) -> None:
    s, a = pair(sft, aligned)
    expected = expo.extrapolate(s, a, 0.3)
    assert torch.equal(torch.ops.expo.extrapolate(s, a, 0.3), expected)
    out = torch.zeros_like(a)
    torch.ops.expo.extrapolate_(s, a, 0.3, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_as_one_node(backend: str) -> None:
    s, a = pair()

    def double(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.ops.expo.extrapolate(s, a * 2, 0.3) + 1  # type: ignore[no-any-return]

    compiled = torch.compile(double, fullgraph=True, backend=backend)
    assert torch.equal(compiled(s, a), expo.extrapolate(s, a * 2, 0.3) + 1)


def test_gradients() -> None:
    s, a = (x.double().requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(lambda s, a: torch.ops.expo.extrapolate(s, a, 0.25), (s, a))


def test_fake_refuses_what_the_function_refuses() -> None:
    s, a = pair()
    for function in (torch.ops.expo.extrapolate, expo.extrapolate):
        with pytest.raises(expo.UsageError, match="shapes"):
            function(s[1:].to("meta"), a.to("meta"), 0.3)


WITHOUT_MEMORY = """
import torch, expo, expo.op
from torch.testing._internal.two_tensor import TwoTensor
x, out = TwoTensor(torch.ones(4), torch.ones(4)), torch.zeros(4)
for call in (
    lambda: torch.ops.expo.extrapolate(x, x, 0.3),
    lambda: torch.ops.expo.extrapolate_(x, x, 0.3, out),
    lambda: torch.ops.expo.extrapolate_(out, out.clone(), 0.3, x),
):
    with torch._C._DisableTorchDispatch():  # has the effect of a mode that does not unwrap
        try:
            call()
        except expo.UsageError as error:
            print(error)
"""


def test_a_tensor_without_memory_is_refused_and_its_shape_is_to_be_had() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert [line.split(" of its own")[0] for line in done.stdout.splitlines()] == [
        f"{role} is a TwoTensor on cpu without memory" for role in ("sft", "sft", "out")
    ]
    found = torch.ops.expo.extrapolate(torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta").half(), 0.3)
    assert (found.device.type, found.dtype, tuple(found.shape)) == ("meta", torch.float16, (3, 4))


@pytest.mark.parametrize(
    ("imports", "found"), [("torch, expo", True), ("expo, torch, expo.op", True), ("expo, torch", False)]
)
def test_who_registers_it(imports: str, found: bool) -> None:
    """`import expo` registers the operator only if torch is already imported; it never imports torch for this."""
    code = f"import {imports}\nassert hasattr(torch.ops.expo, 'extrapolate') is {found}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
