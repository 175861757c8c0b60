"""adapter_config.json of a LoRA adapter: the kinds that are read, and the scale of each module's delta.

The names of the keys and their meaning are PEFT's. Source: github.com/huggingface/peft, tuners/lora/config.py and
utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError

# Advice that several messages end with.
MERGE = "merge it with PEFT's merge_and_unload(), save the result with save_pretrained(), and give that folder instead"
BASE = "is sft the checkpoint that the adapter was trained from?"
TIED_ELSEWHERE = (
    "sft ties this tensor to others, and the trained model has them as separate tensors, which is not read; PEFT can "
    "merge and save the model, but the saved one may be tied again: give its folder only if its logits are the trained "
    "model's"
)

# These kinds change the delta, or have more than scale * B @ A in it. PEFT's merge_and_unload() can apply them.
OTHER_KINDS = {
    "use_dora": "DoRA, which rescales the base's weights",
    "lora_bias": "biases of lora_B (PEFT merges them into layers that have a bias of their own, and into no others)",
    "trainable_token_indices": "single trained rows of an embedding",
    "megatron_config": "LoRA of Megatron's parallel layers",
    "use_qalora": "QA-LoRA, whose lora_A takes pooled inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the base's weights",
    "monteclora_config": "MonteCLoRA, whose weights are sampled",
    "velora_config": "VeLoRA, which keeps projections beside the factors",
}
# No merge turns an adapter of these kinds into a checkpoint with the tensors of sft.
NEVER_MERGED = {
    "alora_invocation_tokens": "an activated LoRA, which applies to some tokens only",
    "arrow_config": "Arrow, which routes between several adapters",
    "layer_replication": "layers that are copies of the base's",
}
# The other keys of a config either describe the training, or are read by this package.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "merge_weights", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
# Values of init_lora_weights that leave the base as it was. PiSSA, OLoRA, CorDA and LoRA-GA subtract the initial B @ A
# from the base's weights, and LoftQ quantises them, so their trained model is not sft + scale * B @ A. PEFT can convert
# such an adapter to one over the untouched base, and then writes `true`.
HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}


def check_config(path: str, config: Mapping[str, Any]) -> None:
    """Refuse every kind of adapter but a LoRA whose deltas are scale * B @ A over the untouched base.

    Args:
        path: Path of the config, for messages.
        config: The config's object.

    Raises:
        CheckpointError: The config says that the adapter is of another kind.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}, but only 'LORA' is read; {MERGE}")
    for key, what in OTHER_KINDS.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is {shortened(config[key])}: {what}, which is not read; {MERGE}")
    for key, what in NEVER_MERGED.items():
        if config.get(key):
            raise CheckpointError(
                f"{path}: {key} is {shortened(config[key])}: {what}, so no checkpoint with sft's shapes can "
                "be the trained model"
            )
    init = config.get("init_lora_weights", True)
    if init and init is not True and str(init).lower() not in HARMLESS_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {shortened(init)}, which may have changed the base's weights before the "
            "training, so sft may not be the adapter's base; convert the adapter (PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...)), or {MERGE}"
        )
    _refuse_unknown_keys(path, config)


def _refuse_unknown_keys(path: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an unknown key that is switched on.

    A later PEFT may have a switch that changes the delta: a key with the value `true`, or with settings of its own.
    Numbers and strings pass, as PEFT writes their defaults into every config.
    """
    for key, value in config.items():
        known = key in KNOWN or key in OTHER_KINDS or key in NEVER_MERGED
        if not known and (value is True or (value and isinstance(value, list | dict))):
            raise CheckpointError(
                f"{path}: {key} is {shortened(value)}, which is not known here and may change what the factors "
                f"mean; {MERGE}"
            )


class Scales:
    """The rank and the scale of each module: those of the first pattern that matches its name, else the config's."""

    def __init__(self, path: str, config: Mapping[str, Any]) -> None:
        """Check the numbers and patterns of a config.

        Args:
            path: Path of the config, for messages.
            config: The config's object.
        """
        self.path = path
        self._rank = _number(path, "r", config.get("r"))
        self._lora_alpha = _number(path, "lora_alpha", config.get("lora_alpha"))
        self._rooted = bool(config.get("use_rslora"))
        self._ranks = _patterns(path, config, "rank_pattern")
        self._lora_alphas = _patterns(path, config, "alpha_pattern")

    def rank_of(self, module: str) -> float:
        """Return r, the number of columns of the module's B."""
        return _first_match(self._ranks, module, self._rank)

    def scale_of(self, module: str) -> float:
        """Return lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA."""
        rank = self.rank_of(module)
        return _first_match(self._lora_alphas, module, self._lora_alpha) / (math.sqrt(rank) if self._rooted else rank)


def _patterns(path: str, config: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
    """Return the expressions of rank_pattern or alpha_pattern and their numbers.

    An expression matches the whole name of a module, or the end of the name after a dot, as in PEFT's
    get_pattern_key().
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is {shortened(patterns)}, but an object is expected")
    found = []
    for pattern, value in patterns.items():
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), _number(path, f"{key}[{pattern!r}]", value)))
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path}: {key} has {pattern!r}, which is no regular expression ({error})") from error
    return found


def _first_match(patterns: Iterable[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _number(path: str, key: str, value: Any) -> float:
    """Return a rank, which has to be a whole number over 0, or a lora_alpha. Raises CheckpointError."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
    rank = not key.startswith(("lora_alpha", "alpha_pattern"))
    if not real or (rank and (value < 1 or value != int(value))):
        kind = "a whole number over 0" if rank else "a number"
        raise CheckpointError(f"{path}: {key} is {shortened(value)}, but {kind} is expected")
    return float(value)


def shortened(value: Any, most: int = 80) -> str:
    """Return the value as Python writes it, in at most `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
