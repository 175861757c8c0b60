"""The search for alpha: how replies are drawn and scored, where it goes, what it says, and that it can be stopped."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import expo
from expo import errors
from expo.demo import ALIGNED, SFT
from expo.demo.score import plain_words
from expo.search import search_alpha
from expo.search.__main__ import main, parse_alphas
from expo.search.models import device_of, load
from expo.search.probing import LADDER, next_probe
from expo.search.prompts import read_prompts
from expo.search.ranking import collapsed, interval, rank, warnings_of
from expo.search.replies import Replies, Reply
from expo.search.rewards import RewardModel, load_reward, rewards_of
from expo.search.sampling import Draw, Penalties, Sampler, repetition, stream_of
from expo.search.settings import Sampling

ROOT = Path(__file__).parents[2]
PROMPTS = [
    *("Return the", "If the", "This module", "The function", "Raise an exception if", "A list", "The default value of"),
    *("When the", "Check if", "Note that the", "Create a new", "This class"),
]
ALPHAS = [0.5, 0.2]


@pytest.fixture(autouse=True, scope="module")
def quiet_library() -> Iterator[None]:
    log: Any = transformers.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    log.set_verbosity(before)
    log.enable_progress_bar()


def score(prompts: list[str], replies: list[str]) -> list[float]:
    assert len(prompts) == len(replies)
    return [plain_words(reply) for reply in replies]


def run(out: Path, reward: Any = score, alphas: Any = ALPHAS, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "batch_size": 5, "device": "cpu", **options}
    return search_alpha(SFT, ALIGNED, options.pop("prompts", PROMPTS), reward, alphas, out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "search"
    run(out, alpacaeval=True)
    return out


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    """Single precision, so that rounding hardly ever tips a draw."""
    model: Any = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(ALIGNED)


# Sampling


def test_penalties_are_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    tokens = torch.tensor(random.integers(0, 6, size=(4, 20)))
    scores = torch.tensor(random.normal(size=(4, 6)), dtype=torch.float32)
    for start in (0, 7, 20):
        found = Penalties(start, 0.25, 0.125)(tokens, scores)
        for row in range(4):
            for token in range(6):
                count = sum(int(each) == token for each in tokens[row, start:])
                wanted = scores[row, token] - 0.25 * (count > 0) - 0.125 * count
                assert found[row, token] == pytest.approx(float(wanted), abs=1e-6)


def test_draws_are_those_of_temperature_top_k_and_top_p_in_the_right_shares() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=8)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 20_000
    streams = torch.tensor([stream_of(0, index) for index in range(count)])
    drawn = Draw(3, streams, sampling)(torch.zeros(count, 5, dtype=torch.long), logits.expand(count, -1))
    assert ((drawn > -math.inf).sum(1) == 1).all()
    shares = torch.bincount(drawn.argmax(1), minlength=40) / count
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.9)])
    nothing: Any = torch.zeros(1, 1, dtype=torch.long)
    wanted = warpers(nothing, logits).softmax(1)[0]
    assert 2 < (wanted > 0).sum() < 8
    assert ((shares > 0) == (wanted > 0)).all()
    torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)


def test_streams_differ_by_seed_prompt_and_step_and_by_nothing_else() -> None:
    logits = torch.zeros(2, 1000)

    def draw(seed: int, first: int, step: int) -> list[int]:
        streams = torch.tensor([stream_of(seed, first), stream_of(seed, first + 1)])
        sampling = Sampling(top_k=1000, top_p=1.0)
        left = Draw(4, streams, sampling)(torch.zeros(2, 4 + step, dtype=torch.long), logits)
        return [int(token) for token in left.argmax(1)]

    assert draw(0, 5, 9) == draw(0, 5, 9)
    assert draw(0, 5, 9)[1] == draw(0, 6, 9)[0]
    found = {token for seed in (0, 1) for first in (0, 2, 4) for step in (0, 1, 2) for token in draw(seed, first, step)}
    assert len(found) > 30  # of 36


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 13) == pytest.approx(0.9)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)


def test_a_reply_does_not_depend_on_its_batch(demo: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=24)
    of_size = {}
    for size in (1, 5, 12):
        sampler = Sampler(*demo, PROMPTS, sampling, 3, size)
        assert sorted(index for batch in sampler.batches for index in batch) == list(range(len(PROMPTS)))
        of_size[size] = {index: reply for b in sampler.batches for index, reply in zip(b, sampler(b), strict=True)}
    assert of_size[1] == of_size[5] == of_size[12]
    assert len({reply.text for reply in of_size[1].values()}) == len(PROMPTS)
    assert {reply.finished for reply in of_size[1].values()} == {True, False}
    for reply in of_size[1].values():
        assert len(reply.tokens) == 24 or reply.finished
    assert Sampler(*demo, PROMPTS, sampling, 4, 12)([0])[0] != of_size[1][0]


def test_sampling_is_ours_alone_whatever_the_checkpoint_says(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    before = Sampler(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8))([0, 1])
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=8, num_beams=2)
    assert Sampler(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8))([0, 1]) == before


def test_prompts_go_through_the_chat_template(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    sampler = Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
    assert "no chat template" in sampler.notes[0]
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} name{% endif %}"
    )
    try:
        with_template = Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
        tokenizer.chat_template = "{{ raise_exception('no turns today') }}"
        with pytest.raises(errors.UsageError, match="no turns today"):
            Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
    finally:
        tokenizer.chat_template = None
    plain = Sampler(model, tokenizer, ["Return the name"], Sampling(max_new_tokens=8))
    assert with_template.notes == []
    assert with_template([0]) == plain([0])


def test_the_context_limits_a_reply_by_its_own_prompt(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    long = " the" * 249  # and the beginning of text: 250 of 256
    sampler = Sampler(model, tokenizer, ["If the", long, "A list"], Sampling(max_new_tokens=40))
    assert sampler.batches == [[0, 2], [1]]
    assert "1 of 3 prompts 6 to 6 new tokens" in sampler.notes[1]
    assert len(sampler([1])[0].tokens) <= 6
    with pytest.raises(errors.UsageError, match="prompt 0 is 301 tokens long, of a context of 256"):
        Sampler(model, tokenizer, [" the" * 300], Sampling())


# Rewards


def test_a_reward_must_be_as_many_finite_numbers_as_replies() -> None:
    wrong: dict[Callable[..., Any], str] = {
        lambda prompts, replies: [1.0]: "returned 1 numbers for 2 replies",
        lambda prompts, replies: [1.0, math.nan]: "nan for the reply 'b'",
        lambda prompts, replies: 3: "list of numbers, got 3",
        lambda prompts, replies: {"y": 1}["x"]: "KeyError.*test_search.py, line",
    }
    for reward, message in wrong.items():
        with pytest.raises(errors.UsageError, match=message):
            rewards_of(reward, "r", ["p", "q"], ["a", "b"])
    array: Any = np.array([1, 2])
    assert rewards_of(lambda prompts, replies: array, "r", ["p", "q"], ["a", "b"]) == [1.0, 2.0]


def test_a_reward_by_name_is_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def length(prompts, replies): return [len(r) for r in replies]\nn = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_own_reward:length")(["p"], ["four"]) == [4]
    for name, message in {
        "my_own_reward:n": "not a function",
        "my_own_reward:x": "no attribute",
        "nowhere:f": "No mod",
    }.items():
        with pytest.raises(errors.UsageError, match=message):
            load_reward(name)
    assert str(tmp_path) not in sys.path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    make: Any = LlamaConfig
    config = make(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=2, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    classifier: Any = LlamaForSequenceClassification
    classifier(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ALIGNED)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_the_chat(judge: Path) -> None:
    reward = RewardModel(str(judge), "cpu")
    prompts, replies = ["Return the", "If", "A list of"], ["value.", "it is not, then what is there to do", "x"]
    found = reward(prompts, replies)
    model, tokenizer = load(transformers.AutoModelForSequenceClassification, str(judge), device_of("cpu"), False)
    for prompt, reply, value in zip(prompts, replies, found, strict=True):
        text = f"<s>user: {prompt}</s>assistant: {reply}</s>"
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert value == pytest.approx(model(input_ids=tokens).logits.item(), abs=1e-5)
    assert len(set(found)) == 3
    assert math.isfinite(reward(["Return the"], ["the end of it all " * 50])[0])
    reward._most = int(1e30)  # as a tokenizer says that knows no limit
    assert reward(prompts, replies) == found


def test_a_model_that_is_no_reward_model_is_refused(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=r"lacks score\.weight, which would be random"):
        RewardModel(str(ALIGNED), "cpu")
    with pytest.raises(errors.CheckpointError, match="transformers cannot load it as AutoModelForSeq"):
        RewardModel(str(tmp_path), "cpu")


# Prompts and alphas


def test_prompts_of_every_form(tmp_path: Path) -> None:
    forms = {
        "a.jsonl": '{"prompt": "one"}\n\n{"instruction": "two", "output": "x"}\r\n',
        "a.json": '[{"instruction": "one", "output": "", "generator": "g", "dataset": "d"}, "two"]',
        "a.txt": "one\r\n\n  two\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == ["one", "two"]
        assert read_prompts(tmp_path / name, 1) == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "one"}\n', 'line 1: needs a text as "prompt" or "instruction", got keys text'),
        ("a.json", "{}", "a list is needed, got dict"),
        ("a.json", "[3]", "entry 0: .* got int"),
        ("a.txt", "\n \n", "no prompt"),
        ("a.txt", "\udcff", "not UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(errors.UsageError, match=message):
        read_prompts(tmp_path / name)


def test_alphas_as_a_range_and_a_list() -> None:
    assert parse_alphas("0.1:0.5:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert parse_alphas("0.1,2.5, 5:7:2") == [0.1, 2.5, 5.0, 7.0]
    for text in ("", "0.1:0.5", "a", "0.1:0.5:0", "1:0:0.1", "0:1:1e-9", "nan", "1:inf:1"):
        with pytest.raises(errors.UsageError, match="--alphas"):
            parse_alphas(text)


# Probing


def probe(curve: Callable[[float], float], noise: float = 0.0, budget: int = 8) -> dict[float, float]:
    """Every alpha that is tried, and its reward."""
    random = np.random.default_rng(0)
    found = {0.0: curve(0.0)}
    errors_of: dict[float, float] = {}
    while (alpha := next_probe(found, errors_of, (), budget)) is not None:
        assert alpha not in found
        found[alpha] = curve(alpha) + noise * random.normal()
        errors_of[alpha] = noise
    assert len(found) <= budget + 1
    return found


def peak(at: float) -> Callable[[float], float]:
    """Rises to the best alpha and falls beyond it, steeply from twice as far on."""
    return lambda alpha: 6 - ((alpha - at) / at) ** 2 - (10 if alpha > 2.2 * at + 0.3 else 0)


@pytest.mark.parametrize("at", [0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 2.5, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_probes_find_a_peak(at: float, noise: float) -> None:
    found = probe(peak(at), noise)
    best = max(found, key=lambda alpha: found[alpha])
    assert abs(best - at) <= max(0.1, 0.25 * at)


def test_probes_stop_going_up_once_the_reward_has_fallen() -> None:
    assert max(probe(peak(0.3))) <= 1.0
    assert max(probe(lambda alpha: -alpha)) == LADDER[0]
    assert list(probe(lambda alpha: alpha))[:7] == [0.0, *LADDER]
    assert list(probe(lambda alpha: 1.0, noise=0.01, budget=3)) == [0.0, *LADDER[:3]]
    assert next_probe({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}) == 2.5
    assert next_probe({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}, collapsed=[1.0]) == 0.75


# Comparing


def replies(rewards: list[float], **what: Any) -> list[Reply]:
    base = Reply(0.0, 0, "p", "r", 0.0, 100, True, 0.02)
    return [replace(base, index=index, reward=value, **what) for index, value in enumerate(rewards)]


def test_comparison_is_paired_and_says_what_it_cannot_tell_apart() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(size=400) * 5  # prompts differ far more than alphas do
    noise = {alpha: random.normal(size=400) * 0.5 for alpha in (0.1, 0.2, 0.3)}
    gains = {0.1: 0.0, 0.2: 0.5, 0.3: 0.52}
    found = {alpha: replies(list(hard + gains[alpha] + noise[alpha])) for alpha in noise}
    ranking = rank({0.0: replies(list(hard)), **found})
    assert ranking.best in (0.2, 0.3)
    assert ranking.equals == tuple(alpha for alpha in (0.2, 0.3) if alpha != ranking.best)
    row = ranking.best_row
    assert 0.4 < row.low < row.gain < row.high < 0.7
    assert row.error == pytest.approx(0.25, rel=0.1)
    assert "not distinguishable from 0." in ranking.verdict()
    low, high = interval(noise[0.1])
    normal = 1.96 * noise[0.1].std() / 20
    assert (low, high) == pytest.approx((noise[0.1].mean() - normal, noise[0.1].mean() + normal), abs=0.005)


def test_where_nothing_beats_aligned_it_says_so() -> None:
    ranking = rank({0.0: replies([1.0] * 60), 0.5: replies([1.0] * 60), 1.0: replies([0.0] * 60)})
    assert ranking.best == 0
    assert ranking.equals == (0.5,)
    assert "no alpha that was tried is better than aligned itself" in ranking.verdict()
    assert "largest" in " ".join(rank({0.0: replies([1.0] * 60), 0.5: replies([2.0] * 60)}).notes)


def test_a_collapse_is_warned_of() -> None:
    base = replies([0.0, 1.0] * 50)
    assert warnings_of(base, base) == ()
    assert warnings_of(replies([0.3, 1.3] * 50, new_tokens=150, repetition=0.1), base) == ()
    signs = {
        "4.0 times as long": replies([0.0, 1.0] * 50, new_tokens=400),
        "100% of the replies do not end": replies([0.0, 1.0] * 50, finished=False),
        "50% of the 4-grams": replies([0.0, 1.0] * 50, repetition=0.5),
        "reward falls to -1.5": replies([-2.0, -1.0] * 50),
    }
    for sign, broken in signs.items():
        (warning,) = warnings_of(broken, base)
        assert sign in warning
    assert [collapsed(broken, base) for broken in signs.values()] == [False, True, True, False]


# The whole


def test_a_search_writes_everything_down(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "replies.jsonl").read_text().splitlines()]
    assert [line["alpha"] for line in lines] == [alpha for alpha in (0.0, 0.2, 0.5) for _ in PROMPTS]
    assert {line["prompt"] for line in lines} == set(PROMPTS)
    assert all(line["reward"] == plain_words(line["reply"]) for line in lines)
    summary = json.loads((whole / "summary.json").read_text())
    for row in summary["rows"]:
        mine = [line for line in lines if line["alpha"] == row["alpha"]]
        assert row["reward"] == pytest.approx(np.mean([line["reward"] for line in mine]))
        assert row["tokens"] == pytest.approx(np.mean([line["new_tokens"] for line in mine]))
        assert row["unfinished"] == pytest.approx(np.mean([not line["finished"] for line in mine]))
    best = max(summary["rows"], key=lambda row: row["reward"])
    assert summary["best"] == best["alpha"]
    assert (whole / "plot.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((whole / "alpacaeval-0.5.json").read_text())
    assert [each["instruction"] for each in written] == PROMPTS
    assert {each["generator"] for each in written} == {"aligned-expo-0.5"}


def test_alphas_are_those_of_merged_models(whole: Path, tmp_path: Path) -> None:
    """A search over the merged model alone, whose alpha 0 is the 0.5 of the pair."""
    expo.merge(SFT, ALIGNED, 0.5, tmp_path / "merged")
    search_alpha(
        SFT, tmp_path / "merged", PROMPTS, score, [], tmp_path / "out", max_new_tokens=12, batch_size=5, device="cpu"
    )
    merged = [json.loads(line)["reply"] for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (whole / "replies.jsonl").read_text().splitlines()]
    assert merged == [line["reply"] for line in lines if line["alpha"] == 0.5]
    assert merged != [line["reply"] for line in lines if line["alpha"] == 0]


@pytest.mark.parametrize("torn", [False, True])
def test_a_search_that_is_stopped_goes_on_to_the_same_replies(whole: Path, tmp_path: Path, torn: bool) -> None:
    calls = 0

    def stop(prompts: list[str], texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return score(prompts, texts)

    stop.__module__, stop.__qualname__ = score.__module__, score.__qualname__  # the reward's name is a setting
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop)
    path = tmp_path / "out" / "replies.jsonl"
    kept = path.read_bytes()
    assert 0 < kept.count(b"\n") < 36
    if torn:  # as a kill leaves it: a batch of which a line and a half are there
        path.write_bytes(kept[: kept.rindex(b"\n", 0, len(kept) - 1) - 30])
    result = run(tmp_path / "out")
    assert path.read_bytes() == (whole / "replies.jsonl").read_bytes()
    assert result.best == json.loads((whole / "summary.json").read_text())["best"]
    before = path.stat().st_mtime_ns
    run(tmp_path / "out", alphas=[0.5])  # nothing is left to do, and all alphas are compared still
    assert path.stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]) == 3


def test_another_search_is_refused_and_the_difference_named(whole: Path, tmp_path: Path) -> None:
    before = (whole / "replies.jsonl").read_bytes()
    differences: dict[str, dict[str, Any]] = {
        "max_new_tokens was 12 and is now 13": {"max_new_tokens": 13},
        "seed was 0 and is now 1": {"seed": 1},
        "prompts was .12, SHA-256": {"prompts": PROMPTS[:5]},
        "reward was .*score. and is now .*len": {"reward": len},
        "temperature was 0.7 and is now 1.0": {"sampling": {"temperature": 1.0}},
    }
    for message, change in differences.items():
        with pytest.raises(errors.OutputError, match=message):
            run(whole, **change)
    assert (whole / "replies.jsonl").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match=r"there is notes\.txt in it"):
        run(tmp_path)


def test_a_folder_has_one_writer_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    reply = replies([1.0])[0]
    with Replies(tmp_path / "a", {"x": 1}) as store:
        store.add([reply, reply])
        with pytest.raises(errors.OutputError, match="another search is writing"):
            Replies(tmp_path / "a", {"x": 1})
    path = tmp_path / "a" / "replies.jsonl"
    assert path.read_text().count("\n") == 1
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(errors.OutputError, match="line 1: not a reply"):
        Replies(tmp_path / "a", {"x": 1})
    path.write_text("")
    Replies(tmp_path / "a", {"x": 2}).close()  # nothing was lost
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"x": 2}


def test_without_matplotlib_there_is_no_plot_and_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path / "out", alphas=[], prompts=PROMPTS[:2], quiet=False)
    assert "no plot.png: pip install matplotlib" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["replies.jsonl", "settings.json", "summary.json"]


def test_auto_goes_by_the_rewards(tmp_path: Path) -> None:
    def short(prompts: list[str], texts: list[str]) -> list[float]:
        return [-float(len(text.split())) for text in texts]

    result = run(tmp_path / "out", short, "auto", budget=3, max_new_tokens=10)
    alphas = [row.alpha for row in result.rows]
    assert len(alphas) <= 4
    assert {0.0, 0.5} <= set(alphas)
    again = run(tmp_path / "out", short, "auto", budget=3, max_new_tokens=10)
    assert again == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "one text at least"),
        ({"alphas": "all"}, 'numbers or "auto"'),
        ({"alphas": [math.inf]}, "finite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sampling": {"top_q": 1}}, "top_q"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"device": "tpu"}, "device must be"),
        ({"keep": "cloud"}, "keep must be"),
        ({"reward": 3}, "reward must be"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.UsageError, match=message):
        run(tmp_path / "out", **change)


def test_an_adapter_and_a_bare_file_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = next(ALIGNED.glob("*.safetensors"))
    with pytest.raises(errors.CheckpointError, match="give the folder"):
        search_alpha(file, file, PROMPTS, score, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command line


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from expo.search.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def words(tmp_path: Path, reward: str, *more: str) -> list[str]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / f"{reward}.py").write_text(REWARD)
    return [
        *("--sft", str(SFT), "--aligned", str(ALIGNED), "--prompts", str(tmp_path / "prompts.jsonl")),
        *("--reward", f"{reward}:plain", "--out", str(tmp_path / "out"), "--alphas", "0.5,3", "--device", "cpu"),
        *("--max-new-tokens", "12", "--batch-size", "5", *more),
    ]


REWARD = """
import os, signal
from expo.demo.score import plain_words
calls = 0
def plain(prompts, replies):
    global calls
    calls += 1
    if calls == 5 and os.environ.get("STOP"):
        os.kill(os.getpid(), int(os.environ["STOP"]))
    return [plain_words(reply) + len(reply) for reply in replies]
"""


def test_the_command_line_killed_and_gone_on_with_to_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = words(tmp_path, "killed_reward")
    command = [sys.executable, "-W", "error", "-m", "expo.search", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STOP": "9", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-9, ""), killed.stderr
    assert "alpha 0: mean reward" in killed.stderr
    path = tmp_path / "out" / "replies.jsonl"
    assert path.read_bytes().count(b"\n") == 17  # and none of the batch that was being scored
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--merge", "merged"]) == 0
    out, err = capsys.readouterr()
    assert "going on with 17 replies" in err
    assert "12 prompts are few" in err
    best = json.loads((tmp_path / "out" / "summary.json").read_text())["best"]
    assert best > 0
    assert f"best: alpha {best:g}" in out
    assert f"merged at alpha {best:g} -> merged" in out
    assert main([*arguments, "--quiet", "--out", "uninterrupted"]) == 0
    assert path.read_bytes() == (tmp_path / "uninterrupted" / "replies.jsonl").read_bytes()
    expo.merge(SFT, ALIGNED, best, "again")
    for file in Path("again").glob("*.safetensors"):
        ours, wanted = load_file(Path("merged") / file.name), load_file(file)
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.usefixtures("own_signals")
def test_the_command_line_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOP", "15")
    assert main(words(tmp_path, "stopped_reward", "--quiet")) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "replies are kept in" in err
    monkeypatch.delenv("STOP")
    assert main(words(tmp_path, "stopped_reward", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.endswith("%")]) == 3
    assert f"merge: python -m expo.fast --sft {SFT} --aligned {ALIGNED} --alpha" in out
    assert all(line.startswith("expo: warning: ") for line in err.splitlines())
    assert main(words(tmp_path, "stopped_reward", "--seed", "1")) == 4
    assert main(words(tmp_path, "stopped_reward", "--merge", str(tmp_path))) == 4
    assert main([*words(tmp_path, "stopped_reward")[2:]]) == 2
    assert main([*words(tmp_path, "stopped_reward"), "--sft", str(tmp_path / "nowhere")]) == 3
    assert main([*words(tmp_path, "stopped_reward"), "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
