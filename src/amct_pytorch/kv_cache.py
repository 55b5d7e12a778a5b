"""int8 KV caches for transformers models, to see their memory and their cost before deploying.

With rotary embeddings a transformers cache holds keys after rotation; factors made on the output
of ``k_proj`` describe them before it. So there are two ways, and each refuses the other's record:

- `CalibratingCache` observes what the cache holds, `QuantizedCache` stores that as int8.
- `quantized_projections` shows what an engine that stores keys before rotation would answer, from
  a record of `create_quant_cali_model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, ModelError, RecordError
from amct_pytorch.files import PathLike
from amct_pytorch.formats import INT8
from amct_pytorch.nn.module.quantization.quant_calibration_op import QuantCalibrationOp
from amct_pytorch.record.kv_cache import KvFactors, read_kv_factors

try:
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError as error:
    raise ImportError(
        "amct_pytorch.kv_cache needs transformers 5 or newer: pip install transformers"
    ) from error


def key_name(layer: int) -> str:
    """The name in records of the keys that a cache holds for a decoder layer."""
    return f"cache.layers.{layer}.keys"


def value_name(layer: int) -> str:
    """The name in records of the values that a cache holds for a decoder layer."""
    return f"cache.layers.{layer}.values"


class CalibratingCache(Cache):
    """A cache that lets an operator observe what is put into it.

    Use a new one, with the same operator, for each batch; after the operator's `batch_num`
    updates of a layer, that layer's factors are in the operator's record. An update is a forward
    pass: in ``generate`` the prompt is one, and each further token another.

    Args:
        config: the model's config.
        operator: observes keys and values [batch, tokens, heads * dim], under `key_name` and
            `value_name`.
        attention_mask: [batch, tokens], 0 where a token is padding; None: no padding. The mask
            that the model's forward is given does not reach its cache.

    Raises:
        ArgumentTypeError: `config` or `operator` is something else.
        ModelError: the model does not have full attention in every layer.
    """

    def __init__(
        self, config: Any, operator: QuantCalibrationOp, attention_mask: Tensor | None = None
    ) -> None:
        if not isinstance(operator, QuantCalibrationOp):
            raise ArgumentTypeError(
                f"operator is of type {type(operator).__name__}; allowed is QuantCalibrationOp"
            )
        number = _number_of_layers(config)
        layers = [_CalibratingLayer(i, operator, attention_mask) for i in range(number)]
        super().__init__(layers=layers)


class QuantizedCache(Cache):
    """A cache that stores keys and values as int8 and gives them back in the model's dtype.

    Memory: one byte a value, and the factors, once for all sequences.

    Args:
        config: the model's config.
        record_file: record that `CalibratingCache` filled.

    Raises:
        ModelError: the model does not have full attention in every layer.
        RecordError: factors of a layer are missing; the record may be of projections, before
            rotation.
        FileMissingError, FileAccessError: the record cannot be read.
    """

    def __init__(self, config: Any, record_file: PathLike) -> None:
        number = _number_of_layers(config)
        factors = read_kv_factors(record_file)
        missing = [
            n for i in range(number) for n in (key_name(i), value_name(i)) if n not in factors
        ]
        if missing:
            hint = ""
            if factors and not any(name.startswith("cache.layers.") for name in factors):
                hint = (
                    "; it has factors of modules, which describe keys before rotation (see "
                    "quantized_projections)"
                )
            raise RecordError(
                f"{record_file}: no KV-cache factors for {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}{hint}; fill the "
                "record with CalibratingCache"
            )
        layers = [
            _QuantizedLayer(i, factors[key_name(i)], factors[value_name(i)]) for i in range(number)
        ]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes of all that is stored: int8 values, scales and offsets."""
        return sum(layer.nbytes() for layer in self.layers)


@contextlib.contextmanager
def quantized_projections(model: nn.Module, record_file: PathLike) -> Iterator[nn.Module]:
    """Quantizes and dequantizes the outputs of the layers a record names, while in the block.

    That is what attention sees where the engine caches these outputs as int8 and rotates keys
    when it reads them.

    Args:
        model: hooks are put on it and taken off again.
        record_file: record that a model of `create_quant_cali_model` filled.

    Raises:
        RecordError: the record names what is no module of the model, or nothing.
        FileMissingError, FileAccessError: the record cannot be read.
    """
    factors = read_kv_factors(record_file)
    modules = dict(model.named_modules())
    unknown = [name for name in factors if name not in modules]
    if unknown or not factors:
        found = f"{unknown[0]} is no module of the model" if unknown else "it has none"
        raise RecordError(
            f"{record_file}: KV-cache factors must be those of modules, made by "
            f"create_quant_cali_model; {found}"
        )
    handles = []
    try:
        for name, found_factors in factors.items():
            handles.append(modules[name].register_forward_hook(_Rounding(name, found_factors)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Rounding:
    """A hook that gives a layer's output back as int8 would hold it."""

    def __init__(self, name: str, factors: KvFactors) -> None:
        self._name, self._factors = name, factors

    def __call__(self, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
        _check_channels(self._name, self._factors, y.shape[-1])
        scale = torch.tensor(self._factors.scale, device=y.device)
        offset = torch.tensor(self._factors.offset, device=y.device)
        return INT8.fake_quantize(y.float(), scale, offset).to(y.dtype)


def _check_channels(name: str, factors: KvFactors, channels: int) -> None:
    if len(factors.scale) not in (1, channels):
        raise RecordError(
            f"{name}: the record has {len(factors.scale)} scales; allowed: 1 or {channels}, the "
            "channels of the tensor"
        )


def _number_of_layers(config: Any) -> int:
    if not hasattr(config, "get_text_config"):
        raise ArgumentTypeError(
            f"config is of type {type(config).__name__}; allowed is that of a model, model.config"
        )
    decoder = config.get_text_config(decoder=True)
    kinds = set(getattr(decoder, "layer_types", None) or ())
    if getattr(decoder, "sliding_window", None) is not None and not kinds:
        kinds = {"sliding_attention"}
    other = sorted(kinds - {"full_attention"})
    if other:
        raise ModelError(
            f"the model has layers of type {', '.join(other)}; int8 caches are for "
            "full_attention only"
        )
    return int(decoder.num_hidden_layers)


class _CalibratingLayer(DynamicLayer):
    """Keeps what it is given, and shows it to the operator."""

    def __init__(self, layer: int, operator: QuantCalibrationOp, mask: Tensor | None) -> None:
        super().__init__()
        self._layer, self._operator, self._mask = layer, operator, mask

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        mask = self._mask
        if mask is not None:
            start = self.get_seq_length()
            mask = mask[:, start : start + key_states.shape[-2]].to(key_states.device)
        self._operator(key_name(self._layer), _joined(key_states), mask)
        self._operator(value_name(self._layer), _joined(value_states), mask)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


class _QuantizedLayer(DynamicLayer):
    """Keeps int8; `keys` and `values` [batch, heads, tokens, dim] are the integers."""

    def __init__(self, layer: int, keys: KvFactors, values: KvFactors) -> None:
        super().__init__()
        self._layer = layer
        self._given = (keys, values)
        self._factors: list[tuple[Tensor, Tensor]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As in the base class."""
        self.dtype, self.device = key_states.dtype, key_states.device
        names = (key_name(self._layer), value_name(self._layer))
        states = (key_states, value_states)
        self._factors = [
            _broadcast(name, factors, x)
            for name, factors, x in zip(names, self._given, states, strict=True)
        ]
        self.keys, self.values = (x.new_empty(_empty(x), dtype=torch.int8) for x in states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in the base class; what is returned went through int8, the new tokens too."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._factors
        self.keys = torch.cat([self.keys, _encoded(key_states, keys)], dim=-2)
        self.values = torch.cat([self.values, _encoded(value_states, values)], dim=-2)
        return self._decoded(self.keys, keys), self._decoded(self.values, values)

    def nbytes(self) -> int:
        """Bytes of integers, scales and offsets."""
        if not self.is_initialized:
            return 0
        tensors = [self.keys, self.values, *(t for pair in self._factors for t in pair)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _decoded(self, codes: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        scale, offset = factors
        return codes.float().sub_(offset).mul_(scale).to(self.dtype)


def _joined(states: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] as [batch, tokens, heads * dim]."""
    return states.transpose(1, 2).flatten(2)


def _empty(states: Tensor) -> tuple[int, ...]:
    return (*states.shape[:2], 0, states.shape[3])


def _broadcast(name: str, factors: KvFactors, states: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, float32 [heads, 1, dim] or [1]."""
    heads, dim = states.shape[1], states.shape[3]
    _check_channels(name, factors, heads * dim)
    shape = (1,) if len(factors.scale) == 1 else (heads, 1, dim)
    scale = torch.tensor(factors.scale, device=states.device).view(shape)
    # As floats: integers would be converted at every step.
    offset = torch.tensor(factors.offset, device=states.device, dtype=torch.float32).view(shape)
    return scale, offset


def _encoded(states: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    return INT8.quantize(states.float(), *factors).to(torch.int8)
