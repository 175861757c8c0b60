"""The files beside aligned's weights: those that are copied into an output, and why the others are left out.

Only files that a model is loaded, used or licensed with are copied: people upload outputs, and a training folder has
scripts, logs and dumps beside the model. The names below are those of transformers' own constants. They are repeated
here because a merge must not import transformers; tests/checkpoints/test_sidecars.py compares both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from .files import ADAPTER_CONFIG, CONFIG, QUANTIZATION_FILES

CARD = "README.md"
DIGESTS = "SHA256SUMS"
TEMPLATES = "additional_chat_templates"
SPEAKERS = "speaker_embeddings"  # Bark's processor names it in speaker_embeddings_path.json
OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx",
)  # fmt: skip

# Each of these files has the tokens of a tokenizer: all such names in transformers' vocab_files_names.
VOCABULARIES = {
    "bpe.codes", "byte_maps.json", "dict.txt", "entity_vocab.json", "prophetnet.tokenizer", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "spiece.model", "spm.model", "spm_char.model", "target.spm",
    "target_vocab.json", "tekken.json", "tiktoken.model", "tokenizer.json", "tokenizer.model", "vocab-src.json",
    "vocab-tgt.json", "vocab.json", "vocab.txt",
}  # fmt: skip
# A vocabulary may belong to one release, or have a name of its own: tokenizer.4.0.0.json, tokenizer.model.v3,
# qwen.tiktoken, tekken_240911.json.
VOCABULARY = re.compile(
    r"tokenizer\.\d[\w.]*\.json|tokenizer\.model\.v\w+|[\w.-]+\.tiktoken|[\w.-]*tekken[\w.-]*\.json"
)
TOKENIZER = VOCABULARIES | {
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "emoji.json", "merges.txt", "normalizer.json",
    "special_tokens_map.json", "tokenizer_config.json", "word_pronunciation.json", "word_shape.json",
}  # fmt: skip
PROCESSORS = {
    "audio_tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "speaker_embeddings_path.json", "video_preprocessor_config.json",
}  # fmt: skip
MODEL = {
    CONFIG, "generation_config.json",
    "calibration.json", "decision.json", "decision_config.json", "decision_template.jinja", "judge_config.json",
    "params.json",  # of Mistral's own format
}  # fmt: skip
CONFIG_OF_RELEASE = re.compile(r"config\.\d[\w.]*\.json")  # config.4.0.0.json, which config.json's own list names
SENTENCE_TRANSFORMERS = re.compile(
    r"modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json|\d+_\w+/config\.json"
)
MODULE = re.compile(r"\d+_\w+/(?:model\.safetensors|pytorch_model\.bin)")
_TERMS = r"(?:licen[cs]es?|notices?|copying|copyright|patents|us(?:e|age)[-_]policy|terms[-_]of[-_]use)"
# The name of the licence may follow: LICENSE-APACHE-2.0, LICENSE.llama3, COPYING.LESSER. Words in lower case may not.
_WHICH = (
    r"(?:[-_. ](?:[A-Z][A-Z0-9]*|\d[\w.]*|(?i:mit|apache|bsd|gpl|lgpl|agpl|cc|llama|gemma|model|code|weights)[\d.]*))*"
)
LICENCE = re.compile(rf"(?i:{_TERMS}){_WHICH}(?:\.\w+)?|[\w. -]*[-_. ](?i:{_TERMS})(?:\.\w+)?")
TEXT = {"", ".txt", ".md", ".rst", ".pdf", ".html"}
TRAINING = {
    "all_results.json", "eval_results.json", "train_results.json", "trainer_log.jsonl", "trainer_state.json",
    "training_args.json",
}  # fmt: skip


class Code(NamedTuple):
    """The custom code of a model, as `custom_code.find_code` finds it.

    Attributes:
        files: The Python files that the configs name, and the files that these name.
        notes: Sentences about files that could not be read or parsed.
    """

    files: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Sidecars(NamedTuple):
    """The files beside the weights, sorted into those that an output gets and those that it does not get.

    Attributes:
        carried: The files that are copied into an output.
        left_out: The file and the reason, for each of the others.
        problems: Messages about patterns of `carry` that carry nothing.
    """

    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


def sort_files(
    files: Sequence[str], code: Code | None = None, carry: Iterable[str] = (), where: str = "aligned"
) -> Sidecars:
    """Decide which files are copied into an output.

    Args:
        files: Paths inside the folder, without the weights.
        code: The custom code among these files.
        carry: Patterns, in the form of fnmatch, of further files to copy.
        where: The folder, for messages.
    """
    code_files = code.files if code else frozenset()
    patterns = tuple(carry)
    carried, left_out = [], []
    for path in files:
        reason = _why_never_copied(path)
        if reason is None and not (_belongs(path, code_files) or any(fnmatchcase(path, each) for each in patterns)):
            reason = _why_left_out(path)
        if reason is None:
            carried.append(path)
        else:
            left_out.append((path, reason))
    problems = (_problem(pattern, files, where) for pattern in patterns)
    return Sidecars(tuple(carried), tuple(left_out), tuple(filter(None, problems)))


def has_tokenizer(files: Iterable[str]) -> bool:
    """Return True if a tokenizer is among these files; a tokenizer of bytes has a config and no vocabulary."""
    return any(
        name in VOCABULARIES or name == "tokenizer_config.json" or VOCABULARY.fullmatch(name) is not None
        for name in files
    )


def find_missing_modules(left_out: Iterable[tuple[str, str]]) -> str | None:
    """Return a warning if weights of sentence-transformers' own modules, which no merge reads, were left out."""
    found = [path for path, _ in left_out if MODULE.fullmatch(path)]
    if not found:
        return None
    more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
    return (
        f"the output lacks {found[0]}{more}: weights of a module that sentence-transformers puts after the model, and "
        "that a merge does not extrapolate; copy aligned's files if the output needs them"
    )


def _why_never_copied(path: str) -> str | None:
    """Return why a file is never copied, whatever the user asks for; None for any other file."""
    base = os.path.basename(path)
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    if base.endswith(OTHER_WEIGHTS):
        return "weights in another form, or training state"
    if path == CARD:
        return "describes aligned; the output has a card of its own"
    if path == DIGESTS:
        return "digests of aligned's files, not of the merge's"
    if base == ADAPTER_CONFIG:
        return "describes an adapter, and the output is a whole model"
    if base in QUANTIZATION_FILES:
        return "describes quantised weights, and the output has none"
    return None


def _belongs(path: str, code: frozenset[str]) -> bool:
    """Return True if a model is loaded, used or licensed with this file."""
    folder, base = os.path.split(path)
    if path in code or SENTENCE_TRANSFORMERS.fullmatch(path):
        return True
    if not folder:
        known = base in MODEL | PROCESSORS | TOKENIZER
        return known or any(names.fullmatch(base) for names in (VOCABULARY, CONFIG_OF_RELEASE)) or _licence(base)
    if folder == SPEAKERS:
        return base.endswith(".npy")
    if folder == TEMPLATES:
        return base.endswith(".jinja")
    if folder.endswith("tokenizer"):  # a processor keeps each tokenizer but its first one in a folder of its own
        return base in TOKENIZER
    return folder == "LICENSES"


def _licence(base: str) -> bool:
    """Return True for the name of a licence or of other terms."""
    suffix = os.path.splitext(base)[1]
    text = suffix in TEXT or suffix.isupper() or suffix[1:].isdigit()  # COPYING.LESSER, LICENSE-2.0
    return text and LICENCE.fullmatch(base) is not None


def _why_left_out(path: str) -> str:
    """Return why a file that no pattern asks for is left out."""
    base = os.path.basename(path)
    if base in TRAINING:
        return "state of aligned's training"
    if base.endswith(".py"):
        return "code that aligned's configs do not name"
    if "/" in path:
        return "in a subfolder, and not a file that a model is loaded with"
    return "not a file that a model is loaded with"


def _problem(pattern: str, files: Sequence[str], where: str) -> str | None:
    """Return why a pattern of `carry` carries nothing; None for a pattern that carries a file."""
    found = [path for path in files if fnmatchcase(path, pattern)]
    if not found:
        return f"`carry` {pattern!r} matches no file beside the weights of {where}"
    reasons = [_why_never_copied(path) for path in found]
    if None in reasons:
        return None
    more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
    return f"`carry` {pattern!r}: {found[0]}{more} cannot be carried: {reasons[0]}; leave the pattern out"
