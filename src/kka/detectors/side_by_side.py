"""Several models of one kind as one model: each has a group of the channels of every layer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kka.journal import Stateful


class GroupedLinear(nn.Module):
    """Linear maps without bias, one per group of inputs: (B, G n_in) -> (B, G n_out)."""

    def __init__(self, groups: int, weight: Tensor) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.unflatten(1, (self.groups, -1)).transpose(0, 1)  # (G, B, n_in)
        maps = self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (G, n_in, n_out)
        return torch.bmm(inputs, maps).transpose(0, 1).flatten(1)


def side_by_side(models: Sequence[nn.Module]) -> Any:
    """One model with the layers of all, their tensors joined along the first axis: (B, N C, ...) -> (B, N D).

    For layers without bias whose order of channels nothing changes, as in a LeNet. BatchNorm treats every
    channel by itself, in its statistics too.
    """
    joined, n = copy.deepcopy(models[0]), len(models)
    for name, layer in list(joined.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.groups = n
        elif isinstance(layer, nn.Linear):
            joined.set_submodule(name, GroupedLinear(n, layer.weight.detach()))
    states = [model.state_dict() for model in models]
    for name, value in map_tensors(lambda *parts: torch.cat(parts), *states).items():
        owner, _, key = name.rpartition(".")
        layer = joined.get_submodule(owner)
        is_weight = isinstance(getattr(layer, key), nn.Parameter)
        setattr(layer, key, nn.Parameter(value) if is_weight else value.clone())
    return joined.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Share:
    """What belongs to the k-th of N models side by side, as the state of a model or optimizer alone."""

    def __init__(self, whole: Stateful, k: int, n: int) -> None:
        self.whole, self.k, self.n = whole, k, n

    def state_dict(self) -> dict[str, Any]:
        return map_tensors(lambda value: value.chunk(self.n)[self.k].clone(), self.whole.state_dict())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set its part; the first one fills the whole, since an optimizer has no tensors before a step."""
        if self.k == 0:
            self.whole.load_state_dict(map_tensors(lambda value: torch.cat([value] * self.n), state))
        else:
            map_tensors(
                lambda value, own: value.chunk(self.n)[self.k].copy_(own), self.whole.state_dict(), state
            )


def map_tensors(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """`function` of the tensors at the same place of nested dicts; counters and all else are the first's."""
    if isinstance(first, Mapping):
        return {
            key: map_tensors(function, value, *(other[key] for other in others))
            for key, value in first.items()
        }
    return function(first, *others) if isinstance(first, Tensor) and first.dim() else first
