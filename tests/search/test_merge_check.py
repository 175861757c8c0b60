"""A merge at the best alpha is compared with the model that was judged; and the number of models in memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from searches import PROMPTS, command_words, score
from tiny_checkpoints import load

import expo
import expo.tensors.live
from expo.search import check_merge, judged_model, merge_check, models, search_alpha
from expo.search.__main__ import main
from expo.search.merge_check import weight_digests
from expo.search.models import load_model
from expo.tensors.model_weights import saved_weights

RISING = """
calls = 0
def reward(prompts, replies):
    global calls
    calls += 1
    return [float(calls)] * len(replies)
"""


def words_of(pair: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
    """Return the arguments of a search over two prompts, whose reward rises with every call."""
    own = ("--alphas", "0.5", "--max-new-tokens", "4", "--out", "search")
    return command_words(pair, folder, PROMPTS[:2], ("rising_reward", RISING), *own, *more)


def count_models() -> int:
    """Return the number of models in memory, those that await the garbage collector included."""
    return sum(
        issubclass(type(each), transformers.PreTrainedModel) and hasattr(each, "lm_head") for each in gc.get_objects()
    )


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()  # otherwise the counts would depend on when it runs
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_no_more_models_are_in_memory_than_are_needed(
    mixture: tuple[Path, Path], current_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models while the originals are written to the disk, and one while replies are sampled and in the check."""
    counts = []

    def counted(kind: Any, path: Any, *rest: Any) -> Any:
        model = load_model(kind, path, *rest)
        model.__dict__["itself"] = model  # the hooks of libraries make such cycles too
        counts.append((Path(path).name, count_models()))
        return model

    monkeypatch.setattr(judged_model, "load_model", counted)
    monkeypatch.setattr(merge_check, "load_model", counted)
    monkeypatch.setattr(models, "load_model", counted)
    compute = merge_check.weight_digests
    monkeypatch.setattr(
        merge_check, "weight_digests", lambda model: counts.append(("digests", count_models())) or compute(model)
    )
    assert main(words_of(mixture, current_folder, "--merge", "merged", "--quiet", "--keep", "disk")) == 0
    assert counts == [("aligned", 1), ("sft", 2), ("digests", 1), ("merged", 1), ("digests", 1)]


@pytest.mark.parametrize("more", [[], ["--on-unpaired", "aligned"]])
def test_a_search_over_a_mixture_and_its_merge(
    mixture: tuple[Path, Path], current_folder: Path, more: list[str], capsys: Any
) -> None:
    assert main(words_of(mixture, current_folder, *more)) == 0
    out, err = capsys.readouterr()
    assert "expo: weights have other names in memory than in the files, so sft is loaded as a model too" in err
    command = next(line for line in out.splitlines() if line.startswith("merge: "))
    assert command.endswith(" ".join(["--alpha 0.5", *more]))
    assert main(words_of(mixture, current_folder, *more, "--merge", "merged")) == 0  # no reply is missing
    out, err = capsys.readouterr()
    assert "the model is loaded once more, to compare the merge with it" in err
    assert "merged at alpha 0.5 -> merged" in out
    weights = len(saved_weights(load(current_folder / "merged")))
    assert f"checked: all {weights} weights are those that were judged, bit for bit" in out
    assert "digests" not in json.loads((current_folder / "search" / "summary.json").read_text())


def test_a_merge_that_is_not_what_was_judged_is_an_error(
    mixture: tuple[Path, Path], current_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = expo.tensors.live.keep_originals

    def sabotaged(*arguments: Any) -> Any:
        trios, size = whole(*arguments)
        return trios[1:], size

    monkeypatch.setattr(expo.tensors.live, "keep_originals", sabotaged)
    assert main(words_of(mixture, current_folder, "--merge", "merged", "--quiet")) == 3
    out, err = capsys.readouterr()
    assert "merged at alpha 0.5 -> merged" in out
    assert "checked" not in out
    assert "the merge is written to merged, but it is not the model that was judged: 1 of " in err
    assert "\n  model.embed_tokens.weight" in err
    assert (current_folder / "merged" / "model.safetensors").exists()


def test_a_merge_that_cannot_be_loaded_is_an_error_that_names_its_folder(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load(mixture[1])
    check_merge(mixture[1], weight_digests(model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(expo.CheckpointError, match=r"the merge is written to .*empty, but it cannot be compared"):
        check_merge(tmp_path / "empty", weight_digests(model))
    weights = len(weight_digests(model))
    with pytest.raises(expo.CheckpointError, match=rf"{weights} of {weights} weights differ"):
        check_merge(mixture[0], weight_digests(model))


def test_replies_from_before_experts_moved_are_refused(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    options: Any = {"max_new_tokens": 4, "device": "cpu", "on_unpaired": "aligned"}
    search_alpha(*mixture, PROMPTS[:2], score, [0.5], tmp_path / "search", **options)
    path = tmp_path / "search" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["judged"]
    path.write_text(json.dumps(settings))
    with pytest.raises(expo.OutputError, match='judged was null and is now "exactly what the merge writes"'):
        search_alpha(*mixture, PROMPTS[:2], score, [0.5], tmp_path / "search", **options)


def test_digests_in_python(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    calls = 0

    def rising(prompts: list[str], replies: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(calls)] * len(replies)

    result = search_alpha(
        *mixture, PROMPTS[:2], rising, [0.5], tmp_path / "search", max_new_tokens=4, device="cpu", digest=True
    )
    assert result.best == 0.5
    expo.merge(*mixture, 0.5, tmp_path / "merged")
    check_merge(tmp_path / "merged", result.digests)
