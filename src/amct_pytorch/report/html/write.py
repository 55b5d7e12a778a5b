"""From a ledger file to its page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from amct_pytorch.errors import ConfigError, PackageMissingError
from amct_pytorch.files import (
    PathLike,
    as_path,
    check_writable,
    read_text,
    text_kind,
    write_whole,
)
from amct_pytorch.report.html.drawing import clipped_text, draw_histogram, draw_network
from amct_pytorch.report.html.page import Page, given_ranking, page_of
from amct_pytorch.report.html.tiles import comparison_tiles
from amct_pytorch.report.network import Network

HERE = Path(__file__).parent
INSTALL = "the HTML report needs jinja2: pip install 'amct-pytorch[report]' (or pip install jinja2)"
RANKING_FILE = "accuracy_based_auto_calibration_ranking_information.json"


def check_installed() -> None:
    """Checks that the package the report needs is there.

    Raises:
        PackageMissingError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise PackageMissingError(INSTALL)


def report_path(ledger: PathLike) -> Path:
    """Where the report of a ledger goes: ``net_ledger.json`` gives ``net_report.html``."""
    path = as_path(ledger, "ledger")
    stem = path.stem.removesuffix("ledger") + "report" if "ledger" in path.stem else path.stem
    return path.with_name(f"{stem}.html")


def read_ledger(path: PathLike) -> dict[str, Any]:
    """The JSON document of a ledger of any flow.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it is no ledger.
    """
    text = read_text(path, "ledger")
    try:
        document = json.loads(text)
    except ValueError as error:
        if text_kind(text[:4096].encode()) != "JSON":
            raise ConfigError(f"{path} is no ledger: it is not JSON") from error
        raise ConfigError(f"{path}: not JSON: {error}") from error
    problem = ledger_problem(document)
    if problem:
        raise ConfigError(f"{path} is no ledger: {problem}")
    found: dict[str, Any] = document
    return found


def ledger_problem(document: Any) -> str | None:
    """Why a JSON document is no ledger; None if it is one."""
    if not isinstance(document, dict):
        return "it is no JSON object"
    layers = document.get("layers")
    if not isinstance(layers, list):
        return "it has no list 'layers'"
    for i, layer in enumerate(layers):
        if not isinstance(layer, dict) or not isinstance(layer.get("name"), str):
            return f"layers[{i}] has no name"
    return None


def write_report(
    ledger: PathLike,
    target: PathLike,
    *,
    ranking: PathLike | None = None,
    comparison: PathLike | None = None,
) -> None:
    """Writes the page of a ledger: one file that needs nothing else, whole or not at all.

    Args:
        ledger: JSON file that a flow wrote.
        target: HTML file to write.
        ranking: the ranking that `accuracy_based_auto_calibration` wrote; None: the one beside the
            ledger, if it is there.
        comparison: what ``amct compare --json`` printed; None: the file ``…comparison.json`` beside
            the ledger, if it is there.

    Raises:
        PackageMissingError: jinja2 is not installed.
        AmctError: a file cannot be read or written, or holds something else.
    """
    check_installed()
    check_writable(target, "target")
    path = as_path(ledger, "ledger")
    document = read_ledger(path)
    if ranking is None and (path.parent / RANKING_FILE).is_file():
        ranking = path.parent / RANKING_FILE
    beside = path.with_name(f"{path.stem.removesuffix('ledger')}comparison.json")
    if comparison is None and path.stem.endswith("ledger") and beside.is_file():
        comparison = beside
    text = render(
        document,
        path.stem.removesuffix("ledger").strip("_-. ") or path.parent.name or "model",
        ranking=None if ranking is None else _json(ranking, "ranking"),
        comparison=None if comparison is None else _json(comparison, "comparison"),
        network=None if document.get("network") else _network_beside(path, document),
    )
    write_whole(target, text.encode(), what="target", announce=False)


def _json(path: PathLike, what: str) -> Any:
    try:
        return json.loads(read_text(path, what))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: {path}: not JSON: {error}") from error


def _network_beside(path: Path, document: Mapping[str, Any]) -> Network | None:
    """The network of an older ledger, from the deploy model that was written with it."""
    if not path.stem.endswith("ledger"):
        return None
    beside = path.with_name(f"{path.stem.removesuffix('ledger')}deploy_model.onnx")
    if not beside.is_file():
        return None
    from amct_pytorch.report.onnx_network import network_of_deploy

    return network_of_deploy(beside, [layer["name"] for layer in document["layers"]])


def render(
    document: Mapping[str, Any],
    title: str,
    *,
    ranking: Any = None,
    comparison: Any = None,
    network: Network | None = None,
) -> str:
    """The page's text.

    Args:
        document: a ledger's JSON.
        title: of the page.
        ranking: [[layer, score], …] of a search; None: made from the layers' errors.
        comparison: document of ``amct compare --json``.
        network: instead of the ledger's own.

    Raises:
        ConfigError: `ranking`, `comparison` or the ledger's network is something else.
    """
    import jinja2

    if document.get("network"):
        try:
            network = TypeAdapter(Network).validate_python(document["network"])
        except ValidationError as error:
            raise ConfigError(f"the ledger's network: {error.errors()[0]['msg']}") from error
        if any(not 0 <= a < b < len(network.nodes) for a, b in network.edges):
            raise ConfigError("the ledger's network has edges that are not from node to later node")
    page = page_of(document, title, network.sources() if network else {})
    if ranking is not None:
        try:
            page.ranking = given_ranking(ranking)
        except ValueError as error:
            raise ConfigError(f"ranking: {error}") from error
        page.ranking_of = "similarity of each layer's own output, lower is worse"
    if comparison is not None:
        page.tiles += _comparison(comparison)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clipped"] = clipped_text
    return environment.get_template("report.html").render(
        page=page,
        drawing=draw_network(network, page.rows, _figures(page)) if network else None,
        histograms=[
            (row, draw_histogram(row.histogram, row.name)) for row in page.rows if row.histogram
        ],
        anchors={row.name: f"layer-{i}" for i, row in enumerate(page.rows)},
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        grades=_legend(page),
    )


def _comparison(document: Any) -> list[Any]:
    try:
        return comparison_tiles(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"comparison: not what `amct compare --json` prints: {type(error).__name__}: {error}"
        ) from error


def _figures(page: Page) -> dict[str, str]:
    """What stands below each layer's name in the drawing."""
    found = {}
    for row in page.rows:
        if row.left:
            found[row.name] = row.status or "left"
        elif row.exact:
            found[row.name] = "exact"
        elif row.value is not None and page.measure is not None:
            found[row.name] = f"{row.value:{page.measure.spec}}{page.measure.unit}"
        else:
            found[row.name] = row.status
    return found


def _legend(page: Page) -> list[str]:
    """What the grades mean, best first."""
    measure = page.measure
    if measure is None:
        return []
    texts = [f"{bound:{measure.spec}}{measure.unit}" for bound in measure.bounds]
    better, worse = ("≥", "<") if measure.higher_is_better else ("≤", ">")
    return [f"{better} {text}" for text in texts] + [f"{worse} {texts[-1]}"]
