"""Tests of the automatic class that a model card names and a search uses."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from expo.checkpoints.auto_class import auto_class

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", {}, "AutoModelForCausalLM"),
    ("GPT2LMHeadModel", {}, "AutoModelForCausalLM"),
    ("ReformerModelWithLMHead", {}, "AutoModelForCausalLM"),
    ("BertForMaskedLM", {}, "AutoModelForMaskedLM"),
    ("LlamaForSequenceClassification", {}, "AutoModelForSequenceClassification"),
    ("LlamaForTokenClassification", {}, "AutoModelForTokenClassification"),
    ("LlamaModel", {}, "AutoModel"),
    ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
    ("MarianMTModel", {"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
    ("EncoderDecoderModel", {"encoder": {}, "decoder": {}}, "AutoModelForSeq2SeqLM"),
    ("WhisperForConditionalGeneration", {"num_mel_bins": 80, "is_encoder_decoder": True}, "AutoModelForSpeechSeq2Seq"),
    ("Qwen2AudioForConditionalGeneration", {"audio_config": {}}, "AutoModelForMultimodalLM"),
    ("LlavaForConditionalGeneration", {"vision_config": {}}, "AutoModelForImageTextToText"),
    ("Gemma3ForConditionalGeneration", {"vision_config": {}, "text_config": {}}, "AutoModelForImageTextToText"),
]


@pytest.mark.parametrize(("architecture", "fields", "expected"), CASES)
def test_the_class_follows_from_the_config(architecture: str, fields: dict[str, Any], expected: str) -> None:
    config = {"architectures": [architecture], **fields}
    assert auto_class(config) == expected
    library: Any = transformers
    if hasattr(library, expected):  # it loads this class
        assert architecture in {
            name for names in getattr(library, expected)._model_mapping._model_mapping.values()
            for name in (names if isinstance(names, tuple) else (names,))
        }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "AutoModelForCausalLM"),
        ({"architectures": None}, "AutoModelForCausalLM"),
        ({"architectures": []}, "AutoModelForCausalLM"),
        ({"architectures": "x", "auto_map": 3}, "AutoModelForCausalLM"),
        ({"architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
         "AutoModelForCausalLM"),
        ({"architectures": ["X"], "auto_map": {"AutoModel": "a.B", "AutoModelForSequenceClassification": "a.C"}},
         "AutoModelForSequenceClassification"),
    ],
)  # fmt: skip
def test_configs_that_name_no_class_of_transformers(config: dict[str, Any], expected: str) -> None:
    assert auto_class(config) == expected


def test_a_search_loads_models_that_write_text() -> None:
    from expo.search.models import generating_class

    for architecture, fields, expected in CASES:
        kind = generating_class({"architectures": [architecture], **fields}).__name__
        assert kind == (expected if expected == "AutoModelForImageTextToText" else "AutoModelForCausalLM")
