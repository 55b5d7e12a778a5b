"""One block after the other: ranges, training, and what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from amct_pytorch.config.distill import DistillConfig
from amct_pytorch.config.distill_json import distillable
from amct_pytorch.distillation.progress import Progress, state_key
from amct_pytorch.distillation.runs import Memory, Part, Run, begin, tensors_by_name
from amct_pytorch.distillation.train_block import (
    Loss,
    MakeOptimizer,
    Outcome,
    observe,
    train_block,
    trainable,
)
from amct_pytorch.errors import ModelError
from amct_pytorch.graph.look import ModelGraph, copy_model
from amct_pytorch.graph.tensors import ModelInputs, in_own_precision, random_state_kept, tensors_in
from amct_pytorch.logs import logger
from amct_pytorch.memory import release_memory
from amct_pytorch.nn.retrain import RetrainLayer, retrain_layers
from amct_pytorch.observers.statistics import Agreement
from amct_pytorch.report.ledger import BlockEntry

# A run done again is the same arithmetic; a kernel that is chosen by alignment may differ a little.
SAME_DB = 60.0


@dataclass(frozen=True)
class Teaching:
    """How blocks are trained.

    Attributes:
        epochs: passes over all batches.
        loss: of the student's and the teacher's output.
        make_optimizer: of a block's parameters.
        decay: whether its learning rate falls to 0.
        described: all of it in words, by which an interrupted run is known again.
    """

    epochs: int
    loss: Loss
    make_optimizer: MakeOptimizer
    decay: bool
    described: tuple[object, ...]


def teach(
    model: nn.Module,
    student: nn.Module,
    graph: ModelGraph,
    config: DistillConfig,
    batches: Sequence[ModelInputs],
    teaching: Teaching,
    progress_root: Path,
) -> list[BlockEntry]:
    """Distills every group of the config, in the order in which they run.

    Layers in no group get the ranges of their inputs.

    Args:
        model: the teacher; left untouched.
        student: its quantized copy, in eval mode; changed in place.
        graph: what a look at the teacher found.
        config: the groups, and which layers are quantized.
        batches: arguments of the model.
        teaching: how.
        progress_root: folder of finished blocks.

    Raises:
        AmctError: naming the layer or batch; see `runs.begin` and `train_block`.
    """
    teacher = copy_model(model)
    layers = retrain_layers(student)
    parts = _parts(config, graph)
    held = [*teacher.state_dict().values(), *student.state_dict().values()]
    held += [t for inputs in batches for t in tensors_in((inputs.args, inputs.kwargs))]
    progress = Progress(progress_root, state_key(held, config, teaching.described))
    memory = Memory(config.data_dump)
    outcomes: list[BlockEntry] = []
    try:
        with in_own_precision(teacher), random_state_kept(teacher):
            runs = begin(teacher, student, distillable(graph.layers), layers, parts, batches)
            for number, part in enumerate(parts):
                started = time.perf_counter()
                targets = [run.reach(part) for run in runs]
                memory.settle(runs)
                release_memory()
                if not part.trained:
                    with _training(layers, part):
                        _find_ranges(layers, runs, part, config)
                    continue
                block = _StudentBlock(student, layers, runs[0], part)
                kept = progress.load(number, part.layers)
                if kept is not None:
                    student.load_state_dict(kept[0], strict=False)
                    outcome = kept[1]
                else:
                    with _training(layers, part):
                        _find_ranges(layers, runs, part, config)
                        outcome = _train(runs, part, targets, block.parameters, teaching)
                    progress.save(number, part.layers, block.state(), outcome)
                seconds = time.perf_counter() - started
                outcomes.append(_entry(part, outcome, seconds))
                if teaching.epochs:
                    _tell(outcomes[-1])
            _check_same(teacher, batches[0], runs[0])
    finally:
        memory.close()
    progress.close()
    return outcomes


def _entry(part: Part, outcome: Outcome, seconds: float) -> BlockEntry:
    return BlockEntry(
        list(part.layers), outcome.before, outcome.after, outcome.best_epoch, round(seconds, 3)
    )


def _tell(block: BlockEntry) -> None:
    names = ", ".join(block.layers)
    logger.info("block %s: loss %.6g -> %.6g", names, block.loss_before, block.loss_after)
    if not block.best_epoch:
        logger.warning(
            "block %s: training did not lower its loss of %.6g", names, block.loss_before
        )


def _parts(config: DistillConfig, graph: ModelGraph) -> list[Part]:
    """The groups, and the quantized layers that are in none, in the order in which they run."""
    parts = [Part(tuple(group), trained=True) for group in config.distill_group]
    grouped = {name for group in config.distill_group for name in group}
    parts += [Part((n,), trained=False) for n in config.enabled_layers() if n not in grouped]
    return sorted(parts, key=lambda part: graph.calls[part.layers[0]].index)


@contextmanager
def _training(layers: Mapping[str, RetrainLayer], part: Part) -> Iterator[None]:
    """The part's quantizers in training mode."""
    inside = [layers[name] for name in part.layers if name in layers]
    for layer in inside:
        layer.train()
    try:
        yield
    finally:
        for layer in inside:
            layer.eval()


def _find_ranges(
    layers: Mapping[str, RetrainLayer], runs: Sequence[Run], part: Part, config: DistillConfig
) -> None:
    quantizers = [layers[name].input_quantizer for name in part.layers if name in layers]
    if not all(quantizer.ready for quantizer in quantizers):
        observe(runs, part, config.batch_num)


def _train(
    runs: Sequence[Run],
    part: Part,
    targets: Sequence[Tensor | None],
    parameters: Sequence[nn.Parameter],
    teaching: Teaching,
) -> Outcome:
    wanted = [target for target in targets if target is not None]
    title = part.layers[0] if len(part.layers) == 1 else f"{part.layers[0]}..{part.layers[-1]}"
    steps = teaching.epochs * len(runs)
    with (
        trainable(parameters),
        tqdm(total=steps, desc=f"distill {title}", unit="batch", disable=None) as bar,
    ):

        def tell(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        return train_block(
            runs,
            part,
            wanted,
            parameters,
            teaching.make_optimizer,
            teaching.loss,
            teaching.epochs,
            tell,
            decay=teaching.decay,
        )


class _StudentBlock:
    """What of the student belongs to a block.

    Attributes:
        parameters: what is trained: weights, biases, BatchNorm, clip values. What calls outside
            the block read too stays as it is.
    """

    def __init__(
        self, student: nn.Module, layers: Mapping[str, RetrainLayer], run: Run, part: Part
    ) -> None:
        self._student = student
        inside = [layers[name] for name in part.layers if name in layers]
        self._quantizers = [q for layer in inside for q in layer.quantizers()]
        own = tensors_by_name(student, run.own_parameters(part))
        self._tensors = {id(tensor) for tensor in own.values()}
        trained = [t for t in own.values() if isinstance(t, nn.Parameter) and t.is_floating_point()]
        trained += [p for q in self._quantizers for p in q.parameters() if p.requires_grad]
        self.parameters = list({id(p): p for p in trained}.values())

    def state(self) -> dict[str, Tensor]:
        """Its part of the student's state dict."""
        prefixes = tuple(
            f"{path}."
            for path, module in self._student.named_modules()
            if any(module is quantizer for quantizer in self._quantizers)
        )
        state = self._student.state_dict(keep_vars=True)
        return {
            name: value
            for name, value in state.items()
            if id(value) in self._tensors or name.startswith(prefixes)
        }


def _check_same(teacher: nn.Module, inputs: ModelInputs, run: Run) -> None:
    """Finds networks that compute something else when their calls are done again.

    Raises:
        ModelError: this one does.
    """
    again, _ = run.finish()
    real = tensors_in(inputs.copied().call(teacher))
    for a, b in zip(real, again, strict=False):
        agreement = Agreement.between(a, b) if a.is_floating_point() else None
        if agreement is not None and agreement.sqnr_db < SAME_DB:
            raise ModelError(
                "the teacher's calls, done again one by one, give another result (SQNR "
                f"{agreement.sqnr_db:.1f} dB): the forward probably changes tensors through views, "
                "or outside torch; such a network cannot be distilled block by block"
            )
