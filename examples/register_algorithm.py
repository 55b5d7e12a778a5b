"""An algorithm of one's own in `quantize`: int4 ranges that weigh errors by what inputs do.

    python examples/register_algorithm.py

For each output channel the range is narrowed to where sum_j E[x_j^2] (w_j - q_j)^2 is least: the
output's error, if inputs were uncorrelated. Compared with the built-in minmax and gptq on
SmolLM2-135M, int4 by channel.
"""

from __future__ import annotations

import copy
from typing import Any

import language_model
import torch
from torch import Tensor, nn

import amct_pytorch as amct

SHRINKS = torch.linspace(0.4, 1.0, 31)


class WeighedLinear(amct.BaseQuantizeModule):
    """Collects E[x^2] of every input channel, then searches the ranges."""

    def __init__(self, ori_module: nn.Linear, layer_name: str, quant_config: dict[str, Any]):
        super().__init__(ori_module, layer_name, quant_config)
        self.ori_module = ori_module
        self.ori_module_type = type(ori_module).__name__
        self.wts_type = quant_config["quant_cfg"]["weights"]["type"]
        self.energy = torch.zeros(ori_module.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Float while calibrating, then simulated."""
        if self.calibrated:
            weight = self.levels() * self.scale_w
            return nn.functional.linear(x, weight, self.ori_module.bias)
        self.energy += x.detach().flatten(0, -2).square().mean(0)
        if self.in_last_batch:
            self.scale_w = self.searched()
        return self.ori_module(x)

    def levels(self, scale: Tensor | None = None) -> Tensor:
        """The integers, [N, K]."""
        weight = self.ori_module.weight.detach()
        return (weight / (self.scale_w if scale is None else scale)).round().clamp(-8, 7)

    def searched(self) -> Tensor:
        """Scales [N, 1] with the least weighed error."""
        weight = self.ori_module.weight.detach()
        largest = weight.abs().amax(1, keepdim=True) / 7
        errors = torch.stack(
            [
                ((self.levels(largest * s) * largest * s - weight).square() * self.energy).sum(1)
                for s in SHRINKS
            ]
        )
        return largest * SHRINKS[errors.argmin(0)][:, None]


class WeighedDeploy(nn.Module):
    """Two integers a byte."""

    def __init__(self, quant_module: WeighedLinear):
        super().__init__()
        codes = quant_module.levels().to(torch.int8)
        self.register_buffer("packed", (codes[:, ::2] & 15) | (codes[:, 1::2] << 4))
        self.register_buffer("scale", quant_module.scale_w)
        self.bias = quant_module.ori_module.bias

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b, with the codes unpacked for each call."""
        codes = torch.stack([self.packed << 4 >> 4, self.packed >> 4], -1).flatten(1)
        return nn.functional.linear(x, codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def main() -> None:
    """Register, quantize, evaluate."""
    torch.set_num_threads(1)
    amct.algorithm_register("weighed", "Linear", WeighedLinear, WeighedDeploy)
    float_model, tokenizer = language_model.load()
    texts = language_model.articles()
    half = len(texts) // 2
    text = language_model.spread_windows(tokenizer, texts[half:], 8, 256)
    heldout = language_model.windows(tokenizer, texts[:half], 8, 256)
    print(f"float: {language_model.perplexity(float_model, heldout, use_cache=False):.2f}")
    for algorithm in ("minmax", "weighed", "gptq"):
        model = copy.deepcopy(float_model)
        config = {
            "batch_num": len(text),
            "quant_cfg": {"weights": {"type": "int4", "strategy": "channel"}},
            "algorithm": algorithm,
            "skip_layers": "lm_head",
        }
        amct.quantize(model, config)
        with torch.inference_mode():
            for window in text.split(1):
                model(window, use_cache=False)
        amct.convert(model)
        value = language_model.perplexity(model, heldout, use_cache=False)
        print(f"{algorithm}: {value:.2f}", flush=True)


if __name__ == "__main__":
    main()
