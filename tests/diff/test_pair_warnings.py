"""The warnings about a pair: equal, unrelated, swapped, partly trained, not finite, or of another form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import random_tensors, write_folder
from moved_pairs import llama_shapes, move, write_pair

from expo.diff import Comparison, compare
from expo.errors import PlanError


def warning_of(comparison: Comparison) -> str:
    assert len(comparison.warnings) == 1, comparison.warnings
    return comparison.warnings[0]


def test_equal_models(tmp_path: Path) -> None:
    comparison = compare(*write_pair(tmp_path, llama_shapes(1), but=""))
    assert warning_of(comparison) == (
        "sft and aligned are equal in all that was compared: is one of the two paths wrong?"
    )
    assert comparison.totals.relative_norm == comparison.totals.one_minus_cosine == 0


def test_unrelated_models(tmp_path: Path) -> None:
    comparison = compare(*(write_folder(tmp_path / str(k), random_tensors(llama_shapes(1), k)) for k in (1, 2)))
    assert warning_of(comparison).endswith(
        "for a model and the one it was trained from it is below 0.1: are the two models unrelated?"
    )


def test_layers_that_were_not_trained(tmp_path: Path) -> None:
    comparison = compare(*write_pair(tmp_path, llama_shapes(9), but=r"layers\.[0-3]\.|layers\.7\.|embed|norm"))
    assert warning_of(comparison) == (
        "only part of the model was trained: the same in both are layers 0-3, 7 of model.layers, embeddings"
    )


def test_elements_that_are_not_finite(tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, {"x": ("F32", (100,)), "y": ("F32", (100,))}, by=1e-4)
    for folder, name, values in ((sft_folder, "x", [np.inf]), (aligned_folder, "y", [np.nan, -np.inf])):
        tensors = random_tensors({"x": ("F32", (100,)), "y": ("F32", (100,))}, 1)
        tensors = dict(move(tensors, 1e-4) if folder == aligned_folder else tensors)
        data = np.frombuffer(tensors[name][2], "<f4").copy()
        data[: len(values)] = values
        tensors[name] = "F32", (100,), data.tobytes()
        write_folder(folder, tensors)
    comparison = compare(sft_folder, aligned_folder)
    assert comparison.warnings == (
        "sft has 1 elements that are inf or NaN, which no norm counts: x",
        "aligned has 2 elements that are inf or NaN, which no norm counts: y",
    )
    assert (comparison.totals.non_finite_sft, comparison.totals.non_finite_aligned) == (1, 2)
    assert comparison.totals.relative_norm < 0.1


def test_tensors_of_one_model_alone_and_of_other_shapes(tmp_path: Path) -> None:
    common = {"x": ("F32", (50, 4)), "model.embed_tokens.weight": ("F32", (40, 16)), "turned": ("F32", (3, 4))}
    sft = random_tensors({**common, "old": ("F32", (3,))}, 1)
    aligned = move({name: sft[name] for name in common}, 1e-4)
    more = random_tensors({"rows": ("F32", (2, 16)), "new": ("F32", (3,))}, 5)
    aligned["model.embed_tokens.weight"] = "F32", (42, 16), aligned["model.embed_tokens.weight"][2] + more["rows"][2]
    aligned["turned"] = "F32", (4, 3), aligned["turned"][2]
    aligned["new"] = more["new"]
    sft_folder, aligned_folder = write_folder(tmp_path / "s", sft), write_folder(tmp_path / "a", aligned)
    comparison = compare(sft_folder, aligned_folder)
    assert comparison.warnings == (
        "1 tensor in sft alone: old",
        "1 tensor in aligned alone: new",
        "3 tensors of another shape in sft: model.embed_tokens.weight[40:42] (sft has F32 [40, 16]), "
        "turned (sft has F32 [3, 4]), model.embed_tokens.weight (rows 0 to 39; sft has F32 [40, 16])",
    )
    assert comparison.unpaired == (("new", "only in aligned"), ("old", "only in sft"))
    assert [tensor.elements for tensor in comparison.tensors] == [200, 640]
    assert [t.name for t in compare(sft_folder, aligned_folder, on_mismatch="aligned").tensors] == ["x"]
    for option in ("on_unpaired", "on_mismatch"):
        with pytest.raises(PlanError):
            compare(sft_folder, aligned_folder, **{option: "error"})


def test_dtypes_that_differ(tmp_path: Path) -> None:
    sft_folder = write_folder(tmp_path / "s", random_tensors({"x": ("F32", (99,))}, 1))
    comparison = compare(sft_folder, write_folder(tmp_path / "a", random_tensors({"x": ("BF16", (99,))}, 1)))
    assert warning_of(comparison) == (
        "dtypes differ (F32 in sft and BF16 in aligned): an element that rounding alone changed counts as changed"
    )


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    for folder, tokens in ((sft_folder, {"a": 0, "b": 1}), (aligned_folder, {"a": 1, "b": 0})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    assert warning_of(compare(sft_folder, aligned_folder)) == (
        "the tokenizers differ in 2 token ids (0 is 'a' in sft and 'b' in aligned; 1 is 'b' in sft and 'a' in "
        "aligned); rows of the embeddings are compared by id"
    )


@pytest.mark.parametrize(
    ("sft", "aligned", "evidence"),
    [
        ("mistral-dpo", "mistral-sft", "sft is called mistral-dpo and aligned mistral-sft"),
        ("Llama-3-8B-Instruct", "Llama-3-8B-base", "sft is called Llama-3-8B-Instruct and aligned Llama-3-8B-base"),
        ("sft", "dpo", ""),
        ("base", "base-chat", ""),
        ("x-Instruct", "x-Instruct-SimPO", ""),
        ("italian", "baseline", ""),
    ],
)
def test_names_that_show_a_swap(sft: str, aligned: str, evidence: str, tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    comparison = compare(sft_folder.rename(tmp_path / sft), aligned_folder.rename(tmp_path / f"{aligned}_"))
    expected = f"the two may be swapped: {evidence}_. The weights alone do not show it"
    assert comparison.warnings == ((expected,) if evidence else ())


@pytest.mark.parametrize("source", ["config", "card", "list"])
def test_files_that_show_a_swap(source: str, tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    (tmp_path / "org").mkdir()
    sft_folder, aligned_folder = sft_folder.rename(tmp_path / "two"), aligned_folder.rename(tmp_path / "org" / "one")
    if source == "config":
        (sft_folder / "config.json").write_text(json.dumps({"_name_or_path": str(aligned_folder)}))
    else:
        text = "org/one" if source == "card" else "\n- org/one"
        (sft_folder / "README.md").write_text(f"---\ntags: [x]\nbase_model: {text}\nlicense: mit\n---\n")
    assert warning_of(compare(sft_folder, aligned_folder)).startswith(
        "the two may be swapped: sft's own files say that it was made from "
    )
    assert compare(aligned_folder, sft_folder).warnings == ()
