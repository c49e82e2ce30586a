"""WSL by its files in /proc, as people have published them. No Windows machine was used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qmix.machine.doctor_view import wsl_rows
from qmix.machine.wsl import drive_warning, find_wsl, windows_drive, wsl_version

KERNELS = {  # /proc/version and /proc/sys/kernel/osrelease
    "wsl2": (
        "Linux version 5.15.153.1-microsoft-standard-WSL2 (root@941d701f84f1) (gcc (GCC) 11.2.0, GNU ld (GNU Binutils) "
        "2.37) #1 SMP Fri Mar 29 23:14:13 UTC 2024\n",
        "5.15.153.1-microsoft-standard-WSL2\n",
    ),
    "wsl1": (
        "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com) (gcc version 5.4.0 (GCC) ) #1237-Microsoft "
        "Sat Sep 11 14:32:00 PST 2021\n",
        "4.4.0-19041-Microsoft\n",
    ),
    "debian": (
        "Linux version 6.1.0-28-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0) #1 SMP\n",
        "6.1.0-28-amd64\n",
    ),
}
NATIVE = "/dev/sdc / ext4 rw,relatime,discard,errors=remount-ro,data=ordered 0 0\nnone /mnt/wsl tmpfs rw,relatime 0 0\n"
NINE_P = (
    NATIVE + r"C:\134 /mnt/c 9p rw,dirsync,noatime,aname=drvfs;path=C:\;uid=1000;gid=1000;symlinkroot=/mnt/,mmap,"
    "access=client,msize=65536,trans=fd,rfd=8,wfd=8 0 0\n"
)
VIRTIO_9P = (
    NATIVE + r"drvfs /mnt/c 9p rw,noatime,dirsync,aname=drvfs;path=C:\;uid=1000;gid=1000;symlinkroot=/mnt/,mmap,"
    "access=client,msize=262144,trans=virtio 0 0\n"
)
VIRTIOFS = NATIVE + "drvfsC0 /mnt/c virtiofs rw,noatime 0 0\n"
WSL1 = "rootfs / wslfs rw,noatime 0 0\nC: /mnt/c drvfs rw,noatime,uid=1000,gid=1000,case=off 0 0\n"
SPACED = NINE_P + r"D:\134 /mnt/my\040disk 9p rw,noatime,aname=drvfs;path=D:\;uid=1000,trans=fd 0 0" + "\n"
HOME = Path("/home/me/.cache/qmix")


def machine(root: Path, kernel: str = "wsl2", mounts: str = NINE_P, gpu: str = "", config: str | None = None) -> Path:
    version, release = KERNELS[kernel]
    files = {"proc/version": version, "proc/sys/kernel/osrelease": release, "proc/mounts": mounts}
    files |= {"dev/dxg": ""} if gpu else {}
    files |= {"usr/lib/wsl/lib/libcuda.so.1": ""} if gpu == "cuda" else {}
    files |= {} if config is None else {"mnt/c/Users/me/.wslconfig": config}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(("kernel", "version"), [("wsl2", 2), ("wsl1", 1), ("debian", None)])
def test_the_version_is_that_of_the_kernel(tmp_path, kernel, version):
    root = machine(tmp_path, kernel)
    assert wsl_version(root) == version
    (root / "proc/sys/kernel/osrelease").unlink()
    assert wsl_version(root) == version


@pytest.mark.parametrize("mounts", [NINE_P, VIRTIO_9P, VIRTIOFS, WSL1])
def test_a_windows_drive_is_known_by_its_mount(tmp_path, mounts):
    root = machine(tmp_path, mounts=mounts)
    assert windows_drive(Path("/mnt/c/Users/me/qmix"), root) == "/mnt/c"
    assert windows_drive(Path("/mnt/c"), root) == "/mnt/c"
    for native in (HOME, Path("/mnt/cake"), Path("/mnt/wsl/x"), Path("/")):
        assert windows_drive(native, root) is None


def test_names_with_spaces_and_drives_within_drives(tmp_path):
    root = machine(tmp_path, mounts=SPACED + "/dev/sdd /mnt/c/linux ext4 rw 0 0\n")
    assert windows_drive(Path("/mnt/my disk/store"), root) == "/mnt/my disk"
    assert windows_drive(Path("/mnt/c/linux/store"), root) is None


def test_elsewhere_a_share_of_the_same_kind_is_no_windows_drive(tmp_path):
    assert windows_drive(Path("/mnt/c/x"), machine(tmp_path, "debian")) is None
    assert find_wsl(HOME, tmp_path) is None


@pytest.mark.parametrize(
    ("config", "memory"),
    [
        (None, None),
        ("[wsl2]\r\nmemory=8GB\r\n", "8GB"),
        ("# mine\n[experimental]\nmemory=1GB\n[wsl2]\nprocessors=2\nmemory = 24GB # most\n", "24GB"),
        ("[wsl2]\n#memory=8GB\n", None),
    ],
)
def test_the_memory_setting_is_read_where_it_can_be(tmp_path, config, memory):
    found = find_wsl(HOME, machine(tmp_path, config=config))
    assert found is not None
    assert found.memory == memory
    assert found.config == (None if config is None else "/mnt/c/Users/me/.wslconfig")


def rows(root: Path, directory: Path = HOME) -> dict[str, str]:
    found = find_wsl(directory, root)
    assert found is not None
    return dict(wsl_rows(found, 16 * 10**9))


def test_doctor_tells_memory_and_the_remedy(tmp_path):
    told = rows(machine(tmp_path / "default"))["WSL memory"]
    assert told.startswith(
        "16 GB for Linux: by default half of the PC's memory; for more, put `memory=NGB` under [wsl2]"
    )
    limited = rows(machine(tmp_path / "limited", config="[wsl2]\nmemory=8GB\n"))["WSL memory"]
    assert "/mnt/c/Users/me/.wslconfig has memory=8GB" in limited


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        ("", "not passed through: there is no /dev/dxg; `wsl --update`"),
        (
            "dxg",
            "passed through, but without CUDA: no libcuda.so in /usr/lib/wsl/lib; install NVIDIA's driver in Windows",
        ),
        ("cuda", "passed through, with the CUDA library of the Windows driver"),
    ],
)
def test_doctor_tells_whether_the_gpu_is_passed_through(tmp_path, gpu, told):
    assert rows(machine(tmp_path, gpu=gpu))["WSL GPU"].startswith(told)


def test_doctor_tells_of_stores_on_a_windows_drive_and_of_wsl1(tmp_path):
    root = machine(tmp_path / "two")
    assert "WSL disk" not in rows(root)
    assert rows(root, Path("/mnt/c/cache"))["WSL disk"].startswith(
        "stores would lie on /mnt/c, a mounted Windows drive"
    )
    (told,) = rows(machine(tmp_path / "one", "wsl1", WSL1)).values()
    assert "wsl --set-version" in told


def test_a_command_warns_once_of_a_store_on_a_windows_drive(first_use, tmp_path, monkeypatch):
    root = machine(tmp_path, mounts=NATIVE + f"drvfsC0 {first_use.cache} virtiofs rw,noatime 0 0\n")
    line = (
        f"{first_use.store}: on {first_use.cache}, a mounted Windows drive: slow, without direct reads; keep stores in"
    )
    assert drive_warning(first_use.store, root).startswith(line)
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache))
    script = (
        "import sys, functools, pathlib, cli\nfrom qmix.machine import wsl\n"
        f"wsl.drive_warning = functools.partial(wsl.drive_warning, root=pathlib.Path({str(root)!r}))\n"
        f"sys.argv = ['qmix', 'plan', {str(first_use.store)!r}, '--ram', '2GiB']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
