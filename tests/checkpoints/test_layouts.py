"""These tests check the table of layouts against the installed transformers, and its reader."""

from __future__ import annotations

import json

import pytest

from expo.checkpoints.layouts import TABLE, Layout, find_layouts
from tests.helpers import layouts_table


def layout_of(model_type: str, **config: object) -> Layout:
    """Return the one layout of a model type."""
    (layout,) = find_layouts({"model_type": model_type, **config})
    return layout


@pytest.mark.exhaustive
def test_the_table_is_what_the_generator_makes() -> None:
    """The installed transformers may be newer than the table; then the table is made again and reviewed."""
    import transformers

    with open(TABLE, encoding="utf-8") as file:
        text = file.read()
    if json.loads(text)["transformers"] != transformers.__version__:
        pytest.skip("the table is that of another version of transformers")
    assert layouts_table.text(layouts_table.make_table()) == text


def test_renames_and_places_of_mixtral() -> None:
    layout = layout_of("mixtral")
    name = layout.rename("module.model.layers.3.block_sparse_moe.experts.12.w3.weight")
    assert name == "model.layers.3.mlp.experts.12.w3.weight"
    place = layout.find_place(name)
    assert place is not None
    assert place.targets == ("model.layers.3.mlp.experts.gate_up_proj",)
    assert (place.source, place.expert) == (1, 12)
    assert place.fusion.operations == (("stack", 0), ("concatenate", 1))
    assert layout.find_place("model.layers.3.mlp.experts.gate_up_proj") is None
    assert layout.find_place("model.layers.3.mlp.experts.12.w3.weight_scale_inv") is None


def test_an_inner_model_has_its_own_layout() -> None:
    """A vision-language model has the layout of its text model; renames of beginnings are those of the outer model."""
    layout = layout_of("no such model", text_config={"model_type": "qwen3_moe"})
    place = layout.find_place("model.language_model.layers.0.mlp.experts.1.down_proj.weight")
    assert place is not None
    assert place.targets == ("model.language_model.layers.0.mlp.experts.down_proj",)


def test_an_inner_model_has_the_layout_of_its_base_class() -> None:
    """The conversions of a ViT belong to a class, and the config of a ViT inside of another model names no class."""
    outer = {"architectures": ["VisionEncoderDecoderModel"], "encoder": {"model_type": "vit"}}
    layout = layout_of("vision-encoder-decoder", **outer)
    name = "encoder.encoder.layer.0.attention.attention.query.weight"
    assert layout.rename(name) == "encoder.layers.0.attention.q_proj.weight"
    assert find_layouts({"model_type": "vit"}) == []


def test_a_class_takes_precedence() -> None:
    assert layout_of("mixtral", architectures=["LlavaModel"]) != layout_of("mixtral")


def test_unknown_models_have_no_layout() -> None:
    assert find_layouts({"model_type": "no such model"}) == []
    assert len(find_layouts({}, {})) > 100
