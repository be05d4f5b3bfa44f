"""Seeded synthetic click logs with the shape and skew of Criteo, and a planted model behind the labels.

No data file is needed, and the answer is known: labels are drawn from a model that lies in DLRM's reach (a dense part,
an effect of every row, a few pairwise interactions of row vectors), so the AUC that a perfect model would get is known
too. Nothing here was fitted to anybody's log but two numbers: the share of look-ups that the most popular 1% of rows
take, and the click rate. Call results on it synthetic.

Popularity follows bounded Pareto laws (Zipf's law in closed form): a rank is one power of a uniform number, so a table
of any size needs no cumulative sums, and a million samples take seconds.

With `drift`, a share of the popular ranks changes hands over the trace: at a random moment a row from the unpopular
tail, with an effect of its own, takes the rank, and the old row takes its place in the tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from examples.samples import DENSE_NAMES, SPARSE_NAMES, Samples

FEATURES = len(SPARSE_NAMES)
# Pairs of features that interact, and the length of the row vectors whose dot product they add to the logit.
PAIRS = ((0, 25), (4, 22), (9, 17), (13, 20))
PAIR_DIM = 2
# Shares of the logit's variance: dense features, rows, interactions.
VARIANCE = (0.35, 0.5, 0.15)
# The ranks that drift can hit: this share of each table's rows, the most popular ones.
POPULAR = 0.1


@dataclass(frozen=True)
class SyntheticTrace:
    """Samples in time order, and what a perfect model would know of them.

    Attributes:
        samples: as training sees them.
        logits: float64 [N], the log-odds that each label was drawn with.
        exponents: the Zipf exponent of each of the 26 features.
        top_share: predicted share of look-ups that the most popular 1% of all rows take (at any one moment).
    """

    samples: Samples
    logits: torch.Tensor
    exponents: tuple[float, ...]
    top_share: float

    def bayes_auc(self, start: int = 0, stop: int | None = None) -> float:
        """Expected AUC of the planted model on samples start .. stop-1: no model can do better, but by luck."""
        return expected_auc(self.logits[start:stop])

    def bayes_log_loss(self, start: int = 0, stop: int | None = None) -> float:
        """Expected log-loss (nats a sample) of the planted model on samples start .. stop-1."""
        logits = self.logits[start:stop]
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, logits.sigmoid()))


def make_synthetic(
    n: int,
    rows_per_table: int,
    *,
    seed: int = 0,
    ctr: float = 0.2,
    auc: float = 0.8,
    top_share: float = 0.7,
    drift: float = 0.0,
) -> SyntheticTrace:
    """Generate a trace.

    Args:
        n: samples, 1 or more.
        rows_per_table: rows of the largest table, 10 or more; the 26 sizes go from 10 to it in a geometric row.
            Row 0 of each, the one for missing values, is not used.
        seed: all randomness; the same arguments give the same trace.
        ctr: share of positive labels, in (0, 1).
        auc: expected AUC of the planted model over the trace, in (0.5, 1).
        top_share: share of all look-ups that the most popular 1% of the rows (over all tables) shall take, in (0, 1);
            Criteo's is about 0.7. With tables so small that the target is out of reach, the nearest is taken:
            `SyntheticTrace.top_share` says what came out.
        drift: share of the popular ranks (each table's top 10%) that change hands during the trace, in [0, 1].

    Raises ValueError, naming the argument and its value, for one out of range.
    """
    _check(n, rows_per_table, ctr, auc, top_share, drift)
    generator = torch.Generator().manual_seed(seed)
    ratio = (rows_per_table / 10) ** (1 / (FEATURES - 1))
    # Shuffled by a fixed stride, so that large and small tables alternate as they do in Criteo.
    sizes = tuple(round(10 * ratio ** (feature * 7 % FEATURES)) for feature in range(FEATURES))
    exponents, reached = _fit_exponents([size - 1 for size in sizes], top_share)

    now = torch.arange(n, dtype=torch.float64) / n
    sparse = torch.empty(n, FEATURES, dtype=torch.int64)
    row_part = torch.zeros(n, dtype=torch.float64)
    vectors: dict[int, torch.Tensor] = {}  # of the features in PAIRS: [n, PAIR_DIM]
    paired = {feature for pair in PAIRS for feature in pair}
    for feature, (size, exponent) in enumerate(zip(sizes, exponents, strict=True)):
        count = size - 1
        rank = _draw_ranks(n, count, exponent, generator)
        if drift:
            rank = _change_hands(rank, now, count, drift, generator)
        row = torch.randperm(count, generator=generator)[rank]  # popularity is no function of the row's number
        sparse[:, feature] = row + 1
        row_part += torch.randn(count, dtype=torch.float64, generator=generator)[row]
        if feature in paired:
            vectors[feature] = torch.randn(count, PAIR_DIM, dtype=torch.float64, generator=generator)[row]
    pair_part = sum(((vectors[a] * vectors[b]).sum(dim=1) for a, b in PAIRS), torch.zeros(n, dtype=torch.float64))
    dense, dense_part = _draw_dense(n, generator)

    parts = zip(VARIANCE, (dense_part, row_part, pair_part), strict=True)
    signal = sum((share**0.5 * _standardise(part) for share, part in parts), torch.zeros(n, dtype=torch.float64))
    logits = _calibrate(_standardise(signal), ctr, auc)
    labels = (torch.rand(n, dtype=torch.float64, generator=generator) < logits.sigmoid()).float()
    return SyntheticTrace(Samples(dense, sparse, labels, sizes), logits, exponents, reached)


def expected_auc(logits: torch.Tensor) -> float:
    """AUC of a model that knows the log-odds (float64 [N]), in expectation over labels drawn with them.

    The probability that of two samples the one with the greater log-odds is the positive one, given that one is and
    one is not: a sum over the sorted samples, no labels needed.
    """
    p = logits.sort().values.sigmoid()
    negatives_below = (1 - p).cumsum(0) - (1 - p)
    # The pair of a sample with itself cannot occur: out of the denominator, too.
    pairs = p.sum() * (1 - p).sum() - (p * (1 - p)).sum()
    return float((p * negatives_below).sum() / pairs) if pairs > 0 else math.nan


def _check(n: int, rows_per_table: int, ctr: float, auc: float, top_share: float, drift: float) -> None:
    for name, value, good, remedy in (
        ("n", n, n >= 1, "1 or more samples"),
        ("rows_per_table", rows_per_table, rows_per_table >= 10, "10 or more rows"),
        ("ctr", ctr, 0 < ctr < 1, "a share of positives above 0 and below 1"),
        ("auc", auc, 0.5 < auc < 1, "an AUC above 0.5 and below 1"),
        ("top_share", top_share, 0 < top_share < 1, "a share of look-ups above 0 and below 1"),
        ("drift", drift, 0 <= drift <= 1, "a share of the popular rows from 0 to 1"),
    ):
        if not good:
            raise ValueError(f"{name} is {value}; give {remedy}")


# --- popularity -------------------------------------------------------------------------------------------------------


def _draw_ranks(n: int, count: int, exponent: float, generator: torch.Generator) -> torch.Tensor:
    """Ranks 0 (the most popular) .. count-1, int64 [n]: the inverse of `_mass` at uniform numbers."""
    power = 1 - exponent
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    x = (1 + u * ((count + 1) ** power - 1)) ** (1 / power)  # in [1, count + 1)
    return (x.long() - 1).clamp_(0, count - 1)


def _mass(rank: float, count: int, exponent: float) -> float:
    """Share of look-ups that the `rank` most popular of `count` rows take: density x^-exponent over [1, count+1)."""
    power = 1 - exponent
    return ((rank + 1) ** power - 1) / ((count + 1) ** power - 1)


def _fit_exponents(counts: list[int], top_share: float) -> tuple[tuple[float, ...], float]:
    """Exponents whose top 1% of rows over all tables take `top_share` of the look-ups, and the share reached.

    They vary between features by up to 0.2 each way around a common level; bisection finds the level.
    """
    low, high = 0.0, 3.0
    for _ in range(40):
        level = (low + high) / 2
        low, high = (level, high) if _top_mass(counts, _spread(level)) < top_share else (low, level)
    return _spread(high), _top_mass(counts, _spread(high))


def _spread(level: float) -> tuple[float, ...]:
    exponents = (level + 0.2 * math.sin(2.4 * feature) for feature in range(FEATURES))
    # The closed form has a hole at 1, where it would be a logarithm: step around it.
    return tuple(1 + 1e-6 if abs(e - 1) < 1e-6 else e for e in (max(e, 0.0) for e in exponents))


def _top_mass(counts: list[int], exponents: tuple[float, ...]) -> float:
    """Share of all look-ups that the most popular 1% of rows take, each feature having as many look-ups."""
    budget = 0.01 * sum(counts)

    def ranks(log_density: float) -> list[float]:
        """How many rows of each table are looked up at least so often."""
        found = []
        for count, e in zip(counts, exponents, strict=True):
            # density(x) = c x^-e with c = (1-e) / ((count+1)^(1-e) - 1)
            log_c = math.log((1 - e) / ((count + 1) ** (1 - e) - 1))
            flat = math.inf if log_c >= log_density else -math.inf
            log_x = (log_c - log_density) / e if e > 0 else flat
            found.append(min(max(math.exp(min(log_x, 50.0)) - 1, 0.0), float(count)))
        return found

    low, high = -60.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(ranks(middle)) > budget else (low, middle)
    shares = (_mass(r, count, e) for r, count, e in zip(ranks(high), counts, exponents, strict=True))
    return sum(shares) / len(counts)


def _change_hands(
    rank: torch.Tensor, now: torch.Tensor, count: int, drift: float, generator: torch.Generator
) -> torch.Tensor:
    """Swap a share of the popular ranks with ranks of the tail, each from a moment of its own on.

    Args:
        rank: int64 [n], the ranks drawn.
        now: float64 [n] in [0, 1), when.
    Returns:
        int64 [n]: whose popularity it was at the start of the trace, which names the row.
    """
    popular = max(1, int(POPULAR * count))
    # The last half of the ranks: unpopular before, and twice as many as could ever be needed.
    tail = count // 2 + torch.randperm(count - count // 2, generator=generator)
    changing = torch.rand(popular, generator=generator) < drift
    old = changing.nonzero().squeeze(1)
    new = tail[: old.numel()]
    old = old[: new.numel()]
    moment = torch.full((count,), math.inf, dtype=torch.float64)
    moment[old] = torch.rand(old.numel(), dtype=torch.float64, generator=generator)
    moment[new] = moment[old]
    partner = torch.arange(count)
    partner[old], partner[new] = new, old
    return torch.where(now >= moment[rank], partner[rank], rank)


# --- the planted model ------------------------------------------------------------------------------------------------


def _draw_dense(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts with long tails, some missing, as log1p like Criteo's; and their part of the logit, float64 [n]."""
    width = len(DENSE_NAMES)
    spread = torch.linspace(0.5, 2.0, width)
    dense = (torch.randn(n, width, generator=generator) * spread + 1.5).exp_().floor_().log1p_()
    missing = torch.rand(n, width, generator=generator) < torch.linspace(0.0, 0.4, width)
    dense.masked_fill_(missing, 0.0)
    centred = ((dense - dense.mean(dim=0)) / spread).double()
    weights = torch.randn(width, dtype=torch.float64, generator=generator)
    # A product as well, so that the bottom MLP has something to do that a linear layer cannot.
    return dense, centred @ weights + centred[:, 0] * centred[:, 1]


def _standardise(part: torch.Tensor) -> torch.Tensor:
    return (part - part.mean()) / part.std(unbiased=False).clamp_min(1e-12)


def _calibrate(signal: torch.Tensor, ctr: float, auc: float) -> torch.Tensor:
    """Scale and shift a standardised signal so that its expected AUC and mean probability are as asked.

    Both are fitted on at most 2^16 samples spread over the trace, by bisection: AUC grows with the scale whatever the
    shift is, as the click rate does with the shift.
    """
    sample = signal[:: max(1, signal.numel() >> 16)]

    def shifted(scale: float) -> float:
        low, high = -60.0, 60.0
        for _ in range(40):
            shift = (low + high) / 2
            low, high = (shift, high) if float((scale * sample + shift).sigmoid().mean()) < ctr else (low, shift)
        return (low + high) / 2

    low, high = 0.0, 30.0
    for _ in range(25):
        scale = (low + high) / 2
        low, high = (scale, high) if expected_auc(scale * sample + shifted(scale)) < auc else (low, scale)
    scale = (low + high) / 2
    return scale * signal + shifted(scale)
