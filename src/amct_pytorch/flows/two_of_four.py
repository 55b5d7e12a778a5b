"""2:4 sparsity of a model: its layers made sparse, put back from a record, and its ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.two_of_four import two_of_four_mask, why_dense
from amct_pytorch.config.prune_cfg import KINDS, TWO_OF_FOUR, PruneConfig, TwoOfFourPlan
from amct_pytorch.errors import ConfigError, RecordError
from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer
from amct_pytorch.graph.look import ModelGraph, copy_model
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger
from amct_pytorch.nn.instrument import call_operands, check_finite
from amct_pytorch.nn.sparse import make_sparse, sparse_layers
from amct_pytorch.record.selective import SelectiveNode
from amct_pytorch.report.sparsity import SparsityEntry, SparsityLedger

# Attribute of a sparse model: why layers stayed dense, by name. Copies and pickles keep it.
LEFT = "amct_left_dense"
NO_SPEED = (
    "2:4 is faster only where the runtime has kernels for it (Ascend, NVIDIA tensor cores); "
    "elsewhere the zeros are multiplied like any other weight"
)


@dataclass(frozen=True)
class SparsePlan:
    """What becomes of each layer.

    Attributes:
        layers: to make sparse, by name in module order.
        left: why each other layer of a type that can be sparse stays dense.
    """

    layers: dict[str, TwoOfFourPlan]
    left: dict[str, str]

    @classmethod
    def of(cls, config: PruneConfig, graph: ModelGraph, place: str) -> SparsePlan:
        """The plan that a config of this kind is for a model.

        Raises:
            ConfigError: no layer is left to make sparse.
        """
        assert config.kind == TWO_OF_FOUR
        shapes = {layer.name: layer for layer in graph.layers}
        layers: dict[str, TwoOfFourPlan] = {}
        left = dict(config.left)
        for name, plan in config.plans.items():
            assert isinstance(plan, TwoOfFourPlan)
            seen = shapes[name]
            layout = LAYER_KINDS[seen.kind].layout(seen.groups)
            reason = why_dense(seen.weight_shape, layout)
            if reason is None:
                layers[name] = plan
            else:
                left[name] = reason
        if not layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            raise ConfigError(
                f"{place}: no layer of the model can be 2:4 sparse; "
                + (why or "it has no Conv2d, ConvTranspose2d or Linear")
            )
        return cls(layers, left)

    def tell(self) -> None:
        """Logs what stays dense."""
        for name, reason in self.left.items():
            logger.warning("%s stays dense: %s", name, reason)


def make_model_sparse(
    model: nn.Module,
    graph: ModelGraph,
    inputs: ModelInputs,
    plan: SparsePlan,
    recorded: Mapping[str, SelectiveNode] | None = None,
) -> nn.Module:
    """A copy of a model, in its own modes, with the layers of a plan made 2:4 sparse.

    Args:
        model: the model that was looked at; left untouched.
        graph: what the look found.
        inputs: arguments to run it on, where a layer computes its weight in its forward.
        plan: which layers, and how.
        recorded: masks of a record, which count in place of the weights'.

    Raises:
        ModelError: a weight holds NaN or infinity, or the model cannot be copied or run.
    """
    copied = copy_model(model)
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        module.training = original.training
    layers = [layer for layer in graph.layers if layer.name in plan.layers]
    operands = call_operands(copied, model, graph, inputs, layers)
    for layer in layers:
        weight, bias = operands[layer.name]
        check_finite(layer.name, weight, bias)
        kind = LAYER_KINDS[layer.kind]
        held = recorded[layer.name].mask if recorded else None
        if held is None:
            held = two_of_four_mask(weight.detach(), kind.layout(layer.groups))
        mask = held.to(weight.device)
        make_sparse(
            copied.get_submodule(layer.name), kind, mask, plan.layers[layer.name].update_freq
        )
    setattr(copied, LEFT, dict(plan.left))
    return copied


def check_same_layers(
    plan: SparsePlan, recorded: Mapping[str, SelectiveNode], record: str, cfg: str
) -> None:
    """Finds the first layer that is sparse by the record or by the config only.

    Raises:
        RecordError: naming it.
    """
    for name in plan.layers:
        if name not in recorded:
            raise RecordError(
                f"{record}: {name} is dense here, but {cfg} makes it sparse; give the config "
                "that the record was made with"
            )
    for name in recorded:
        if name not in plan.layers:
            reason = plan.left.get(name, "it does not name it")
            raise RecordError(
                f"{record}: {name} is sparse here, but {cfg} leaves it dense: {reason}; give the "
                "config that the record was made with"
            )


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each sparse layer, by name in module order."""
    return {name: layer.sparse_mask for name, layer in sparse_layers(model).items()}


def sparsity_ledger(model: nn.Module, layers: tuple[SeenLayer, ...]) -> SparsityLedger:
    """What became of each layer of a sparse model.

    Args:
        model: what `make_model_sparse` returned, trained or not.
        layers: what a look at it found.
    """
    sparse, left = sparse_layers(model), getattr(model, LEFT, {})
    entries = []
    for layer in layers:
        if not layer.weight_shape:
            continue
        number = math.prod(layer.weight_shape)
        entry = SparsityEntry(layer.name, layer.kind, "dense", weights=number, kept=number)
        if layer.name in sparse:
            module = sparse[layer.name]
            mask, weight = module.sparse_mask, module.weight
            assert isinstance(weight, Tensor)
            entry.status, entry.kept = "2:4", int(mask.sum())
            entry.update_freq, entry.batches = module.update_freq, module.sparse_batches
            if weight.shape == mask.shape:
                entry.magnitude_kept = _magnitude_kept(weight.detach(), mask)
        else:
            other = None if layer.kind in KINDS[TWO_OF_FOUR] else f"2:4 is not for {layer.kind}"
            entry.reason = left.get(layer.name, other or "the model was given without it sparse")
        entries.append(entry)
    ledger = SparsityLedger(entries, notes=[NO_SPEED])
    ledger.add_up()
    return ledger


def _magnitude_kept(weight: Tensor, mask: Tensor) -> float | None:
    sizes = weight.abs().to(torch.float32)
    whole = float(sizes.sum())
    return float((sizes * mask).sum()) / whole if whole > 0 else None


def prunable(graph: ModelGraph) -> list[SeenLayer]:
    """The layers with weights, with the reason why they cannot be pruned as theirs.

    What only quantization cannot do (a padding mode, say) is no reason.
    """
    return [
        replace(layer, reason=layer.unreachable) if LAYER_KINDS[layer.kind].weighted else layer
        for layer in graph.layers
    ]
