"""The deploy module of linear layers: weights stored in few bits, and a forward that runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amct_pytorch.errors import ArgumentValueError, did_you_mean
from amct_pytorch.formats import (
    FORMATS,
    Granularity,
    IntFormat,
    MicroscalingFormat,
    NumberFormat,
)
from amct_pytorch.formats.e8m0 import decode_scale, encode_scale
from amct_pytorch.low_bit.kernels import KERNELS, LARGEST_INT32, LARGEST_PRODUCT, Kernel
from amct_pytorch.low_bit.reference import reference_linear
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor

if TYPE_CHECKING:
    from amct_pytorch.low_bit.linear import LinearQuantizeModule

BACKENDS = ("auto", "reference")
# Buffers that must stay as they are when the model is cast to another floating dtype.
_FACTORS = ("scale", "divisor", "input_scale")


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        type: name of the number format.
        strategy: kind of granularity.
        group_size: of strategy group; None otherwise.
        symmetric: without offsets.
        dynamic: scales are computed from the data at hand.
    """

    type: str
    strategy: str
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False

    @property
    def format(self) -> NumberFormat:
        """The number format."""
        return FORMATS[self.type]

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return Granularity(self.strategy, self.group_size)  # type: ignore[arg-type]

    def __str__(self) -> str:
        by = self.strategy if self.group_size is None else f"group of {self.group_size}"
        return f"{self.type} by {by}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True)
class LinearSpec:
    """Everything about a `LowBitLinear` but the contents of its buffers.

    Attributes:
        in_features: K.
        out_features: N.
        weight: how the weight is quantized.
        inputs: how inputs are quantized; None: not.
        divisor: whether inputs are divided by a factor per input channel first.
        bias: torch dtype of the bias, such as ``float32``; None: there is none.
        dtype: torch dtype of the float layer.
    """

    in_features: int
    out_features: int
    weight: TensorSpec
    inputs: TensorSpec | None = None
    divisor: bool = False
    bias: str | None = None
    dtype: str = "float32"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LinearSpec:
        """The inverse of `as_dict`."""
        inputs = raw["inputs"]
        blocks = {
            "weight": TensorSpec(**raw["weight"]),
            "inputs": None if inputs is None else TensorSpec(**inputs),
        }
        return cls(**{**raw, **blocks})

    @property
    def sums_integers(self) -> bool:
        """Whether a product is a sum of integers times one factor per token and channel."""
        return (
            self.inputs is not None
            and isinstance(self.inputs.format, IntFormat)
            and isinstance(self.weight.format, IntFormat)
            and self.weight.strategy != "group"
        )


class LowBitLinear(nn.Module):
    """A linear layer whose weight is stored in few bits.

    ======================= ======================== ==========================================
    buffer                  dtype                    shape and meaning
    ======================= ======================== ==========================================
    ``packed``              int8 or uint8            [N, K], or [N, ceil(K / 2)] for four bits:
                                                     the codes; 8-bit floats as raw bytes
    ``scale``               float32; uint8 for mx    of the granularity, see `Granularity`
    ``offset``              int8                     the same shape; asymmetric only
    ``divisor``             float32                  [K]; what inputs are divided by
    ``input_scale``         float32                  [1]; static inputs only
    ``input_offset``        int32                    [1]; static asymmetric inputs only
    ``bias``                as the model, or int32   [N]; int32, in units of input_scale * scale,
                                                     where products are sums of integers
                                                     and input scales are static
    ======================= ======================== ==========================================

    What `forward` computes is defined by `reference.reference_linear`. With `backend` "auto" a
    kernel of torch is used where there is one for the device, the formats and the shape; each
    says in `kernels` how far it may be from the reference. A kernel may keep `packed` in an order
    of its own; `state_dict` always has the order of the table. Gradients flow to the
    input, through the reference; there are none for the weight.

    Attributes:
        spec: formats, granularities and sizes.
        backend: ``auto`` or ``reference``; can be set at any time.
        notes: what could not be done as asked.
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor | None
    divisor: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None
    kernel_factors: Tensor | None
    notes: list[str]

    def __init__(self, quant_module: LinearQuantizeModule) -> None:
        solved = quant_module.deploy
        assert isinstance(solved, LowBitLinear)
        self._fill(solved.spec, dict(solved.named_buffers()))
        self.notes = solved.notes

    @classmethod
    def of(cls, solution: LinearSolution, bias: Tensor | None, dtype: torch.dtype) -> LowBitLinear:
        """The deploy module of a solution.

        Args:
            solution: what an algorithm found.
            bias: of the float layer, [N], or None.
            dtype: of the float layer's weight.

        Raises:
            ArgumentValueError: an offset is outside the range of its format.
        """
        weight, inputs = solution.weight, solution.inputs
        solution.check_offsets()
        rows, columns = weight.codes.shape
        spec = LinearSpec(
            columns,
            rows,
            _spec_of(weight.fmt, weight.granularity, weight.offset is None),
            None
            if inputs is None
            else _spec_of(inputs.fmt, inputs.granularity, inputs.offset is None, inputs.dynamic),
            solution.divisor is not None,
            None if bias is None else _name_of(dtype),
            _name_of(dtype),
        )
        packed = weight.fmt.pack(weight.codes)
        if packed.is_floating_point():
            packed = packed.view(torch.uint8)
        of_mx = isinstance(weight.fmt, MicroscalingFormat)
        buffers = {
            "packed": packed,
            "scale": encode_scale(weight.scale) if of_mx else weight.scale.float(),
            "offset": None if weight.offset is None else weight.offset.to(torch.int8),
            "divisor": solution.divisor,
            "input_scale": None if inputs is None else inputs.scale,
            "input_offset": None if inputs is None else inputs.offset,
            "bias": None if bias is None else bias.detach().to(dtype),
        }
        notes: list[str] = []
        if bias is not None and spec.sums_integers and inputs is not None and not inputs.dynamic:
            assert inputs.scale is not None
            units = (
                bias.detach().double() / (weight.scale.double().view(-1) * inputs.scale)
            ).round()
            room = LARGEST_INT32 - columns * LARGEST_PRODUCT
            # Sums that int32 may not hold are made in float64.
            if bool(units.abs().max() > (room if room >= 0 else LARGEST_INT32)):
                notes.append("sums with the bias may be beyond int32; the bias stays float")
            else:
                buffers["bias"] = units.to(torch.int32)
                spec = dataclasses.replace(spec, bias="int32")
        layer = cls.__new__(cls)
        own = {n: None if b is None else _own_copy(b) for n, b in buffers.items()}
        layer._fill(spec, own)
        layer.notes = notes
        return layer

    @classmethod
    def from_spec(cls, spec: LinearSpec) -> LowBitLinear:
        """A module of that structure with buffers of zeros, to load a state dict into."""
        rows, columns = spec.out_features, spec.in_features
        fmt = spec.weight.format
        factors = spec.weight.granularity.scales_shape((rows, columns))
        of_mx = isinstance(fmt, MicroscalingFormat)
        static = spec.inputs is not None and not spec.inputs.dynamic
        raw = torch.uint8 if fmt.bits <= 4 or fmt.code_dtype.is_floating_point else fmt.code_dtype
        layer = cls.__new__(cls)
        layer._fill(
            spec,
            {
                "packed": torch.zeros(rows, -(-columns * fmt.bits // 8), dtype=raw),
                "scale": torch.zeros(factors, dtype=torch.uint8 if of_mx else torch.float32),
                "offset": None if spec.weight.symmetric else torch.zeros(factors, dtype=torch.int8),
                "divisor": torch.zeros(columns) if spec.divisor else None,
                "input_scale": torch.zeros(1) if static else None,
                "input_offset": torch.zeros(1, dtype=torch.int32)
                if static and spec.inputs is not None and not spec.inputs.symmetric
                else None,
                "bias": torch.zeros(rows, dtype=getattr(torch, spec.bias)) if spec.bias else None,
            },
        )
        layer.notes = []
        return layer

    def _fill(self, spec: LinearSpec, buffers: Mapping[str, Tensor | None]) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self._backend = "auto"
        self._kernel: Kernel | None = None
        self._chosen_for: tuple[torch.device, torch.dtype] | None = None
        for name in ("packed", "scale", "offset", "divisor", "input_scale", "input_offset", "bias"):
            self.register_buffer(name, buffers.get(name))
        self.register_buffer("kernel_factors", None, persistent=False)

    @property
    def backend(self) -> str:
        """``auto``: the fastest kernel that fits; ``reference``: plain torch operations."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ArgumentValueError(
                f"backend is {name!r}{did_you_mean(str(name), BACKENDS)}; allowed are "
                f"{', '.join(BACKENDS)}"
            )
        self._release_kernel()
        self._backend = name

    @property
    def kernel(self) -> str:
        """What `forward` was last set up for: a kernel's name, or ``reference``.

        A kernel may leave many tokens at once to the reference; it says so itself.
        """
        return "reference" if self._kernel is None else self._kernel.name

    def codes(self) -> Tensor:
        """The codes of the weight, unpacked, [N, K]."""
        packed = self.packed if self._kernel is None else self._kernel.canonical(self)
        fmt = self.spec.weight.format
        if fmt.code_dtype.is_floating_point:
            return packed.view(fmt.code_dtype)
        return fmt.unpack(packed, self.in_features)

    def quantized_weight(self) -> QuantizedTensor:
        """Codes, scales and offsets of the weight."""
        spec = self.spec.weight
        scale = decode_scale(self.scale) if self.scale.dtype == torch.uint8 else self.scale
        offset = None if self.offset is None else self.offset.int()
        return QuantizedTensor(self.codes(), scale, offset, spec.format, spec.granularity)

    def input_quantizer(self) -> InputQuantizer | None:
        """How inputs are quantized; None: not."""
        spec = self.spec.inputs
        if spec is None:
            return None
        return InputQuantizer(spec.format, spec.granularity, self.input_scale, self.input_offset)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for in the place of the float weight, [N, K], computed anew."""
        weight = self.quantized_weight().dequantize()
        if self.divisor is not None:
            weight = weight / self.divisor
        return weight.to(getattr(torch, self.spec.dtype))

    def float_bias(self) -> Tensor | None:
        """The bias as real numbers, [N]."""
        if self.bias is None or self.bias.is_floating_point():
            return self.bias
        assert self.input_scale is not None
        return self.bias * (self.scale.view(-1) * self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """y = Q_x(x / divisor) · Wᵀ + bias for x [..., K]; y [..., N] has the dtype of x."""
        if (x.device, x.dtype) != self._chosen_for:
            self._choose_kernel(x)
        kernel = self._kernel
        if kernel is None or (x.requires_grad and torch.is_grad_enabled()):
            return reference_linear(self, x)
        return kernel.run(self, x)

    def _choose_kernel(self, x: Tensor) -> None:
        self._release_kernel()
        if self._backend == "auto":
            kernel = next((kernel for kernel in KERNELS if kernel.fits(self, x)), None)
            if kernel is not None:
                kernel.prepare(self)
                self._kernel = kernel
        self._chosen_for = (x.device, x.dtype)

    def _release_kernel(self) -> None:
        """Puts `packed` back into its own order."""
        if self._kernel is not None:
            self.packed = self._kernel.canonical(self)
            self.kernel_factors = None
        self._kernel = self._chosen_for = None

    def stored_bytes(self) -> int:
        """Bytes of everything in the state dict."""
        state = self.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel is not None:
            destination[f"{prefix}packed"] = self._kernel.canonical(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release_kernel()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowBitLinear:
        self._release_kernel()
        before = {name: self._buffers[name] for name in _FACTORS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, formats, granularities, bytes, kernel."""
        inputs = "float"
        if self.spec.inputs is not None:
            inputs = f"{self.spec.inputs}{', dynamic' if self.spec.inputs.dynamic else ''}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.spec.weight}, inputs={inputs}, bias={self.spec.bias}, "
            f"bytes={self.stored_bytes()}, kernel={self.kernel}"
        )


def _own_copy(x: Tensor) -> Tensor:
    """A copy in the order of the axes, whatever the order of the original (kernels need it)."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _spec_of(
    fmt: NumberFormat, granularity: Granularity, symmetric: bool, dynamic: bool = False
) -> TensorSpec:
    return TensorSpec(fmt.name, granularity.kind, granularity.group_size, symmetric, dynamic)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
