"""Mount points: a disk, a volume of a container, a bind mount. No rename can replace one by an output."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..errors import OutputError

MOUNTINFO = "/proc/self/mountinfo"


def refuse_mount_point(out: str, single_file: bool = False) -> None:
    """Refuse an output at a mount point, or around one: putting it in place would fail after all the work.

    Args:
        out: The output's path, as the user gave it.
        single_file: True where the output is one file.

    Raises:
        OutputError: The path is a mount point, or a folder with a mount point in it.
    """
    path = os.path.realpath(out)
    if not os.path.exists(path):
        return
    if not is_mount_point(path):
        _refuse_mount_inside(out, path)
        return
    if os.path.isdir(path):
        kind, name = ("file", "merged.safetensors") if single_file else ("folder", "merged")
        advice = f"choose a {kind} in it, such as {os.path.join(out, name)}"
    else:
        advice = "choose another `out`"
    raise OutputError(f"{out} is a mount point, which cannot be replaced: {advice}")


def _refuse_mount_inside(out: str, path: str) -> None:
    """Raise OutputError where something is mounted inside an output: its removal would empty that volume.

    Args:
        out: The output's path, as the user gave it.
        path: The same path with links resolved.
    """
    inside = next((each for each in _system_mount_points() if each.startswith(os.path.join(path, ""))), None)
    if inside is not None:
        raise OutputError(f"{out} has a mount point in it, {inside}, so it cannot be replaced: choose another `out`")


def is_mount_point(path: str) -> bool:
    """Return True if a filesystem, a folder or a file is mounted at this path. The path must have no links in it."""
    # os.path.ismount alone does not suffice: it compares devices, and a bind mount may be of the same device.
    return path in _system_mount_points() or os.path.ismount(path)


def _system_mount_points() -> list[str]:
    """Return the mount points that the system lists; none on a system without such a list."""
    try:
        with open(MOUNTINFO, "rb") as file:
            return list(mount_points(file.read()))
    except OSError:
        return []


def mount_points(mountinfo: bytes) -> Iterator[str]:
    """Yield the paths of all mounts in a text such as /proc/self/mountinfo: the fifth field of each line, unescaped."""
    for line in mountinfo.splitlines():
        fields = line.split(b" ")
        if len(fields) > 4:
            yield os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), fields[4]))
