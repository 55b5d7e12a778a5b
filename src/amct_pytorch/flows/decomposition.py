"""Tensor decomposition: auto_decomposition, decompose_network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from amct_pytorch.decomposition.eligibility import conv_layers, left_out, why_not
from amct_pytorch.decomposition.geometry import Geometry, weights_in
from amct_pytorch.decomposition.info_file import describe, dump_info, load_info
from amct_pytorch.decomposition.layer_data import (
    Metric,
    batches_of,
    fit_outputs,
    input_metrics,
)
from amct_pytorch.decomposition.measure import Seen, measure, see_layers
from amct_pytorch.decomposition.modules import build_pieces, put_in_place
from amct_pytorch.decomposition.policy import RankPolicy, check_share
from amct_pytorch.decomposition.solve import solve_layer
from amct_pytorch.errors import ArgumentTypeError
from amct_pytorch.files import PathLike, WholeFiles, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.graph.look import check_model, copy_model
from amct_pytorch.graph.tensors import ModelInputs, random_state_kept
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.report.decomposition import (
    DecompositionEntry,
    DecompositionLedger,
    entry_line,
    ledger_beside,
)

InputData = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Patterns = Iterable[str] | str | None


@public_call
def auto_decomposition(
    model: nn.Module,
    decompose_info_path: PathLike | None = None,
    *,
    rank_policy: str = "vbmf",
    energy: float = 0.9,
    flops_ratio: float = 0.5,
    rank_bounds: bool = True,
    minimum_saving: float = 0.0,
    include: Patterns = None,
    exclude: Patterns = None,
    tucker: bool = False,
    input_data: InputData | None = None,
    calibration_data: Iterable[InputData] | None = None,
) -> tuple[nn.Module, dict[str, list[str]]]:
    """Splits large convolutions into two small ones each, in place.

    Tried are Conv2d with groups 1, dilation 1, stride up to 2, both kernel sides >= 3 and enough
    channels; a layer is split only where that saves both weights and FLOPs. Everything else is
    left as it is, with the reason in the ledger. Fine-tune the model afterwards, with a new
    optimizer: the split layers have new parameters.

    Args:
        model: with its weights, on any device; changed in place. A model that is itself a
            Conv2d stays as it is and its pieces are returned.
        decompose_info_path: JSON file to write for `decompose_network`; the ledger goes beside
            it (``net.json`` and ``net_ledger.json``). None: nothing is written. Nothing
            split: only the ledger is.
        rank_policy: ``vbmf``, ``energy`` or ``flops``; see `RankPolicy`.
        energy: share of each layer's squared weights that ``energy`` keeps, 0 < energy <= 1.
        flops_ratio: share of each layer's FLOPs that ``flops`` allows, 0 < flops_ratio < 1.
        rank_bounds: whether ``vbmf`` stays within its default bounds.
        minimum_saving: share of weights and of FLOPs that a layer must at least save,
            0 <= minimum_saving < 1.
        include: shell patterns of names of layers to try (``features.*``); None: all.
        exclude: patterns of names of layers to leave alone.
        tucker: use the Tucker-2 form (three convolutions) where it costs less than two at no
            more error.
        input_data: as for the model's forward. With it FLOPs are of the real sizes, latency is
            measured, a layer that would get slower is left alone, and so is one that the
            forward uses in an unusual way (twice, or by its weight).
        calibration_data: batches, each as input_data (whose default is then the first of
            them). With it the factors keep the error of each layer's output on these batches
            small, not that of its weight, and the last piece, with its bias, is fitted to that
            output; a model loses far less before fine-tuning. The model runs twice on each.
            Ranks stay as without it.

    Returns:
        The model, and the pieces' names by layer: ``{'conv1': ['conv1.0', 'conv1.1'], …}``.

    Raises:
        AmctError: naming the argument, file or layer; nothing is written or changed then.
    """
    start_logging(to_file=decompose_info_path is not None)
    policy = RankPolicy(rank_policy, energy, flops_ratio, rank_bounds)
    check_share("minimum_saving", minimum_saving, "0 <= minimum_saving < 1", lambda v: 0 <= v < 1)
    if not isinstance(tucker, bool):
        raise ArgumentTypeError(f"tucker is a {type(tucker).__name__}; allowed are True and False")
    check_model(model)
    info_path = _writable(decompose_info_path)
    inputs = None if input_data is None else ModelInputs.of(input_data)
    batches = [] if calibration_data is None else batches_of(calibration_data)
    if inputs is None and batches:
        inputs = batches[0]
    began = time.perf_counter()
    convs = conv_layers(model)
    reasons = left_out(list(convs), include, exclude)
    reasons = why_not(model, convs) | reasons
    seen = {} if inputs is None else see_layers(model, inputs, convs)
    reasons |= {name: s.reason for name, s in seen.items() if s.reason and name not in reasons}
    original = copy_model(model) if batches else model
    tried = {name: conv for name, conv in convs.items() if name not in reasons}
    metrics = input_metrics(original, batches, tried) if batches and tried else {}
    ledger = DecompositionLedger(
        [],
        {"name": rank_policy, "energy": energy, "flops_ratio": flops_ratio, "bounds": rank_bounds},
        "one output position" if inputs is None else "one sample of input_data",
        calibration_batches=len(batches),
    )
    ledger.seconds["look"] = time.perf_counter() - began
    solver = _Solver(policy, minimum_saving, tucker)
    rows: dict[str, nn.Sequential] = {}
    infos = []
    for name, conv in convs.items():
        entry, row = solver.solve(name, conv, reasons.get(name), seen.get(name), metrics.get(name))
        ledger.layers.append(entry)
        if row is not None:
            rows[name] = row
            infos.append(describe(name, conv, entry.mode or "", tuple(entry.shapes)))
    if batches and rows:
        _fit(original, batches, rows, ledger)
    for entry in ledger.layers:
        logger.info(entry_line(entry))
    ledger.add_up()
    ledger.seconds["solve"] = time.perf_counter() - began - ledger.seconds["look"]
    if info_path is not None:
        _write(info_path, dump_info(infos) if infos else None, ledger)
    if not rows:
        logger.warning("nothing was decomposed: %s", _why_nothing(ledger))
    return put_in_place(model, convs, rows)


@public_call
def decompose_network(
    model: nn.Module, decompose_info_path: PathLike
) -> tuple[nn.Module, dict[str, list[str]]]:
    """Gives a fresh model the structure that `auto_decomposition` found, in place.

    The pieces' weights are as torch initialises them; load the saved ones afterwards
    (``model.load_state_dict``).

    Args:
        model: of the same architecture, on any device; changed in place. A model that is itself
            a Conv2d stays as it is and its pieces are returned.
        decompose_info_path: JSON file that `auto_decomposition` wrote.

    Returns:
        The model, and the pieces' names by layer, as `auto_decomposition` returned them.

    Raises:
        AmctError: naming the file, layer and key; the model is as it was then.
    """
    start_logging(to_file=False)
    check_model(model)
    convs = conv_layers(model)
    splits = load_info(decompose_info_path, convs)
    with random_state_kept(model):
        rows = {name: build_pieces(convs[name], splits[name]) for name in convs if name in splits}
    return put_in_place(model, convs, rows)


class _Solver:
    """Solves layers with the options of one call."""

    def __init__(self, policy: RankPolicy, minimum_saving: float, tucker: bool) -> None:
        self._policy = policy
        self._minimum_saving = minimum_saving
        self._tucker = tucker

    def solve(
        self,
        name: str,
        conv: nn.Conv2d,
        reason: str | None,
        seen: Seen | None,
        metric: Metric | None,
    ) -> tuple[DecompositionEntry, nn.Sequential | None]:
        """What becomes of one layer: its ledger entry, and its pieces if it is split."""
        began = time.perf_counter()
        entry = _entry(name, conv, seen)
        entry.reason = reason
        row = None if entry.reason else self._pieces(conv, entry, seen, metric)
        entry.seconds = time.perf_counter() - began
        if row is None:
            return entry, None
        entry.status = "decomposed"
        return entry, row

    def _pieces(
        self,
        conv: nn.Conv2d,
        entry: DecompositionEntry,
        seen: Seen | None,
        metric: Metric | None,
    ) -> nn.Sequential | None:
        """The pieces; None where they do not pay, with the reason in `entry`."""
        geometry = Geometry.of(conv)
        try:
            solution = solve_layer(
                conv.weight,
                geometry,
                self._policy,
                minimum_saving=self._minimum_saving,
                tucker=self._tucker,
                metric=metric,
            )
        except torch.linalg.LinAlgError as error:
            solution = f"its weight could not be factorised: {error}"
        if isinstance(solution, str):
            entry.reason = solution
            return None
        if not all(bool(torch.isfinite(w.to(conv.weight.dtype)).all()) for w in solution.weights):
            entry.reason = f"its factors overflow {conv.weight.dtype}"
            return None
        row = build_pieces(conv, solution.split, solution.weights)
        sizes = seen.sizes if seen else None
        entry.mode, entry.rank, entry.rank_estimate = (
            solution.mode,
            solution.rank,
            solution.estimate,
        )
        entry.rank_estimate_at_least = solution.at_least
        entry.shapes, entry.method = list(solution.split), solution.method
        entry.error, entry.other_error = solution.error, solution.other_error
        after = weights_in(solution.split) + entry.parameters_before - conv.weight.numel()
        flops = 2 * geometry.macs(solution.split, sizes)
        if seen:
            if flops >= entry.flops_before:  # the sizes' rounding can decide on tiny inputs
                entry.reason = "it would not save FLOPs at the sizes of input_data"
                return None
            times = measure(conv, row, seen.input_shape)
            entry.milliseconds_before, entry.milliseconds_after = times
            if times[1] >= times[0]:
                entry.reason = (
                    f"it would get slower here: {times[0]:.3f} ms, {times[1]:.3f} ms in pieces"
                )
                return None
        entry.parameters_after, entry.flops_after = after, flops
        return row


def _fit(
    original: nn.Module,
    batches: list[ModelInputs],
    rows: dict[str, nn.Sequential],
    ledger: DecompositionLedger,
) -> None:
    """Fits the rows to the outputs of their layers, and notes the errors."""
    fits = fit_outputs(original, batches, rows)
    for entry in ledger.layers:
        if entry.name in fits:
            entry.output_error = fits[entry.name].error
            entry.output_error_unfitted = fits[entry.name].error_before
        elif entry.name in rows:
            logger.warning(
                "%s: its outputs on calibration_data hold NaN or infinity, are all zero, or lead "
                "to weights beyond its dtype; its pieces follow its weight alone",
                entry.name or "the model",
            )


def _entry(name: str, conv: nn.Conv2d, seen: Seen | None) -> DecompositionEntry:
    """A layer as it is."""
    geometry = Geometry.of(conv)
    weights = weights_in(geometry.whole) // conv.groups
    parameters = weights + (conv.out_channels if conv.bias is not None else 0)
    shape = seen.input_shape if seen and seen.input_shape else None
    height, width = seen.sizes[1] if seen else (1, 1)
    flops = 2 * weights * height * width
    return DecompositionEntry(
        name=name,
        status="kept",
        reason=None,
        kernel=geometry.kernel,
        stride=geometry.stride,
        parameters_before=parameters,
        parameters_after=parameters,
        flops_before=flops,
        flops_after=flops,
        input_shape=shape,
    )


def _writable(info_path: PathLike | None) -> Path | None:
    if info_path is None:
        return None
    checked = check_writable(info_path, "decompose_info_path")
    check_writable(ledger_beside(checked), "decompose_info_path")
    return checked


def _write(info_path: Path, info: str | None, ledger: DecompositionLedger) -> None:
    what = "decompose_info_path"
    with WholeFiles() as files:
        if info is not None:
            files.write(info_path, info.encode(), what=what)
        elif info_path.exists():
            logger.warning(
                "%s is from an earlier run and was left as it is: it does not describe this model",
                info_path,
            )
        files.write(ledger_beside(info_path), ledger.to_json().encode(), what=what)


def _why_nothing(ledger: DecompositionLedger) -> str:
    if not ledger.layers:
        return "the model has no Conv2d"
    lines = [entry_line(entry) for entry in ledger.layers]
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
