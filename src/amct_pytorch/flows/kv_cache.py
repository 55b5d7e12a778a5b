"""KV-cache quantization: create_quant_cali_config, create_quant_cali_model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.config.cfg_file import parse_kv_cache_cfg
from amct_pytorch.config.kv_cache import KvCacheConfig, default_kv_cache_config
from amct_pytorch.config.kv_cache_files import (
    dump_kv_cache_json,
    kv_cache_config_from_cfg,
    load_kv_cache_json,
)
from amct_pytorch.errors import CalibrationError
from amct_pytorch.files import PathLike, check_distinct, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.graph.look import check_model, copy_model
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.observers.kv_cache import KvObserver
from amct_pytorch.record.kv_cache import add_kv_factors, read_kv_factors

MASK = "attention_mask"


@public_call
def create_quant_cali_config(
    config_file: PathLike,
    model: nn.Module,
    quant_layers: Mapping[str, Sequence[str]] | None = None,
    config_defination: PathLike | None = None,
) -> None:
    """Writes the KV-cache calibration config as JSON.

    Args:
        config_file: JSON file to write.
        model: with its Linears, float32, float16 or bfloat16; left untouched.
        quant_layers: ``{'kv_cache_quant_layers': [name, …]}``: the Linears whose outputs are
            cached, by name or by pattern (``*.k_proj``). The key ``kv_cache_quant`` is
            accepted too.
        config_defination: protobuf-text ``.cfg`` (message AMCTQuantCaliConfig), which wins
            over `quant_layers`. Also accepted as `config_definition`.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """
    start_logging(to_file=False)
    check_model(model)
    check_writable(config_file, "config_file")
    if config_defination is None:
        config = default_kv_cache_config(quant_layers, model)
    else:
        check_distinct(config_defination=config_defination, config_file=config_file)
        message = parse_kv_cache_cfg(config_defination)
        config = kv_cache_config_from_cfg(message, model, str(config_defination))
    start_logging(to_file=True)
    write_whole(config_file, dump_kv_cache_json(config).encode(), what="config_file")


@public_call
def create_quant_cali_model(
    config_file: PathLike, record_file: PathLike, model: nn.Module
) -> nn.Module:
    """A copy of the model that calibrates the outputs of the layers its config names.

    Run `batch_num` forward passes on it, of any sequence lengths; it always returns the float
    output. When the last of them has run, the factors are added to the record, one
    `kv_cache_value` a layer; later passes change no file. Where the model's forward is given
    an `attention_mask` [batch, tokens] of zeros and ones, padding is left out.

    Args:
        config_file: JSON written by `create_quant_cali_config`.
        record_file: record to add to; it need not exist.
        model: as given to `create_quant_cali_config`; left untouched.

    Returns:
        The calibration model, in eval mode, on the model's device.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """
    start_logging(to_file=False)
    check_model(model)
    check_distinct(config_file=config_file, record_file=record_file)
    path = check_writable(record_file, "record_file")
    config = load_kv_cache_json(config_file, model)
    if path.exists():
        read_kv_factors(path)  # a record that could not be added to is told now
    copied = copy_model(model)
    start_logging(to_file=True)
    _KvCalibration(copied, config, record_file)
    return copied


class _KvCalibration:
    """Observes layer outputs by hooks, and takes the hooks off after the last batch."""

    def __init__(self, model: nn.Module, config: KvCacheConfig, record_file: PathLike) -> None:
        self._config = config
        self._record_file = record_file
        self._observers = {
            name: KvObserver(name, layer.kv_data_quant_config, asymmetric=config.asymmetric(name))
            for name, layer in config.layers.items()
        }
        self._signature = inspect.signature(model.forward)
        self._mask: Tensor | None = None
        self._batch = 0
        self._in_batch = False
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        for name in self._observers:
            layer = model.get_submodule(name)
            self._handles.append(layer.register_forward_hook(self._observing(name)))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            logger.warning("calibration runs in eval mode; the model was in training mode")
            model.eval()
        if self._in_batch:
            raise CalibrationError(
                "an earlier calibration batch failed half-way, so what it left is incomplete; call "
                "create_quant_cali_model again"
            )
        self._in_batch = True
        given = self._signature.bind_partial(*args, **kwargs).arguments
        mask = given.get(MASK, given.get("kwargs", {}).get(MASK))
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _observing(self, name: str) -> Any:
        def observe(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._observers[name].update(output, self._mask_of(output))

        return observe

    def _mask_of(self, output: Tensor) -> Tensor | None:
        """The mask of the tokens of `output`: the last of those that a cache holds too."""
        mask = self._mask
        if mask is None or output.dim() != 3 or mask.shape[0] != output.shape[0]:
            return None
        if mask.shape[1] < output.shape[1]:
            return None
        return mask[:, mask.shape[1] - output.shape[1] :].to(output.device)

    def _after(self, *_: Any) -> None:
        self._batch += 1
        self._in_batch = False
        self._mask = None
        logger.info("calibration batch %d of %d", self._batch, self._config.batch_num)
        if self._batch < self._config.batch_num:
            return
        # Tensors made under the caller's inference mode are not wanted in the statistics.
        with torch.inference_mode(False), torch.no_grad():
            self._finish()
        for handle in self._handles:
            handle.remove()

    def _finish(self) -> None:
        seen = {name: found for name, found in self._observers.items() if found.seen}
        for name in self._observers:
            if name not in seen:
                logger.warning("layer %r did not run on any batch; it gets no factors", name)
        if not seen:
            raise CalibrationError("no layer that the config names ran on the calibration data")
        add_kv_factors(self._record_file, {name: found.factors() for name, found in seen.items()})
