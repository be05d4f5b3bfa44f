"""Row-wise Adagrad over sparse gradients, as open-source DLRM trains ``nn.EmbeddingBag(sparse=True)`` with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SparseRowWiseAdagrad(torch.optim.Optimizer):
    """One sum a row of the mean of its squared gradients, as in FBGEMM: ``w -= lr * g / (sqrt(sum) + eps)``.

    Args:
        parameters: of sparse gradients, ``[rows, dim]``.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.zeros(parameter.shape[0], device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                total = self.state[parameter]["sum"]
                total.index_add_(0, rows, values.square().mean(dim=1))
                scale = -group["lr"] / (total.index_select(0, rows).sqrt() + group["eps"])
                parameter.index_add_(0, rows, values * scale[:, None])
