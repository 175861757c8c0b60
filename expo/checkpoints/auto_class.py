"""The automatic class of transformers that loads a model, chosen by the model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CAUSAL = "AutoModelForCausalLM"
# The end of a class's name in `architectures`, and the automatic class that loads such models.
_ENDS = (
    ("ForCausalLM", CAUSAL),
    ("LMHeadModel", CAUSAL),
    ("WithLMHead", CAUSAL),
    ("GenerationDecoder", CAUSAL),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("MTModel", "AutoModelForSeq2SeqLM"),
    ("VisionEncoderDecoderModel", "AutoModelForImageTextToText"),
    ("EncoderDecoderModel", "AutoModelForSeq2SeqLM"),
    ("ForTextToText", "AutoModelForSeq2SeqLM"),
    ("ForSpeechToText", "AutoModelForSpeechSeq2Seq"),
)
_IMAGES = ("vision_config", "vit_config", "vq_config")  # the parts of a config that belong to an image's encoder
_SOUNDS = ("audio_config", "num_mel_bins", "encoder_config", "audio_encoder_config")


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the name of the automatic class that loads a folder with this config.json.

    A model with code of its own names the class itself, in `auto_map`. A config that names no class is taken for a
    causal language model's.
    """
    own = config.get("auto_map")
    named = [name for name in own if name.startswith("AutoModelFor")] if isinstance(own, dict) else []
    if named:
        return CAUSAL if CAUSAL in named else named[0]
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    found = next((auto for end, auto in _ENDS if name.endswith(end)), None)
    if found is not None or not name:
        return found or CAUSAL
    if name.endswith("Model"):
        return "AutoModel"
    if any(part in config for part in _IMAGES):
        return "AutoModelForImageTextToText"
    if any(part in config for part in _SOUNDS):
        return "AutoModelForSpeechSeq2Seq" if config.get("is_encoder_decoder") else "AutoModelForMultimodalLM"
    return "AutoModelForSeq2SeqLM"
