"""Run the whole experiment: do the stages that are missing, and report the results."""

from __future__ import annotations

from pathlib import Path

from . import report, stages
from .experiment import Experiment
from .extras import import_extra
from .reward import make_readings
from .settings import Settings


def run(settings: Settings, seeds: int, work: Path, out: Path) -> Path:
    """Write OUT/<name>.json and OUT/<name>.png, print the tables, and return the path of the JSON."""
    import_extra("matplotlib")  # without this import, a missing matplotlib would be noticed an hour later
    experiment = Experiment(settings, work, lambda text: print(text, flush=True))
    experiment.report_estimate(seeds)
    by_seed = [experiment.run_seed(seed) for seed in range(seeds)]
    replies, training = [replies for replies, _ in by_seed], [log for _, log in by_seed]
    result = report.make_result(settings, replies, training, make_readings(experiment.reward))
    path = out / f"{settings.name}.json"
    stages.write_text(path, report.format_json(result))
    report.plot(result, path.with_suffix(".png"))
    print(report.format_tables(result))
    return path
