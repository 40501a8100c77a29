"""Training: memory, losses that leap, Ctrl-C, a full disk, early stopping; each on real runs of small models."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import TrainerCallback

import veneer as vn
from bases import example
from veneer.train import fit
from veneer.train.config import make_config
from veneer.train.prepare import prepare
from veneer.train.quantize import quantization
from veneer.train.rates import choose, rate_of
from veneer.train.run import read_run, run
from veneer.train.trainer import last_checkpoint

CLASSES = {"classify": tf.BertForSequenceClassification, "language_model": tf.LlamaForCausalLM, "embeddings": tf.BertModel}


def weights(folder):
    return load_file(next((folder / "adapter").glob("adapter-*.safetensors")))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def near(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=2e-5) for k in a)


def calm(small, out, name="classify", **changes):
    """No dropout, so that how a batch is divided changes nothing but rounding; LoRA, and no choice among checkpoints."""
    settings = example(name, *small, out, plan={"method": "lora"}, choose_best=False, learning_rate=1e-3, **changes)
    config = tf.AutoConfig.from_pretrained(settings["model"])
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    folder = out.parent / f"{name}-calm"
    if not folder.exists():
        CLASSES[name].from_pretrained(settings["model"]).save_pretrained(folder)
        config.save_pretrained(folder)
        tf.AutoTokenizer.from_pretrained(settings["model"]).save_pretrained(folder)
    return make_config(settings | {"model": str(folder)})


def crowded(monkeypatch, cls, most, times=10**9):
    """`cls` runs out of memory with more than `most` rows, as a GPU does."""
    own, left = cls.forward, [times]

    def forward(self, *args, **kwargs):
        rows = kwargs["input_ids"].shape[0]
        if torch.is_grad_enabled() and rows > most and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return own(self, *args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(cls, "forward", forward)


@pytest.mark.parametrize("name", ["classify", "language_model"])
def test_out_of_memory_divides_the_batch_and_changes_nothing_else(small, tmp_path, monkeypatch, name):
    """8 rows at once, and 2 rows 4 times: the same steps, for a mean over rows and for one over tokens."""
    run(calm(small, tmp_path / "whole", name), quiet=True)
    crowded(monkeypatch, CLASSES[name], 3)
    run(calm(small, tmp_path / "parts", name), quiet=True)
    assert read_run(tmp_path / "whole")["batch"]["micro"] == 8
    assert read_run(tmp_path / "parts")["batch"] == {"micro": 2, "accumulate": 4, "checkpointing": False}
    assert near(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


LIMITED = """
import json, resource, sys
from veneer.train import fit, run as runs
from veneer.train.config import make_config
own = runs.find_micro_batch
def limited(*args):
    fit._try(args[0], args[1][:1])  # threads, kernels and code that the first pass loads are not what is limited
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20), resource.RLIM_INFINITY))
    return own(*args)
runs.find_micro_batch = limited
runs.run(make_config(json.loads(sys.argv[1])), quiet=True)
"""


def test_an_allocator_that_really_fails_divides_the_batch(tmp_path):
    """A limit on the process, little above what it holds when the base is loaded: torch's own allocator then says no.

    The limit counts addresses, so glibc is told to give each tensor's back: by itself it keeps those of up to 32 MiB for
    later tensors, and a kernel that is compiled meanwhile finds no room.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    data = {"train": "tweets", "limit": 128, "eval_rows": 4}
    config = {"model": "minilm", "plan": "lora", "data": data, "output": str(tmp_path / "a"), "batch_size": 128, "max_steps": 1, "choose_best": False}
    done = subprocess.run([sys.executable, "-c", LIMITED, json.dumps(config | {"gradient_checkpointing": False})], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_run(tmp_path / "a")
    assert found["batch"]["micro"] < 128 and found["batch"]["micro"] * found["batch"]["accumulate"] == 128 and found["result"]["metrics"]["loss"] > 0


def test_out_of_memory_in_an_evaluation_halves_its_batch(small, tmp_path, monkeypatch):
    settings = calm(small, tmp_path / "whole").model_copy(update={"eval_batch_size": 8})
    run(settings, quiet=True)
    own = tf.BertForSequenceClassification.forward

    def forward(self, *args, **kwargs):
        if not self.training and kwargs["input_ids"].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, *args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(tf.BertForSequenceClassification, "forward", forward)
    run(settings.model_copy(update={"output": str(tmp_path / "parts")}), quiet=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    first, second = (read_run(tmp_path / n)["result"]["metrics"] for n in ("whole", "parts"))
    assert second == pytest.approx(first, rel=1e-5)


def test_out_of_memory_later_begins_again_with_less(small, tmp_path, monkeypatch):
    run(calm(small, tmp_path / "whole"), quiet=True)

    class Later(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and args.per_device_train_batch_size == 8:
                crowded(monkeypatch, CLASSES["classify"], 7)

    run(calm(small, tmp_path / "parts"), quiet=True, callbacks=[Later()])
    assert read_run(tmp_path / "parts")["batch"]["micro"] == 4
    assert near(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_out_of_memory_where_nothing_smaller_would_be_the_same(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crowded(patch, tf.BertModel, 8)  # 8 rows of two texts
        with pytest.raises(vn.ConfigError, match="8 rows do not fit.*compares the rows.*batch_size=4"):
            run(make_config(example("embeddings", *small, tmp_path / "a")), quiet=True)
    crowded(monkeypatch, tf.BertForSequenceClassification, 0)
    with pytest.raises(vn.ConfigError, match="not even one row.*max_length"):
        run(calm(small, tmp_path / "b"), quiet=True)


def test_the_longest_rows_are_tried_first_and_leave_no_trace(small, tmp_path, monkeypatch):
    seen = []
    own = fit._try
    monkeypatch.setattr(fit, "_try", lambda trainer, rows: (seen.append([len(r["input_ids"]) for r in rows]), own(trainer, rows))[1])
    config = make_config(example("classify", *small, tmp_path / "a", choose_best=False))
    result = run(config, quiet=True)
    every = sorted((len(ids) for ids in result.evaluation["input_ids"]), reverse=True)
    assert len(seen) == 1 and seen[0] == sorted(seen[0], reverse=True) and seen[0][0] >= every[0] - 40
    monkeypatch.setattr(fit, "_try", lambda trainer, rows: None)
    run(config.model_copy(update={"output": str(tmp_path / "b")}), quiet=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_gradients_are_checkpointed_where_the_estimate_says_so(small, tmp_path, monkeypatch):
    run(calm(small, tmp_path / "a", "language_model"), quiet=True)
    monkeypatch.setattr(fit, "free_memory", lambda device: 1 << 20)
    run(calm(small, tmp_path / "b", "language_model"), quiet=True)
    assert read_run(tmp_path / "b")["batch"]["checkpointing"] and not read_run(tmp_path / "a")["batch"]["checkpointing"]
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"))


def spoiled(monkeypatch, factor, after):
    """The loss of every call in training after `after` of them times `factor`."""
    own, calls = tf.BertForSequenceClassification.forward, [0]

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        calls[0] += self.training and torch.is_grad_enabled()
        if calls[0] > after and self.training:
            out.loss = out.loss * factor
        return out

    forward.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(tf.BertForSequenceClassification, "forward", forward)


@pytest.mark.parametrize(("factor", "says"), [(math.nan, "the loss is nan at step 9"), (50.0, "the loss leaps to .* at step 9, 3 times its highest")])
def test_a_loss_that_leaps_ends_the_run_with_the_last_good_state(small, tmp_path, monkeypatch, factor, says):
    import re

    # of the state after the eighth step all that is known is what it led to
    run(calm(small, tmp_path / "seven", max_steps=12, warmup=0.0, checkpoint_every=1), quiet=True, callbacks=[_stop_at(7)])
    spoiled(monkeypatch, factor, 10)  # two calls before the first step
    result = run(calm(small, tmp_path / "a", max_steps=12, warmup=0.0, checkpoint_every=1), quiet=True)
    assert re.search(says, result.stopped) and read_run(tmp_path / "a")["result"]["stopped"] == result.stopped
    assert same(weights(tmp_path / "a"), weights(tmp_path / "seven"))


def _stop_at(step):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()


@pytest.mark.parametrize("rate", [1e30, 1e3])
def test_what_is_kept_of_a_run_that_diverges_is_good(small, tmp_path, rate):
    """The step after the last finite loss may be the one that spoils the adapter."""
    changes = {"max_steps": 40, "learning_rate": rate, "warmup": 0.0 if rate > 1e6 else 0.5, "choose_best": False}
    try:
        result = run(make_config(example("language_model", *small, tmp_path / "a", **changes)), quiet=True)
    except vn.ConfigError as e:
        assert "before there was a good state to keep" in str(e) and not (tmp_path / "a" / "adapter").exists()
        return
    highest = max(e["loss"] for e in read_run(tmp_path / "a")["result"]["log"][:-3] if math.isfinite(e.get("loss", math.nan)))
    assert result.stopped and result.metrics["loss"] < 3 * highest


def test_a_run_that_diverges_by_itself_says_so_on_the_command_line(small, tmp_path):
    import yaml
    from typer.testing import CliRunner

    from veneer.cli import app

    settings = example("language_model", *small, tmp_path / "a", max_steps=30, learning_rate=1e3, choose_best=False, warmup=0.3)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml")])
    assert done.exit_code == 1 and "stopped early: the " in done.output and "last good state is kept" in done.output, done.output
    assert all(bool(torch.isfinite(v).all()) for v in weights(tmp_path / "a").values())


def test_a_loss_that_goes_wrong_right_after_a_break(small, tmp_path, monkeypatch):
    """Nothing was logged since the checkpoint, so the checkpoint is the last good state."""
    config = calm(small, tmp_path / "a", max_steps=4, checkpoint_every=2)

    class Break(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise ConnectionError("pulled")

    with pytest.raises(ConnectionError):
        run(config, quiet=True, callbacks=[Break()])
    kept = load_file(tmp_path / "a" / "checkpoints" / "checkpoint-2" / "training.safetensors")
    spoiled(monkeypatch, math.nan, 0)
    result = run(config, quiet=True)
    assert "the loss is nan at step 3" in result.stopped and same(weights(tmp_path / "a"), kept)


def test_a_loss_that_is_never_a_number_says_so(small, tmp_path, monkeypatch):
    spoiled(monkeypatch, math.nan, 0)
    with pytest.raises(vn.ConfigError, match="the loss is nan at step 1, before.*learning_rate"):
        run(calm(small, tmp_path / "a"), quiet=True)
    assert not (tmp_path / "a" / "adapter").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_goes_on(small, tmp_path, number):
    before = signal.getsignal(number)
    settings = example("classify", *small, tmp_path / "whole", max_steps=4, choose_best=False)
    run(make_config(settings), quiet=True)

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    cut = make_config(settings | {"output": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        run(cut, quiet=True, callbacks=[Press()])
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-2"]
    said = _pressed(tmp_path, settings | {"output": str(tmp_path / "cut")}), _pressed(tmp_path, settings | {"output": str(tmp_path / "none")})
    assert "checkpoint-2 is kept, and the same command goes on from it" in said[0] and "there is no checkpoint yet" in said[1]
    run(cut, quiet=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert signal.getsignal(number) == before


def _pressed(folder, settings):
    """What `veneer train` says where Ctrl-C ends it at once."""
    import yaml
    from typer.testing import CliRunner

    from veneer.cli import app

    def pressed(config):
        raise KeyboardInterrupt

    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.train.run.run", pressed)
        done = CliRunner().invoke(app, ["train", str(folder / "c.yaml")])
    assert done.exit_code == 130
    return done.output


def test_a_full_disk_is_told_and_nothing_is_lost(small, tmp_path):
    """A real limit of the system, in a process of its own; torch, tokenizers and safetensors each meet it in their own way."""
    settings = example("classify", *small, tmp_path / "whole", max_steps=6, choose_best=False, checkpoint_every=2)
    run(make_config(settings), quiet=True)
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "whole").rglob("*") if f.is_file() and f.name != "report.html"}
    assert sizes["tokenizer.json"] < sizes["optimizer.pt"]
    cut = settings | {"output": str(tmp_path / "cut")}
    (tmp_path / "c.json").write_text(json.dumps(cut))
    for limit in (sizes["tokenizer.json"] // 2, sizes["optimizer.pt"] - 100):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2); import veneer.cli; veneer.cli.main()"
        done = subprocess.run([sys.executable, "-c", code, "train", str(tmp_path / "c.json")], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert re.search("veneer: the run cannot be written: .*MiB are free there.*same command goes on", done.stderr), done.stderr
    run(make_config(cut), quiet=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_checkpoint_cut_off_in_its_last_file_is_not_gone_on_from(tmp_path):
    for step, state in ((2, "{}"), (4, '{"global_step": 4, "log_hi'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "training.safetensors").write_bytes(b"")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def test_early_stopping_and_the_best_checkpoint(small, tmp_path):
    settings = example("classify", *small, tmp_path / "a", max_steps=20, checkpoint_every=1, early_stopping=2, learning_rate=1e-9)
    result = run(make_config(settings), quiet=True)
    log = read_run(tmp_path / "a")["result"]["log"]
    scores = [e["eval_macro_f1"] for e in log if "eval_macro_f1" in e]
    assert len(scores) == 4 and result.metrics["macro_f1"] == max(scores)  # the first, two that are no better, and the last word
    with pytest.raises(vn.ConfigError, match="early_stopping needs evaluations"):
        run(make_config(settings | {"output": str(tmp_path / "b"), "choose_best": False}), quiet=True)


@pytest.mark.parametrize("name", ["classify", "chat", "text_to_text"])
def test_checkpointed_gradients_by_estimate_change_no_weight(small, tmp_path, monkeypatch, name):
    counted = []
    real = tf.modeling_utils.checkpoint
    monkeypatch.setattr(tf.modeling_utils, "checkpoint", lambda *a, **k: counted.append(1) or real(*a, **k))

    def weights(folder, **changes):
        counted.clear()
        run(make_config(example(name, *small, tmp_path / folder, max_steps=3, **changes)), quiet=True)
        return load_file(next((tmp_path / folder / "adapter").glob("adapter-*.safetensors"))), len(counted)

    plain, none = weights("plain")
    monkeypatch.setattr("veneer.train.run.roomy", lambda *a: False)
    auto, some = weights("auto")
    assert none == 0 and some >= 3 * 2  # steps and layers
    assert plain.keys() == auto.keys() and all(torch.allclose(v, auto[k], atol=1e-5) for k, v in plain.items())
    assert weights("off", gradient_checkpointing=False)[1] == 0


def test_a_new_head_has_a_rate_of_its_own(small, tmp_path):
    config = example("classify", *small, tmp_path / "a", max_steps=2, learning_rate=1e-3, head_learning_rate="1e-2")
    result = run(make_config(config), quiet=True)
    rates = {id(p): g["lr"] for g in vn.param_groups(result.model, 1e-3) for p in g["params"]}
    found = {part.site.role == "head": rates[id(p)] for part in vn.Adapter(result.model, "adapter").parts for p in part.parameters()}
    assert found == {True: pytest.approx(1e-2), False: 1e-3}
    assert rate_of(prepare(make_config(config | {"learning_rate": None})).adapter.plan) == vn.LoRA.rate[0]  # the head does not decide
    for name, changes in (("language_model", {}), ("classify", {"plan": "full"})):
        with pytest.raises(vn.ConfigError, match="no head is added to this plan.*head_learning_rate"):
            run(make_config(example(name, *small, tmp_path / "b", head_learning_rate=1e-2, **changes)), quiet=True)
    assert not (tmp_path / "b").exists()


def test_rates_have_sources():
    assert rate_of(vn.LoRA(8) + vn.Full(at="head")) == vn.LoRA.rate[0] and rate_of(vn.Full(at="head")) == vn.Full.rate[0]
    assert choose(vn.Prefix(3) + vn.Bottleneck(4))[1].startswith("bottleneck: UniPELT")
    assert all(0 < m.cls.rate[0] < 1 and m.cls.rate[1] for m in vn.methods())
    assert rate_of(vn.preset("full")) == rate_of(vn.Full(at="norm")) == 5e-5
    assert vn.Prefix.rate[0] > vn.Full.rate[0] and rate_of(vn.Prefix(3) + vn.Full(at="head")) == vn.Prefix.rate[0]


def test_full_fine_tuning_trains_each_tensor_once(small, tmp_path):
    p = prepare(make_config(example("classify", *small, tmp_path / "run") | {"plan": "full"}))
    assert p.plan == vn.preset("full")  # the head is among all, so none is added
    assert vn.summary(p.model).trainable == sum(x.numel() for x in p.model.parameters() if not x.requires_grad)


def test_a_quantiser_that_is_not_there_is_named(small, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr("veneer.train.quantize.find_spec", lambda name: None)
    for name, package in (("nf4", "bitsandbytes"), ("torchao-int8", "torchao")):
        with pytest.raises(vn.ConfigError, match=f"quantization={name} needs the package '{package}'.*veneer.quant"):
            quantization(name)
    assert quantization(None) == {}
    with pytest.raises(vn.ConfigError, match="quantization cannot be 'nf5'.*nf4"):
        make_config({"model": "m", "data": {"train": "t"}, "quantization": "nf5"})


@pytest.mark.parametrize("kind", ["torchao-int4", "torchao-int8"])
@pytest.mark.filterwarnings("ignore")
def test_a_base_in_torchaos_bits_is_trained(small, tmp_path, kind):
    """Through Trainer, which refuses 4 bits of itself; where no linear has a size that can be packed, that is said."""
    config = calm(small, tmp_path / "a", "language_model", quantization=kind)
    if kind == "torchao-int4":
        with pytest.raises(vn.ConfigError, match="nothing of the base was quantised.*torchao-int4"):
            prepare(config)
        wide = tf.LlamaConfig.from_pretrained(config.model, hidden_size=128, intermediate_size=256)
        tf.LlamaForCausalLM(wide).save_pretrained(config.model)
    result = run(config, quiet=True)
    before, after = (next(p for n, p in m.named_parameters() if n.endswith("q_proj.weight")) for m in (prepare(config).model, result.model))
    assert all(torch.equal(getattr(before, k), getattr(after, k)) for k in before.__tensor_flatten__()[0])
    assert any(t.any() for n, t in weights(tmp_path / "a").items() if n.endswith("B"))


def test_run_json_says_how_the_data_came_out(small, tmp_path):
    settings = example("regression", *small, tmp_path / "a")
    settings["data"] = {"train": small[1]["scores"], "on_error": "skip"}
    run(make_config(settings), quiet=True)
    found = json.loads((tmp_path / "a" / "run.json").read_text())["data"]
    assert found["format"] == "text-label" and found["train"]["skipped"] + found["eval"]["skipped"] == 1
    reason = (found["train"]["reasons"] + found["eval"]["reasons"])[0]
    assert "'much' is no number" in reason and "scores.csv, line" in reason
    with pytest.raises(vn.DataError, match="'much' is no number.*scores.csv, line"):
        run(make_config(settings | {"output": str(tmp_path / "b"), "data": settings["data"] | {"on_error": "stop"}}), quiet=True)
    assert not (tmp_path / "b").exists()


def test_a_quantised_base_is_trained_through_trainer_and_measured(small, tmp_path, monkeypatch):
    """Trainer refuses a quantised model unless adapters are attached; weights that are made of other tensors are counted."""
    from types import SimpleNamespace

    from torch.testing._internal.two_tensor import TwoTensor

    from veneer.fingerprint import packed

    pair = TwoTensor(torch.zeros(4, 2), torch.ones(4, 2))
    assert packed(pair) and not packed(torch.zeros(2)) and sum(s.nbytes() for s in fit.storages(pair)) == 2 * 4 * 2 * 4
    config = calm(small, tmp_path / "a")
    monkeypatch.setattr(tf.BertForSequenceClassification, "is_quantized", True, raising=False)
    monkeypatch.setattr(tf.BertForSequenceClassification, "hf_quantizer", SimpleNamespace(is_trainable=True, is_qat_trainable=False), raising=False)
    result = run(config, quiet=True)
    assert result.trainable > 0 and not result.model._hf_peft_config_loaded
