"""The process that downloads weights: `python -m expo.inputs.download_worker`, which `downloads.py` starts.

Its input is one line, a JSON array of [repository, revision, commit, names of files]. It prints nothing, or the message
of the first error as JSON. When its input ends, it ends too, so it never outlives the process that has started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from ..errors import CheckpointError
from .hub_errors import explain_hub_errors
from .hub_ids import HubId

FILES_AT_ONCE = 8  # of each repository, as many as huggingface_hub downloads by itself


def main() -> int:
    """Download the files, and return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one ends it
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    from huggingface_hub import hf_hub_download

    failed = threading.Event()
    errors: list[str] = []

    def fetch(hub_id: HubId, commit: str, name: str) -> None:
        if failed.is_set():
            return
        try:
            with explain_hub_errors(hub_id):
                hf_hub_download(hub_id.repo, name, revision=commit)
        except CheckpointError as error:
            errors.append(str(error))
            failed.set()  # files that are under way are finished: they are not downloaded again

    pools = []
    for repo, revision, commit, names in job:
        pools.append(ThreadPoolExecutor(FILES_AT_ONCE))
        for name in names:
            pools[-1].submit(fetch, HubId(repo, revision), commit, name)
    for pool in pools:
        pool.shutdown()
    if errors:
        print(json.dumps(errors[0]), flush=True)
    return bool(errors)


def _end_with_input() -> None:
    """End this process when its input ends."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
