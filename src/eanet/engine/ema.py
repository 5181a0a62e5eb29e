"""The exponential moving average of the weights of networks."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Averages of the trainable parameters, updated once after each training step.

    average <- d average + (1 - d) weight, with d = min(decay, (1 + t) / (10 + t)) for the update
    t = 0, 1, ... where a ramp is asked for, so that the average of a short run is not dominated by
    the initial weights.

    Buffers (running statistics, integer counters) and frozen parameters are not averaged: the
    averaged network has those of the trained one. Averages of running statistics lag behind the
    averaged weights, and an average of a counter is not a count.

    Args:
        networks: by name.
        decay: d, within (0, 1).
        ramp: whether d starts low.

    Raises:
        ValueError: the decay is outside (0, 1).
    """

    def __init__(self, networks: Mapping[str, nn.Module], *, decay: float, ramp: bool) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must be within (0, 1), got {decay}")
        self.decay = decay
        self.ramp = ramp
        self._live = {
            name: {key: p for key, p in network.named_parameters() if p.requires_grad}
            for name, network in networks.items()
        }
        #: averages by network and parameter name
        self.weights: dict[str, dict[str, Tensor]] = {
            name: {key: parameter.detach().clone() for key, parameter in parameters.items()}
            for name, parameters in self._live.items()
        }

    def decay_at(self, step: int) -> float:
        """Return d for the update after a step (from 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights as they are after a step (from 0)."""
        weight = 1.0 - self.decay_at(step)
        for name, parameters in self._live.items():
            if not parameters:
                continue
            averages = list(self.weights[name].values())
            torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], weight)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

    @contextmanager
    def applied(self) -> Generator[None]:
        """Let the networks hold the averages, and restore their weights bit by bit afterwards.

        The values are copied, not the tensors exchanged, since wrappers that shard or compile a
        network hold on to its tensors.
        """
        kept = {
            name: {key: parameter.detach().clone() for key, parameter in parameters.items()}
            for name, parameters in self._live.items()
        }
        self._copy_in(self.weights)
        try:
            yield
        finally:
            self._copy_in(kept)

    @torch.no_grad()
    def _copy_in(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameters in self._live.items():
            for key, parameter in parameters.items():
                parameter.copy_(weights[name][key])
