"""What every quantize module is: the base class that users' algorithms extend too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel
from torch import Tensor, nn

from amct_pytorch.low_bit.ledger import LayerOutcome


class BaseQuantizeModule(nn.Module):
    """A layer under calibration, in the place of the float layer.

    `quantize` constructs one as ``quant_op(ori_module, layer_name, quant_config)`` for each layer
    of the class that an algorithm was registered for. It returns the float output for
    `batch_num` batches; in the last of them it computes its factors; from then on it returns
    the simulated quantized output. `convert` then constructs ``deploy_op(quant_module)``.

    A complete algorithm, to paste and change::

        import torch
        import amct_pytorch as amct

        class HalvesQuantize(amct.BaseQuantizeModule):
            def __init__(self, ori_module, layer_name, quant_config):
                super().__init__(ori_module, layer_name, quant_config)
                self.ori_module = ori_module
                self.ori_module_type = type(ori_module).__name__
                self.wts_type = quant_config['quant_cfg']['weights']['type']

            def forward(self, x):
                if self.calibrated:  # all batches seen: simulate
                    levels = torch.round(self.ori_module.weight / self.scale_w).clamp(-128, 127)
                    return torch.nn.functional.linear(
                        x, levels * self.scale_w, self.ori_module.bias)
                if self.in_last_batch:  # look at x here to calibrate on it; then solve
                    self.scale_w = self.ori_module.weight.detach().abs().max() / 127
                return self.ori_module(x)

        class HalvesDeploy(torch.nn.Module):
            def __init__(self, quant_module):
                super().__init__()
                ori, scale = quant_module.ori_module, quant_module.scale_w
                levels = torch.round(ori.weight.detach() / scale).clamp(-128, 127)
                self.register_buffer('levels', levels.to(torch.int8))
                self.register_buffer('scale', scale)
                self.bias = ori.bias

            def forward(self, x):
                return torch.nn.functional.linear(
                    x, self.levels.to(x.dtype) * self.scale, self.bias)

        amct.algorithm_register('halves', 'Linear', HalvesQuantize, HalvesDeploy)
        amct.quantize(model, {'batch_num': 1, 'algorithm': 'halves',
                              'quant_cfg': {'weights': {'type': 'int8'}}})
        model(batch)
        amct.convert(model)

    Batches are counted here, one for each call of the module, whatever `forward` does.

    Args:
        ori_module: the float layer.
        layer_name: its dotted module path.
        quant_config: a dict of the shape of the config of `quantize`, for this layer alone:
            ``{'batch_num': 1, 'quant_cfg': {'weights': {...}, 'inputs': {...}},
            'algorithm': {name: {option: value}}}``. ``inputs`` is absent where only weights are
            quantized; defaults are filled in.

    Attributes:
        Options: pydantic model of the algorithm's options; None: any are accepted.
        layer_name: as given.
        batch_num: batches to calibrate on.
        batches_seen: calls so far that have returned.
        outcome: the ledger's entry of this layer.
        ori_module_type: class name of the float layer.
        act_type: number format of the inputs.
        wts_type: number format of the weights.
        scale_w: scales of the weights.
        scale_d: scale of the inputs.
        offset_w: offsets of the weights.
        offset_d: offset of the inputs.
        group_size: weights along the input axis that share a scale.
        scale: factors per input channel that inputs are divided and weights multiplied by.
        clip_max: bounds that weights were clipped to.
            This and the eight before it are None until the algorithm sets them.
    """

    Options: ClassVar[type[BaseModel] | None] = None

    def __init__(
        self,
        ori_module: nn.Module | None = None,
        layer_name: str | None = None,
        quant_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.batch_num = int((quant_config or {}).get("batch_num", 1))
        self.batches_seen = 0
        self.outcome = LayerOutcome(layer_name or "", type(ori_module).__name__)
        self.ori_module_type: str | None = None
        self.act_type: str | None = None
        self.wts_type: str | None = None
        self.scale_w: Tensor | None = None
        self.scale_d: Tensor | None = None
        self.offset_w: Tensor | None = None
        self.offset_d: Tensor | None = None
        self.group_size: int | None = None
        self.scale: Tensor | None = None
        self.clip_max: Tensor | None = None
        self.register_forward_hook(_count)

    @property
    def calibrated(self) -> bool:
        """Whether all batches have been seen."""
        return self.batches_seen >= self.batch_num

    @property
    def in_last_batch(self) -> bool:
        """Within `forward`: whether this is the last batch to calibrate on."""
        return self.batches_seen + 1 == self.batch_num


def _count(module: nn.Module, _inputs: Any, _output: Any) -> None:
    assert isinstance(module, BaseQuantizeModule)
    if not module.calibrated:
        module.batches_seen += 1
