"""Quantised checkpoints are merged from the values of their tensors, in every way that a plain one is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import quantized
from checkpoint_files import Tensors, quiet, read_folder, write_folder

import expo
from expo.kernels.numerics import narrow
from expo.search import search_alpha

Array = Any
ALPHA = 0.3
EXPERTS = "model.layers.0.mlp.experts"
PROJECTION = "model.layers.0.mlp.up_proj.weight"


class Model(NamedTuple):
    """A checkpoint as its raw tensors and its config, and the fp32 values of its weights."""

    tensors: Tensors
    config: Mapping[str, Any]
    values: Mapping[str, Array]


def bf16(values: Array) -> Array:
    out = np.empty(values.shape, np.uint16)
    narrow(values.astype(np.float32), "BF16", out)
    return out


def wide(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def norm(rng: Any) -> Array:
    return bf16(rng.standard_normal(24))


def plain(values: Mapping[str, Array], seed: int, model_type: str = "x") -> Model:
    """Return a bf16 model with the shapes of these values."""
    rng = np.random.default_rng(seed)
    weights = {name: bf16(rng.standard_normal(value.shape)) for name, value in values.items()}
    tensors = {name: ("BF16", bits.shape, bits.tobytes()) for name, bits in weights.items()}
    return Model(tensors, {"model_type": model_type}, {name: wide(bits) for name, bits in weights.items()})


def fp8(
    shape: tuple[int, ...], block: tuple[int, int], scale_shape: tuple[int, ...], seed: int,
    name: str = PROJECTION, suffix: str = "_scale", dtype: str = "F32", config: Mapping[str, Any] | None = None,
) -> Model:  # fmt: skip
    """Return a model with one FP8 tensor whose scales have a shape and a dtype, and with scales of activations."""
    rng = np.random.default_rng(seed)
    lead, (rows, columns) = shape[:-2], shape[-2:]
    codes = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    count = int(np.prod(lead, dtype=int)), -(-rows // block[0]), -(-columns // block[1])
    if dtype == "F8_E8M0":
        stored = rng.integers(100, 140, count, np.uint8)
        scales = quantized.e8m0(stored)
    else:
        stored = bf16(rng.uniform(0.01, 0.02, count)) if dtype == "BF16" else rng.uniform(0.01, 0.02, count)
        stored = stored if dtype == "BF16" else stored.astype(np.float32)
        scales = wide(stored) if dtype == "BF16" else stored
    matrices = zip(codes.reshape(-1, rows, columns), scales, strict=True)
    value = np.stack([quantized.values(each, "F8_E4M3", some, block) for each, some in matrices]).reshape(shape)
    other = norm(rng)
    tensors = {
        name: ("F8_E4M3", shape, codes.tobytes()),
        f"{name}{suffix}": (dtype, scale_shape, stored.tobytes()),
        "model.norm.weight": ("BF16", other.shape, other.tobytes()),
        f"{name.removesuffix('.weight')}.input_scale": ("F32", (), np.float32(1).tobytes()),
    }
    return Model(tensors, config or {"model_type": "x"}, {name: value, "model.norm.weight": wide(other)})


def deepseek(seed: int, **other: Any) -> Model:
    config = {"model_type": "x", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return fp8((300, 577), (128, 128), (3, 5), seed, suffix="_scale_inv", **({"config": config} | other))


def compressed(strategy: str, seed: int, *arguments: Any, **other: Any) -> Model:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": other.pop("stated", None)}
    entry = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"weights": weights}},
    }
    return fp8(*arguments, seed, config={"model_type": "x", "quantization_config": entry}, **other)


def mxfp4(seed: int) -> Model:
    """Return a model with MXFP4 experts, whose values transformers transposes."""
    rng = np.random.default_rng(seed)
    blocks, exponents = rng.integers(0, 256, (3, 40, 2, 16), np.uint8), rng.integers(100, 140, (3, 40, 2), np.uint8)
    exponents[0, :2, 0] = 0, 254  # numbers that are subnormal in fp32, and numbers that overflow
    codes, scales = quantized.unpack_mxfp4(blocks), quantized.e8m0(exponents)
    value = np.stack([quantized.values(each, "F4", some, (1, 32)) for each, some in zip(codes, scales, strict=True)])
    other = norm(rng)
    tensors = {
        f"{EXPERTS}.gate_up_proj_blocks": ("U8", blocks.shape, blocks.tobytes()),
        f"{EXPERTS}.gate_up_proj_scales": ("U8", exponents.shape, exponents.tobytes()),
        "model.norm.weight": ("BF16", other.shape, other.tobytes()),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    values = {
        f"{EXPERTS}.gate_up_proj": np.ascontiguousarray(value.transpose(0, 2, 1)),
        "model.norm.weight": wide(other),
    }
    return Model(tensors, config, values)


FORMS: dict[str, Callable[[int], Model]] = {
    "blocks with edges": deepseek,
    "blocks without a config": lambda seed: deepseek(seed, config={"model_type": "x"}),
    "scales that are powers of two": lambda seed: deepseek(seed, dtype="F8_E8M0"),
    "blocks of a stated size": lambda seed: compressed(
        "block", seed, (300, 577), (64, 32), (5, 19), stated=[64, 32], suffix="_scale"
    ),
    "one scale": lambda seed: compressed("tensor", seed, (30, 57), (30, 57), (1,), dtype="BF16"),
    "a scalar": lambda seed: fp8((30, 57), (30, 57), (), seed),
    "rows": lambda seed: compressed("channel", seed, (300, 57), (1, 57), (300, 1), dtype="BF16"),
    "rows in one dimension": lambda seed: fp8((300, 57), (1, 57), (300,), seed),
    "experts with edges": lambda seed: fp8(
        (3, 200, 140), (128, 128), (3, 2, 2), seed, f"{EXPERTS}.gate_up_proj", "_scale_inv"
    ),
    "experts with a scale each": lambda seed: fp8((3, 20, 14), (20, 14), (3,), seed, f"{EXPERTS}.gate_up_proj"),
    "experts with scales of columns": lambda seed: fp8(
        (3, 20, 14), (20, 1), (3, 1, 14), seed, f"{EXPERTS}.gate_up_proj"
    ),
    "MXFP4": mxfp4,
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)


def write(folder: Path, model: Model) -> Path:
    return write_folder(folder, model.tensors, config={**model.config, "torch_dtype": "bfloat16"})


def expected(sft: Model, aligned: Model, alpha: float) -> dict[str, Array]:
    """Return the formula's results in fp32."""
    found = {}
    with np.errstate(all="ignore"):
        for name, a in aligned.values.items():
            found[name] = a + np.float32(alpha) * (a - sft.values[name]) if alpha else a
    return found


def check(folder: Path, values: Mapping[str, Array], dtype: str = "BF16") -> None:
    """Assert that a folder has these values, rounded once, and no quantisation."""
    tensors = read_folder(folder)
    assert set(tensors) == set(values)
    for name, value in values.items():
        found_dtype, shape, data = tensors[name]
        assert (found_dtype, shape) == (dtype, value.shape)
        bits = np.frombuffer(data, np.uint16 if dtype == "BF16" else np.uint32).reshape(shape)
        same = bits == (bf16(value) if dtype == "BF16" else value.view(np.uint32))
        found = wide(bits) if dtype == "BF16" else bits.view(np.float32)
        assert (same | (np.isnan(found) & np.isnan(value))).all(), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@every_form
def test_merge_and_stream(tmp_path: Path, form: str, engine: str) -> None:
    """Either side may be quantised, or both: files and streamed tensors are the formula of the values, rounded once."""
    models = {"q1": FORMS[form](1), "q2": FORMS[form](2)}
    models["plain"] = plain(models["q1"].values, 3, models["q1"].config["model_type"])
    for name, model in models.items():
        write(tmp_path / name, model)
    for sft, aligned in (("plain", "q1"), ("q1", "plain"), ("q1", "q2")):
        out = tmp_path / f"{sft} {aligned}"
        wanted = {alpha: expected(models[sft], models[aligned], alpha) for alpha in (0.0, ALPHA)}
        result = expo.merge(
            tmp_path / sft, tmp_path / aligned, [0.0, ALPHA], f"{out} {{alpha}}", engine=engine, verify=True
        )
        notes = [note for note in result.warnings if "extrapolated from the values" in note]
        assert notes
        has_scales = any(name.endswith(".input_scale") for name in models["q1"].tensors)
        assert all(("scales of activations are left out: 1, such as" in note) is has_scales for note in notes)
        for alpha, values in wanted.items():
            check(Path(f"{out} {alpha:g}"), values)
        with quiet():
            streamed = dict(expo.stream(tmp_path / sft, tmp_path / aligned, ALPHA, framework="numpy", engine=engine))
        for name, value in wanted[ALPHA].items():
            same = (streamed[name].view(np.uint16) == bf16(value)) | np.isnan(value)
            assert same.all()


@every_form
def test_another_dtype(tmp_path: Path, form: str) -> None:
    """At alpha 0 an fp32 output has the values themselves, so they never pass through bf16."""
    aligned = FORMS[form](1)
    write(tmp_path / "aligned", aligned)
    sft = plain(aligned.values, 2, aligned.config["model_type"])
    write(tmp_path / "sft", sft)
    for alpha in (0.0, ALPHA):
        expo.merge(tmp_path / "sft", tmp_path / "aligned", alpha, tmp_path / "out", dtype="fp32", overwrite=True)
        check(tmp_path / "out", expected(sft, aligned, alpha), "F32")


@pytest.mark.exhaustive  # the interpreter starts in a process of its own
@pytest.mark.parametrize("form", ["blocks with edges", "MXFP4"])
def test_no_engine_shows(tmp_path: Path, form: str) -> None:
    """The engine for GPUs, which Triton's interpreter runs, writes the same fp32 files; it truncates bf16 results."""
    pytest.importorskip("triton", minversion="3.8", reason="no Triton, or one whose interpreter cannot run the kernel")
    write(tmp_path / "aligned", FORMS[form](1))
    write(tmp_path / "sft", FORMS[form](2))
    expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "cpu", dtype="fp32")
    code = "import sys, expo; expo.merge(*sys.argv[1:3], 0.3, sys.argv[3], engine='triton', dtype='fp32')"
    paths = [str(tmp_path / name) for name in ("sft", "aligned", "triton")]
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code, *paths], env=environment, check=True, timeout=120)
    assert read_folder(tmp_path / "triton") == read_folder(tmp_path / "cpu")


def test_plan_says_it_and_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "aligned", deepseek(1))
    write(tmp_path / "sft", deepseek(2))
    arguments = ["--sft", tmp_path / "sft", "--aligned", tmp_path / "aligned", "--alpha", "0.3"]
    code = (
        "import sys, expo.fast\n"
        "code = expo.fast.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    for more in (["--plan"], ["--out", tmp_path / "out"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, [*arguments, *more])], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "1 quantised tensor (1 of FP8 with scales for blocks of 128 x 128)" in done.stdout + done.stderr


def test_adapter_over_a_quantised_base(tmp_path: Path) -> None:
    """The delta is added to the values of the base, and the sum is rounded once."""
    base = deepseek(1)
    write(tmp_path / "base", base)
    rng = np.random.default_rng(5)
    left, right = rng.standard_normal((300, 4)).astype(np.float32), rng.standard_normal((4, 577)).astype(np.float32)
    stem = f"base_model.model.{PROJECTION.removesuffix('.weight')}"
    adapter = {
        f"{stem}.lora_A.weight": ("F32", right.shape, right.tobytes()),
        f"{stem}.lora_B.weight": ("F32", left.shape, left.tobytes()),
    }
    write_folder(tmp_path / "adapter", adapter)
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "config.json").unlink()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    delta = np.zeros((300, 577), np.float32)
    for k in range(4):
        delta += left[:, k : k + 1] * right[k]
    delta *= np.float32(2)
    for alpha in (0.0, ALPHA):
        expo.merge(tmp_path / "base", tmp_path / "adapter", alpha, tmp_path / "out", overwrite=True)
        values = dict(base.values)
        values[PROJECTION] = base.values[PROJECTION] + np.float32(1 + alpha) * delta
        check(tmp_path / "out", values)


def test_common_rows(tmp_path: Path) -> None:
    """The rows that both have are extrapolated, although the scales of a block reach over the last of them."""
    aligned, sft = deepseek(1), plain({PROJECTION: np.zeros((200, 577)), "model.norm.weight": np.zeros(24)}, 2)
    write(tmp_path / "aligned", aligned)
    write(tmp_path / "sft", sft)
    expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out", on_mismatch="rows")
    values = expected(sft._replace(values={**sft.values, PROJECTION: np.resize(sft.values[PROJECTION], (300, 577))}),
                      aligned, ALPHA)  # fmt: skip
    values[PROJECTION][200:] = aligned.values[PROJECTION][200:]
    check(tmp_path / "out", values)


def test_distance_is_that_of_the_values(tmp_path: Path) -> None:
    aligned = deepseek(1)
    sft = plain(aligned.values, 2)
    write(tmp_path / "aligned", aligned)
    write(tmp_path / "sft", sft)
    command = [
        sys.executable,
        "-m",
        "expo.diff",
        "--sft",
        tmp_path / "sft",
        "--aligned",
        tmp_path / "aligned",
        "--json",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=True)
    records = {each["name"]: each for each in json.loads(done.stdout)["tensors"]}
    difference = aligned.values[PROJECTION].astype(np.float64) - sft.values[PROJECTION]
    assert records[PROJECTION]["difference_norm"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)


def test_search_asks_for_a_model_in_bf16(tmp_path: Path) -> None:
    """The advice of the message gives a model with which the search goes on."""
    write(tmp_path / "aligned", deepseek(1))
    write(tmp_path / "sft", deepseek(2))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    with pytest.raises(expo.CheckpointError, match=r"has quantised weights.*expo.fast --alpha 0") as error:
        search_alpha(tmp_path / "sft", tmp_path / "aligned", [str(prompts)], lambda *_: [0.0])
    assert str(tmp_path / "aligned") in str(error.value)
    expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.0, tmp_path / "whole")
    expo.merge(tmp_path / "sft", tmp_path / "whole", ALPHA, tmp_path / "out")
    found = {name: wide(bf16(value)) for name, value in deepseek(1).values.items()}
    check(tmp_path / "out", expected(deepseek(2), deepseek(1)._replace(values=found), ALPHA))


def test_live_reads_a_quantised_sft(tmp_path: Path) -> None:
    """A live model over a quantised sft has the bits of the merged files."""
    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = torch.nn.Linear(577, 300, bias=False, dtype=torch.bfloat16)
            self.norm = torch.nn.LayerNorm(24, bias=False, dtype=torch.bfloat16)

    layer = Layer()
    sft = fp8((300, 577), (128, 128), (3, 5), 4, "up_proj.weight", "_scale_inv")
    tensors = {name.replace("model.norm", "norm"): each for name, each in sft.tensors.items()}
    write_folder(tmp_path / "sft", tensors, config={})
    before = {name: tensor.float().numpy().copy() for name, tensor in layer.state_dict().items()}
    with quiet(), expo.Live(layer, tmp_path / "sft") as live:
        live.alpha = ALPHA
        for name, tensor in layer.state_dict().items():
            other = sft.values[name.replace("norm", "model.norm")]
            value = before[name] + np.float32(ALPHA) * (before[name] - other)
            assert (tensor.view(torch.int16).numpy().view(np.uint16) == bf16(value)).all()


# Experts


def test_experts_in_two_layouts(tmp_path: Path) -> None:
    """Quantised tensors of single experts are paired with the fused tensor of the other model."""
    rng = np.random.default_rng(0)
    names = [f"{EXPERTS}.{expert}.{kind}_proj.weight" for expert in range(2) for kind in ("gate", "up")]
    parts = [fp8((40, 24), (128, 128), (1, 1), seed, name, "_scale_inv") for seed, name in enumerate(names)]
    tensors = {name: each for part in parts for name, each in part.tensors.items()}
    config = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}
    write_folder(tmp_path / "aligned", tensors, config=config)
    fused = bf16(rng.standard_normal((2, 80, 24)))
    other = norm(rng)
    sft = {f"{EXPERTS}.gate_up_proj": fused, "model.norm.weight": other}
    raw = {name: ("BF16", bits.shape, bits.tobytes()) for name, bits in sft.items()}
    write_folder(tmp_path / "sft", raw, config={"model_type": "deepseek_v3"})
    expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out")
    values = {"model.norm.weight": parts[-1].values["model.norm.weight"]}
    values["model.norm.weight"] = values["model.norm.weight"] + np.float32(ALPHA) * (
        values["model.norm.weight"] - wide(other)
    )
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        a, s = part.values[name], wide(fused)[i // 2, i % 2 * 40 : i % 2 * 40 + 40]
        values[name] = a + np.float32(ALPHA) * (a - s)
    check(tmp_path / "out", values)


# transformers itself


def test_values_are_those_of_transformers(tmp_path: Path) -> None:
    """At alpha 0 the output has the weights that transformers computes, for whole blocks, and it loads."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 64}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sft")
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if "_proj." in name:
            state[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = torch.rand(tensor.shape[0] // 128, tensor.shape[1] // 128) + 0.5
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.config.save_pretrained(tmp_path / "fp8")
    save_file(state, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    with quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "fp8", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype="auto"
        ).state_dict()
        expo.merge(tmp_path / "sft", tmp_path / "fp8", 0.0, tmp_path / "out", check=True)
        ours, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype="auto", output_loading_info=True
        )
    assert not any(info.values()), info
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_mxfp4_is_that_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    model = mxfp4(1)
    blocks, scales = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)
        for name, (_, shape, data) in model.tensors.items()
        if "proj_" in name
    )
    theirs = convert(blocks, scales, dtype=torch.float32)
    assert (theirs.numpy() == model.values[f"{EXPERTS}.gate_up_proj"]).all()


# Left-over entries


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization": {"group_size": 64}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}, "model_type": "y"}},
    ],
    ids=lambda entry: next(iter(entry)),
)
@pytest.mark.parametrize("sides", ["aligned", "sft", "both"])
def test_an_entry_over_plain_weights_is_left_over(tmp_path: Path, entry: dict[str, Any], sides: str) -> None:
    sft, aligned = plain({"model.norm.weight": np.zeros(24)}, 1), plain({"model.norm.weight": np.zeros(24)}, 2)
    write(tmp_path / "aligned", aligned._replace(config={"model_type": "x", **(entry if sides != "sft" else {})}))
    write(tmp_path / "sft", sft._replace(config={"model_type": "x", **(entry if sides != "aligned" else {})}))
    result = expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out")
    notes = [note for note in result.warnings if "config.json has an entry of a quantisation" in note]
    assert len(notes) == {"aligned": 1, "sft": 1, "both": 2}[sides]
    check(tmp_path / "out", expected(sft, aligned, ALPHA))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"compression_config", "quantization"} & set(config)
    assert "quantization_config" not in config.get("text_config", {})


def test_a_model_that_rounds_its_weights_keeps_its_entry(tmp_path: Path) -> None:
    """BitNet's weights are plain numbers, and the entry says that the model rounds them: without it, it is another."""
    model = plain({"model.norm.weight": np.zeros(24)}, 1)
    write(tmp_path / "sft", model)
    write(tmp_path / "aligned", model._replace(config={"quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(expo.PlanError, match="quant_method bitnet"):
        expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out")


# Refusals


def without(model: Model, *names: str) -> Model:
    return model._replace(tensors={name: each for name, each in model.tensors.items() if name not in names})


def changed(model: Model, name: str, **what: Any) -> Model:
    dtype, shape, data = model.tensors[name]
    entry = (what.get("dtype", dtype), what.get("shape", shape), what.get("data", data))
    return model._replace(tensors={**model.tensors, name: entry})


def added(model: Model, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Model:
    return model._replace(tensors={**model.tensors, name: (dtype, shape, bytes(nbytes))})


def mislabelled(model: Model, **entry: Any) -> Model:
    return model._replace(config={**model.config, "quantization_config": entry})


SCALES, PACKED = f"{PROJECTION}_scale_inv", f"{EXPERTS}.gate_up_proj_scales"
REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "no scales": (lambda: without(deepseek(1), SCALES), f"{PROJECTION} is F8_E4M3 and has no tensor of scales"),
    "two tensors of scales": (
        lambda: added(deepseek(1), f"{PROJECTION}_scale", "F32", (1,), 4), "has two tensors of scales",
    ),
    "zero points": (lambda: added(deepseek(1), f"{PROJECTION}_zero_point", "F32", (1,), 4), "has zero points"),
    "scales of another shape": (
        lambda: changed(deepseek(1), SCALES, shape=(5, 3)), r"is F8_E4M3 \[300, 577\] and its scales are F32 \[5, 3\]",
    ),
    "scales of integers": (lambda: changed(deepseek(1), SCALES, dtype="I32"), r"its scales are I32 \[3, 5\]"),
    "MXFP4 of another model": (
        lambda: mxfp4(1)._replace(config={"model_type": "y", "quantization_config": {"quant_method": "mxfp4"}}),
        "only the layout of GPT-OSS is known, and the model is 'y'",
    ),
    "MXFP4 without scales": (lambda: without(mxfp4(1), PACKED), "its scales are not there"),
    "MXFP4 with other scales": (
        lambda: changed(mxfp4(1), PACKED, shape=(3, 20, 4)),
        r"is U8 \[3, 40, 2, 16\] and its scales are U8 \[3, 20, 4\]",
    ),
    "another scheme beside FP8": (
        lambda: added(deepseek(1), "model.layers.1.mlp.up_proj.qweight", "I32", (4, 4), 64), "quant_method fp8",
    ),
    "another method": (lambda: mislabelled(deepseek(1), quant_method="quark"), "quant_method quark"),
    "FP8 with other bits": (
        lambda: changed(deepseek(1), PROJECTION, dtype="F8_E5M2"), "quant_method fp8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("side", ["sft", "aligned"])
def test_refused_with_the_tensor(tmp_path: Path, case: str, side: str) -> None:
    make, text = REFUSED[case]
    model = make()
    write(tmp_path / side, model)
    values = (mxfp4 if "MXFP4" in case else deepseek)(1).values
    other = plain(values, 2)
    write(
        tmp_path / ("aligned" if side == "sft" else "sft"),
        other._replace(config=model.config | {"quantization_config": {}}),
    )
    with pytest.raises(expo.PlanError, match=text) as error:
        expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out", on_unpaired="aligned",
                   on_mismatch="aligned")  # fmt: skip
    assert str(tmp_path / side) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A merge of 256 MB of FP8 and MXFP4 takes less memory than one of its tensors."""
    rows = 8192
    codes = ("F8_E4M3", (rows, 8192), bytes(rows * 8192))
    scales = np.ones((64, 64), np.float32).tobytes()
    packed = {
        f"{EXPERTS}.gate_up_proj_blocks": ("U8", (16, 2048, 128, 16), bytes(1 << 26)),
        f"{EXPERTS}.gate_up_proj_scales": ("U8", (16, 2048, 128), bytes(1 << 22)),
    }
    tensors = {PROJECTION: codes, f"{PROJECTION}_scale_inv": ("F32", (64, 64), scales), **packed}
    config = {"model_type": "gpt_oss"}
    write_folder(tmp_path / "sft", tensors, config=config)
    shutil.copytree(tmp_path / "sft", tmp_path / "aligned")
    code = (
        "import sys, resource, expo\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "expo.merge(sys.argv[1], sys.argv[2], 0.5, sys.argv[3])\n"
        "print(peak() * 1024)"
    )
    paths = [str(tmp_path / name) for name in ("sft", "aligned", "out")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 200e6, done.stdout


def test_the_plan_counts_the_memory_of_transposed_elements(tmp_path: Path) -> None:
    """A worker reads the elements of a whole chunk at once if a row of the output has elements of many rows."""
    found = []
    for name, make in (("rows", deepseek), ("transposed", mxfp4)):
        write(tmp_path / name, make(1))
        write(tmp_path / f"{name} sft", make(2))
        words = ["--sft", tmp_path / f"{name} sft", "--aligned", tmp_path / name, "--alpha", "0.3", "--plan", "--json"]
        command = [sys.executable, "-m", "expo.fast", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append(json.loads(done.stdout)["memory"])
    assert found[1] > found[0]
