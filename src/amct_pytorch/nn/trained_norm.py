"""A BatchNorm that its layer's quantization is trained with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.wrapped import Wrapped


class TrainedNorm(Wrapped):
    """A BatchNorm behind a layer that is trained with its quantization.

    Runs as ever, but for a forward whose layer has computed with the BatchNorm folded in.

    Args:
        norm: the user's module.

    Attributes:
        folded: whether the present forward's layer has.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm, ("batch_norm",))
        self.folded = False

    @property
    def norm(self) -> _BatchNorm:
        """The user's module, or the one that took its place (convert_sync_batchnorm)."""
        inner = self.layer
        assert isinstance(inner, _BatchNorm)
        return inner

    def answer(self, call: LayerCall) -> Tensor:
        """The data operand as it is."""
        return call.x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's forward, without its normalisation where that is folded."""
        if not self.folded:
            return self.layer(*args, **kwargs)
        return super().forward(*args, **kwargs)
