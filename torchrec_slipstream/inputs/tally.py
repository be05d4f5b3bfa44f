"""What became of this rank's samples: counted as they pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.inputs.batches import kjts_of, labels_of
from torchrec_slipstream.inputs.blind import negatives_of
from torchrec_slipstream.report.inputs import ClassCount, DropCount, InputReport, LaneCount
from torchrec_slipstream.tbe.features import ModelTable

_MAX_LABELS = 16


class Tally:
    """Counts over all epochs; the attributes are those of :class:`InputReport`."""

    def __init__(self) -> None:
        self.epochs = self.read = self.used = self.dropped = self.left_over = 0
        self.kept_weight = 0.0
        self._classes = dict.fromkeys(("negative", "positive"), ClassCount(0, 0, 0.0))
        self._labels: tuple[Counter[str], Counter[str]] | None = Counter(), Counter()  # samples read, and dropped
        self._features: tuple[Counter[str], Counter[str]] = Counter(), Counter()  # look-ups read, and kept
        self._lanes: tuple[Counter[int], Counter[int]] = Counter(), Counter()  # samples handed out, and batches

    def count(self, batch: Any, keep: Tensor, weight: Tensor | None, kept: Sequence[Any]) -> None:
        """An input batch was read, and chosen from (``keep`` and ``weight`` as ``Choice`` has them); ``kept`` are the
        batches made of its kept samples."""
        size, left = keep.numel(), int(keep.count_nonzero())
        self.read += size
        self.dropped += size - left
        self.kept_weight += _sum(keep, weight)
        if (labels := labels_of(batch)) is not None:
            self._count_classes(negatives_of(labels), keep, weight)
            self._count_labels(labels.detach(), keep)
        for tally, batches in zip(self._features, ([batch], kept), strict=True):
            for features in [one for some in batches for one in kjts_of(some)]:
                tally.update(dict(zip(features.keys(), features.length_per_key(), strict=True)))

    def hand_out(self, lane: int, samples: int) -> None:
        """A batch of so many samples of a lane goes out to be trained on."""
        self.used += samples
        self._lanes[0][lane] += samples
        self._lanes[1][lane] += 1

    def _count_classes(self, negative: Tensor, keep: Tensor, weight: Tensor | None) -> None:
        for name, members in (("negative", negative), ("positive", ~negative)):
            kept = members & keep
            read, left = int(members.count_nonzero()), int(kept.count_nonzero())
            self._classes[name] += ClassCount(read, read - left, _sum(kept, weight))

    def _count_labels(self, labels: Tensor, keep: Tensor) -> None:
        if self._labels is None or labels.numel() != keep.numel():
            return
        labels = labels.cpu().reshape(-1)
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

    def report(
        self,
        method: str,
        waiting: int,
        tables: Iterable[ModelTable] = (),
        lanes: Sequence[str] = (),
        **found: Any,
    ) -> InputReport:
        """As of now, of this rank.

        Args:
            method: ``InputsConfig.method``.
            waiting: samples that are buffered.
            tables: of the model, to count look-ups by; a look-up of a feature of several tables counts in each.
            lanes: names of the lanes, where there are several.
            found: what else the method knows: other fields of :class:`InputReport`.
        """
        (samples, batches), (read, kept) = self._lanes, self._features
        by_table = {table.fqn: [key for key in table.features if key in read] for table in tables}
        return InputReport(
            method=method,
            epochs=self.epochs,
            read=self.read,
            used=self.used,
            dropped=self.dropped,
            left_over=self.left_over,
            waiting=waiting,
            kept_weight=self.kept_weight,
            classes={name: one for name, one in self._classes.items() if one.read},
            labels={key: DropCount(every, self._labels[1][key]) for key, every in sorted(self._labels[0].items())}
            if self._labels is not None
            else {},
            features={key: DropCount(every, every - kept[key]) for key, every in read.items()},
            tables={
                fqn: DropCount(every := sum(read[key] for key in keys), every - sum(kept[key] for key in keys))
                for fqn, keys in by_table.items()
                if keys
            },
            lanes={name: LaneCount(samples[lane], batches[lane]) for lane, name in enumerate(lanes)},
            **found,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        pairs = {"labels": self._labels, "features": self._features, "lanes": self._lanes}
        plain["classes"] = {name: asdict(one) for name, one in self._classes.items()}
        return plain | {key: [dict(one) for one in pair] if pair is not None else None for key, pair in pairs.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        state = dict(state)
        labels, (read, kept), (samples, batches) = (state.pop(name) for name in ("labels", "features", "lanes"))
        self._classes = {name: ClassCount(**one) for name, one in state.pop("classes").items()}
        self._labels = (Counter(labels[0]), Counter(labels[1])) if labels is not None else None
        self._features, self._lanes = (Counter(read), Counter(kept)), (Counter(samples), Counter(batches))
        vars(self).update(state)


def _sum(kept: Tensor, weight: Tensor | None) -> float:
    """Of the kept samples' weights."""
    return float(kept.count_nonzero() if weight is None else weight[kept].sum(dtype=torch.float64))
