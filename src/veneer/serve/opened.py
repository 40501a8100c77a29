"""Anything that was trained, opened for use: a run's folder, or an adapter's own in any format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter import Adapter, activate
from ..data.builtin import model_path
from ..errors import AdapterError, ConfigError, VeneerError, did_you_mean
from ..formats import find, reader
from ..store import CONFIG, load, read_config
from ..train.config import TrainConfig, make_config
from ..train.folder import ADAPTER, PROCESSOR, RUN, read_run
from ..train.prepare import load_model


@dataclass
class Opened:
    """A base with trained adapters attached, ready for use.

    folder     what was opened first
    model      the base, in eval mode, with `names` attached and the first of them active
    tokenizer  the base's tokenizer or processor; None where the base has none
    names      the adapters, in the order in which they were given
    config     the run's configuration, and labels: its labels in the order of the logits; None and [] for a bare adapter
    """

    folder: Path
    model: Any
    tokenizer: Any
    names: list[str]
    config: TrainConfig | None = None
    labels: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> Adapter:
        """A handle on the first adapter."""
        return Adapter(self.model, self.names[0])

    @property
    def base(self) -> str:
        """Where the base was loaded from, as from_pretrained takes it."""
        return str(self.model.config._name_or_path or "")

    def add(self, folder: str | Path, name: str | None = None) -> str:
        """Attach another adapter, of a run or of its own, to the same base; return its name (the folder's where that of
        the file is taken). Raises: ConfigError, StoreError (another base), AdapterError."""
        place, own = adapter_in(Path(folder))
        name = name or own
        if name in self.names:
            name = next(n for n in _names_for(Path(folder), name) if n not in self.names)
        load(self.model, place, name=name, activate=False)
        self.model.eval()
        self.names.append(name)
        return name

    def use(self, names: list[str]) -> None:
        """Make `names` the active adapters; none is the base. Raises: AdapterError with the nearest name."""
        for n in names:
            if n not in self.names:
                raise AdapterError(f"no adapter called {n!r} is here", fix=did_you_mean(n, self.names))
        activate(self.model, names or None)


def open_folder(folder: str | Path, *, model: str | None = None, name: str | None = None, more: list[str] | None = None, plain: bool = False) -> Opened:
    """Open what `folder` holds: a run, a native adapter, or one that Hugging Face PEFT or AdapterHub wrote.

    model   the base, in place of the one that the folder names
    name    what to call the adapter here; default: its own name
    more    further adapters for the same base, as FOLDER or FOLDER=NAME
    plain   the base unquantised, also where the run trained on a quantised one: what merges and exports want

    Raises: ConfigError (not a folder of ours, an unfinished run, no base), StoreError (damaged files, another base).
    """
    folder = Path(folder)
    opened = _run(folder, model, name, plain) if (folder / RUN).exists() else _bare(folder, model, name)
    for other in more or []:
        path, _, called = str(other).partition("=")
        opened.add(path, called or None)
    activate(opened.model, opened.names[0])
    return opened


def adapter_in(folder: Path) -> tuple[Path, str]:
    """Where the adapter of `folder` lies, and its name. Raises: ConfigError where there is none."""
    if (folder / RUN).exists():
        data = read_run(folder)
        return _finished(folder), str(data["config"].get("name") or folder.name)
    if (folder / CONFIG).exists():
        return folder, read_config(folder)["name"]
    found = find(folder, None) if folder.is_dir() else None
    if found is None:
        raise ConfigError(
            "this folder is not a run: it has no run.json, and no adapter lies in it either",
            where=str(folder),
            fix="Give the folder that `veneer train` or `veneer demo` wrote, or one with an adapter",
        )
    module, config = reader(found)
    return found, module.about(found, config)[0] or found.name


def _names_for(folder: Path, name: str) -> Iterator[str]:
    """Other names for a second adapter called `name`."""
    parents = [p for p in (folder.resolve().name, folder.resolve().parent.name) if p.isidentifier() or p.replace("-", "_").isidentifier()]
    yield from parents
    for i in range(2, 1_000_000):
        yield f"{name}{i}"


def _finished(folder: Path) -> Path:
    if not (folder / ADAPTER / CONFIG).exists():
        raise ConfigError("the run in this folder has not finished: it has no adapter yet", where=str(folder), fix="Run the same `veneer train` command again")
    return folder / ADAPTER


def config_of(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The checked configuration of the run in `folder`, and all that its run.json says. Raises: ConfigError."""
    from .. import __version__

    data = read_run(folder)
    try:
        return make_config(data["config"], str(folder / RUN)), data
    except ConfigError as e:
        wrote = (data.get("versions") or {}).get("veneer", "an unknown version")
        if wrote == __version__:
            raise
        fix = f"Use that version, or open its adapter alone: {folder / ADAPTER}"
        raise ConfigError(f"{e.what}: the run was written by veneer {wrote}, and this is {__version__}", where=e.where, fix=fix) from None


def _run(folder: Path, base: str | None, name: str | None, plain: bool) -> Opened:
    config, data = config_of(folder)
    place = _finished(folder)
    if base is not None:
        config = config.model_copy(update={"model": base})
    if plain:
        config = config.model_copy(update={"quantization": None})
    try:
        model, tokenizer = load_model(config, data["labels"], folder / PROCESSOR)
    except ConfigError as e:
        raise ConfigError(f"the base of this run is not there: {e.what}", where=config.model, fix="Name it where it is now: --model PATH") from e
    name = name or config.name
    load(model, place, name=name)
    model.eval()
    return Opened(folder, model, tokenizer, [name], config, list(data["labels"]))


def _bare(folder: Path, base: str | None, name: str | None) -> Opened:
    place, own = adapter_in(folder)
    name = name or own
    if (place / CONFIG).exists():
        described = read_config(place)["base"]
        path, kind = base or described.get("name_or_path"), described["class"]
    else:
        module, said = reader(place)
        _, path, kind = module.about(place, said)
        path = base or path
    if not path:
        raise ConfigError("the adapter does not say which base it is for", where=str(place), fix="Name it: --model PATH")
    model, tokenizer = load_base(str(path), kind)
    load(model, place, name=name)
    model.eval()
    return Opened(folder, model, tokenizer, [name])


def load_base(path: str, kind: str = "", **options: Any) -> tuple[Any, Any]:
    """The model at `path` as transformers' class `kind` (default: the one that its configuration names), in fp32, and its
    tokenizer, or None where it has none. Raises: ConfigError where there is no such model."""
    import torch
    import transformers

    path = model_path(path)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            cls = getattr(transformers, kind or (config.architectures or ["AutoModel"])[0], None)
            if cls is None:
                raise ConfigError(f"transformers has no class {kind!r}", where=path, fix="Update transformers, or open it in Python with vn.load")
            model = cls.from_pretrained(path, **{"dtype": torch.float32, **options})
        except (OSError, ValueError) as e:
            if isinstance(e, VeneerError):
                raise
            raise ConfigError(f"the base is not there: {str(e).splitlines()[0]}", where=path, fix="Name it where it is now: --model PATH") from e
        tokenizer = None
        with contextlib.suppress(OSError, ValueError):  # a model of images or plain tensors has none
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing and draws no bars within the block: that a head is new, or unused, is known here."""
    import transformers

    before, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bar:
            transformers.logging.enable_progress_bar()
