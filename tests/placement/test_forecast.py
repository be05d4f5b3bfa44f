"""Forecasts against a plain one made row by row, what they learn of kinds of traffic, and the choice of hot rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_slipstream.placement import forecast as module
from torchrec_slipstream.placement.forecast import Forecast, choose

CPU = torch.device("cpu")


class PlainForecast:
    """The same, of one row after another."""

    def __init__(self, begins: list[int]) -> None:
        self.table_of = [t for t in range(len(begins) - 1) for _ in range(begins[t], begins[t + 1])]
        self.faded = [[0.0, 0.0] for _ in self.table_of]
        self.steps = [0.0, 0.0]
        self.normal = np.zeros((len(begins) - 1, 5))
        self.mixture = np.full((len(begins) - 1, 2), 0.5)
        self.tally = np.zeros((3, len(begins) - 1, 48))

    def rates(self, row: int) -> tuple[float, float]:
        recent, lasting = (faded / steps for faded, steps in zip(self.faded[row], self.steps, strict=True))
        return recent, lasting

    def mixed(self, row: int) -> float:
        return float(np.dot(self.mixture[self.table_of[row]], self.rates(row)))

    def place(self, rate: float) -> float:
        count = rate * self.steps[1]
        return min(max(math.log2(count) + 12.7, 0.0), 47.0) if count else 0.0

    def observe(self, counts: list[int], steps: int) -> None:
        if self.steps[1]:
            self.normal *= 0.95
            self.tally *= 0.8
            for row, (table, count) in enumerate(zip(self.table_of, counts, strict=True)):
                recent, lasting = self.rates(row)
                weight = 1 / ((recent + lasting) / 2 + 1 / steps)
                pairs = (recent, recent), (recent, lasting), (lasting, lasting), (recent, count / steps)
                self.normal[table] += [weight * a * b for a, b in (*pairs, (lasting, count / steps))]
                self.tally[:, table, int(self.place(self.mixed(row)))] += steps, self.mixed(row) * steps, count
            self.mixture = self.solve()
        for row, count in enumerate(counts):
            for i, fade in enumerate((0.5 ** (1 / 1.5), 0.5 ** (1 / 32))):
                self.faded[row][i] = float(np.float16(math.sqrt(self.faded[row][i] * fade + count))) ** 2
        self.steps = [self.steps[0] * 0.5 ** (1 / 1.5) + steps, self.steps[1] * 0.5 ** (1 / 32) + steps]

    def solve(self) -> np.ndarray:
        everything = self.normal.sum(0)
        of_all = self.least_squares(*everything)
        size = everything[0] + everything[2]
        mixtures = []
        for aa, ab, bb, a, b in self.normal:
            pull = (aa + bb) / size if size else 0.0
            also = everything[:3] * pull
            right = (a + also[0] * of_all[0] + also[1] * of_all[1], b + also[1] * of_all[0] + also[2] * of_all[1])
            mine = self.least_squares(aa + also[0], ab + also[1], bb + also[2], *right)
            mixtures.append(mine if aa + bb else of_all)
        return np.array(mixtures)

    @staticmethod
    def least_squares(aa: float, ab: float, bb: float, a: float, b: float) -> tuple[float, float]:
        ridge = 1e-9 * (aa + bb) + 1e-30
        matrix = np.array([[aa + ridge, ab], [ab, bb + ridge]])
        right = np.array([a, b]) + ridge / 2
        found = np.linalg.solve(matrix, right)
        if (found >= 0).all():
            return float(found[0]), float(found[1])
        # Without one or the other: what leaves less.
        single = [(right[0] / matrix[0, 0], 0.0), (0.0, right[1] / matrix[1, 1])]
        return min(single, key=lambda w: float(np.array(w) @ matrix @ np.array(w) - 2 * np.dot(right, w)))

    def worth(self) -> list[float]:
        found = []
        for row, table in enumerate(self.table_of):
            exposure, forecast, came = self.tally[:, table]
            place = self.place(self.mixed(row))
            if place < 1:
                found.append(came[0] / max(exposure[0], 1.0))
                continue

            def correction(at: int, came: np.ndarray = came, forecast: np.ndarray = forecast) -> float:
                near = [(at, 1.0), *((other, 0.5) for other in (at - 1, at + 1) if 1 <= other < 48)]
                return (sum(w * came[i] for i, w in near) + 100) / (sum(w * forecast[i] for i, w in near) + 100)

            at = min(max(place - 0.5, 1.0), 46.99)
            low = int(at)
            found.append(self.mixed(row) * (correction(low) + (at - low) * (correction(low + 1) - correction(low))))
        return found


def poisson_windows(rates: Tensor, windows: int, seed: int = 0, steps: int = 10) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.poisson(rates * steps, generator=generator).int(), steps) for _ in range(windows)]


def forecast_of(begins: list[int], windows: list[tuple[Tensor, int]]) -> Forecast:
    forecast = Forecast(begins, CPU)
    touches = torch.zeros(begins[-1], dtype=torch.int32)
    for counts, steps in windows:
        touches = touches + counts
        forecast.observe(touches, steps)
    return forecast


@pytest.mark.parametrize("seed", range(8))
def test_equals_one_made_row_by_row(seed: int) -> None:
    generator = np.random.default_rng(seed)
    begins = [0, 40, 40, 100, 115]
    forecast, plain = Forecast(begins, CPU), PlainForecast(begins)
    rates = generator.pareto(0.7, 115) * 0.05
    rates[100:] = 0.0  # a table that nobody looks up
    touches = np.zeros(115, dtype=np.int64)
    for window in range(7):
        if window % 3 == 2:
            rates[:100] = generator.permutation(rates[:100])
        steps = int(generator.integers(1, 30))
        counts = generator.poisson(rates * steps)
        touches += counts
        forecast.observe(torch.from_numpy(touches).int(), steps)
        plain.observe(counts.tolist(), steps)
        torch.testing.assert_close(
            forecast.worth().double(), torch.tensor(plain.worth(), dtype=torch.float64), rtol=2e-4, atol=1e-7
        )


def test_of_steady_traffic_it_forecasts_the_rate() -> None:
    rates = torch.cat([torch.full((300,), 2.0), torch.full((300,), 0.5), torch.zeros(300)])
    worth = forecast_of([0, 900], poisson_windows(rates, 40)).worth()
    assert worth[:300].mean().item() == pytest.approx(2.0, rel=0.03)
    assert worth[300:600].mean().item() == pytest.approx(0.5, rel=0.03)
    assert (worth[:300] - 2.0).abs().mean() < 0.15, "a mean of many windows, not the last one's count"
    assert worth[600:].max() < 1e-5


def test_of_drifting_traffic_it_takes_the_recent_rate() -> None:
    windows = []
    for window in range(42):  # 40 hot rows, others after every fourth window, and the last ones for two
        rates = torch.zeros(440)
        rates[window // 4 * 40 :][:40] = 3.0
        windows += poisson_windows(rates, 1, seed=window)
    worth = forecast_of([0, 440], windows).worth()
    assert set(worth.topk(40).indices.tolist()) == set(range(400, 440)), "though others have more look-ups in all"


def test_rows_that_never_come_back_are_worth_less_than_rows_never_seen() -> None:
    # In the first table each row is looked up in one window alone, in the second always.
    generator = torch.Generator().manual_seed(0)
    windows = []
    for window in range(20):
        counts = torch.zeros(1250, dtype=torch.int32)
        counts[window * 50 : window * 50 + 50] = 3
        counts[1050:] = torch.poisson(torch.full((200,), 3.0), generator=generator).int()
        windows.append((counts, 10))
    worth = forecast_of([0, 1050, 1250], windows).worth()
    gone, unseen, steady = worth[:1000], worth[1000:1050], worth[1050:]
    assert gone.max() < unseen.min()
    assert unseen.max() < steady.min()


def test_rates_are_by_counted_step() -> None:
    rates = torch.full((500,), 1.5)
    windows = [window for steps in (3, 17, 1, 40, 8, 2, 9) for window in poisson_windows(rates, 1, steps, steps)]
    assert forecast_of([0, 500], windows).worth().mean().item() == pytest.approx(1.5, rel=0.05)


def test_nothing_counted_is_nothing_observed() -> None:
    forecast = Forecast([0, 3, 3], CPU)
    assert forecast.worth().tolist() == [0.0, 0.0, 0.0]
    forecast.observe(torch.ones(3, dtype=torch.int32), 0)
    assert forecast.before.tolist() == [0, 0, 0]


def test_the_first_window_is_taken_as_it_is() -> None:
    worth = forecast_of([0, 4], [(torch.tensor([0, 1, 5, 60_000_000], dtype=torch.int32), 5)]).worth()
    torch.testing.assert_close(worth, torch.tensor([0.0, 0.2, 1.0, 12_000_000.0]), rtol=2e-3, atol=0.0)


def test_work_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = poisson_windows(torch.rand(200) * 2, 6)
    whole = forecast_of([0, 90, 200], windows).worth()
    monkeypatch.setattr(module, "_CHUNK", 32)
    torch.testing.assert_close(forecast_of([0, 90, 200], windows).worth(), whole, rtol=1e-5, atol=0.0)


def test_goes_on_from_a_state() -> None:
    windows = poisson_windows(torch.rand(120), 9)
    whole = forecast_of([0, 50, 120], windows)
    half = forecast_of([0, 50, 120], windows[:4])
    resumed = Forecast([0, 50, 120], CPU)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in half.state_dict().items()})
    touches = sum((counts for counts, _ in windows[:4]), torch.zeros(120, dtype=torch.int32))
    for counts, steps in windows[4:]:
        touches = touches + counts
        resumed.observe(touches, steps)
    assert torch.equal(resumed.worth(), whole.worth())
    assert whole.before.nbytes + whole.recent.nbytes + whole.lasting.nbytes == 8 * 120


def test_refuses_the_state_of_other_tables() -> None:
    forecast = forecast_of([0, 5], poisson_windows(torch.ones(5), 2))
    worth = forecast.worth()
    with pytest.raises(ValueError, match=r"before is \[6\]; give a state with \[5\]"):
        forecast.load_state_dict(Forecast([0, 6], CPU).state_dict())
    with pytest.raises(ValueError, match=r"tally is missing"):
        forecast.load_state_dict({k: v for k, v in forecast.state_dict().items() if k != "tally"})
    assert torch.equal(forecast.worth(), worth)


def test_follows_counts_that_were_lowered() -> None:
    windows = poisson_windows(torch.full((20,), 4.0), 3)
    plain, lowered = forecast_of([0, 20], windows[:2]), forecast_of([0, 20], windows[:2])
    touches = windows[0][0] + windows[1][0]
    rows, taken = torch.tensor([3, 7]), torch.tensor([30, 11], dtype=torch.int32)
    lowered.lower(rows, taken)
    plain.observe(touches + windows[2][0], 10)
    touches[rows] -= taken
    lowered.observe(touches + windows[2][0], 10)
    assert torch.equal(plain.worth(), lowered.worth())


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 8.0]), st.booleans()), max_size=12),
    st.integers(-1, 13),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_chooses_as_a_sort_would(rows: list[tuple[float, bool]], capacity: int, keep: float, margin: float) -> None:
    scores = [worth * keep + margin if hot else worth for worth, hot in rows]
    order = sorted(range(len(rows)), key=lambda row: (-scores[row], not rows[row][1], row))
    worth = torch.tensor([worth for worth, _ in rows], dtype=torch.float32)
    hot = torch.tensor([hot for _, hot in rows], dtype=torch.bool)
    chosen = choose(worth, hot, capacity, keep=keep, margin=margin)
    assert set(chosen.nonzero().squeeze(1).tolist()) == set(order[: max(capacity, 0)])


def test_a_cold_row_has_to_beat_a_hot_one_by_the_factor() -> None:
    hot = torch.tensor([True, True, False, False])
    assert choose(torch.tensor([1.0, 1.0, 1.2, 1.3]), hot, 2, keep=1.25).tolist() == [True, False, False, True]
    assert choose(torch.tensor([0.0, 0.0, 0.0, 0.0]), hot.flip(0), 2).tolist() == [False, False, True, True]


def test_counts_without_end_stay_numbers() -> None:
    """Of a padding id, say: a lasting count is the look-ups of 46 windows, more than a float16's square holds."""
    forecast = Forecast([0, 2], torch.device("cpu"))
    touches = torch.zeros(2, dtype=torch.int32)
    for _ in range(60):
        touches += torch.tensor([2**30 // 8, 1], dtype=torch.int32)
        forecast.observe(touches, 10)
        forecast.lower(torch.tensor([0]), touches[:1].clone())
        touches[0] = 0
        worth = forecast.worth()
        assert worth.isfinite().all()
    assert worth[0] > 1000 * worth[1] > 0
