"""Errors say what, where and the nearest fix; every public name says what it does."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

import veneer as vn
from helpers import refuses
from veneer import errors
from veneer.errors import did_you_mean, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, vn.VeneerError)]


@pytest.mark.parametrize("error", CLASSES)
def test_texts(error: type[vn.VeneerError]) -> None:
    assert str(error("no such thing")) == "no such thing"
    assert str(error("no such thing", where="a.json")) == "no such thing [a.json]"
    full = error("no such thing", where="a.json", fix="Make one")
    assert str(full) == "no such thing [a.json]. Make one" and (full.what, full.where, full.fix) == ("no such thing", "a.json", "Make one")
    assert issubclass(error, vn.VeneerError) and getattr(vn, error.__name__) is error


def test_builtin_parents() -> None:
    for error, parent in (
        (vn.PlanError, ValueError), (vn.SiteError, ValueError), (vn.AdapterError, KeyError), (vn.CapabilityError, TypeError),
        (vn.MergeError, RuntimeError), (vn.StoreError, ValueError), (vn.ConfigError, ValueError), (vn.DataError, ValueError),
    ):  # fmt: skip
        assert issubclass(error, parent)
        with pytest.raises(parent):
            raise error("x")


@pytest.mark.parametrize("error", CLASSES)
def test_errors_pass_between_processes(error: type[vn.VeneerError]) -> None:
    e = pickle.loads(pickle.dumps(error("what", where="where", fix="fix")))
    assert type(e) is error and str(e) == "what [where]. fix" and e.fix == "fix"


def test_nearest() -> None:
    assert nearest("lorra", ["lora", "ia3", "flora"])[0] == "lora"
    assert nearest("zzz", ["lora"]) == []
    assert did_you_mean("lorra", ["lora", "ia3"]) == "Did you mean 'lora'?"
    assert did_you_mean("zzz", ["lora", "ia3"]) == "Known here: 'lora', 'ia3'"
    assert did_you_mean("zzz", []) == "There are none here."
    assert did_you_mean("zzz", map(str, range(100, 200))).endswith("'119', …")


@pytest.mark.parametrize("name", vn.__all__)
def test_every_public_name_is_described(name: str) -> None:
    doc = inspect.getdoc(getattr(vn, name)) or ""
    assert len(doc) >= 60, f"vn.{name}: {doc!r}"
    assert doc[0].isupper() or doc[0] in "(`", name
    assert max(map(len, doc.splitlines())) <= 124, name


@pytest.mark.parametrize("name", [n for n in vn.__all__ if inspect.isfunction(getattr(vn, n)) and n not in ("methods", "sites")])
def test_every_function_says_what_it_raises(name: str) -> None:
    doc = inspect.getdoc(getattr(vn, name)) or ""
    named = [c.__name__ for c in CLASSES if c.__name__ in doc]
    assert "Raises:" in doc and named, f"vn.{name}"


def test_an_optimiser_needs_something_to_train() -> None:
    with refuses(vn.AdapterError, "nothing here is trainable", "vn.attach"):
        vn.adamw([])


@pytest.mark.parametrize("record", vn.methods(), ids=lambda r: r.name)
def test_every_method_is_described(record) -> None:
    doc = inspect.getdoc(record.cls) or ""
    for option in record.cls.__dataclass_fields__:
        assert option in doc, f"{record.name}: the option {option!r} is not described"
    assert "=" in doc and "Parameters:" in doc and "Raises:" in doc
    assert set(record.ports) <= {"weight", "param", "hidden", "kv", "embed"} and record.family
    assert (record.paper and record.paper.split(",")[0] in doc) or record.name == "full"
    assert set(record.capabilities) == {c for c in ("mergeable", "identity_at_init", "routable", "gateable", "needs_data") if getattr(record.cls, c)}


def test_public_index() -> None:
    assert set(vn.__all__) <= set(dir(vn))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        vn.atach  # type: ignore[attr-defined]  # noqa: B018
    for name in vn.__all__:
        assert not inspect.ismodule(getattr(vn, name)), name


def test_import_needs_no_torch() -> None:
    code = "import sys, veneer; veneer.VeneerError; veneer.Plan; print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    path = [p for p in sys.path if p]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
