"""The layer and the kind of a tensor, by names of many architectures."""

from __future__ import annotations

import pytest

from expo.diff.places import find_place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12, "self_attn.q_proj")),
        ("model.layers.12.self_attn.q_proj.bias", ("model.layers", 12, "self_attn.q_proj")),
        ("transformer.h.0.ln_1.weight", ("transformer.h", 0, "norms")),
        ("h.3.attn.c_attn.weight", ("h", 3, "attn.c_attn")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", ("encoder.block", 1, "SelfAttention.q")),
        ("bert.encoder.layer.7.attention.output.LayerNorm.gamma", ("bert.encoder.layer", 7, "norms")),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", ("model.layers", 2, "block_sparse_moe.experts.w1")),
        ("vision_tower.encoder.layers.4.mlp.fc1.bias", ("vision_tower.encoder.layers", 4, "mlp.fc1")),
        ("model.embed_tokens.weight", ("", None, "embeddings")),
        ("transformer.wpe.weight", ("", None, "embeddings")),
        ("lm_head.weight", ("", None, "head")),
        ("output.weight", ("", None, "head")),
        ("score.weight", ("", None, "head")),
        ("model.norm.weight", ("", None, "norms")),
        ("transformer.ln_f.bias", ("", None, "norms")),
        ("something.0.odd", ("", None, "other")),
    ],
)
def test_the_place_of_a_tensor(name: str, place: tuple[str, int | None, str]) -> None:
    assert tuple(find_place(name)) == place
