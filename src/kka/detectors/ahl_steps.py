"""AHL's formulas: adaptation and its gradient (Eq. 1-3), psi and the importance weights (Eq. 5-7)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kka.detectors.deviation import DevNetHeads, DRAHeads, Features

PSI_HIDDEN = 6

Parameters = dict[str, Tensor]
Heads = DevNetHeads | DRAHeads


@dataclass(frozen=True)
class Batch:
    """Features of some images with their labels, mean features of normals, and draws of the prior."""

    features: Features
    references: Features
    labels: Tensor
    draws: Tensor


def batch_loss(heads: Heads, parameters: Parameters, batch: Batch) -> Tensor:
    """Loss of the heads with these parameters (Eq. 1)."""
    scores = functional_call(heads, parameters, (batch.features, batch.references))
    return heads.loss(scores, batch.labels, batch.draws)


def adapt(
    heads: Heads, start: Parameters, batches: Iterable[Batch], lr: float, second_order: bool
) -> Parameters:
    """Parameters after a gradient step on each batch, differentiable with respect to `start`.

    The first step is of second order if asked; later ones pass the gradient on as it is.
    """
    parameters = start
    for step, batch in enumerate(batches):
        loss, values = batch_loss(heads, parameters, batch), list(parameters.values())
        exact = second_order and step == 0
        gradients = torch.autograd.grad(loss, values, create_graph=exact, materialize_grads=True)
        pairs = zip(parameters.items(), gradients, strict=True)
        parameters = {name: value - lr * gradient for (name, value), gradient in pairs}
    return parameters


def query_gradient(
    heads: Heads, start: Parameters, adapted: Parameters, batches: Iterable[Batch], n: int
) -> tuple[float, list[Tensor]]:
    """Mean loss of the adapted heads on n batches of the query, and its gradient at `start` (Eq. 2-3)."""
    leaves = {name: value.detach().requires_grad_() for name, value in adapted.items()}
    total, gradients = 0.0, [torch.zeros_like(value) for value in leaves.values()]
    for batch in batches:  # one at a time: the memory of one
        loss = batch_loss(heads, leaves, batch) / n
        parts = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        torch._foreach_add_(gradients, parts)
        total += loss.item()
    values = list(adapted.values())
    return total, list(torch.autograd.grad(values, list(start.values()), gradients, materialize_grads=True))


class Psi(nn.Module):
    """Foretells the scores of all adapted models from those of the last epochs (Eq. 5)."""

    history: Tensor
    """(N, K, T) scores of all images, oldest epoch first"""

    def __init__(self, n_tasks: int, n_images: int, n_epochs: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(n_images, n_epochs, n_tasks))
        self.lstm = nn.LSTM(n_tasks, PSI_HIDDEN, 2, batch_first=True, dropout=0.5, bidirectional=True)
        self.fc = nn.Linear(2 * PSI_HIDDEN, n_tasks)

    def forward(self, history: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(N, K, T) scores of K epochs by T models -> (N, T) of the next one."""
        return self.fc(self.lstm(history, state)[0][:, -1].relu())


def generalisation_errors(scores: Tensor, anomalous: Tensor, supports: Sequence[Tensor]) -> Tensor:
    """How wrong each adapted model is about images that it has not adapted to (Eq. 6).

    (N, T) scores, (N,) 0 or 1, T times (N,) bool -> (T,). Its own normals do not count, unseen anomalies
    twice as much as all else.
    """
    errors = []
    for column, support in zip(scores.unbind(1), supports, strict=True):
        counted = ~(support & (anomalous == 0))
        weight = torch.where((anomalous == 1) & ~support, 1.0, 0.5)
        errors.append((weight * (column - anomalous) ** 2)[counted].mean())
    return torch.stack(errors)


def official_errors(scores: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The official code's: means of each query set, summed and divided once more by the number of images.

    Q times (N_q, T) scores, Q times (N_q,) labels -> (T,). Half weight for normal and pseudo anomalies.
    """
    total = torch.zeros(scores[0].shape[1])
    for kind, weight in enumerate((0.5, 1.0, 0.5)):  # NORMAL, SEEN, PSEUDO
        squares = [
            (part[rows == kind] - float(kind > 0)).square() for part, rows in zip(scores, labels, strict=True)
        ]
        count = sum(len(part) for part in squares)
        if count:
            total += weight * torch.stack([part.mean(0) for part in squares if len(part)]).sum(0) / count
    return total


def importance_weights(errors: Tensor) -> Tensor:
    """(T,) -> (T,), sum 1 (Eq. 7)."""
    return torch.softmax(-errors, 0)
