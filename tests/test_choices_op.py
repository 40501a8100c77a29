"""T-Few's losses against the paper's formulas, written as loops over examples, candidates and tokens."""

from __future__ import annotations

import math

import torch

from veneer.ops.choices import language_loss, length_normalised_loss, normalised, t_few_loss, token_log_probs, unlikelihood_loss


def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 11, generator=g, dtype=torch.float32)
    labels = torch.randint(0, 11, (3, 4, 5), generator=g)
    for b, lengths in enumerate([(5, 2, 3, 1), (4, 4, 1, 0), (2, 5, 0, 0)]):  # a length of 0: no such candidate
        for c, n in enumerate(lengths):
            labels[b, c, n:] = -100
    return logits, labels, torch.tensor([1, 0, 1])


def by_loops(logits, labels, answer):
    lm, ul, ln = [], [], []
    for b in range(3):
        probs = [[torch.softmax(logits[b, c, t], -1)[labels[b, c, t]].item() for t in range(5) if labels[b, c, t] >= 0] for c in range(4)]
        beta = [sum(map(math.log, p)) / len(p) if p else None for p in probs]
        y = int(answer[b])
        lm.append(-beta[y])
        wrong = [p for c in range(4) if c != y for p in probs[c]]
        ul.append(-sum(math.log(1 - p) for p in wrong) / len(wrong))
        ln.append(-math.log(math.exp(beta[y]) / sum(math.exp(x) for x in beta if x is not None)))
    return [sum(v) / 3 for v in (lm, ul, ln)]


def test_losses_are_the_papers():
    logits, labels, answer = batch()
    logp, real = token_log_probs(logits, labels), labels != -100
    ours = [f(logp, real, answer).item() for f in (language_loss, unlikelihood_loss, length_normalised_loss)]
    theirs = by_loops(logits, labels, answer)
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) < 1e-5
    assert abs(t_few_loss(logits, labels, answer).item() - sum(theirs)) < 1e-5
    assert torch.isneginf(normalised(logp, real)[1, 3])


def test_gradients_are_finite_at_the_ends():
    """A wrong answer that is certain, and candidates that are not there."""
    logits, labels, answer = batch()
    logits[0, 0, 0] = -1e4
    logits[0, 0, 0, labels[0, 0, 0]] = 1e4
    logits.requires_grad_(True)
    value = t_few_loss(logits, labels, answer)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()
    assert logits.grad[1, 3].abs().sum() == 0 and logits.grad[0, 1].abs().sum() > 0
