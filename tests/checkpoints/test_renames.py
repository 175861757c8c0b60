"""The table of renames: pairs of names in both directions, and tensors that are found by another name."""

from __future__ import annotations

import pytest

from expo.checkpoints.renames import PREFIXES, NameIndex, names_with_other_prefixes

SAME = [
    ("model.layers.0.q.weight", "layers.0.q.weight"),
    ("gpt_neox.layers.0.q.weight", "layers.0.q.weight"),
    ("bert.encoder.q.weight", "encoder.q.weight"),
    ("language_model.model.norm.weight", "model.language_model.norm.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("embed_out.weight", "lm_head.weight"),
    ("model.norm.weight", "model.language_model.norm.weight"),
    ("visual.merger.weight", "model.visual.merger.weight"),
    ("vision_tower.vision_model.x.weight", "model.vision_tower.x.weight"),
    ("model.vision_tower.vision_model.x.weight", "model.vision_tower.x.weight"),
    ("image_newline", "model.image_newline"),
    ("norm.gamma", "norm.weight"),
    ("norm.beta", "norm.bias"),
    ("conv.weight_g", "conv.parametrizations.weight.original0"),
    ("conv.weight_v", "conv.parametrizations.weight.original1"),
]


@pytest.mark.parametrize(("one", "other"), [*SAME, *((other, one) for one, other in SAME)])
def test_one_rename_in_either_direction(one: str, other: str) -> None:
    assert NameIndex([one, "model.unrelated.weight"]).find(other) == {one}


def test_a_wrapper_on_either_side() -> None:
    assert NameIndex(["module.model.norm.weight"]).find("norm.weight") == {"module.model.norm.weight"}
    assert NameIndex(["model.norm.weight"]).find("_orig_mod.norm.weight") == {"model.norm.weight"}


def test_two_renames_are_too_many() -> None:
    assert NameIndex(["language_model.model.norm.gamma"]).find("model.language_model.norm.weight") == set()


def test_all_names_that_fit_are_found() -> None:
    assert NameIndex(["model.x", "transformer.x"]).find("x") == {"model.x", "transformer.x"}


def test_an_adapters_names_are_tried_in_the_order_of_the_table() -> None:
    assert list(names_with_other_prefixes("model.visual.x")) == [
        "visual.x", "model.model.visual.x", "transformer.model.visual.x", "gpt_neox.model.visual.x",
        "model.language_model.visual.x", "visual.x", "language_model.model.visual.x",
    ]  # fmt: skip
    assert {new for pair in PREFIXES for new in pair} >= {"", "model.", "transformer.", "gpt_neox."}
