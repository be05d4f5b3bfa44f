"""What became of this rank's samples: counted as they pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.inputs.batches import kjts_of, labels_of
from torchrec_slipstream.report.inputs import DropCount, InputReport

_MAX_LABELS = 16


class Tally:
    """Counts over all epochs; the attributes are those of :class:`InputReport`."""

    def __init__(self) -> None:
        self.epochs = self.read = self.used = self.dropped = self.left_over = 0
        self.kept_weight = 0.0
        self._labels: tuple[Counter[str], Counter[str]] | None = Counter(), Counter()  # samples read, and dropped
        self._features: tuple[Counter[str], Counter[str]] = Counter(), Counter()  # look-ups read, and kept

    def count(self, batch: Any, keep: Tensor, weight: Tensor | None, kept: Sequence[Any]) -> None:
        """An input batch was read, and chosen from (``keep`` and ``weight`` as ``Choice`` has them); ``kept`` are the
        batches made of its kept samples."""
        size, left = keep.numel(), int(keep.count_nonzero())
        self.read += size
        self.dropped += size - left
        self.kept_weight += float(left if weight is None else weight[keep].sum(dtype=torch.float64))
        self._count_labels(batch, keep)
        for tally, batches in zip(self._features, ([batch], kept), strict=True):
            for features in [one for some in batches for one in kjts_of(some)]:
                tally.update(dict(zip(features.keys(), features.length_per_key(), strict=True)))

    def _count_labels(self, batch: Any, keep: Tensor) -> None:
        labels = labels_of(batch)
        if self._labels is None or labels is None or labels.numel() != keep.numel():
            return
        labels = labels.detach().cpu().reshape(-1)
        read, dropped = self._labels
        ones = labels == 1
        if (positives := int(ones.count_nonzero())) + int((labels == 0).count_nonzero()) == labels.numel():  # the rule
            of_ones, of_all = int((ones & ~keep).count_nonzero()), int((~keep).count_nonzero())
            read.update({"0": labels.numel() - positives, "1": positives})
            dropped.update({"0": of_all - of_ones, "1": of_ones})
            return
        values, place = labels.unique(return_inverse=True)
        if len(values) <= _MAX_LABELS:
            names = [f"{value:g}" for value in values.tolist()]
            read.update(dict(zip(names, place.bincount(minlength=len(names)).tolist(), strict=True)))
            dropped.update(dict(zip(names, place[~keep].bincount(minlength=len(names)).tolist(), strict=True)))
        if len(values) > _MAX_LABELS or len(read) > _MAX_LABELS:
            self._labels = None

    def report(self, method: str, waiting: int) -> InputReport:
        """As of now, of this rank; ``waiting`` samples are buffered."""
        return InputReport(
            method=method,
            epochs=self.epochs,
            read=self.read,
            used=self.used,
            dropped=self.dropped,
            left_over=self.left_over,
            waiting=waiting,
            kept_weight=self.kept_weight,
            labels={key: DropCount(read, self._labels[1][key]) for key, read in sorted(self._labels[0].items())}
            if self._labels is not None
            else {},
            features={key: DropCount(all, all - self._features[1][key]) for key, all in self._features[0].items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        pairs = {"labels": self._labels, "features": self._features}
        return plain | {key: [dict(one) for one in pair] if pair is not None else None for key, pair in pairs.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        state = dict(state)
        labels, (read, kept) = state.pop("labels"), state.pop("features")
        self._labels = (Counter(labels[0]), Counter(labels[1])) if labels is not None else None
        self._features = Counter(read), Counter(kept)
        vars(self).update(state)
