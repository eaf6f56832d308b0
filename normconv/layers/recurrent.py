"""Recurrent layers keep a list of their weights; with computed weights it is made for every call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

__all__ = ["ComputedFlatWeights"]


class ComputedFlatWeights:
    """What `nn.RNN`, `nn.LSTM` and `nn.GRU` read in place of a list that would grow stale.

    cuDNN wants all weights in one piece of memory: computed ones are copied there in every call.
    """

    _flat_weights_names: list[str]
    input_size: int

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """Take what torch caches, and keep nothing of it."""

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        """Do nothing: nothing is cached that could be older than the parameters."""

    def flatten_parameters(self) -> None:
        """Do nothing: computed weights are no parameters that could lie in one piece of memory."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Check shape and dtype of the input as torch does, without computing weights for it."""
        biases_and_v = [p for p in self.__dict__["_parameters"].values() if p is not None]
        view: Any = SimpleNamespace(_flat_weights=biases_and_v, input_size=self.input_size)
        nn.RNNBase.check_input(view, input, batch_sizes)
