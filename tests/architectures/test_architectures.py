"""The sweep of architectures: 27 model types here, all of them in the long run, and the page about the results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from checkpoint_files import quiet

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import adapters  # noqa: E402
import architectures_page  # noqa: E402
import sweep  # noqa: E402
import tiny_pairs  # noqa: E402

# Model types whose names, ties, buffers or shapes differ from those of the others.
REPRESENTATIVES = [
    ("causal", "bert"), ("causal", "bloom"), ("causal", "ctrl"), ("causal", "falcon"), ("causal", "gemma3_text"),
    ("causal", "gpt2"), ("causal", "gpt_neox"), ("causal", "lfm2"), ("causal", "llama"), ("causal", "mamba"),
    ("causal", "mixtral"), ("causal", "opt"), ("causal", "phi3"), ("causal", "qwen3"), ("causal", "qwen3_moe"),
    ("causal", "xlnet"), ("seq2seq", "bart"), ("seq2seq", "led"), ("seq2seq", "t5"), ("vision-language", "gemma3"),
    ("vision-language", "instructblip"), ("vision-language", "llava"), ("vision-language", "qwen2_5_vl"),
    ("vision-language", "qwen3_vl"), ("encoder", "distilbert"), ("encoder", "modernbert"), ("encoder", "roberta"),
]  # fmt: skip
PARTS = 8  # of each kind, in the long run


@pytest.mark.parametrize(("kind", "model_type"), REPRESENTATIVES)
def test_a_model_type(kind: str, model_type: str, tmp_path: Path) -> None:
    with quiet():
        assert sweep.check(kind, model_type, tmp_path) == []


# Model types whose modules are cut, joined, fused or renamed as transformers loads the files.
@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("causal", "laguna"), ("vision-language", "minimax_m3_vl"), ("encoder", "nomic_bert"), ("encoder", "gte")],
)
def test_an_adapter_of_a_model_type(kind: str, model_type: str, tmp_path: Path) -> None:
    with quiet():
        assert adapters.check_adapter(kind, model_type, tmp_path) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", sweep.KINDS)
def test_all_model_types(kind: str, part: int, tmp_path: Path) -> None:
    """A model type that has passed once passes again."""
    types = tiny_pairs.model_types(kind)[part::PARTS]
    command = [sys.executable, "-W", "ignore", str(HERE / "sweep.py"), kind, "--types", ",".join(types), "--results",
               str(tmp_path / "results.json")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=sweep.SECONDS * len(types))
    found = json.loads((tmp_path / "results.json").read_text())["results"][kind]
    known = sweep.read_results().get("results", {}).get(kind, dict.fromkeys(types, sweep.PASSED))
    assert {name: found[name] for name in types if known.get(name) == sweep.PASSED != found[name]} == {}


def test_the_page_lists_the_results() -> None:
    data = json.loads(sweep.RESULTS.read_text())
    assert architectures_page.PAGE.read_text() == architectures_page.page_text(
        data, json.loads(sweep.ADAPTERS.read_text())
    )
    assert list(data["results"]) == list(sweep.KINDS)
    if data["transformers"] == transformers.__version__:
        assert {kind: list(found) for kind, found in data["results"].items()} == {
            kind: tiny_pairs.model_types(kind) for kind in sweep.KINDS
        }


def test_live_over_files_in_another_form(tmp_path: Path) -> None:
    """The table of layouts does not have this conversion, so transformers loads sft's files as a model too."""
    with quiet():
        pair = tiny_pairs.make_pair("causal", "lara_mini", tmp_path)
        assert sweep.check_files(pair) == []
    with pytest.warns(UserWarning, match="has loaded it as a model too, on the CPU"):
        assert sweep.check_live(pair) == []
