"""Tests of the plan: the steps, all problems at once, the output's files, and the chunks."""

from __future__ import annotations

import builtins
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import random_tensors, write_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import ALPHA, COPY, EXTRAPOLATE, Shapes, check_cut, checkpoint, fates, make_plan

import expo
from expo.checkpoints.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoints.files import SINGLE
from expo.checkpoints.safetensors_header import ALIGNMENT, parse
from expo.dtypes import BITS
from expo.errors import PlanError, UsageError
from expo.fast import main
from expo.options import MAX_ALPHAS
from expo.planning.plan import Plan
from expo.planning.shards import cut
from expo.planning.steps import Step

REPOSITORY = Path(expo.__file__).parents[1]


def pair(sft: Shapes, aligned: Shapes) -> tuple[Checkpoint, Checkpoint]:
    return checkpoint(sft, "/models/sft"), checkpoint(aligned)


def only_step(plan: Plan) -> Step:
    (step,) = plan.steps
    return step


MODEL: Shapes = {
    "embed": ("BF16", (10, 4)), "layers.0.q": ("F16", (4, 4)), "layers.1.q": ("F32", (4, 4)),
    "norm": ("F64", (4,)), "steps": ("I64", (1,)), "scalar": ("F32", ()), "empty": ("BF16", (0, 4)),
}  # fmt: skip


# Pairing and fates.


def test_tensors_are_paired_by_name_whatever_the_order() -> None:
    sft, aligned = pair(dict(reversed(MODEL.items())), MODEL)
    plan = make_plan(sft, aligned, [ALPHA])
    plan.check()
    assert [step.name for step in plan.steps] == list(MODEL), "in aligned's order"
    for step in plan.steps:
        assert step.aligned == aligned.tensors[step.name]
        assert step.sft == (sft.tensors[step.name] if step.action is EXTRAPOLATE else None)
    assert plan.dropped == {}


def test_floating_point_is_extrapolated_and_integers_are_copied() -> None:
    plan = make_plan(*pair(MODEL, MODEL), [ALPHA])
    assert fates(plan) == {
        **dict.fromkeys(MODEL, (EXTRAPOLATE, "")),
        "steps": (COPY, "I64 is not a floating-point dtype"),
    }


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"])
@pytest.mark.parametrize("other", ["I64", "BOOL"])
def test_integers_are_copied_even_where_sft_has_other_integers(dtype: str, other: str) -> None:
    plan = make_plan(*pair({"t": (other, (8,))}, {"t": (dtype, (8,))}), [ALPHA])
    plan.check()
    assert fates(plan) == {"t": (COPY, f"{dtype} is not a floating-point dtype")}
    assert only_step(plan).alphas == (0.0,)


@pytest.mark.parametrize("aligned", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("sft", ["BF16", "F16", "F32", "F64"])
def test_any_two_floating_dtypes_are_extrapolated_and_steps_keep_the_alpha_given(sft: str, aligned: str) -> None:
    """An alpha that is 0 in the arithmetic of both dtypes is 0 in the step; the engine rounds any other alpha."""
    step = only_step(make_plan(*pair({"t": (sft, (8,))}, {"t": (aligned, (8,))}), [ALPHA, 1e-46]))
    assert step.action is EXTRAPOLATE
    assert step.alphas == (ALPHA, 1e-46 if "F64" in (sft, aligned) else 0.0)


@pytest.mark.parametrize("alpha", [0, 0.0, -0.0])
def test_alpha_0_copies(alpha: float) -> None:
    plan = make_plan(*pair({"t": ("BF16", (8,))}, {"t": ("BF16", (8,))}), [alpha])
    plan.check()
    assert only_step(plan)[1:3] == (COPY, "alpha is 0")
    assert only_step(plan).alphas == (0.0,)
    assert only_step(plan).sft is None, "sft's bytes are not read"


@pytest.mark.parametrize("alpha", [1e-46, -1e-46, 5e-324, 2.0**-150])
def test_alpha_that_rounds_to_0_in_fp32_copies_unless_a_tensor_is_fp64(alpha: float) -> None:
    shapes = {"half": ("BF16", (8,)), "single": ("F32", (8,)), "double": ("F64", (8,))}
    plan = make_plan(*pair(shapes, shapes), [alpha])
    assert {step.name: step.action for step in plan.steps} == {
        "half": COPY, "single": COPY, "double": EXTRAPOLATE,
    }  # fmt: skip
    assert plan.steps[2].alphas == (alpha,)


@pytest.mark.parametrize("alpha", [2.0**-149, 1e-45, 3.4028234663852886e38, -1.5, 1])
def test_alpha_that_fp32_can_hold_is_used(alpha: float) -> None:
    assert only_step(make_plan(*pair({"t": ("F32", (8,))}, {"t": ("F32", (8,))}), [alpha])).action is EXTRAPOLATE


def test_several_alphas_share_one_plan_and_a_0_among_them_is_a_copy_in_its_output_alone() -> None:
    plan = make_plan(*pair({"t": ("F64", (8,))}, {"t": ("F64", (8,))}), [0.1, 0, -0.5])
    assert plan.alphas == (0.1, 0, -0.5)
    assert only_step(plan).action is EXTRAPOLATE
    assert only_step(plan).alphas == (0.1, 0.0, -0.5)


# Arguments.


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e39, -1e39, 3.5e38, 10**400, None, "1", [1]])
@pytest.mark.parametrize("place", ["alpha", "second alpha", "rule"])
def test_alpha_that_is_no_finite_fp32_number(alpha: Any, place: str) -> None:
    sft, aligned = pair(MODEL, MODEL)
    alphas = {"alpha": [alpha], "second alpha": [0.1, alpha], "rule": [0.1]}[place]
    with pytest.raises(UsageError) as caught:
        make_plan(sft, aligned, alphas, {"embed": alpha} if place == "rule" else None)
    assert "finite in float32" in str(caught.value)
    assert repr(alpha) in str(caught.value)


@pytest.mark.parametrize(
    "alphas", [[], [0.1, 0.1], [1, 1.0], [0.0, -0.0], [i / 100 for i in range(MAX_ALPHAS + 1)]], ids=len
)
def test_no_alpha_the_same_twice_or_too_many(alphas: list[float]) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(*pair(MODEL, MODEL), alphas)
    assert str(MAX_ALPHAS) in str(caught.value)
    assert str(alphas) in str(caught.value)


def test_as_many_alphas_as_allowed() -> None:
    alphas = [i / 100 for i in range(MAX_ALPHAS)]
    plan = make_plan(*pair(MODEL, MODEL), alphas)
    plan.check()
    assert all(len(step.alphas) == MAX_ALPHAS for step in plan.steps)


@pytest.mark.parametrize(
    ("option", "known"),
    [("on_unpaired", "error, aligned"), ("on_mismatch", "error, rows, aligned"), ("dtype", "bf16, fp16, fp32")],
)
def test_unknown_choice(option: str, known: str) -> None:
    arguments: dict[str, Any] = {option: "sft"}
    with pytest.raises(UsageError, match=f"`{option}` must be one of {known}, got 'sft'"):
        make_plan(*pair(MODEL, MODEL), [ALPHA], **arguments)


# --alpha-for.


def alphas_by_name(rules: Mapping[str, float], alpha: float = 2.0) -> dict[str, float]:
    plan = make_plan(*pair(MODEL, MODEL), [alpha], rules)
    plan.check()
    return {step.name: step.alphas[0] for step in plan.steps if step.name != "steps"}


@pytest.mark.parametrize(
    ("rules", "changed"),
    [
        pytest.param({r"\.q$": 0.5}, {"layers.0.q": 0.5, "layers.1.q": 0.5}, id="searched anywhere in the name"),
        pytest.param({"^e": 4, "d$": 0.5}, {"embed": 0.5, "empty": 4.0}, id="anchored"),
        pytest.param({"layers": 0.5, r"\.1\.": 4}, {"layers.0.q": 0.5, "layers.1.q": 4.0}, id="last wins"),
        pytest.param({r"\.1\.": 4, "layers": 0.5}, {"layers.0.q": 0.5, "layers.1.q": 0.5}, id="last wins, not first"),
        pytest.param({"embed": 0}, {"embed": 0.0}, id="0 keeps"),
        pytest.param({"": -1}, dict.fromkeys([n for n in MODEL if n != "steps"], -1.0), id="empty: every name"),
        pytest.param({"(?i)EMBED|Norm": 0.5}, {"embed": 0.5, "norm": 0.5}, id="flags and alternatives"),
    ],
)  # fmt: skip
def test_alpha_for(rules: Mapping[str, float], changed: Mapping[str, float]) -> None:
    everywhere = dict.fromkeys([name for name in MODEL if name != "steps"], 2.0)
    assert alphas_by_name(rules) == {**everywhere, **changed}


def test_alpha_for_0_keeps_the_tensor_and_reads_no_counterpart() -> None:
    plan = make_plan(*pair(MODEL, MODEL), [ALPHA], {"embed": 0})
    assert plan.steps[0][1:3] == (COPY, "alpha is 0")
    assert plan.steps[0].alphas == (0.0,)
    assert plan.steps[0].sft is None


def test_alpha_for_is_the_same_in_every_output_and_replaces_alpha_0() -> None:
    plan = make_plan(*pair(MODEL, MODEL), [0, 1, 2], {"layers": 0.5})
    assert {step.name: step.alphas for step in plan.steps} == {
        **dict.fromkeys(MODEL, (0.0, 1.0, 2.0)),
        "layers.0.q": (0.5,) * 3, "layers.1.q": (0.5,) * 3, "steps": (0.0,) * 3,
    }  # fmt: skip
    assert make_plan(*pair(MODEL, MODEL), [0], {"embed": 0.5}).steps[0].action is EXTRAPOLATE


@pytest.mark.parametrize("pattern", ["layer$", "^q", r"layers\.7\."])
def test_alpha_for_that_matches_nothing_is_a_problem(pattern: str) -> None:
    plan = make_plan(*pair(MODEL, MODEL), [ALPHA], {pattern: 1, "embed": 0.5})
    assert plan.problems == (f"`alpha_for` {pattern!r} matches no tensor of /models/aligned",)
    with pytest.raises(PlanError):
        plan.check()


def test_alpha_for_that_a_later_rule_covers_is_no_problem() -> None:
    make_plan(*pair(MODEL, MODEL), [ALPHA], {"embed": 1, "": 0.5}).check()


@pytest.mark.parametrize(
    "pattern",
    ["(", "*", "[a", "(?P<n", "a{2,1}", "a{99999999999999999999}", "(" * 5000, 3, b"embed"],
    ids=lambda pattern: str(pattern)[:12],
)
def test_alpha_for_that_is_no_regular_expression(pattern: Any) -> None:
    with pytest.raises(UsageError, match="is not a regular expression"):
        make_plan(*pair(MODEL, MODEL), [ALPHA], {pattern: 1})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    shapes: Shapes = {"a=b": ("BF16", (4,)), "c": ("BF16", (4,))}
    for i, role in enumerate(("sft", "aligned")):
        write_folder(tmp_path / role, random_tensors(shapes, seed=i))
    return str(tmp_path / "sft"), str(tmp_path / "aligned")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["a=b=0.5"], {"a=b": 0.5, "c": 2}),
        (["a(?=.b)=0.5"], {"a=b": 0.5, "c": 2}),
        (["==0.5"], {"a=b": 0.5, "c": 2}),
        (["=0.5"], {"a=b": 0.5, "c": 0.5}),
        (["a=-1e-1", "c=+4"], {"a=b": -0.1, "c": 4}),
        (["c=1", ".=3", "c=4"], {"a=b": 3, "c": 4}),
        (["c=1", ".=3", "c=1"], {"a=b": 3, "c": 1}),
    ],
)
def test_alpha_for_on_the_command_line_is_cut_at_its_last_equals_sign(
    folders: tuple[str, str], rules: list[str], expected: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for rule in rules for text in ("--alpha-for", rule)]
    assert main(["--sft", folders[0], "--aligned", folders[1], "--alpha", "2", "--plan", "--json", *options]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    alphas = {step["name"]: pytest.approx(step["alphas"][0], rel=1e-6) for step in steps}
    assert expected == alphas


@pytest.mark.parametrize("rule", ["c", "c=", "c=x", "=", ""])
def test_alpha_for_on_the_command_line_without_a_number(
    folders: tuple[str, str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sft", folders[0], "--aligned", folders[1], "--alpha", "2", "--plan", "--alpha-for", rule]
    assert main(arguments) == UsageError.exit_code
    assert f"--alpha-for takes REGEX=FLOAT, got {rule!r}" in capsys.readouterr().err


# Unpaired and mismatched tensors.

SFT: Shapes = {
    "both": ("BF16", (4,)), "sft.0": ("BF16", (4,)), "sft.1": ("I64", (1,)), "resized.0": ("BF16", (4, 2)),
    "resized.1": ("BF16", ()), "kind": ("I64", (4,)),
}  # fmt: skip
ALIGNED: Shapes = {
    "both": ("BF16", (4,)), "mine.0": ("BF16", (4,)), "mine.1": ("U8", (4,)), "resized.0": ("BF16", (5, 2)),
    "resized.1": ("F32", (1,)), "kind": ("F32", (4,)),
}  # fmt: skip


def test_unpaired_and_mismatched_are_all_listed_at_once_with_their_options() -> None:
    plan = make_plan(*pair(SFT, ALIGNED), [ALPHA])
    with pytest.raises(PlanError) as caught:
        plan.check()
    message = str(caught.value)
    assert message == "\n".join(plan.problems)
    unpaired = message[: message.index("tensors whose")]
    assert "4 tensors without a counterpart" in unpaired
    assert "`on_unpaired='aligned'`" in unpaired
    for name, side in (("mine.0", "aligned"), ("mine.1", "aligned"), ("sft.0", "sft"), ("sft.1", "sft")):
        assert f"{name} ({side} only)" in unpaired
    assert "2 tensors whose counterpart has another shape" in message
    assert "1 tensor with integers in one checkpoint and floating-point numbers in the other" in message
    assert "`on_mismatch='aligned'`" in message
    assert "resized.0: sft BF16 [4, 2], aligned BF16 [5, 2]" in message
    assert "resized.1: sft BF16 [], aligned F32 [1]" in message
    assert "kind: sft I64 [4], aligned F32 [4]" in message
    assert len(plan.problems) == 3


def test_every_kind_of_problem_is_listed_at_once() -> None:
    sft = checkpoint({**SFT, "fp8": ("F8_E4M3", (4,))}, "/models/sft", config={"model_type": "llama"})
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": "fp8"}}
    aligned = checkpoint({**ALIGNED, "fp8": ("F8_E4M3", (4,))}, config=config)
    problems = make_plan(sft, aligned, [ALPHA], {"nothing like it": 1}).problems
    words = (
        "quantised (",
        "architectures",
        "dtype that",
        "without a counterpart",
        "integers in",
        "`on_mismatch=",
        "`alpha_for`",
    )
    assert [sum(word in problem for problem in problems) for word in words] == [1] * 7
    assert len(problems) == 7


@pytest.mark.parametrize(("n", "words"), [(1, "1 tensor without"), (1000, "1000 tensors without")])
def test_number_of_unpaired_tensors(n: int, words: str) -> None:
    extra = {f"extra.{i}": ("BF16", (1,)) for i in range(n)}
    (problem,) = make_plan(*pair({"both": ("BF16", (4,))}, {"both": ("BF16", (4,)), **extra}), [1]).problems
    assert problem.startswith(words)
    assert problem.splitlines()[1] == (
        "  extra.0 (aligned only)" if n == 1 else "  extra.* (aligned only): 1000 tensors"
    )
    assert problem.count("\n") == 1


def test_the_options_keep_aligneds_tensors() -> None:
    plan = make_plan(*pair(SFT, ALIGNED), [ALPHA], on_unpaired="aligned", on_mismatch="aligned")
    plan.check()
    assert plan.dropped == {"sft.0": "only in sft", "sft.1": "only in sft"}
    assert fates(plan) == {
        "both": (EXTRAPOLATE, ""),
        "mine.0": (COPY, "not in sft"),
        "mine.1": (COPY, "not in sft"),
        "resized.0": (COPY, "sft has BF16 [4, 2]"),
        "resized.1": (COPY, "sft has BF16 []"),
        "kind": (COPY, "sft has I64 [4]"),
    }


@pytest.mark.parametrize(
    ("options", "left"),
    [({"on_unpaired": "aligned"}, "on_mismatch"), ({"on_mismatch": "aligned"}, "on_unpaired")],
)
def test_one_option_does_not_answer_for_the_other(options: dict[str, str], left: str) -> None:
    problems = make_plan(*pair(SFT, ALIGNED), [ALPHA], **options).problems
    assert [left in problem for problem in problems] == [False, True][-len(problems) :]


def test_a_rule_or_alpha_0_does_not_hide_a_mismatch() -> None:
    assert len(make_plan(*pair(SFT, ALIGNED), [0]).problems) == 3
    assert len(make_plan(*pair(SFT, ALIGNED), [1], {"": 0}).problems) == 3


def test_a_plan_with_problems_can_be_printed_whole() -> None:
    plan = make_plan(*pair(SFT, ALIGNED), [ALPHA])
    assert plan.problems
    assert [step.name for step in plan.steps] == list(ALIGNED)
    assert plan.output_bytes > plan.input_bytes > 0
    assert [chunk.stop for chunk in cut(plan.shards, ALIGNMENT)][-1] == plan.shards[0].size


# Models that do not belong together.


@pytest.mark.parametrize(
    ("sft", "aligned", "fits"),
    [
        ({"model_type": "llama"}, {"model_type": "llama"}, True),
        ({"model_type": "llama"}, {"model_type": "mistral"}, False),
        ({}, {"model_type": "mistral"}, True),
        ({"model_type": "llama"}, {}, True),
        ({"model_type": None}, {"model_type": "mistral"}, True),
        ({"model_type": ["odd"]}, {"model_type": {}}, False),
    ],
)
def test_model_type(sft: dict[str, Any], aligned: dict[str, Any], fits: bool) -> None:
    problems = make_plan(
        checkpoint(MODEL, "/models/sft", config=sft), checkpoint(MODEL, config=aligned), [ALPHA]
    ).problems
    assert (problems == ()) is fits
    if not fits:
        (problem,) = problems
        for words in ("/models/sft", "/models/aligned", repr(sft["model_type"]), repr(aligned["model_type"])):
            assert words in problem


@pytest.mark.parametrize("role", ["sft", "aligned"])
@pytest.mark.parametrize(
    ("scheme", "method"), [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "unknown"), ("awq", "awq")]
)
def test_quantised_model(role: str, scheme: Any, method: str) -> None:
    configs = {"sft": {}, "aligned": {}, role: {"quantization_config": scheme}}
    sft, aligned = (checkpoint(MODEL, f"/models/{name}", config=config) for name, config in configs.items())
    (problem,) = make_plan(sft, aligned, [ALPHA]).problems
    assert problem.startswith(f"{role} /models/{role} is quantised (quant_method {method})")


@pytest.mark.parametrize("scheme", [None, {}, False])
def test_empty_quantization_config_is_none(scheme: Any) -> None:
    config = {"quantization_config": scheme}
    make_plan(checkpoint(MODEL, config=config), checkpoint(MODEL, config=config), [ALPHA]).check()


@pytest.mark.parametrize(
    "dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "C64"]
)
@pytest.mark.parametrize("roles", [("sft",), ("aligned",), ("sft", "aligned")])
@pytest.mark.parametrize("policy", ["error", "aligned"])
def test_dtype_that_cannot_be_extrapolated(dtype: str, roles: tuple[str, ...], policy: str) -> None:
    shapes = {
        role: {"w": (dtype if role in roles else "BF16", (4,)), "v": ("BF16", (4,))} for role in ("sft", "aligned")
    }
    plan = make_plan(*pair(shapes["sft"], shapes["aligned"]), [ALPHA], on_mismatch=policy)
    problem = plan.problems[0]
    assert problem.startswith(f"{len(roles)} tensor{'s' * (len(roles) > 1)} of a dtype that cannot be extrapolated")
    for role in roles:
        assert f"{role}'s w ({dtype})" in problem
    assert fates(plan)["v"] == (EXTRAPOLATE, "")
    assert fates(plan)["w"][0] is COPY


# The output's files.

GROUPS = [["embed", "steps", "norm"], ["layers.1.q"], ["scalar", "layers.0.q", "empty"]]


def test_output_keeps_the_shards_of_aligned_whatever_those_of_sft() -> None:
    sft = checkpoint(MODEL, "/models/sft", shards=[[name] for name in reversed(MODEL)])
    aligned = checkpoint(MODEL, shards=GROUPS)
    plan = make_plan(sft, aligned, [ALPHA])
    plan.check()
    assert {shard.name: {step.name for step, _ in shard.steps} for shard in plan.shards} == {
        f"shard-{i}": set(group) for i, group in enumerate(GROUPS)
    }
    assert plan.index is not None
    assert json.loads(plan.index)["weight_map"] == aligned.weight_map
    single = make_plan(sft, checkpoint(MODEL), [ALPHA])
    assert [shard.name for shard in single.shards] == [SINGLE]
    assert single.index is None


def test_output_headers_are_valid_and_say_what_the_plan_says() -> None:
    aligned = checkpoint(MODEL, shards=GROUPS, metadata={"made by": "é"})
    plan = make_plan(checkpoint(MODEL), aligned, [ALPHA])
    for shard in plan.shards:
        header = parse(shard.name, shard.header[8:], shard.size)
        assert header.tensors == tuple(placed for _, placed in shard.steps)
        assert header.metadata == {"format": "pt", "made by": "é"}
        for step, placed in shard.steps:
            assert (placed.name, placed.dtype, placed.shape) == (step.name, step.aligned.dtype, step.aligned.shape)


def test_index_has_the_true_total_and_the_other_metadata() -> None:
    index = {"metadata": {"total_size": 7, "total_parameters": 5, "é": "\n"}, "weight_map": {}}
    plan = make_plan(checkpoint(MODEL), checkpoint(MODEL, shards=GROUPS, index=index), [ALPHA])
    assert plan.index is not None
    assert plan.index.endswith(b"}\n")
    written = json.loads(plan.index)
    total = sum(step.aligned.nbytes for step in plan.steps)
    assert written["metadata"] == {"total_size": total, "total_parameters": 5, "é": "\n"}
    assert list(written["weight_map"]) == sorted(MODEL)


@pytest.mark.parametrize("metadata", [None, [], "x", 1])
def test_index_with_metadata_of_another_kind(metadata: Any) -> None:
    aligned = checkpoint(MODEL, shards=GROUPS, index={"metadata": metadata, "weight_map": {}})
    plan = make_plan(checkpoint(MODEL), aligned, [ALPHA])
    assert plan.index is not None
    assert list(json.loads(plan.index)["metadata"]) == ["total_size"]


@pytest.mark.parametrize("metadata", [{"by": "\ud800"}, {"\udfff": 1}])
def test_index_with_a_lone_surrogate_in_its_metadata(metadata: dict[str, Any]) -> None:
    """A lone surrogate is valid in JSON and cannot be encoded in UTF-8."""
    aligned = checkpoint(MODEL, shards=GROUPS, index={"metadata": metadata, "weight_map": {}})
    plan = make_plan(checkpoint(MODEL), aligned, [ALPHA])
    assert plan.index is not None
    assert json.loads(plan.index)["metadata"].items() >= metadata.items()


def test_bytes_read_and_written() -> None:
    sft: Shapes = {"w": ("F32", (6,)), "i": ("I64", (2,)), "x": ("F32", (100,))}
    aligned: Shapes = {"w": ("BF16", (6,)), "i": ("I64", (2,)), "y": ("F64", (5,))}
    for alphas in ([0.1], [0.1, 0.2, 0]):
        plan = make_plan(*pair(sft, aligned), alphas, on_unpaired="aligned")
        assert plan.input_bytes == 6 * 4 + 6 * 2 + 2 * 8 + 5 * 8
        assert plan.output_bytes == len(alphas) * (ALIGNMENT + 6 * 2 + 2 * 8 + 5 * 8)
    assert make_plan(*pair(sft, aligned), [0], on_unpaired="aligned").input_bytes == 6 * 2 + 2 * 8 + 5 * 8


def test_every_file_is_carried_or_named_in_order() -> None:
    files = ("README.md", "a.bin", "config.json", "sub/x.json", "tokenizer.json")
    plan = make_plan(checkpoint(MODEL), checkpoint(MODEL, files=files), [ALPHA])
    assert plan.carried == ("config.json", "tokenizer.json")
    assert [file for file, _ in plan.left_out] == ["README.md", "a.bin", "sub/x.json"]


@pytest.mark.parametrize("carry", ["*.png", [""], [1]])
def test_patterns_that_make_no_sense(carry: Any) -> None:
    with pytest.raises(UsageError, match=r"^`carry` must be a list of patterns, such as \['\*\.png'\], got "):
        make_plan(*pair(MODEL, MODEL), [ALPHA], carry=carry)


def test_a_pattern_that_carries_nothing_is_a_problem_among_the_others() -> None:
    aligned = checkpoint(MODEL, files=("config.json", "loss.png"))
    plan = make_plan(checkpoint(MODEL), aligned, [ALPHA], carry=["*.png", "*.pdf"])
    assert plan.carried == ("config.json", "loss.png")
    assert plan.problems == ("`carry` '*.pdf' matches no file beside the weights of /models/aligned",)


# No I/O.


def test_planning_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {name: MODEL[name] for name in ("embed", "layers.0.q", "steps")}
    sft = open_checkpoint(write_folder(tmp_path / "sft", random_tensors(shapes, 1), shards=3))
    aligned = open_checkpoint(write_folder(tmp_path / "aligned", random_tensors(shapes, 2), shards=2))

    def refuse(*arguments: object, **_: object) -> Any:
        raise AssertionError(f"planning opened a file: {arguments}")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        for name in ("open", "stat", "lstat", "listdir", "scandir", "access", "readlink"):
            patch.setattr(os, name, refuse)
        plan = make_plan(sft, aligned, [0.1, 0.2], {"embed": 0.5})
        plan.check()
        chunks = list(cut(plan.shards, ALIGNMENT))
    assert sum(chunk.stop - chunk.start for chunk in chunks) * 2 == plan.output_bytes


def test_planning_imports_neither_numpy_nor_torch(tmp_path: Path) -> None:
    for role in ("sft", "aligned"):
        write_folder(tmp_path / role, random_tensors({"w": ("BF16", (4, 4))}, 1), shards=1)
    code = (
        "import sys\n"
        "from expo.checkpoints.checkpoint import open_checkpoint\n"
        "from expo.planning.shards import cut\n"
        "from expo.options import MergeOptions\n"
        "from expo.planning.matching import match_tensors\n"
        "from expo.planning.plan import plan_output\n"
        "sft, aligned, options = open_checkpoint('sft'), open_checkpoint('aligned'), MergeOptions(alphas=(0.5,))\n"
        "plan = plan_output(aligned, match_tensors(sft, aligned, options), options)\n"
        "plan.check()\n"
        "assert len(list(cut(plan.shards, 4096))) == 2\n"
        "heavy = {'numpy', 'torch', 'transformers', 'safetensors', 'ml_dtypes', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


# cut().


@st.composite
def layouts(draw: st.DrawFn) -> Checkpoint:
    """Return a checkpoint of any dtypes and sizes in any number of shards; elements of 4 and 6 bits fill bytes."""
    n = draw(st.integers(1, 25))
    tensors = {}
    for i in range(n):
        dtype = draw(st.sampled_from(list(BITS)))
        count = draw(st.integers(0, 40) | st.integers(0, 30_000) | st.sampled_from([512, 1024, 2048, 4096, 8192]))
        tensors[f"t{draw(st.integers(0, 9))}.{i}"] = (dtype, (count * {4: 2, 6: 4}.get(BITS[dtype], 1),))
    groups: list[list[str]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for name in tensors:
        groups[draw(st.integers(0, len(groups) - 1))].append(name)
    assume(all(groups))
    return checkpoint(tensors, shards=groups)


@given(layouts(), st.integers(1, 12).map(lambda blocks: blocks * ALIGNMENT))
@settings(deadline=None, max_examples=150)
def test_chunks_and_pieces_tile_the_output(aligned: Checkpoint, size: int) -> None:
    plan = make_plan(aligned, aligned, [ALPHA])
    check_cut(plan, list(cut(plan.shards, size)), size)


@pytest.mark.parametrize("size", [ALIGNMENT, 4 << 20])
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param({"a": ("BF16", (0,))}, id="nothing but the header"),
        pytest.param({"a": ("BF16", (0,)), "b": ("F64", ()), "c": ("F32", (0, 3))}, id="scalar between empty tensors"),
        pytest.param({f"t{i}": ("F32", (1024,)) for i in range(5)}, id="tensors that end where chunks end"),
        pytest.param({f"t{i}": ("BOOL", (1,)) for i in range(5000)}, id="many tensors in a chunk"),
        pytest.param({"x" * 9000: ("BF16", (5,))}, id="a header longer than a chunk"),
        pytest.param({"a": ("F64", (3,)), "b": ("F32", (3,)), "c": ("F16", (3,)), "d": ("U8", (3,))}, id="odd sizes"),
    ],
)  # fmt: skip
def test_chunks_at_the_edges(shapes: Shapes, size: int) -> None:
    plan = make_plan(*pair(shapes, shapes), [ALPHA])
    check_cut(plan, list(cut(plan.shards, size)), size)


def test_chunks_of_a_tensor_beyond_32_bits() -> None:
    shapes: Shapes = {"w": ("F32", (3, 2**31 + 1)), "b": ("BF16", (7,))}
    plan = make_plan(*pair(shapes, shapes), [ALPHA])
    size = 1 << 30
    check_cut(plan, list(cut(plan.shards, size)), size)
