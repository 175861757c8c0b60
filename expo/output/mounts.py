"""Mount points, which no rename can put an output in place of: a volume of a container, a disk, a bind mount."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..errors import OutputError

MOUNTINFO = "/proc/self/mountinfo"


def refuse_mount_point(out: str, single_file: bool = False) -> None:
    """Raise OutputError where `out` is a mount point: moving the output there would fail after all the work.

    Args:
        out: The output's path, as the user gave it.
        single_file: True where the output is one file.
    """
    place = os.path.realpath(out)
    if not os.path.exists(place):
        return
    if not is_mount_point(place):
        _refuse_mount_inside(out, place)
        return
    if os.path.isdir(place):
        kind, name = ("file", "merged.safetensors") if single_file else ("folder", "merged")
        advice = f"choose a {kind} in it, such as {os.path.join(out, name)}"
    else:
        advice = "choose another --out"
    raise OutputError(f"{out} is a mount point, which cannot be replaced: {advice}")


def _refuse_mount_inside(out: str, place: str) -> None:
    """Raise OutputError where something is mounted inside an output: its removal would empty that volume."""
    inside = next((each for each in _listed() if each.startswith(os.path.join(place, ""))), None)
    if inside is not None:
        raise OutputError(f"{out} has a mount point in it, {inside}, so it cannot be replaced: choose another --out")


def is_mount_point(place: str) -> bool:
    """Return whether something is mounted at this real path, or bound to it, a file included."""
    # os.path.ismount compares devices, and a bind mount may be of the same one.
    return place in _listed() or os.path.ismount(place)


def _listed() -> list[str]:
    """Return the mount points that the system lists; none where it does not say."""
    try:
        with open(MOUNTINFO, "rb") as file:
            return list(mount_points(file.read()))
    except OSError:
        return []


def mount_points(mountinfo: bytes) -> Iterator[str]:
    """Yield the paths of all mounts that the system lists: the fifth field of each line, with its escapes undone."""
    for line in mountinfo.splitlines():
        fields = line.split(b" ")
        if len(fields) > 4:
            yield os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), fields[4]))
