"""The settings of the experiment: for the 135M model, for the embedded demo pair, and quick ones of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from expo.search.settings import Sampling


@dataclass(frozen=True)
class Settings:
    """Everything that a figure depends on, except the seeds."""

    name: str
    model: str  # "smollm2" or "demo"
    reward: str
    train_prompts: int
    held_out_prompts: int
    replies_each: int  # replies to a held-out prompt at every alpha
    candidates: int  # replies to a training prompt, of which the best and the worst make a pair
    train_temperature: float
    new_tokens: int
    steps: int
    early: float  # share of the steps after which the first checkpoint is kept
    warmup: int  # steps of linear warm-up; then the rate is constant, so stopping early is the same as training less
    pairs_per_step: int
    learning_rate: float
    alphas_early: tuple[float, ...]
    alphas_full: tuple[float, ...]
    beta: float = 0.1
    rows: int = 64  # replies that are sampled together
    bf16: bool = False  # matrix products in bf16 (weights, sums and the extrapolation stay fp32)

    def sampling(self, temperature: float = Sampling.temperature) -> Sampling:
        """Return the paper's settings of the sampling, with replies of the length of these settings."""
        return Sampling(temperature=temperature, max_new_tokens=self.new_tokens)

    @property
    def early_step(self) -> int:
        """The number of steps of the early checkpoint."""
        return max(1, round(self.early * self.steps))


SMOLLM2 = Settings(
    name="claim",
    model="smollm2",
    reward="sentiment",
    train_prompts=320,
    held_out_prompts=128,
    replies_each=1,
    candidates=4,
    train_temperature=1.0,
    new_tokens=40,
    steps=60,
    early=0.2,
    warmup=4,
    pairs_per_step=16,
    learning_rate=1e-5,
    alphas_early=(0, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 96),
    alphas_full=(0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16, 32),
    bf16=True,
)

DEMO = Settings(
    name="claim-demo",
    model="demo",
    reward="plain_words",
    train_prompts=160,
    held_out_prompts=40,
    replies_each=4,
    candidates=4,
    train_temperature=0.8,
    new_tokens=32,
    steps=40,
    early=0.2,
    warmup=4,
    pairs_per_step=16,
    learning_rate=1e-4,
    alphas_early=(0, 0.5, 1, 2, 3, 5, 8, 12, 20, 40),
    alphas_full=(0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 4, 8),
    rows=160,
)


def choose(model: str, quick: bool) -> Settings:
    """Return the settings of a model; the quick ones run everything in minutes, and their figures mean nothing."""
    full = {"smollm2": SMOLLM2, "demo": DEMO}[model]
    if not quick:
        return full
    return replace(
        full,
        name=f"{full.name}-quick",
        train_prompts=32,
        held_out_prompts=16,
        steps=10,
        warmup=2,
        alphas_early=(0, 2, 8, 64),
        alphas_full=(0, 0.5, 2, 16),
    )
