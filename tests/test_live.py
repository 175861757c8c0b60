"""Live: a model in memory has the bits that merged files would have, whichever way its originals are kept."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import expo
import expo.live
from expo.demo import ALIGNED, SFT
from expo.live import KEEP, Live

Weights = Mapping[str, torch.Tensor]


class Small(torch.nn.Module):
    """Two matrices in two dtypes, a vector, a buffer, and an odd number of elements."""

    def __init__(self, seed: int, rows: int = 7, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter((torch.randn(shape, generator=random) * 0.02).to(dtype))

        self.embed_tokens = torch.nn.Module()
        self.embed_tokens.weight = parameter(rows, 5, dtype=dtype)
        self.wide = parameter(3, 11, dtype=torch.float32)
        self.narrow = parameter(13, dtype=torch.float16)
        self.register_buffer("seen", torch.full((2,), float(seed)))


def loaded(path: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one if one[name].dim()
    )


def merged(sft: torch.nn.Module, aligned: torch.nn.Module, folder: Path, alpha: float, **options: Any) -> Weights:
    """What a merge from file to file makes of the parameters."""
    folder.mkdir()
    for name, model in (("sft", sft), ("aligned", aligned)):
        save_file(dict(model.named_parameters()), folder / f"{name}.safetensors")
    files = [folder / f"{name}.safetensors" for name in ("sft", "aligned", "out")]
    expo.merge(files[0], files[1], alpha, files[2], **options)
    return load_file(files[2])


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("kind", ["path", "module"])
def test_the_bits_of_merged_files_on_the_demo(keep: str, kind: str, tmp_path: Path) -> None:
    model = loaded(ALIGNED)
    before = bits(model)
    with Live(model, SFT if kind == "path" else loaded(SFT), keep=keep) as live:
        assert live.alpha == 0
        for alpha in (0.5, -1.5, 0.1):
            live.alpha = alpha
            assert live.alpha == alpha
            expo.merge(SFT, ALIGNED, alpha, tmp_path / str(alpha))
            assert same(bits(model), bits(loaded(tmp_path / str(alpha))))
        live.alpha = 0
        assert same(bits(model), before)
        live.alpha = 0.3
    assert same(bits(model), before), "the context restores aligned"


@pytest.mark.parametrize("keep", KEEP)
def test_every_dtype_and_rules(keep: str, tmp_path: Path) -> None:
    sft, model = Small(1), Small(2)
    rules = {"wide": 2.0, "narrow": 0.0}
    expected = merged(sft, model, tmp_path / "files", 0.7, alpha_for=rules)
    live = Live(model, sft, keep=keep, alpha_for=rules)
    live.alpha = 0.7
    assert same(dict(model.named_parameters()), expected)
    assert model.seen.tolist() == [2.0, 2.0], "buffers are not touched"
    live.alpha = 0.0
    assert same(bits(model), bits(Small(2)))


@pytest.mark.parametrize("job", [1, 2, 4, 1 << 20])
def test_whatever_a_thread_takes_at_a_time(job: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.live, "JOB", job)
    sft, model = Small(1), Small(2)
    expected = merged(sft, model, tmp_path / "files", 0.7)
    Live(model, sft).alpha = 0.7
    assert same(dict(model.named_parameters()), expected)


def test_a_model_of_another_dtype_than_its_sft(tmp_path: Path) -> None:
    sft, model = Small(1, dtype=torch.float32), Small(2, dtype=torch.float64)
    expected = merged(sft, model, tmp_path / "files", 0.7)
    live = Live(model, sft)
    live.alpha = 0.7
    assert same(dict(model.named_parameters()), expected)


def test_rows(tmp_path: Path) -> None:
    sft, model = Small(1, rows=5), Small(2, rows=7)
    with pytest.raises(expo.PlanError, match="--on-mismatch"):
        Live(model, sft)
    expected = merged(sft, model, tmp_path / "files", 0.7, on_mismatch="rows")
    Live(model, sft, on_mismatch="rows").alpha = 0.7
    assert same(dict(model.named_parameters()), expected)
    assert torch.equal(model.embed_tokens.weight[5:], Small(2).embed_tokens.weight[5:])


def test_tied_parameters_are_rewritten_once() -> None:
    model = loaded(ALIGNED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    live = Live(model, SFT)
    assert live.memory == 2 * sum(parameter.nbytes for parameter in model.parameters())
    live.alpha = 0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_given_as_sft_is_used_where_it_is() -> None:
    model, sft = Small(2), Small(1)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert Live(model, sft).memory == size
    assert Live(model, sft, keep="host").memory == 2 * size


def test_sft_by_another_name_or_as_a_bin_file(tmp_path: Path) -> None:
    """What merge() can read and pair, Live can."""
    folder = tmp_path / "sft"
    shutil.copytree(SFT, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    weights = {
        f"module.{name}": tensor for name, tensor in loaded(SFT).state_dict().items() if name != "lm_head.weight"
    }
    torch.save(weights, folder / "pytorch_model.bin")
    model, other = loaded(ALIGNED), loaded(ALIGNED)
    Live(model, folder).alpha = 0.5
    Live(other, SFT).alpha = 0.5
    assert same(bits(model), bits(other))


def test_gradients_and_optimisers_go_on() -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    live.alpha = 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.wide.sum().backward()
    assert model.wide.grad is not None


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39, "0.5", None])
def test_an_alpha_that_is_no_finite_number_changes_nothing(alpha: Any) -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    live.alpha = 0.25
    before = bits(model)
    with pytest.raises(expo.UsageError, match="alpha must be a number that is finite in float32"):
        live.alpha = alpha
    assert live.alpha == 0.25
    assert same(bits(model), before)


def test_a_model_that_was_moved_is_noticed() -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    model.wide.data = model.wide.data.clone()
    with pytest.raises(expo.UsageError, match="not where they were"):
        live.alpha = 0.5


def test_a_failure_in_the_middle_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    with monkeypatch.context() as patch:
        patch.setattr(expo.live, "compute_at", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.alpha = 0.5
    assert live.alpha is None, "some parameters may be of the new alpha"
    live.alpha = 0
    assert same(bits(model), bits(Small(2)))


@pytest.mark.parametrize("keep", KEEP)
def test_close_restores_and_lets_go(keep: str) -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft, keep=keep)
    live.alpha = 0.5
    room = weakref.ref(live._trios[0].aligned.untyped_storage())
    live.close()
    live.close()
    gc.collect()
    assert room() is None
    assert live.memory == 0
    assert same(bits(model), bits(Small(2)))
    with pytest.raises(expo.UsageError, match="closed"):
        live.alpha = 0.5


@pytest.mark.parametrize(("keep", "where"), [("device", "memory"), ("host", "memory"), ("disk", "the disk of ")])
def test_too_little_room_is_told_before_anything_is_copied(
    keep: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expo.live, "available_memory", lambda: 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    others = ", ".join(each for each in KEEP if each != keep)
    with pytest.raises(expo.EngineError) as caught:
        Live(Small(2), SFT if keep == "none" else Small(1, dtype=torch.bfloat16), keep=keep)
    assert str(caught.value).startswith(f"keep='{keep}' takes ")
    assert where in str(caught.value)
    assert str(caught.value).endswith(f"100 bytes are free: try {others}")


def meta() -> torch.nn.Module:
    with torch.device("meta"):
        return Small(2)


def integers() -> torch.nn.Module:
    model = Small(2)
    model.count = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (meta, "not in memory"),
        (integers, "count is torch.int64: parameters must be contiguous bf16, fp16, fp32 or fp64"),
        (torch.nn.Module, "parameters must be on one device, got none"),
    ],
)
def test_models_that_cannot_be_alive(model: Any, words: str) -> None:
    with pytest.raises(expo.UsageError, match=f"^model: .*{words}"):
        Live(model(), Small(1))


def test_unknown_keep() -> None:
    with pytest.raises(expo.UsageError, match="keep must be one of device, host, disk, got 'cloud'"):
        Live(Small(2), Small(1), keep="cloud")


def test_another_model_as_sft_is_a_plan_error(tmp_path: Path) -> None:
    shutil.copytree(SFT, tmp_path / "sft")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    (tmp_path / "sft" / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(expo.PlanError, match="different architectures"):
        Live(loaded(ALIGNED), tmp_path / "sft")
