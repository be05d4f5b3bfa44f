"""Test metrics over all ranks: AUC, normalised entropy, log-loss."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torchmetrics.classification import BinaryAUROC
from torchrec.metrics.ne import compute_ne, get_ne_states

# As torchrec.metrics: what keeps a probability of 0 or 1 from an infinite entropy.
ETA = 1e-12


class Evaluation:
    """Gathers the predictions of one pass over the test samples; every rank updates with its share.

    AUC is exact (all predictions are kept and gathered, no thresholds): at the differences in question, a thousandth,
    binned AUC would show its bins. Needs a default process group.
    """

    def __init__(self, device: torch.device) -> None:
        self._auroc = BinaryAUROC().to(device)
        self._states: dict[str, torch.Tensor] = {}
        self._device = device

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch: logits float [B], labels 0 or 1 [B]."""
        labels = labels.double()
        # float64: in float32, sigmoid makes ties of large logits.
        predictions = logits.double().sigmoid()
        self._auroc.update(predictions, labels.long())
        # get_ne_states clamps its predictions in place, hence after AUROC and on a copy.
        new = get_ne_states(labels, predictions.clone(), torch.ones_like(labels), ETA)
        for name, value in new.items():
            self._states[name] = self._states.get(name, 0.0) + value

    def compute(self) -> dict[str, float]:
        """Collective over all ranks: `auc`, `normalized_entropy` (1: no better than the mean), `log_loss` (nats),
        `ctr` (share of positives), `samples`."""
        names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")
        sums = torch.stack([self._states[name] for name in names])
        dist.all_reduce(sums)
        entropy, samples, positives, negatives = sums
        auc = self._auroc.compute()  # gathers by itself
        return {
            "auc": float(auc),
            "normalized_entropy": float(compute_ne(entropy, samples, positives, negatives, ETA)),
            "log_loss": float(entropy / samples) * math.log(2),  # torchrec counts in bits
            "ctr": float(positives / samples),
            "samples": int(samples),
        }
