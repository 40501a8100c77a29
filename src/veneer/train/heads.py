"""What is trained beside a plan because it is drawn at random: a new head, and whatever else the checkpoint did not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..compose.paced import paced
from ..errors import ConfigError
from ..methods import holder
from ..patterns import select
from ..plan import Plan
from ..resolve import sites
from .config import TrainConfig
from .rates import rate_of


def with_heads(config: TrainConfig, plan: Plan, asked: Plan, extras: list[Plan]) -> Plan:
    """`plan` and the heads beside it, which learn at `head_learning_rate` where one is given. Raises: ConfigError where there are none."""
    rate = config.head_learning_rate
    if rate is not None and not extras:
        raise ConfigError(
            "no head is added to this plan", where="head_learning_rate", fix="Leave it out; in a plan: {paced: head, by: 10} for ten times its rate"
        )
    for extra in extras:
        plan = plan + (extra if rate is None else paced(extra, rate / (config.learning_rate or rate_of(asked))))
    return plan


def heads(plan: Plan, fresh: Iterable[str], model: Any, head: bool) -> list[Plan]:
    """What is to be trained beside `plan`: the head, where the task has one of its own, and whatever else the checkpoint did
    not have, since what is drawn at random must learn. What the plan trains whole by itself is left out."""
    there = [s for s in sites(model) if s.port == "param"]
    whole = {s.path for m in plan.leaves() if m.holds == "tensor" for s in select(there, m.at or m.default_at, port="param")}
    own = {s.path for s in select(there, "head", port="param")} if head else set()
    # a module of which the checkpoint has some tensors is not drawn: a missing bias starts at zero
    had = {n.rpartition(".")[0] for n, _ in model.named_parameters(remove_duplicate=False) if n not in set(fresh)}
    drawn = {k.rpartition(".")[0] for k in fresh} & {s.path for s in there} - own - whole - had
    full = holder("tensor")
    out = [] if own <= whole else [full(at="head")]
    return out + ([full(at=f"name:^({'|'.join(map(re.escape, sorted(drawn)))})$")] if drawn else [])
