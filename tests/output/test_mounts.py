"""An output on a mount point: merge and plan refuse it before anything is read, and the advice works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import expo
from expo.fast import main
from expo.output import mounts

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "expo" / "demo"
MOUNTINFO = b"""\
22 27 0:21 / /proc rw,nosuid shared:12 - proc proc rw
29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
71 29 254:1 /srv/models /home/me/out rw,relatime shared:1 - ext4 /dev/root rw
72 29 0:44 / /mnt/my\\040disk\\011\\134x rw - tmpfs tmpfs rw
73 29 254:1 /srv/a.safetensors /home/me/a.safetensors rw - ext4 /dev/root rw
74 29 0:45 / /mnt/\\303\\244 rw - tmpfs tmpfs rw
cut off
"""


def test_the_mount_points_of_the_system_s_list() -> None:
    assert list(mounts.mount_points(MOUNTINFO)) == [
        "/proc", "/", "/home/me/out", "/mnt/my disk\t\\x", "/home/me/a.safetensors", "/mnt/ä"
    ]  # fmt: skip
    assert list(mounts.mount_points(b"")) == []


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that the system's list, as the test replaces it, gives as a bind mount of the same device."""
    place = tmp_path / "a volume"
    place.mkdir()
    listed = str(place).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(f"1 2 254:1 /x {listed} rw - ext4 /dev/root rw\n")
    monkeypatch.setattr(mounts, "MOUNTINFO", str(tmp_path / "mountinfo"))
    assert not os.path.ismount(place)
    return place


def refusal(out: object, advice: str) -> str:
    return f"{out} is a mount point, which cannot be replaced: {advice}"


@pytest.mark.parametrize("options", [[], ["--plan"], ["--overwrite"], ["--resume"], ["--overwrite", "--plan"]])
def test_it_is_refused_before_anything_is_read(
    volume: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    nowhere = ["--sft", "/nowhere/sft", "--aligned", "org/not-downloaded", "--alpha", "0.3"]
    assert main([*nowhere, "--out", str(volume), *options]) == 4
    said = refusal(volume, f"choose a folder in it, such as {volume}/merged")
    assert capsys.readouterr() == ("", f"expo: error: {said}\n")


def test_an_output_with_a_volume_inside_is_not_replaced(volume: Path) -> None:
    """Removing the old output would empty the volume."""
    out = volume.parent
    (out / "config.json").write_text("{}")
    with pytest.raises(expo.OutputError, match="has a mount point in it") as caught:
        expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, out, overwrite=True)
    assert str(volume) in str(caught.value)
    assert volume.is_dir()
    expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, volume / "merged")
    assert (volume / "merged" / "config.json").exists(), "an output beside the volume or in it is allowed"


def test_several_alphas_and_a_link_that_leads_there(volume: Path) -> None:
    link = volume.with_name("out-0.5")
    link.symlink_to(volume)
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(DEMO / "sft", DEMO / "aligned", [0.3, 0.5], volume.with_name("out-{alpha}"))
    assert str(caught.value) == refusal(link, f"choose a folder in it, such as {link}/merged")


def test_the_default_output(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = volume.rename(volume.with_name("aligned-expo-0.3"))
    Path(mounts.MOUNTINFO).write_text(f"1 2 254:1 /x {place} rw - ext4 /dev/root rw\n")
    monkeypatch.chdir(volume.parent)
    with pytest.raises(expo.OutputError, match=r"^aligned-expo-0\.3 is a mount point.* aligned-expo-0\.3/merged$"):
        expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, overwrite=True)


def test_a_bare_file_at_a_volume_and_on_a_bound_file(volume: Path, tmp_path: Path) -> None:
    file = next((DEMO / "aligned").glob("*.safetensors"))
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(file, file, 0.3, volume)
    assert str(caught.value) == refusal(volume, f"choose a file in it, such as {volume}/merged.safetensors")
    bound = tmp_path / "out.safetensors"
    bound.touch()
    Path(mounts.MOUNTINFO).write_text(f"1 2 254:1 /x {bound} rw - ext4 /dev/root rw\n")
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(file, file, 0.3, bound, overwrite=True)
    assert str(caught.value) == refusal(bound, "choose another `out`")


def test_what_it_advises_works(volume: Path) -> None:
    expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, volume / "merged")
    expo.merge(DEMO / "sft", DEMO / "aligned", 0.3, volume / "merged", overwrite=True)
    assert os.listdir(volume) == ["merged"]


def test_without_the_system_s_list_devices_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", str(tmp_path / "none"))
    assert mounts.is_mount_point("/proc")
    assert not mounts.is_mount_point(str(tmp_path))


# Real mounts, in a namespace of the test's own.

REAL = r"""
set -e
mount -t tmpfs -o size=64m tmpfs volume
mkdir "source" "bound one"; mount --bind source "bound one"
touch file.safetensors bound.safetensors; mount --bind file.safetensors bound.safetensors
merge() { "$PYTHON" -m expo.fast --sft "$DEMO/sft" --aligned "$DEMO/aligned" --alpha 0.3 --quiet "$@" || echo "rc $?"; }
merge --out volume --overwrite
merge --out "bound one"
merge --out bound.safetensors --overwrite --plan
merge --out volume/merged; merge --out "bound one/merged"
ls -A volume source
"$PYTHON" -m expo.fast --sft "$DEMO/sft" --aligned "$DEMO/aligned" --alpha 0.3 --out volume/more --plan --json >plan
"$PYTHON" -c "import json, shutil; print(json.load(open('plan'))['bytes_free'] == shutil.disk_usage('volume').free)"
ln -s volume/deep link; mkdir volume/deep
"$PYTHON" -m expo.fast --sft "$DEMO/sft" --aligned "$DEMO/aligned" --alpha 0.3 --out link/a/b --plan --json >plan
"$PYTHON" -c "import json, shutil; print(json.load(open('plan'))['bytes_free'] == shutil.disk_usage('volume').free)"
"""


def test_mounts_of_the_system(tmp_path: Path) -> None:
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    ) if os.path.exists("/usr/bin/unshare") else None  # fmt: skip
    if probe is None or probe.returncode:
        pytest.skip(f"this process may not mount in a namespace of its own: {probe.stderr if probe else 'no unshare'}")
    (tmp_path / "volume").mkdir()
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", REAL], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "DEMO": str(DEMO), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"expo: error: {refusal('volume', 'choose a folder in it, such as volume/merged')}",
        f"expo: error: {refusal('bound one', 'choose a folder in it, such as bound one/merged')}",
        f"expo: error: {refusal('bound.safetensors', 'choose another --out')}",
    ]
    assert done.stdout.split("\n") == [
        "rc 4",
        "rc 4",
        "rc 4",
        "source:",
        "merged",
        "",
        "volume:",
        "merged",
        "True",
        "True",
        "",
    ]
