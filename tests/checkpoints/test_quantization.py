"""Quantised checkpoints are refused by the name of their scheme, with the way out; plain ones never."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import random_tensors, write_folder
from plans import ALPHA, Shapes, checkpoint, make_plan

from expo.checkpoints.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoints.quantization import ORIGINAL, describe_problem, find_scheme

Q = "model.layers.0.self_attn.q_proj"
PLAIN: Shapes = {f"{Q}.weight": ("BF16", (4, 4)), "model.norm.weight": ("BF16", (4,))}
CODES: Shapes = {f"{Q}.weight": ("I8", (4, 4))}

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "fp8"),
    "MXFP4": ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    "AQLM": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "no method": ({"quantization_config": {"bits": 4}}, "unknown"),
    "null for a method": ({"quantization_config": {"quant_method": None}}, "unknown"),
    "a string": ({"quantization_config": "hqq"}, "hqq"),
    "a list": ({"quantization_config": [1]}, "[1]"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    "the second of two keys": ({"quantization_config": {}, "compression_config": {"quant_method": "x"}}, "x"),
}
FILES = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "optimum-quanto",
}  # fmt: skip
TENSORS: dict[str, tuple[Shapes, str]] = {
    "DeepSeek's fp8": ({f"{Q}.weight": ("F8_E4M3", (4, 4)), f"{Q}.weight_scale_inv": ("F32", (1, 1))}, "fp8"),
    "compressed, packed": (
        {f"{Q}.weight_packed": ("I32", (4, 1)), f"{Q}.weight_scale": ("BF16", (4, 1))}, "compressed-tensors",
    ),
    "compressed, int8": ({**CODES, f"{Q}.weight_scale": ("BF16", (4, 1))}, "compressed-tensors"),
    "NVFP4": ({f"{Q}.weight": ("U8", (4, 2)), f"{Q}.weight_scale": ("F8_E4M3", (4, 1))}, "compressed-tensors"),
    "a scale with no weight": ({"model.layers.0.mlp.up_proj.weight_scale": ("BF16", (4, 1))}, "compressed-tensors"),
    "GPTQ": (
        {f"{Q}.qweight": ("I32", (1, 4)), f"{Q}.qzeros": ("I32", (1, 1)), f"{Q}.scales": ("F16", (1, 4)),
         f"{Q}.g_idx": ("I32", (4,))}, "gptq",
    ),
    "AWQ": ({f"{Q}.qweight": ("I32", (4, 1)), f"{Q}.qzeros": ("I32", (1, 1))}, "gptq or awq"),
    "bitsandbytes, 4 bits": (
        {f"{Q}.weight": ("U8", (8, 1)), f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (9,))}, "bitsandbytes",
    ),
    "bitsandbytes, absmax": ({f"{Q}.weight.absmax": ("F32", (1,))}, "bitsandbytes"),
    "bitsandbytes, nested": ({f"{Q}.weight.nested_absmax": ("F32", (1,))}, "bitsandbytes"),
    "bitsandbytes, map": ({f"{Q}.weight.quant_map": ("F32", (16,))}, "bitsandbytes"),
    "bitsandbytes, 8 bits": ({**CODES, f"{Q}.SCB": ("F32", (4,))}, "bitsandbytes"),
    "MXFP4": (
        {"model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (2, 4, 1, 16)),
         "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (2, 4, 1))}, "mxfp4",
    ),
    "MLX": (
        {f"{Q}.weight": ("U32", (4, 1)), f"{Q}.scales": ("BF16", (4, 1)), f"{Q}.biases": ("BF16", (4, 1))}, "MLX",
    ),
    "optimum-quanto": (
        {f"{Q}.weight._data": ("I8", (4, 4)), f"{Q}.weight._scale": ("BF16", (4, 1))}, "optimum-quanto",
    ),
    "HQQ": (
        {f"{Q}.W_q": ("U8", (2, 4)), f"{Q}.scale": ("F16", (4, 1)), f"{Q}.zero": ("F16", (4, 1))}, "hqq",
    ),
    "AQLM": (
        {f"{Q}.codes": ("I16", (1, 1, 2)), f"{Q}.codebooks": ("F16", (2, 8, 1, 4)), f"{Q}.scales": ("F16", (1, 1))},
        "aqlm",
    ),
    "QuIP#": ({f"{Q}.Qidxs": ("I16", (4, 1)), f"{Q}.SU": ("F16", (4,)), f"{Q}.SV": ("F16", (4,))}, "quip"),
    "QuIP#, packed": ({f"{Q}.Qidxs": ("I64", (4, 1)), f"{Q}.SU": ("F16", (4,))}, "quip"),
    "SpQR": ({f"{Q}.dense_weights": ("I64", (16,)), f"{Q}.row_offsets": ("I32", (5,))}, "unknown"),
    "EETQ": ({**CODES, f"{Q}.weight_scales": ("F16", (4,))}, "unknown"),
    "BitNet": ({f"{Q}.weight": ("U8", (1, 4)), f"{Q}.weight_scale_2": ("BF16", (1,))}, "unknown"),
    "torchao": ({f"{Q}.weight_qdata": ("I8", (4, 4)), f"{Q}.weight_scale": ("F32", (4,))}, "unknown"),
    "codes alone": ({"model.layers.1.mlp.up_proj.weight": ("I8", (4, 4))}, "unknown"),
    "codes of 64 bits": ({"model.layers.1.mlp.up_proj.weight": ("I64", (4, 4))}, "unknown"),
    "one layer of several": (
        {"model.layers.1.mlp.experts.up_proj": ("BF16", (2, 4, 4)), "model.layers.2.mlp.experts.up_proj":
         ("U8", (2, 4, 2))}, "unknown",
    ),
    "fused experts and their scales": (
        {"model.layers.1.mlp.experts.up_proj": ("U8", (2, 4, 2)), "model.layers.1.mlp.experts.up_proj_scale":
         ("F32", (2, 4))}, "unknown",
    ),
    "Marlin": ({f"{Q}.B": ("I32", (16, 4)), f"{Q}.s": ("F16", (1, 4))}, "unknown"),
    "EXL3": ({f"{Q}.trellis": ("I16", (8, 8)), f"{Q}.suh": ("F16", (4,))}, "unknown"),
    "HQQ as floats": ({f"{Q}.W_q": ("F32", (2, 4)), f"{Q}.scale": ("F16", (4, 1))}, "hqq"),
    "zero points beside numbers": ({f"{Q}.weight_zero_point": ("I8", (4,))}, "unknown"),
}  # fmt: skip


def cases() -> list[Any]:
    found = [pytest.param(checkpoint({**PLAIN, **CODES}, config=config), name, id=f"config: {key}")
             for key, (config, name) in CONFIGS.items()]  # fmt: skip
    found += [pytest.param(checkpoint(PLAIN, files=[file]), name, id=file) for file, name in FILES.items()]
    found += [pytest.param(checkpoint({**PLAIN, **tensors}), name, id=f"tensors: {key}")
              for key, (tensors, name) in TENSORS.items()]  # fmt: skip
    return found


@pytest.mark.parametrize(("quantised", "name"), cases())
def test_every_scheme_is_named_with_role_path_and_way_out(quantised: Checkpoint, name: str) -> None:
    assert find_scheme(quantised) == name
    for role in ("sft", "aligned"):
        other = checkpoint(PLAIN, "/models/plain")
        given = dataclasses.replace(quantised, path="/models/quantised")
        sft, aligned = (given, other) if role == "sft" else (other, given)
        first, *rest = make_plan(sft, aligned, [ALPHA], on_unpaired="aligned", on_mismatch="aligned").problems
        assert first.startswith(f"{role} /models/quantised is quantised (quant_method {name})")
        assert ORIGINAL in first
        assert not [text for text in rest if "is quantised (" in text], "the message names it once"
        assert first.count("\n") == 0


def test_order_of_the_tensors_does_not_matter() -> None:
    tensors, name = TENSORS["GPTQ"]
    assert find_scheme(checkpoint(dict(reversed(tensors.items())))) == name


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("fp8", ("FineGrainedFP8Config(dequantize=True)", "save_pretrained()")),
        ("mxfp4", ("Mxfp4Config(dequantize=True)", "save_pretrained()")),
        ("bitsandbytes", ("model.dequantize()", "save_pretrained()")),
        ("gptq", ()), ("awq", ()), ("gptq or awq", ()), ("compressed-tensors", ()), ("modelopt", ()), ("unknown", ()),
    ],
)  # fmt: skip
def test_the_way_out(name: str, ways: tuple[str, ...]) -> None:
    text = describe_problem("sft", checkpoint(CODES, config={"quantization_config": {"quant_method": name}}))
    assert text is not None
    assert text.partition("extrapolated; ")[2].startswith(ORIGINAL)
    assert ("save_pretrained" in text) is bool(ways)
    assert all(way in text for way in ways)


def test_both_may_be_quantised_each_in_its_own_way() -> None:
    sft = checkpoint(PLAIN, "/models/sft", config=CONFIGS["GPTQ"][0])
    aligned = checkpoint(PLAIN, config=CONFIGS["fp8"][0])
    problems = make_plan(sft, aligned, [ALPHA]).problems
    assert [text.partition(" is quantised")[0] for text in problems] == ["sft /models/sft", "aligned /models/aligned"]
    assert "gptq" in problems[0]
    assert "fp8" in problems[1]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"encoder.layers.0.layer_scale.weight": ("F32", (4,))}, id="ConvNeXt's"),
        pytest.param({"encoder.layers.0.layer_scale1": ("F32", (4,))}, id="BEiT's"),
        pytest.param({"logit_scale": ("F32", ())}, id="CLIP's"),
        pytest.param({"model.norm.weight_scale": ("BF16", (4,))}, id="beside a weight of plain numbers"),
        pytest.param({f"{Q}.weight_scale": ("BF16", (4, 1))}, id="beside another"),
        pytest.param({f"{Q}.weight_scale_inv": ("F32", (1, 1))}, id="left over from fp8, the weight no longer codes"),
        pytest.param({f"{Q}.scale": ("F32", (4,))}, id="scale"),
        pytest.param({f"{Q}.scales": ("F32", (4,))}, id="scales"),
        pytest.param({"weight_scale": ("F32", (4,))}, id="weight_scale itself"),
        pytest.param({"transformer.num_blocks": ("U8", (1,))}, id="U8 and blocks"),
        pytest.param({"mlp.experts.gate_up_proj_blocks": ("BF16", (4, 4)), "mlp.experts.gate_up_proj_scales":
                     ("BF16", (4,))}, id="blocks of plain numbers"),
        pytest.param({"my_blocks": ("U8", (4,)), "my_scale": ("U8", (4,))}, id="blocks without scales"),
        pytest.param({"mlp.experts.gate_up_proj": ("BF16", (2, 4, 4))}, id="MoE"),
        pytest.param({"vision.absmax": ("F32", (1,)), "quant_map": ("F32", (1,)), "SCB.weight": ("F32", (1,))},
                     id="words of bitsandbytes"),
        pytest.param({"g_idx.weight": ("F32", (1,)), "idx": ("I64", (1,)), "qzeros": ("F32", (1,))}, id="of GPTQ"),
        pytest.param({"blocks.0.attn.relative_position_index": ("I64", (4, 4)), "blocks.0.attn.logit_scale":
                      ("F32", (2, 1, 1))}, id="Swin's index"),
        pytest.param({"h.0.attn.bias": ("U8", (1, 1, 4, 4)), "h.0.attn.scale": ("F32", ())}, id="a mask of bytes"),
        pytest.param({"embeddings.position_ids": ("I32", (1, 4)), "embeddings.scale": ("F32", ())}, id="positions"),
        pytest.param({"enc.attn.rel_index": ("I32", (2, 2)), "enc.attn.logit_scale": ("F32", (4,)), "enc.out.weight":
                      ("F32", (8, 8))}, id="an index of 32 bits"),
        pytest.param({"vq.codes": ("I64", (2, 2)), "vq.codebook": ("F32", (2, 2))}, id="codes of a quantiser's own"),
        pytest.param({"bn.num_batches_tracked": ("I64", ()), "bn.weight": ("F32", (4,))}, id="a counter"),
        pytest.param({"mask": ("BOOL", (4,)), "ids": ("I64", (4,)), "table": ("U8", (4,))}, id="integers"),
    ],
)  # fmt: skip
def test_a_plain_model_is_not_taken_for_a_quantised_one(names: Shapes) -> None:
    shapes = {**PLAIN, **names}
    assert find_scheme(checkpoint(shapes)) is None
    make_plan(checkpoint(shapes, "/models/sft"), checkpoint(shapes), [ALPHA]).check()


@pytest.mark.parametrize(
    "config",
    [
        {}, {"quantization_config": None}, {"quantization_config": {}}, {"quantization_config": False},
        {"compression_config": None}, {"quantization": "none"}, {"text_config": {}}, {"model_type": "awq"},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_says_nothing_of_it(config: dict[str, Any]) -> None:
    assert find_scheme(checkpoint(PLAIN, config=config, files=["config.json", "sub/quant_config.json"])) is None


def test_from_the_disk(tmp_path: Path) -> None:
    shapes: Shapes = {f"{Q}.weight": ("U8", (4, 4)), f"{Q}.weight.absmax": ("F32", (2,)), "norm": ("BF16", (4,))}
    opened = open_checkpoint(write_folder(tmp_path / "model", random_tensors(shapes, 1)))
    assert find_scheme(opened) == "bitsandbytes"
    (tmp_path / "model" / "quantize_config.json").write_text("{}")
    assert find_scheme(open_checkpoint(tmp_path / "model")) == "gptq"
