"""Which layers, number formats, granularities and algorithms go together in `quantize`.

The table is `ROWS`. Everything that is checked, and everything that an error says is allowed, is
read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SYMMETRIC = (True,)
EITHER = (True, False)
TENSOR_OR_CHANNEL = ("tensor", "channel")
ANY = ("tensor", "channel", "group")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        layer: class name of the layer.
        activation: number format of the inputs; None: only weights are quantized.
        weight: number format of the weights.
        act_strategies: how scales of the inputs may be shared.
        act_symmetric: values that `inputs.symmetric` may have.
        wts_strategies: how scales of the weights may be shared.
        wts_symmetric: values that `weights.symmetric` may have.
        algorithms: their names.
        k_multiple: Ascend's packed kernel needs input channels in multiples of this.
        n_multiple: the same for output channels.
    """

    layer: str
    activation: str | None
    weight: str
    act_strategies: tuple[str, ...]
    act_symmetric: tuple[bool, ...]
    wts_strategies: tuple[str, ...]
    wts_symmetric: tuple[bool, ...]
    algorithms: tuple[str, ...]
    k_multiple: int = 1
    n_multiple: int = 1

    def __str__(self) -> str:
        weights = _told(self.weight, self.wts_strategies, self.wts_symmetric)
        inputs = "no inputs"
        if self.activation is not None:
            told = _told(self.activation, self.act_strategies, self.act_symmetric)
            inputs = f"inputs {told}"
        return f"{self.layer}: weights {weights}; {inputs}; by {', '.join(self.algorithms)}"


def _told(fmt: str, strategies: tuple[str, ...], symmetric: tuple[bool, ...]) -> str:
    symmetry = "symmetric or not" if len(symmetric) > 1 else "symmetric"
    return f"{fmt} ({'/'.join(strategies)}, {symmetry})"


def _both(
    layer: str, fmt: str, algorithms: tuple[str, ...], wts_strategies: tuple[str, ...]
) -> Row:
    """Floating weights and inputs of one format."""
    act = ("tensor", "token") if layer == "Linear" else ("tensor",)
    return Row(layer, fmt, fmt, act, SYMMETRIC, wts_strategies, SYMMETRIC, algorithms)


def _weights(
    fmt: str,
    strategies: tuple[str, ...],
    symmetric: tuple[bool, ...],
    algorithms: tuple[str, ...],
    multiple: int = 1,
) -> Row:
    """Weights only."""
    return Row("Linear", None, fmt, (), (), strategies, symmetric, algorithms, multiple, multiple)


_INTEGER_PAIR = ("minmax", "smoothquant")
_BY_SEARCH = ("minmax", "gptq", "awq")

ROWS: tuple[Row, ...] = (
    _both("Linear", "hifloat8", ("ofmr", "cast", "quantile", "smoothquant"), TENSOR_OR_CHANNEL),
    _both("Linear", "float8_e4m3fn", ("ofmr",), TENSOR_OR_CHANNEL),
    Row(
        "Linear", "mxfp8_e4m3fn", "mxfp8_e4m3fn", ("group",), SYMMETRIC, ("group",), SYMMETRIC,
        ("mxquant",), k_multiple=64,
    ),
    Row(
        "Linear", "float8_e4m3fn", "float4_e2m1", ("tensor",), SYMMETRIC, ("group",), SYMMETRIC,
        _INTEGER_PAIR, k_multiple=64,
    ),
    Row(
        "Linear", "int8", "int8", ("tensor",), EITHER, TENSOR_OR_CHANNEL, SYMMETRIC,
        _INTEGER_PAIR,
    ),
    Row(
        "Linear", "int8", "int8", ("token",), SYMMETRIC, TENSOR_OR_CHANNEL, SYMMETRIC,
        _INTEGER_PAIR, k_multiple=16, n_multiple=8,
    ),
    Row("Linear", "int8", "int4", ("tensor",), EITHER, ANY, EITHER, _INTEGER_PAIR),
    Row("Linear", "int8", "int4", ("token",), SYMMETRIC, ANY, EITHER, _INTEGER_PAIR),
    _both("Conv2d", "hifloat8", ("ofmr",), TENSOR_OR_CHANNEL),
    _both("Conv2d", "float8_e4m3fn", ("ofmr",), TENSOR_OR_CHANNEL),
    _weights("hifloat8", TENSOR_OR_CHANNEL, SYMMETRIC, ("ofmr", "gptq", "cast", "quantile")),
    _weights("float8_e4m3fn", TENSOR_OR_CHANNEL, SYMMETRIC, ("ofmr", "gptq")),
    _weights("mxfp4_e2m1", ("group",), SYMMETRIC, ("mxquant", "gptq", "awq")),
    _weights("float4_e2m1", ("group",), SYMMETRIC, _BY_SEARCH),
    _weights("int8", ANY, EITHER, _BY_SEARCH, multiple=32),
    _weights("int4", ANY, EITHER, _BY_SEARCH, multiple=64),
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """What a config asks for one layer, in the table's terms.

    Attributes:
        layer: class name of the layer.
        algorithm: its name.
        weight: number format of the weights.
        wts_strategy: how their scales are shared.
        wts_symmetric: whether they are without offsets.
        activation: number format of the inputs; None: weights only, and the next two are None.
        act_strategy: how their scales are shared.
        act_symmetric: whether they are without offsets.
    """

    layer: str
    algorithm: str
    weight: str
    wts_strategy: str
    wts_symmetric: bool
    activation: str | None = None
    act_strategy: str | None = None
    act_symmetric: bool | None = None

    def __str__(self) -> str:
        weights = _told(self.weight, (self.wts_strategy,), (self.wts_symmetric,))
        if not self.wts_symmetric:
            weights = weights.replace("symmetric", "asymmetric")
        inputs = "no inputs"
        if self.activation is not None:
            inputs = f"inputs {self.activation} ({self.act_strategy}, "
            inputs += "symmetric)" if self.act_symmetric else "asymmetric)"
        return f"{self.layer}: weights {weights}; {inputs}; by {self.algorithm}"

    def fits(self, row: Row) -> bool:
        """Whether `row` allows this."""
        inputs_fit = self.activation is None or (
            self.act_strategy in row.act_strategies and self.act_symmetric in row.act_symmetric
        )
        return (
            inputs_fit
            and (self.layer, self.activation, self.weight)
            == (row.layer, row.activation, row.weight)
            and self.wts_strategy in row.wts_strategies
            and self.wts_symmetric in row.wts_symmetric
            and self.algorithm in row.algorithms
        )


def find_row(wanted: Combination) -> Row | None:
    """The row that allows `wanted`, or None."""
    return next((row for row in ROWS if wanted.fits(row)), None)


def nearest_rows(wanted: Combination) -> Sequence[Row]:
    """The rows that say best what is allowed instead.

    Of the same formats, and of the same algorithm with the same weights; else of one of them.
    """
    of_layer = [row for row in ROWS if row.layer == wanted.layer]
    near = [
        row
        for row in of_layer
        if row.weight == wanted.weight
        and (row.activation == wanted.activation or wanted.algorithm in row.algorithms)
    ]
    of_weight = [row for row in of_layer if row.weight == wanted.weight]
    of_algorithm = [row for row in of_layer if wanted.algorithm in row.algorithms]
    return near or of_weight or of_algorithm or of_layer or ROWS
