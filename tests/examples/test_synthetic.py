"""The synthetic trace keeps its promises: skew, click rate, a Bayes AUC that is one, drift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from examples.samples import Samples
from examples.synthetic import POPULAR, SyntheticTrace, _change_hands, expected_auc, make_synthetic


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return float(binary_auroc(scores.sigmoid(), labels.long()))


def row_counts(samples: Samples) -> torch.Tensor:
    """Look-ups of every usable row (row 0 is not) over all tables, most popular first."""
    counts = [torch.bincount(samples.sparse[:, f], minlength=rows)[1:] for f, rows in enumerate(samples.table_rows)]
    return torch.cat(counts).sort(descending=True).values


@pytest.fixture(scope="module")
def trace() -> SyntheticTrace:
    return make_synthetic(200_000, 20_000, seed=1)


def test_same_arguments_same_trace_and_another_seed_another() -> None:
    first, again, other = (make_synthetic(2000, 500, seed=seed, drift=0.3) for seed in (4, 4, 5))
    assert torch.equal(first.samples.sparse, again.samples.sparse)
    assert torch.equal(first.samples.dense, again.samples.dense)
    assert torch.equal(first.samples.labels, again.samples.labels)
    assert not torch.equal(first.samples.sparse, other.samples.sparse)


def test_tables_go_from_ten_rows_to_the_size_asked_for(trace: SyntheticTrace) -> None:
    sizes = sorted(trace.samples.table_rows)
    assert sizes[0] == 10
    assert sizes[-1] == 20_000
    assert len(set(sizes)) > 20
    assert trace.samples.sparse.min() == 1, "row 0 means missing, and nothing is"


@pytest.mark.parametrize(("rows_per_table", "top_share"), [(20_000, 0.7), (100_000, 0.7), (20_000, 0.5)])
def test_top_percent_of_rows_takes_its_share(rows_per_table: int, top_share: float) -> None:
    trace = make_synthetic(200_000, rows_per_table, top_share=top_share)
    counts = row_counts(trace.samples)
    measured = (counts[: len(counts) // 100].sum() / counts.sum()).item()
    assert trace.top_share == pytest.approx(top_share, abs=1e-3)
    assert measured == pytest.approx(top_share, abs=0.02)


def test_share_out_of_reach_is_told() -> None:
    trace = make_synthetic(1000, 10, top_share=0.7)  # 1% of 26 tables of 9 rows is two rows
    assert trace.top_share < 0.3


def test_features_differ_in_skew(trace: SyntheticTrace) -> None:
    assert max(trace.exponents) - min(trace.exponents) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("ctr", [0.05, 0.2, 0.6])
def test_click_rate(ctr: float) -> None:
    labels = make_synthetic(100_000, 1000, ctr=ctr).samples.labels
    # four standard deviations of the drawing, and as much again for the calibration's own sample
    assert labels.mean().item() == pytest.approx(ctr, abs=8 * math.sqrt(ctr * (1 - ctr) / 100_000))


@pytest.mark.parametrize("wanted", [0.65, 0.8, 0.9])
def test_bayes_auc_is_the_auc_of_the_planted_model_on_the_drawn_labels(wanted: float) -> None:
    trace = make_synthetic(200_000, 1000, auc=wanted)
    assert trace.bayes_auc() == pytest.approx(wanted, abs=0.005)
    assert auc(trace.logits, trace.samples.labels) == pytest.approx(trace.bayes_auc(), abs=0.005)
    log_loss = torch.nn.functional.binary_cross_entropy_with_logits(trace.logits, trace.samples.labels.double())
    assert log_loss.item() == pytest.approx(trace.bayes_log_loss(), rel=0.01)


def test_bayes_auc_of_a_part_is_that_parts(trace: SyntheticTrace) -> None:
    assert trace.bayes_auc(0, 1000) == expected_auc(trace.logits[:1000])
    assert trace.bayes_auc(150_000) == pytest.approx(trace.bayes_auc(), abs=0.005)


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=9))
def test_expected_auc_is_the_mean_over_all_labellings(logits: list[float]) -> None:
    """Against the definition: expected well-ordered pairs over expected pairs, all 2^n labellings enumerated."""
    p = torch.tensor(logits, dtype=torch.float64).sigmoid()
    won = pairs = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if i == j:
                continue
            weight = float(p[i] * (1 - p[j]))  # i positive, j negative
            pairs += weight
            won += weight * (1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
    # Equal logits stand in some order in the sorted sum, of which this is the mean.
    if len(set(p.tolist())) == len(p):
        assert expected_auc(torch.tensor(logits, dtype=torch.float64)) == pytest.approx(won / pairs)


def test_labels_cannot_be_had_from_the_dense_features_alone(trace: SyntheticTrace) -> None:
    """A linear model of the dense features learns something, and falls well short of what the rows add."""
    x = torch.cat([trace.samples.dense, torch.ones(len(trace.samples), 1)], dim=1)
    weights = torch.linalg.lstsq(x, trace.samples.labels[:, None]).solution
    reached = auc((x @ weights).squeeze(1), trace.samples.labels)
    assert 0.6 < reached < trace.bayes_auc() - 0.04


def popular_rows(samples: Samples, feature: int, count: int) -> set[int]:
    return set(torch.bincount(samples.sparse[:, feature]).sort(descending=True).indices[:count].tolist())


@pytest.mark.parametrize(("drift", "low", "high"), [(0.0, 0.9, 1.0), (0.5, 0.4, 0.75), (1.0, 0.0, 0.25)])
def test_drift_replaces_popular_rows(drift: float, low: float, high: float) -> None:
    trace = make_synthetic(400_000, 1000, seed=2, drift=drift)
    start, end = trace.samples.slice(0, 20_000), trace.samples.slice(380_000, 400_000)
    kept = total = 0
    for feature, rows in enumerate(trace.samples.table_rows):
        count = int(POPULAR * rows) // 4  # clear of the noise at the edge of popularity
        if count >= 3:
            kept += len(popular_rows(start, feature, count) & popular_rows(end, feature, count))
            total += count
    assert total > 50
    assert low <= kept / total <= high


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_drift_only_swaps_rows(moment: float) -> None:
    """At any moment every row still holds exactly one rank: what leaves the top goes to the tail, none is lost."""
    everyone = torch.arange(1000)
    found = _change_hands(
        everyone, torch.full((1000,), moment, dtype=torch.float64), 1000, 1.0, torch.Generator().manual_seed(0)
    )
    assert found.sort().values.tolist() == everyone.tolist()
    moved = int((found[:100] != everyone[:100]).sum())
    assert moved == {0.0: 0, 1.0: 100}.get(moment, moved)
    assert moment != 0.5 or 30 < moved < 70


def test_popularity_is_no_function_of_the_row_number(trace: SyntheticTrace) -> None:
    """Else sharding by rows would give one rank all the popular ones."""
    feature = max(range(26), key=lambda f: trace.samples.table_rows[f])
    popular = popular_rows(trace.samples, feature, 200)
    # The mean of 200 of the numbers 1 .. 20000 drawn at random is 10000, with a standard deviation of 408.
    assert sum(popular) / 200 == pytest.approx(10_000, abs=4 * 408)


def test_drift_comes_gradually_and_leaves_the_skew_alone() -> None:
    trace = make_synthetic(400_000, 1000, seed=2, drift=1.0)
    feature = max(range(26), key=lambda f: trace.samples.table_rows[f])
    parts = [popular_rows(trace.samples.slice(i * 40_000, (i + 1) * 40_000), feature, 25) for i in range(10)]
    overlap = [len(parts[0] & part) for part in parts]
    assert overlap[1] > overlap[5] > overlap[9]
    steady = row_counts(make_synthetic(40_000, 1000, seed=2).samples)
    moment = row_counts(trace.samples.slice(0, 40_000))
    top = len(steady) // 100
    assert (moment[:top].sum() / moment.sum()).item() == pytest.approx(
        (steady[:top].sum() / steady.sum()).item(), abs=0.04
    )


def test_a_row_that_became_popular_has_an_effect_of_its_own() -> None:
    """Click rates of the rows that hold rank 0 before and after a change are those of different rows."""
    trace = make_synthetic(400_000, 10, seed=0, drift=1.0, auc=0.9)
    differences = []
    for feature in range(26):
        before = popular_rows(trace.samples.slice(0, 20_000), feature, 1).pop()
        after = popular_rows(trace.samples.slice(380_000, 400_000), feature, 1).pop()
        if before != after:  # a change at the very start or end of the trace falls into one of the two windows
            of = [trace.logits[trace.samples.sparse[:, feature] == row].mean() for row in (before, after)]
            differences.append(abs(float(of[1] - of[0])))
    assert len(differences) >= 20
    assert max(differences) > 0.5


@settings(max_examples=25)
@given(
    n=st.integers(1, 300),
    rows=st.integers(10, 5000),
    seed=st.integers(0, 2**31),
    ctr=st.floats(0.01, 0.99),
    drift=st.floats(0, 1),
    top_share=st.floats(0.01, 0.99),
)
def test_any_arguments_in_range_give_valid_samples(
    n: int, rows: int, seed: int, ctr: float, drift: float, top_share: float
) -> None:
    trace = make_synthetic(n, rows, seed=seed, ctr=ctr, drift=drift, top_share=top_share)
    assert len(trace.samples) == n  # Samples checks ids, shapes and types itself
    assert trace.samples.dense.isfinite().all()
    assert (trace.samples.dense >= 0).all()
    assert trace.logits.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n": 0}, "n is 0; give 1 or more"),
        ({"rows_per_table": 9}, "rows_per_table is 9; give 10"),
        ({"ctr": 1.0}, "ctr is 1.0"),
        ({"auc": 0.5}, "auc is 0.5"),
        ({"top_share": 0.0}, "top_share is 0.0"),
        ({"drift": 1.5}, "drift is 1.5"),
        ({"drift": math.nan}, "drift is nan"),
    ],
)
def test_arguments_out_of_range(changed: dict[str, float], said: str) -> None:
    arguments = {"n": 10, "rows_per_table": 100, **changed}
    with pytest.raises(ValueError, match=said):
        make_synthetic(**arguments)  # type: ignore[arg-type]
