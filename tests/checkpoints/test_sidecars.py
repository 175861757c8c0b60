"""The files beside the weights that are copied into an output; their names are those in transformers' constants."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from expo.checkpoints import sidecars
from expo.checkpoints.sidecars import Code, find_missing_modules, has_tokenizer, sort_files

NEEDED = (
    "config.json", "config.4.0.0.json", "generation_config.json", "params.json",
    "tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tekken_240911.json", "qwen.tiktoken", "normalizer.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool use.jinja",
    "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/special_tokens_map.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE-2.0", "LICENSE.MIT", "LICENCE.md", "license.md", "MODEL_LICENSE", "NOTICE",
    "Notice.txt", "COPYING", "COPYING.LESSER", "USE_POLICY.md", "USE-POLICY.txt", "ACCEPTABLE_USE_POLICY.md",
    "Tongyi Qianwen LICENSE.md", "third_party_notices.txt", "LICENSES/MIT.txt", "LICENSE-APACHE", "license-mit.txt",
    "LICENSE_LLAMA3.txt", "COPYING.LESSER", "speaker_embeddings_path.json", "speaker_embeddings/en_1_semantic.npy",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "sentence_xlm-roberta_config.json", "1_Pooling/config.json",
)  # fmt: skip
LEFT_OUT = {
    "hidden": (".gitattributes", "sub/.hidden", ".cache/huggingface/x.json"),
    "weights in another form": (
        "pytorch_model.bin", "model-00001-of-00002.safetensors", "pytorch_model.bin.index.json", "model.fp16.gguf",
        "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "rng_state_0.pth", "rust_model.ot", "onnx/model.onnx",
        "original/consolidated.ckpt", "training_args.bin", "2_Dense/model.safetensors",
    ),
    "describes aligned": ("README.md",),
    "digests": ("SHA256SUMS",),
    "describes an adapter": ("adapter_config.json", "checkpoint-5/adapter_config.json"),
    "describes quantised weights": ("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
    "training": ("trainer_state.json", "trainer_log.jsonl", "training_args.json", "sub/all_results.json"),
    "code that aligned's configs do not name": ("zero_to_fp32.py", "modeling_own.py", "wandb/run-1/code/train.py"),
    "in a subfolder": (
        "onnx/config.json", "docs/README.md", "runs/events.out.tfevents.17", "checkpoint-10/tokenizer.json",
        "sub/LICENSE", "original/params.json", "templates/tool.jinja",
    ),
    "not a file that a model is loaded with": (
        "latest", "run.sh", "nohup.out", "debug.log", "events.out.tfevents.17", "model.safetensors.bak", "core.4711",
        "generated_predictions.jsonl", "training_loss.png", "config.json.bak", "config.old.json", "tokenizer.json~",
        "ds_config.json", "license.log", "LICENSE.bak", "predicted_license_plates.txt",
        "license_server_password.txt", "copying_progress.txt", "notice_to_staff.md", "unlicensed.txt", "noticed.md",
        "modelcard.json", "requirements.txt", "vocab.json.1", "wandb-summary.json", "id_rsa", "token.txt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", NEEDED)
def test_files_that_a_model_needs_come_along(file: str) -> None:
    assert sort_files([file]) == ((file,), (), ())


@pytest.mark.parametrize(("file", "reason"), [(file, reason) for reason, files in LEFT_OUT.items() for file in files])
def test_any_other_file_stays_behind_and_is_named(file: str, reason: str) -> None:
    carried, left_out, problems = sort_files([file])
    assert (carried, problems) == ((), ())
    ((name, why),) = left_out
    assert name == file
    assert reason in why


def test_code_comes_along_where_it_is_named_and_allowed() -> None:
    code = Code(frozenset({"modeling_own.py", "own.words", "kernel.bin", ".secret"}))
    carried, left_out, _ = sort_files([".secret", "kernel.bin", "modeling_own.py", "other.py", "own.words"], code)
    assert carried == ("modeling_own.py", "own.words")
    assert [name for name, _ in left_out] == [".secret", "kernel.bin", "other.py"]


def test_patterns_take_further_files_along() -> None:
    files = ["a.png", "docs/b.png", "docs/c.txt", "config.json", "run.sh"]
    assert sort_files(files, carry=["*.png"]).carried == ("a.png", "docs/b.png", "config.json")
    assert sort_files(files, carry=["docs/*", "run.sh"]).carried == (
        "docs/b.png",
        "docs/c.txt",
        "config.json",
        "run.sh",
    )
    assert sort_files(files, carry=["*"]) == (tuple(files), (), ())
    assert sort_files(files, carry=["config.json"]).problems == (), "no pattern is needed for this file"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.pdf", "`carry` '*.pdf' matches no file beside the weights of /m/aligned"),
        ("RUN.sh", "`carry` 'RUN.sh' matches no file beside the weights of /m/aligned"),
        ("*.bin", "a.bin (and 1 more like it) cannot be carried: weights in another form, or training state"),
        (".git*", ".gitattributes cannot be carried: hidden"),
        ("SHA256SUMS", "SHA256SUMS cannot be carried: digests of aligned's files"),
        ("README.md", "README.md cannot be carried: describes aligned"),
        ("adapter_*.json", "adapter_config.json cannot be carried: describes an adapter"),
        ("hf_*", "hf_quant_config.json cannot be carried: describes quantised weights"),
    ],
)
def test_a_pattern_that_carries_nothing_says_why(pattern: str, said: str) -> None:
    files = [
        ".gitattributes", "README.md", "SHA256SUMS", "a.bin", "adapter_config.json", "b.bin", "hf_quant_config.json",
        "run.sh",
    ]  # fmt: skip
    carried, left_out, (problem,) = sort_files(files, carry=[pattern], where="/m/aligned")
    assert carried == ()
    assert [name for name, _ in left_out] == files
    assert said in problem


def test_a_pattern_may_match_files_that_cannot_come_along_beside_others() -> None:
    carried, left_out, problems = sort_files(["a.bin", "a.png"], carry=["a.*"])
    assert (carried, problems) == (("a.png",), ())
    assert left_out == (("a.bin", "weights in another form, or training state"),)


def test_weights_of_modules_beside_the_model_are_missed() -> None:
    files = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/model.onnx"]
    warning = find_missing_modules(sort_files(files).left_out)
    assert warning is not None
    assert warning.startswith("the output lacks 2_Dense/model.safetensors: weights of a module that ")
    assert find_missing_modules(sort_files(["1_Pooling/config.json", "sub/model.safetensors"]).left_out) is None


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["tokenizer.json"], True), (["tokenizer.model"], True), (["tokenizer_config.json"], True),
        (["own.tiktoken"], True), (["tekken_7.json"], True), (["tokenizer.model.v3"], True), (["vocab.txt"], True),
        (["config.json", "README.md", "sub/tokenizer.json"], False), (["merges.txt"], False), ([], False),
    ],
)  # fmt: skip
def test_whether_there_is_a_tokenizer(files: list[str], found: bool) -> None:
    assert has_tokenizer(files) is found


# --- the names, against transformers ----------------------------------------------------------------------------------

# These constants of transformers are no names of files in a model's folder that a model is loaded with.
OTHERS = {
    "README.md", "modelcard.json", "adapter_config.json", "additional_chat_templates", "checkpoint", "export.json",
    "pytorch_model_fsdp", "transformers_modules",
    "checkpoint-is-incomplete.txt",
}  # fmt: skip
# These files of vocab_files_names are no tokenizer without others.
COMPANIONS = {
    "emoji.json", "merges.txt", "normalizer.json", "tokenizer_config.json", "word_pronunciation.json",
    "word_shape.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def assignments() -> list[tuple[str, ast.expr]]:
    """Return every assignment to one name in the modules of transformers that may define names of files."""
    transformers = pytest.importorskip("transformers")
    found: list[tuple[str, ast.expr]] = []
    for path in sorted(Path(transformers.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"(?i:vocab_files_names|extra_config_files)|^[A-Z0-9_]+_(NAME|FILE)\b", text, re.MULTILINE):
            for node in ast.walk(ast.parse(text)):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                value = getattr(node, "value", None)
                pairs = zip(targets, [value], strict=False)
                if isinstance(value, ast.Tuple) and isinstance(targets[0], ast.Tuple):
                    pairs = zip(targets[0].elts, value.elts, strict=True)
                found += [(key.id, of) for key, of in pairs if isinstance(key, ast.Name) and isinstance(of, ast.expr)]
    return found


def texts(value: ast.expr) -> set[str]:
    """Return the strings in a constant, in the parts of a tuple, or in the values of a dict."""
    parts = value.values if isinstance(value, ast.Dict) else getattr(value, "elts", [value])
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


@pytest.mark.exhaustive  # it parses all of transformers
def test_every_file_name_of_transformers_is_known(assignments: list[tuple[str, ast.expr]]) -> None:
    label = re.compile(r"(?i:vocab_files_names|extra_config_files)|[A-Z0-9_]+_(NAME|FILE)")
    names = {name for key, value in assignments if label.fullmatch(key) for name in texts(value)}
    files = {
        name for name in names - OTHERS if re.fullmatch(r"[\w.-]+\.(json|jinja|txt|model|spm|codes|tokenizer)", name)
    }
    weights = {name for name in files if name.endswith(sidecars.OTHER_WEIGHTS)}
    assert {"spiece.model", "config.json", "preprocessor_config.json", "chat_template.jinja", "vocab.txt"} <= files
    assert len(files) > 30
    assert [name for name, _ in sort_files(sorted(files - weights - sidecars.TRAINING)).left_out] == []


def test_no_vocabulary_of_transformers_is_missing(assignments: list[tuple[str, ast.expr]]) -> None:
    tables = [value for key, value in assignments if key.lower() == "vocab_files_names" and isinstance(value, ast.Dict)]
    vocabularies = {name for table in tables for name in texts(table)}
    assert len(vocabularies) > 20
    assert vocabularies <= sidecars.TOKENIZER
    assert vocabularies - COMPANIONS <= sidecars.VOCABULARIES
