"""Names of tensors as text: without a wrapper's parts, the prefix that many share, and stars for numbers."""

from __future__ import annotations

import pytest

from expo.checkpoints.naming import find_wrapper_prefix, mask_numbers, unwrap


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q.weight", "model.layers.0.q.weight"),
        ("model.module.x", "model.module.x"),
        ("modules.0.weight", "modules.0.weight"),
        ("policy_head.weight", "policy_head.weight"),
    ],
)
def test_unwrap(name: str, short: str) -> None:
    assert unwrap(name) == short


def test_the_prefix_that_names_share_and_others_lack() -> None:
    assert find_wrapper_prefix(["a.b.c", "a.b.d"], ["c", "d"]) == "a.b."
    assert find_wrapper_prefix(["a.b.c", "a.b.d"], ["b.c", "b.d"]) == "a."
    assert find_wrapper_prefix(["a.c", "b.d"], ["c", "d"]) == ""


def test_numbers_are_parts_of_a_name() -> None:
    assert mask_numbers("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
    assert mask_numbers("0.weight") == "*.weight"
