"""A small network of blocks whose layers remember what they were calibrated on."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import amct_pytorch as amct
from amct_pytorch.low_bit.gptq import GptqLinear
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import MinMaxLinear


class Remembering(LinearQuantizeModule):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.inputs, self.references = [], []

    def observe(self, x):
        self.inputs.append(x.clone())
        self.references.append(getattr(self, "reference", None))
        super().observe(x)


class GptqLayer(Remembering, GptqLinear):
    pass


class MinMaxLayer(Remembering, MinMaxLinear):
    pass


class Block(nn.Module):
    """Two layers on one input, and one behind them; wants a shift from the model."""

    def __init__(self, width, returns_tuple):
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.returns_tuple = returns_tuple

    def forward(self, x, shift):
        y = F.layer_norm(x, x.shape[-1:]) + shift
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return (x, None) if self.returns_tuple else x


class Network(nn.Module):
    def __init__(self, width=12, depth=3, returns_tuple=False):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, returns_tuple) for _ in range(depth))
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, x, attention_mask=None):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x, shift=0.1 * number)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def network(layer, batch_num, skip=("first",), seed=0, **options):
    """The float network, and one under calibration with layers of that class."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = Network(**options)
    changed = copy.deepcopy(plain)
    amct.algorithm_register(layer.__name__, "Linear", layer)
    config = {
        "batch_num": batch_num,
        "quant_cfg": {"weights": {"type": "int4", "strategy": "channel"}},
        "algorithm": layer.__name__,
        "skip_layers": skip,
    }
    amct.quantize(changed, config)
    return plain, changed


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Remembering)}


def seen_inputs(model, batches, names):
    """What each named layer gets when the batches run through the model, joined."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in seen.items()}
