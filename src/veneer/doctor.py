"""What this machine has and lacks for the library: read from the package's own declaration, then tried."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PACKAGE = "veneer"
ROOM = 2 << 30  # bytes that a small base and its runs take


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, its `state` ('good', 'absent': not needed for all, 'wrong'), what it `says`, and the `fix`."""

    what: str
    state: str
    says: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything, in the order in which it matters. Raises nothing: what goes wrong is a finding."""
    out: list[Finding] = []
    for check in CHECKS:
        try:
            out += check()
        except Exception as e:  # the point is to report, whatever a broken package raises
            out.append(
                Finding(check.__name__.strip("_"), "wrong", f"{type(e).__name__}: {str(e).partition(chr(10))[0]}", "Install the packages named above again")
            )
    return out


def _versions() -> Iterator[Finding]:
    """Python and what pyproject.toml asks for, extras apart."""
    yield Finding("python", "good", sys.version.split()[0])
    yield Finding(PACKAGE, "good", metadata.version(PACKAGE))
    for r in _requirements():
        if r.marker is None or r.marker.evaluate({"extra": ""}):
            yield _package(r, "wrong", f'pip install "{r.name}{r.specifier}"')


def _extras() -> Iterator[Finding]:
    """One line for each extra, with what of it is absent or too old."""
    extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    for extra in extras:
        mine = [r for r in _requirements() if r.name != PACKAGE and r.marker is not None and _only(r, extra)]
        found = [_package(r, "absent", "") for r in mine]
        lacking = [f for f in found if f.state != "good"]
        says = ", ".join(f"{f.what} {f.says}" for f in lacking or found)
        yield Finding(f"extra {extra}", "absent" if lacking else "good", says, f'pip install "{PACKAGE}[{extra}]"' if lacking else "")


def _only(r, extra: str) -> bool:
    return r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})


def _requirements():
    from packaging.requirements import Requirement

    return [Requirement(line) for line in metadata.requires(PACKAGE) or []]


def _package(r, otherwise: str, fix: str) -> Finding:
    try:
        version = metadata.version(r.name)
    except metadata.PackageNotFoundError:
        return Finding(r.name, otherwise, "is not installed", fix)
    if not r.specifier.contains(version, prereleases=True):
        return Finding(r.name, otherwise, f"{version}, and {r.specifier} is needed", fix)
    return Finding(r.name, "good", version)


def _fit() -> Iterator[Finding]:
    """torchvision and torchaudio come in builds for one torch; another one breaks transformers' imports."""
    for name in ("torchvision", "torchaudio"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            __import__(name)
            yield Finding(name, "good", metadata.version(name))
        except Exception as e:
            fix = f"Uninstall it, or install the build for torch {metadata.version('torch')}"
            yield Finding(name, "wrong", f"does not load beside this torch: {str(e).partition(chr(10))[0]}", fix)


def _devices() -> Iterator[Finding]:
    """Where training would run, and in which precisions."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: leave bf16 off"
            yield Finding(f"cuda:{i}", "good", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {bf16}")
    elif torch.version.cuda is not None and shutil.which("nvidia-smi"):
        yield Finding("cuda", "wrong", "there is a GPU, and torch cannot use it", f"Install a driver for CUDA {torch.version.cuda}, or another build of torch")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "good", "Apple's GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "good", f"{cores} cores, {torch.get_num_threads()} threads used by torch")


def _disk() -> Iterator[Finding]:
    """Room where runs and bases are written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, folder in (("this folder", os.getcwd()), ("hub cache", HF_HUB_CACHE)):
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Finding(
                what, "wrong", f"{folder} cannot be written", "Go to a folder of your own" if what == "this folder" else "Set HF_HOME to one that can"
            )
        elif free < ROOM:
            yield Finding(what, "wrong", f"{free >> 20} MiB are free in {folder}", "Delete old runs, or work on another disk")
        else:
            yield Finding(what, "good", f"{free / 2**30:.0f} GiB free in {folder}")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        yield Finding("hub", "good", "offline, as HF_HUB_OFFLINE says: only bases and data that are here already")


def _step() -> Iterator[Finding]:
    """A small model on the device that training would take: attach, one step, save, load, detach."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import veneer as vn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    model = BertForSequenceClassification(BertConfig(**size)).to(device)
    ids = torch.arange(8, device=device).reshape(2, 4)
    adapter = vn.attach(model, vn.gated(vn.Bottleneck(4) + vn.Prefix(2) + vn.LoRA(2)), name="doctor")
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=torch.tensor([0, 1], device=device)).loss.backward()
        optimiser.step()
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        with tempfile.TemporaryDirectory() as folder:
            vn.save(model, folder, name="doctor")
            vn.detach(model, "doctor")
            vn.load(model, folder)
            same = torch.equal(before, model(input_ids=ids).logits)
    fix = "Reinstall torch and transformers in a fresh environment, and report it if that does not help"
    yield Finding("a step", "good" if same else "wrong", f"trained, saved and loaded on {device}" if same else "the loaded adapter gives other outputs", fix)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _extras, _fit, _devices, _disk, _step)
