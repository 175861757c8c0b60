"""The option --check: outputs that transformers loads, and outputs that it does not load and that stay staged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Tensors, contents, random_tensors, read_folder, sparse_file, staging_folder, write_folder

import expo
from expo.fast import main
from expo.merging import load_check as loading

transformers: Any = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "expo" / "demo"
CONFIG: dict[str, Any] = json.loads((DEMO / "aligned" / "config.json").read_text())
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Change = Callable[[dict[str, Any]], Tensors]


def pair(folder: Path, change: Change = dict, shards: int = 0, **config: Any) -> tuple[Path, Path]:
    """Write the demo pair with other tensors and another config."""
    sft, aligned = (
        write_folder(folder / name, change(read_folder(DEMO / name)), shards, {**CONFIG, **config})
        for name in ("sft", "aligned")
    )
    return sft, aligned


def refused(inputs: tuple[Path, Path], out: Path) -> list[str]:
    """Return the lines of the error of a merge with check, after which `out` does not exist."""
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(*inputs, 0.3, out, check=True)
    assert caught.value.exit_code == 4
    assert not out.exists()
    assert staging_folder(out).is_dir()
    lines = str(caught.value).splitlines()
    kept = (
        f"; the finished part is kept in {staging_folder(out)}: `resume=True` without `check=True` puts it in place "
        "as it is"
    )
    assert lines[0].startswith(f"{out}: transformers {transformers.__version__} does not load it completely as ")
    assert lines[-1].endswith(kept)
    lines[-1] = lines[-1].removesuffix(kept)
    assert len(lines) <= 40
    return [line.strip() for line in lines[1:]]


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("layers.1.mlp", "layers.1.mlq"): tensor for name, tensor in tensors.items()}


def untied(tensors: Tensors, counterpart: bool = False) -> Tensors:
    dtype, shape, data = tensors[EMBEDDING]
    return {**tensors, HEAD: (dtype, shape, data if counterpart else data[2:] + data[:2])}


def test_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sft", str(DEMO / "sft"), "--aligned", str(DEMO / "aligned"), "--alpha", "0.3", "0.5"]
    assert main([*words, "--out", str(tmp_path / "{alpha}"), "--check", "--digest"]) == 0
    printed = capsys.readouterr()
    assert "transformers" not in printed.err
    assert "Loading" not in printed.err, "transformers' bars are silenced"
    assert f"-> {tmp_path}/0.5 (checked)\n" in printed.out
    assert main([*words, "--out", str(tmp_path / "plain-{alpha}"), "--digest"]) == 0
    assert "checked" not in capsys.readouterr().out
    for alpha in ("0.3", "0.5"):
        assert contents(tmp_path / alpha) == contents(tmp_path / f"plain-{alpha}")


@pytest.mark.parametrize("shards", [0, 3])
def test_names_that_transformers_does_not_know(tmp_path: Path, shards: int) -> None:
    problems = refused(pair(tmp_path, renamed, shards), tmp_path / "out")
    parts = ("down", "gate", "up")
    assert problems == [
        *(f"missing: model.layers.1.mlp.{part}_proj.weight" for part in parts),
        *(f"unexpected: model.layers.1.mlq.{part}_proj.weight" for part in parts),
    ]


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    def without(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}

    assert refused(pair(tmp_path, without), tmp_path / "out") == ["missing: model.norm.weight"]


def test_a_tensor_of_another_shape_than_the_config_s(tmp_path: Path) -> None:
    problems = refused(pair(tmp_path, vocab_size=CONFIG["vocab_size"] + 8), tmp_path / "out")
    rows, width = CONFIG["vocab_size"], CONFIG["hidden_size"]
    assert f"mismatched: {EMBEDDING}: [{rows}, {width}] in the files, [{rows + 8}, {width}] in the model" in problems


def test_a_head_that_the_config_ties_but_that_is_stored_with_other_values(tmp_path: Path) -> None:
    problems = refused(pair(tmp_path, untied, tie_word_embeddings=True), tmp_path / "out")
    assert problems == [f"tied by the config, but stored apart with other values: {HEAD} and {EMBEDDING}"]


def test_a_head_that_is_missing_though_the_config_does_not_tie_it(tmp_path: Path) -> None:
    assert refused(pair(tmp_path, tie_word_embeddings=False), tmp_path / "out") == [f"missing: {HEAD}"]


def test_heads_that_fit_their_configs(tmp_path: Path) -> None:
    assert expo.merge(*pair(tmp_path / "a", untied, tie_word_embeddings=False), 0.3, tmp_path / "x", check=True).checked

    def twice(tensors: Tensors) -> Tensors:
        return untied(tensors, counterpart=True)

    assert expo.merge(*pair(tmp_path / "b", twice, tie_word_embeddings=True), 0.3, tmp_path / "y", check=True).checked


def test_at_most_forty_lines(tmp_path: Path) -> None:
    def all_renamed(tensors: Tensors) -> Tensors:
        return {f"x.{name}": tensor for name, tensor in tensors.items()}

    problems = refused(pair(tmp_path, all_renamed), tmp_path / "out")
    assert len(problems) == loading.MAX_LISTED + 1
    missing = len(read_folder(DEMO / "aligned")) + 1  # no embedding is left to tie the head to
    assert problems[-1] == f"and {missing + missing - 1 - loading.MAX_LISTED} more"


def test_a_config_that_transformers_cannot_read(tmp_path: Path) -> None:
    problems = refused(pair(tmp_path, hidden_size="many"), tmp_path / "out")
    assert "Error" in problems[0]


def test_what_it_advises_puts_the_output_in_place(tmp_path: Path) -> None:
    inputs, out = pair(tmp_path, renamed), tmp_path / "out"
    refused(inputs, out)
    with pytest.raises(expo.OutputError, match="does not load it completely"):
        expo.merge(*inputs, 0.3, out, check=True, resume=True)
    merged = expo.merge(*inputs, 0.3, out, resume=True)
    assert merged.resumed == merged.bytes_written
    assert not merged.checked
    expo.merge(*inputs, 0.3, tmp_path / "plain")
    assert contents(out) == contents(tmp_path / "plain")


def test_names_of_other_versions_load_as_transformers_loads_them(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    for seed, name in enumerate(("sft", "aligned")):
        model.save_pretrained(tmp_path / name)
        shapes = {key: (dtype, shape) for key, (dtype, shape, _) in read_folder(tmp_path / name).items()}
        bare = {key.removeprefix("transformer."): value for key, value in random_tensors(shapes, seed).items()}
        saved = json.loads((tmp_path / name / "config.json").read_text())
        write_folder(tmp_path / name, bare, config=saved)
    assert expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.3, tmp_path / "out", check=True).checked


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MixtralForCausalLM", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}),  # fused experts
        ("BertForMaskedLM", SMALL),  # a tied weight and a tied bias
        ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2}),
        ("LlavaForConditionalGeneration",  # other names in other versions
         {"text_config": {"model_type": "llama", **SMALL},
          "vision_config": {"model_type": "clip_vision_model", **SMALL, "image_size": 16, "patch_size": 8}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_of_other_kinds(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    loader = getattr(transformers, name)
    model = loader(loader.config_class(**config))
    for seed, role in enumerate(("sft", "aligned")):
        model.save_pretrained(tmp_path / role)
        shapes = {key: (dtype, shape) for key, (dtype, shape, _) in read_folder(tmp_path / role).items()}
        saved = json.loads((tmp_path / role / "config.json").read_text())
        write_folder(tmp_path / role, random_tensors(shapes, seed), config=saved)
    assert expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.3, tmp_path / "out", check=True).checked


def test_without_architectures_the_model_of_the_type_counts(tmp_path: Path) -> None:
    def body(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    assert expo.merge(*pair(tmp_path, body, architectures=None), 0.3, tmp_path / "out", check=True).checked


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
         "its class OwnForCausalLM is custom code (auto_map in aligned's config.json), which is not run; "),
        ({"architectures": None, "model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}},
         "its model_type 'own' is custom code"),
        ({"architectures": ["NoSuchModel"]}, "does not know the class NoSuchModel of aligned's config.json"),
        ({"architectures": [], "model_type": None}, "does not know the model_type None of aligned's config.json"),
        ({"architectures": [{}]}, "does not know the class {} of"), ({"architectures": ["pipeline"]}, "does not know"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_checked_are_refused_before_the_work(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    inputs = pair(tmp_path, **config)
    (inputs[1] / "modeling_own.py").write_text("raise SystemExit('run')")
    with pytest.raises(expo.UsageError) as caught:
        expo.merge(*inputs, 0.3, tmp_path / "out", check=True)
    assert message in str(caught.value)
    assert not staging_folder(tmp_path / "out").exists()
    expo.merge(*inputs, 0.3, tmp_path / "out")


def test_a_bare_file_and_a_folder_without_a_config(tmp_path: Path) -> None:
    inputs = pair(tmp_path)
    files = [path / "model.safetensors" for path in inputs]
    with pytest.raises(expo.UsageError, match=r"^`check` loads a folder with a config.json, but .* is one bare file"):
        expo.merge(*files, 0.3, tmp_path / "out.safetensors", check=True)
    (inputs[1] / "config.json").unlink()
    with pytest.raises(expo.UsageError, match=r"has no config\.json; leave `check` out$"):
        expo.merge(*inputs, 0.3, tmp_path / "out", check=True)


def test_code_of_aligned_s_is_not_run_where_transformers_has_the_class(tmp_path: Path) -> None:
    inputs = pair(tmp_path, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (inputs[1] / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    assert expo.merge(*inputs, 0.3, tmp_path / "out", check=True).checked
    assert not (tmp_path / "run").exists()


MEMORY = """
import resource, sys, torch, transformers
from expo.merging.load_check import check_output
loader = transformers.LlamaForCausalLM
check_output(loader, sys.argv[1], "out")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_output(loader, sys.argv[2], "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_weights_are_not_loaded(tmp_path: Path) -> None:
    small, large = pair(tmp_path)[1], tmp_path / "large"
    large.mkdir()
    width = 16 * CONFIG["intermediate_size"]
    (large / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": width * 16}))
    shapes = {name: ("F32", shape) for name, (_, shape, _) in read_folder(small).items()}
    for name, (dtype, shape) in shapes.items():
        if ".mlp." in name:
            shapes[name] = dtype, tuple(width * 16 if side == CONFIG["intermediate_size"] else side for side in shape)
    path = sparse_file(large / "model.safetensors", shapes)
    assert path.stat().st_size > 400_000_000
    command = [sys.executable, "-W", "error", "-c", MEMORY, str(small), str(large)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 50_000_000
