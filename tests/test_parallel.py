"""Training over two processes: DDP and FSDP2 give the adapter that one process gives on the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import veneer as vn
from test_contract import ALL_METHODS, make, shake
from zoo import output

CASES = [(kind, method) for kind in ("bert", "llama") for method in ("lora", "bottleneck", "prefix", "unipelt")]


def build(kind: str, method: str):
    model, _ = make(kind)
    adapter = vn.attach(model, ALL_METHODS[method](), name="a")
    shake(adapter)
    return model, adapter


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Four rows; two of them padded, on the right."""
    ids = torch.arange(5, 33).reshape(4, 7)
    mask = torch.ones_like(ids)
    mask[1::2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def half(inputs: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {k: v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}


def step(model: nn.Module, adapter, inputs: dict[str, torch.Tensor]) -> None:
    """One step of SGD on a mean over rows, so that the mean over processes is the mean over the batch."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    y = output(model, inputs)
    weights = torch.linspace(-1.0, 1.0, y[0].numel()).reshape(y[0].shape)
    ((y * weights).flatten(1).sum(1) + (y**2).flatten(1).mean(1)).mean().backward()
    optimiser.step()


def layers(model: nn.Module) -> nn.ModuleList:
    return next(m for n, m in model.named_modules() if n.endswith(("encoder.layer", "model.layers")))  # type: ignore[return-value]


def whole(adapter) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in adapter.named_parameters()}


def pruning():
    model, _ = make("llama")
    torch.manual_seed(0)
    adapter = vn.attach(model, vn.AdaLoRA(4, target=1), name="a")
    shake(adapter)
    return model, adapter


def work(rank: int, port: int, folder: str) -> None:
    """One process: every case under DDP and then under FSDP2."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for kind, method in CASES:
            model, adapter = build(kind, method)
            step(nn.parallel.DistributedDataParallel(model), adapter, half(batch(kind), rank))
            got = {"ddp": whole(adapter)}

            model, adapter = build(kind, method)
            for layer in layers(model):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            step(model, adapter, half(batch(kind), rank))
            got["fsdp2"] = whole(adapter)
            vn.save(model, Path(folder) / f"{kind}-{method}-{rank}", name="a")
            with pytest.raises(vn.CapabilityError, match="FSDP2"):
                vn.save(model, Path(folder) / "peft", name="a", format="peft")
            with torch.no_grad():
                got["output"] = output(model, batch(kind))  # type: ignore[assignment]
            if rank == 0:
                torch.save(got, Path(folder) / f"{kind}-{method}.pt")
            dist.barrier()
        for way in ("ddp", "fsdp2"):
            model, adapter = pruning()
            for layer in layers(model) if way == "fsdp2" else ():
                fully_shard(layer, mesh=mesh)
            run = fully_shard(model, mesh=mesh) if way == "fsdp2" else nn.parallel.DistributedDataParallel(model)
            for n in range(1, 5):
                model.zero_grad()
                step(run, adapter, half(batch("llama"), rank))
                vn.advance(model, n, 4)
            got = {n: t.cpu() for n, t in whole(adapter).items()} | {f"kept {i}": p.kept for i, p in enumerate(adapter.parts)}
            torch.save(got, Path(folder) / f"pruned-{way}-{rank}.pt")
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    # gloo was seen to crash (SIGSEGV in its own threads) once in about six runs on a busy machine; a wrong result or an
    # exception in a process is another error and is never tried again
    for last in (False, False, True):
        folder = tmp_path_factory.mktemp("parallel")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        try:
            mp.spawn(work, (port, str(folder)), nprocs=2)
        except mp.ProcessExitedException:
            if last:
                raise
            continue
        return folder


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_two_processes_train_what_one_trains(kind: str, method: str, ran) -> None:
    model, adapter = build(kind, method)
    step(model, adapter, batch(kind))
    want = whole(adapter)
    got = torch.load(ran / f"{kind}-{method}.pt")
    for way in ("ddp", "fsdp2"):
        assert got[way].keys() == want.keys()
        for n in want:
            torch.testing.assert_close(got[way][n], want[n], atol=1e-5, rtol=1e-5, msg=lambda m, n=n, way=way: f"{way} {n}: {m}")
    plain, _ = make(kind)
    vn.load(plain, ran / f"{kind}-{method}-0", name="a")
    with torch.no_grad():
        torch.testing.assert_close(output(plain, batch(kind)), got["output"], atol=1e-5, rtol=1e-5)


def test_every_process_prunes_the_same(ran) -> None:
    """AdaLoRA's budget is dealt out by the gradients of the whole batch: in each process as in one."""
    model, adapter = pruning()
    for n in range(1, 5):
        model.zero_grad()
        step(model, adapter, batch("llama"))
        vn.advance(model, n, 4)
    want = whole(adapter) | {f"kept {i}": p.kept for i, p in enumerate(adapter.parts)}
    assert sum(int(p.kept.sum()) for p in adapter.parts) == len(adapter.parts)
    for way in ("ddp", "fsdp2"):
        for rank in (0, 1):
            got = torch.load(ran / f"pruned-{way}-{rank}.pt")
            for n in want:
                torch.testing.assert_close(got[n], want[n], atol=1e-5, rtol=1e-5, msg=lambda m, n=n, way=way: f"{way} {n}: {m}")
