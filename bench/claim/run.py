"""The whole of a run: what is not done is done, and then told."""

from __future__ import annotations

from pathlib import Path

from . import cache, report
from .experiment import Experiment
from .missing import needed
from .reward import readings
from .settings import Settings


def run(settings: Settings, seeds: int, work: Path, out: Path) -> Path:
    """Write OUT/<name>.json and .png, print the tables; return the JSON's path."""
    needed("matplotlib")  # an hour later would be too late to miss it
    experiment = Experiment(settings, work, lambda text: print(text, flush=True))
    experiment.tell_time(seeds)
    by_seed = [experiment.seed(seed) for seed in range(seeds)]
    kept = report.result(
        settings, [found for found, _ in by_seed], [log for _, log in by_seed], readings(experiment.reward)
    )
    path = out / f"{settings.name}.json"
    cache.write(path, report.text(kept))
    report.plot(kept, path.with_suffix(".png"))
    print(report.tables(kept))
    return path
