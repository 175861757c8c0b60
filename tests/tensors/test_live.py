"""A live model must have the bits of merged files, whichever way its originals are kept."""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import expo
import expo.tensors.live
from expo.demo import ALIGNED, SFT
from expo.tensors import originals
from expo.tensors.live import Live
from expo.tensors.originals import KEEP

ROOT = Path(__file__).parents[2]
Weights = Mapping[str, torch.Tensor]


class Small(torch.nn.Module):
    """A model with two matrices of two dtypes, a vector and a buffer; its number of elements is odd."""

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
    """Return the weights that a merge from file to file gives."""
    folder.mkdir()
    for name, model in (("sft", sft), ("aligned", aligned)):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
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
    assert same(bits(model), before), "the context did not restore aligned"


@pytest.mark.parametrize("keep", KEEP)
def test_every_dtype_and_rules(keep: str, tmp_path: Path) -> None:
    sft, model = Small(1), Small(2)
    rules = {"wide": 2.0, "narrow": 0.0}
    expected = merged(sft, model, tmp_path / "files", 0.7, alpha_for=rules)
    live = Live(model, sft, keep=keep, alpha_for=rules)
    live.alpha = 0.7
    assert same(bits(model), expected)
    assert model.seen.tolist() == pytest.approx([2.7, 2.7]), "a buffer that files hold was not set"
    live.alpha = 0.0
    assert same(bits(model), bits(Small(2)))


@pytest.mark.parametrize("job", [1, 2, 4, 1 << 20])
def test_whatever_a_thread_takes_at_a_time(job: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.tensors.live, "CPU_ELEMENTS", job)
    sft, model = Small(1), Small(2)
    expected = merged(sft, model, tmp_path / "files", 0.7)
    Live(model, sft).alpha = 0.7
    assert same(bits(model), expected)


def test_a_model_of_another_dtype_than_its_sft(tmp_path: Path) -> None:
    sft, model = Small(1, dtype=torch.float32), Small(2, dtype=torch.float64)
    expected = merged(sft, model, tmp_path / "files", 0.7)
    live = Live(model, sft)
    live.alpha = 0.7
    assert same(bits(model), expected)


def test_rows(tmp_path: Path) -> None:
    sft, model = Small(1, rows=5), Small(2, rows=7)
    with pytest.raises(expo.PlanError, match="on_mismatch"):
        Live(model, sft)
    expected = merged(sft, model, tmp_path / "files", 0.7, on_mismatch="rows")
    Live(model, sft, on_mismatch="rows").alpha = 0.7
    assert same(bits(model), expected)
    assert torch.equal(model.embed_tokens.weight[5:], Small(2).embed_tokens.weight[5:])


# Live sets the buffers that files hold and a merge extrapolates


class Buffered(torch.nn.Module):
    """A model with a parameter and buffers of every kind.

    Some are saved and some are not, some hold no floats, one is tied, and some are computed by the model.
    """

    _keys_to_ignore_on_save = ("unsaved",)

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 5).bfloat16())
        self.inner = torch.nn.Module()
        self.inner.register_buffer("bias", torch.randn(7))
        self.inner.register_buffer("scale", torch.randn(()).double())
        self.register_buffer("tied", self.inner.bias)
        self.register_buffer("seen", torch.tensor([seed]))
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("passing", torch.randn(4), persistent=False)
        self.register_buffer("unsaved", torch.randn(4))
        self.rotary_emb = torch.nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.randn(4))
        self.attn = torch.nn.Module()
        self.attn.register_buffer("bias", torch.randn(1, 1, 4, 4))
        self.attn.register_buffer("masked_bias", torch.tensor(-1e4 - seed))

    def files(self) -> Weights:
        """Return the tensors that a library like transformers saves, which include only one of two tied buffers."""
        return {name: tensor for name, tensor in bits(self).items() if name not in ("inner.bias", "unsaved")}


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("kind", ["path", "module"])
def test_buffers_that_files_hold_have_the_bits_of_the_merge(keep: str, kind: str, tmp_path: Path) -> None:
    sft, model = Buffered(1), Buffered(2)
    save_file(dict(sft.files()), tmp_path / "sft.safetensors")
    save_file(dict(model.files()), tmp_path / "aligned.safetensors")
    expo.merge(tmp_path / "sft.safetensors", tmp_path / "aligned.safetensors", 0.3, tmp_path / "out.safetensors")
    expected, before = load_file(tmp_path / "out.safetensors"), bits(model)
    others = model.passing.clone(), model.unsaved.clone()
    with Live(model, sft if kind == "module" else tmp_path / "sft.safetensors", keep=keep) as live:
        live.alpha = 0.3
        assert equal(model.files(), expected)
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, model.state_dict()[name])}
        assert moved == {"weight", "inner.bias", "inner.scale", "tied"}
        assert (torch.equal(model.passing, others[0]), torch.equal(model.unsaved, others[1])) == (True, True)
        live.alpha = 0
        assert equal(bits(model), before)
        live.alpha = -2
    assert equal(bits(model), before), "the context did not restore aligned"


def equal(one: Weights, other: Weights) -> bool:
    """Return True if the two have the same names, dtypes and bits, also of scalars."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def test_a_buffer_that_was_replaced_is_noticed() -> None:
    model = Buffered(2)
    live = Live(model, Buffered(1))
    model.passing = torch.zeros(4)  # no file holds this buffer, so Live does not set it
    live.alpha = 0.5
    model.inner.scale = model.inner.scale.clone()
    with pytest.raises(expo.UsageError, match="have moved in memory"):
        live.alpha = 0.1


def test_a_buffer_that_cannot_be_set_in_place_is_named() -> None:
    models = Buffered(1), Buffered(2)
    for model in models:
        model.inner.register_buffer("strided", torch.randn(4, 4).t())
        model.rotary_emb.register_buffer("inv_freq", torch.randn(1).expand(4))  # Live does not set this buffer
    with pytest.raises(expo.UsageError, match=r"model: inner\.strided is torch\.float32: buffers that files"):
        Live(models[1], models[0])


def deepseek(seed: int) -> Any:
    """Return a DeepSeek-V3 with a router in one of its two layers; training changes the router's bias, a buffer."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=4, n_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def gemma(seed: int) -> Any:
    """Return a Gemma 4; each of its layers has a scalar as a buffer."""
    config = transformers.Gemma4TextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "buffer", "fused"), [(deepseek, "e_score_correction_bias", True), (gemma, "layer_scalar", False)]
)
def test_a_model_of_transformers_with_buffers_is_the_merged_one(
    make: Any, buffer: str, fused: bool, tmp_path: Path
) -> None:
    for seed, name in enumerate(("sft", "aligned")):
        model = make(seed)
        with torch.no_grad():
            moved = [tensor for key, tensor in model.named_buffers() if key.endswith(buffer)]
            assert moved
            for tensor in moved:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        model.save_pretrained(tmp_path / name)
    model, sft = loaded(tmp_path / "aligned"), tmp_path / "sft"
    before = bits(model)
    with Live(model, loaded(sft) if fused else sft) as live:
        for alpha in (0.3, 0.0):
            expo.merge(sft, tmp_path / "aligned", alpha, tmp_path / str(alpha))
            live.alpha = alpha
            assert equal(bits(model), bits(loaded(tmp_path / str(alpha))))
            assert equal(bits(model), before) is (alpha == 0)
    assert any(key.endswith(buffer) for key in before)
    assert equal(bits(model), before)


def test_tied_parameters_are_rewritten_once() -> None:
    model = loaded(ALIGNED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    live = Live(model, SFT)
    assert live.memory == 2 * sum(parameter.nbytes for parameter in model.parameters())
    live.alpha = 0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_given_as_sft_is_used_where_it_is() -> None:
    model, sft = Small(2), Small(1)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert Live(model, sft).memory == size
    assert Live(model, sft, keep="host").memory == 2 * size


def test_sft_by_another_name_or_as_a_bin_file(tmp_path: Path) -> None:
    """Live reads and pairs the same checkpoints as merge()."""
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


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("rows", [7, 5])
def test_a_backward_pass_does_not_use_weights_that_were_overwritten(rows: int, alpha: float) -> None:
    model = Small(2)
    live = Live(model, Small(1, rows=rows), on_mismatch="rows")
    for tensor in (model.wide, model.embed_tokens.weight):
        loss, version, of_buffer = (tensor * tensor).sum(), tensor._version, model.seen._version
        live.alpha = alpha
        assert tensor._version > version
        assert model.seen._version > of_buffer
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_weight_that_stays_counts_no_write() -> None:
    models = Small(1), Small(2)
    models[1].added = torch.nn.Parameter(torch.ones(3))
    models[1].register_buffer("count", torch.zeros(3, dtype=torch.int64))
    live = Live(models[1], models[0], on_unpaired="aligned")
    before = models[1].added._version, models[1].count._version
    live.alpha = 0.5
    assert (models[1].added._version, models[1].count._version) == before


def test_a_model_that_accelerate_has_offloaded_is_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = loaded(ALIGNED)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, {**device_map, "model.layers.0": "disk"}, offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(expo.UsageError) as caught:
        Live(model, SFT)
    message = str(caught.value)
    assert re.match(
        r"model: model\.layers\.0\.\S+ is a Parameter on meta without memory of its own: accelerate", message
    )
    assert "device_map='cpu'" in message
    model = transformers.AutoModelForCausalLM.from_pretrained(ALIGNED, dtype="auto", device_map="cpu")
    Live(model, SFT).alpha = 0.5


def test_a_module_that_was_replaced_is_noticed() -> None:
    """The weights of the former module would be rewritten, and the model would not change."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    live = Live(model, copy.deepcopy(model))
    live.alpha = 0.5
    model[1][0] = torch.nn.Linear(4, 2)
    with pytest.raises(expo.UsageError, match="have moved in memory"):
        live.alpha = 0.3


def test_a_model_that_was_moved_is_noticed() -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    model.wide.data = model.wide.data.clone()
    with pytest.raises(expo.UsageError, match="have moved in memory"):
        live.alpha = 0.5


@pytest.mark.parametrize("change", ["replaced", "removed", "None"])
def test_a_parameter_that_is_not_in_the_model_any_more_is_noticed(change: str) -> None:
    model = Small(2)
    live = Live(model, Small(1))
    if change == "replaced":
        model.embed_tokens.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone())
    elif change == "removed":
        del model.wide
    else:
        model.wide = None
    with pytest.raises(expo.UsageError, match="have moved in memory"):
        live.alpha = 0.5


@pytest.mark.usefixtures("frozen_heap")
def test_close_releases_the_originals_of_a_model_that_was_moved() -> None:
    model = Small(2)
    live = Live(model, Small(1))
    memory = weakref.ref(live._weights[0].aligned.untyped_storage())
    model.wide.data = model.wide.data.clone()
    with pytest.raises(expo.UsageError, match="have moved in memory"):
        live.close()
    live.close()
    gc.collect()
    assert memory() is None
    assert live.memory == 0


def test_a_failure_in_the_middle_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft)
    with monkeypatch.context() as patch:
        patch.setattr(expo.tensors.live, "compute_on_cpu", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.alpha = 0.5
    assert live.alpha is None, "some parameters may have the new alpha"
    live.alpha = 0
    assert same(bits(model), bits(Small(2)))


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("keep", KEEP)
def test_close_restores_and_lets_go(keep: str) -> None:
    sft, model = Small(1), Small(2)
    live = Live(model, sft, keep=keep)
    live.alpha = 0.5
    room = weakref.ref(live._weights[0].aligned.untyped_storage())
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
    monkeypatch.setattr("expo.tensors.originals.available_memory", lambda: 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    others = ", ".join(each for each in KEEP if each != keep)
    with pytest.raises(expo.EngineError) as caught:
        Live(Small(2), SFT if keep == "none" else Small(1, dtype=torch.bfloat16), keep=keep)
    assert str(caught.value).startswith(f"`keep='{keep}'` takes ")
    assert where in str(caught.value)
    assert str(caught.value).endswith(f"100 bytes are free: try {others}")


def test_the_memory_that_torch_has_cached_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 450)
    assert originals._free_bytes("device", torch.device("cuda:1")) == ("cuda:1", 350)


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ("device", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        ("host", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")),
        ("host", MemoryError()),
        ("disk", OSError(28, "No space left on device")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_memory_that_runs_out_is_an_error_with_the_way_out(
    keep: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(originals, "_allocate", fail)
    others = ", ".join(each for each in KEEP if each != keep)
    with pytest.raises(expo.EngineError, match=rf"^`keep='{keep}'` takes .* but could not get it .*: try {others}$"):
        Live(Small(2), Small(1, dtype=torch.bfloat16), keep=keep)


def test_another_error_of_torch_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "_allocate", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        Live(Small(2), Small(1, dtype=torch.bfloat16))


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
        (
            meta,
            "is a Parameter on meta without memory of its own: a live model has all its weights",
        ),
        (integers, "count is torch.int64: parameters must be contiguous bf16, fp16, fp32 or fp64"),
        (torch.nn.Module, "the Module has no parameters, so it is no model"),
    ],
)
def test_models_that_cannot_be_alive(model: Any, words: str) -> None:
    with pytest.raises(expo.UsageError, match=f"^model: .*{words}"):
        Live(model(), Small(1))


DISTRIBUTED = """
import torch, torch.distributed, expo
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
plain, spread, freed = (torch.nn.Linear(3, 3, bias=False) for _ in range(3))
spread.weight = torch.nn.Parameter(distribute_tensor(spread.weight.data, mesh, [Shard(0)]))
freed.weight.untyped_storage().resize_(0)
buffered = torch.nn.Linear(3, 3, bias=False)
buffered.register_buffer("moved", torch.ones(3))
buffered.moved.untyped_storage().resize_(0)
absent = torch.nn.Linear(3, 3, bias=False)
absent.weight = torch.nn.Parameter(distribute_tensor(torch.ones(3, 3, device="meta"), mesh, [Shard(0)]))
for model, sft in ((spread, plain), (plain, spread), (freed, plain), (buffered, plain), (absent, plain)):
    try:
        expo.Live(model, sft).alpha = 0.5
    except expo.UsageError as error:
        print(error)
"""


def test_weights_that_are_not_in_memory_are_refused() -> None:
    """Weights without memory are refused; the calls run in another process, because an accepted one would kill it."""
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    starts = [
        f"{side}: weight is a DTensor of placements (Shard(dim=0),) on the cpu mesh [0]" for side in ("model", "sft")
    ]
    starts += [
        "model: weight is a Parameter on cpu",
        "model: moved is a Tensor on cpu",
        "model: weight is a Tensor on meta",
    ]
    assert [re.split(" without |, but ", line)[0] for line in done.stdout.splitlines()] == starts


def test_unknown_keep() -> None:
    with pytest.raises(expo.UsageError, match="`keep` must be one of device, host, disk, got 'cloud'"):
        Live(Small(2), Small(1), keep="cloud")


def test_another_model_as_sft_is_a_plan_error(tmp_path: Path) -> None:
    shutil.copytree(SFT, tmp_path / "sft")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    (tmp_path / "sft" / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(expo.PlanError, match="different architectures"):
        Live(loaded(ALIGNED), tmp_path / "sft")
