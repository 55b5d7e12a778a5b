"""Small networks, one for each way in which the input of a linear layer can be made."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

WIDTH = 16


def linear(inputs=WIDTH, outputs=WIDTH, bias=True):
    return nn.Linear(inputs, outputs, bias=bias)


class OwnNorm(nn.Module):
    """A norm written out, as transformers has it; `bias` adds one."""

    def __init__(self, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.rand(WIDTH)) if bias else None

    def forward(self, x):
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return y if self.bias is None else y + self.bias


class Readers(nn.Module):
    """A norm read by two layers."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.a, self.b = norm, linear(), linear()

    def forward(self, x):
        y = self.norm(x)
        return self.a(y) * self.b(y)


class Attention(nn.Module):
    """Heads of 4; key and value heads shared by `share` query heads, in the way of `repeat`."""

    def __init__(self, share=1, repeat="expand", eager=False, fused=False):
        super().__init__()
        self.share, self.repeat, self.eager = share, repeat, eager
        narrow = WIDTH // share
        self.q = linear()
        self.kv = linear(outputs=2 * narrow) if fused else None
        self.k, self.v = (None, None) if fused else (linear(outputs=narrow), linear(outputs=narrow))
        self.o = linear()

    def forward(self, x):
        b, t, _ = x.shape
        k, v = self.kv(x).chunk(2, -1) if self.kv else (self.k(x), self.v(x))
        q, k, v = (y.view(b, t, -1, 4).transpose(1, 2) for y in (self.q(x), k, v))
        gqa = {"enable_gqa": True} if self.repeat == "sdpa" else {}
        if self.share > 1 and self.repeat == "expand":
            k, v = (
                y[:, :, None].expand(b, y.shape[1], self.share, t, 4).reshape(b, -1, t, 4)
                for y in (k, v)
            )
        elif self.repeat == "interleave":
            k, v = (y.repeat_interleave(self.share, dim=1) for y in (k, v))
        if self.eager:
            scores = torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 2, -1)
            y = torch.matmul(scores, v)
        else:
            y = scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
        return self.o(y.transpose(1, 2).contiguous().reshape(b, t, -1))


class Gated(nn.Module):
    """A gated feed-forward layer, gate and up in one product or in two."""

    def __init__(self, fused=False):
        super().__init__()
        self.both = linear(outputs=2 * WIDTH) if fused else None
        self.gate, self.up = (None, None) if fused else (linear(), linear())
        self.down = linear()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1) if self.both else (self.gate(x), self.up(x))
        return self.down(silu(gate) * up)


class Residual(Readers):
    """The norm's output goes on beside the layers, as in models with norms behind the sum."""

    def forward(self, x):
        y = self.norm(x)
        return y + self.a(y)


class Returned(Readers):
    """The norm's output is an output of the model."""

    def forward(self, x):
        y = self.norm(x)
        return self.a(y), y


class Looked(Readers):
    """Python looks at the norm's output."""

    def forward(self, x):
        y = self.norm(x)
        return self.a(y) if y.sum().item() > -1e9 and y.tolist() else y


class NormTwice(Readers):
    """One norm in two places."""

    def forward(self, x):
        return self.a(self.norm(x)) + self.b(self.norm(2 * x))


class LayerTwice(Readers):
    """One layer in two places."""

    def forward(self, x):
        return self.a(self.norm(x)) + self.a(x)


class Mixed(nn.Module):
    """A product over channels between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x):
        y = self.first(x)
        return self.second(torch.matmul(torch.softmax(x, -1), y.transpose(1, 2)).repeat(1, 1, 2))


class Changing(nn.Module):
    """Goes another way in every other pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.passes = OwnNorm(), linear(), 0

    def forward(self, x):
        self.passes += 1
        return self.a(self.norm(x)) if self.passes % 2 else self.a(torch.tanh(x))


def chain(between):
    return nn.Sequential(linear(), between, linear())
