"""T-Few's losses on answers that a language model chooses among, as pure functions of the tokens' log-probabilities.

Shapes: B examples, C candidate answers each, T tokens each, V words. A token that does not count has label -100; a candidate
without one that counts is not there, so that examples may have fewer than C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label (…, T) under logits (…, T, V), in fp32; 0 where the label is -100."""
    loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -loss.reshape(labels.shape)


def normalised(logp: Tensor, real: Tensor) -> Tensor:
    """β (B, C): the mean of log p over a candidate's own tokens; -inf for a candidate that is not there."""
    count = real.sum(-1)
    return (logp.sum(-1) / count.clamp(min=1)).masked_fill(count == 0, float("-inf"))


def language_loss(logp: Tensor, real: Tensor, answer: Tensor) -> Tensor:
    """L_LM = -(1 / T_y) Σ_t log p(y_t | x, y_<t), for the right answer y; the mean over the examples."""
    return -normalised(logp, real).gather(1, answer[:, None]).mean()


def unlikelihood_loss(logp: Tensor, real: Tensor, answer: Tensor) -> Tensor:
    """L_UL = - Σ_n Σ_t log(1 - p(ŷ_t | x, ŷ_<t)) / Σ_n T_n, over the tokens of all wrong answers n; the mean over the examples."""
    wrong = real & (torch.arange(real.shape[1], device=real.device)[None] != answer[:, None])[..., None]
    # p = 1 has no logarithm of 1 - p: it counts as the largest p below it
    each = torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(torch.float32).eps)))
    total = torch.where(wrong, each, torch.zeros_like(each)).sum((1, 2))
    return -(total / wrong.sum((1, 2)).clamp(min=1)).mean()


def length_normalised_loss(logp: Tensor, real: Tensor, answer: Tensor) -> Tensor:
    """L_LN = -log(exp β_y / Σ_c exp β_c): a softmax over the candidates' mean log-probabilities; the mean over the examples."""
    return F.cross_entropy(normalised(logp, real), answer)


def t_few_loss(logits: Tensor, labels: Tensor, answer: Tensor) -> Tensor:
    """T-Few's loss L_LM + L_UL + L_LN (Liu et al., NeurIPS 2022, arXiv 2205.05638, section 3.2).

    logits (B, C, T, V) at the positions that predict labels (B, C, T); answer (B,) is the number of the right candidate.
    """
    logp, real = token_log_probs(logits, labels), labels != IGNORE
    return language_loss(logp, real, answer) + unlikelihood_loss(logp, real, answer) + length_normalised_loss(logp, real, answer)
