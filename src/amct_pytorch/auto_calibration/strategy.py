"""Which layers go back to float next: the base class of strategies, and the binary search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from amct_pytorch.errors import ArgumentValueError

Ranking = Sequence[tuple[str, float]]


class AutoCalibrationStrategyBase(ABC):
    """Decides from trial to trial what to roll back; subclasses may be given as instances."""

    @abstractmethod
    def initialize(self, ranking_info: Ranking) -> None:
        """Begins a search, after a trial with all layers quantized was not good enough.

        Args:
            ranking_info: layer and sensitivity score, the most sensitive first.
        """

    @abstractmethod
    def update_quant_config(self, metric_eval: tuple[bool, float]) -> tuple[bool, dict[str, bool]]:
        """What to try next.

        Args:
            metric_eval: of the last trial: whether it was good enough, and what was lost.

        Returns:
            Whether to stop, and for each layer whether to quantize it. When stopping, these are
            the flags of the best trial that was good enough; where there was none, all False.
        """


class BinarySearchStrategy(AutoCalibrationStrategyBase):
    """Finds the least number of the most sensitive layers whose roll-back is enough.

    First the worse half goes back to float; then the number is halved towards the smallest
    that passes, in ceil(log2(layers)) trials or one more. That supposes that rolling back more
    layers never makes the model worse; each trial that passed was run, so the result holds even
    where this does not.
    """

    def __init__(self) -> None:
        self._layers: list[str] = []
        # Rolling back `_fails` layers is known not to be enough; `_passes` is.
        self._fails = 0
        self._passes: int | None = None
        self._trial: int | None = None

    def initialize(self, ranking_info: Ranking) -> None:
        """See `AutoCalibrationStrategyBase.initialize`.

        Raises:
            ArgumentValueError: a layer is named twice.
        """
        self._layers = [name for name, _ in ranking_info]
        if len(set(self._layers)) != len(self._layers):
            raise ArgumentValueError("ranking_info names a layer twice")
        self._fails, self._passes, self._trial = 0, None, None

    def update_quant_config(self, metric_eval: tuple[bool, float]) -> tuple[bool, dict[str, bool]]:
        """See `AutoCalibrationStrategyBase.update_quant_config`."""
        if self._trial is not None:
            if metric_eval[0]:
                self._passes = self._trial
            else:
                self._fails = self._trial
        # With all layers in float nothing is left to quantize: that is no trial.
        end = len(self._layers) if self._passes is None else self._passes
        if end - self._fails <= 1:
            return True, self._flags(end)
        self._trial = (self._fails + end) // 2
        return False, self._flags(self._trial)

    def _flags(self, rolled_back: int) -> dict[str, bool]:
        return {name: index >= rolled_back for index, name in enumerate(self._layers)}
