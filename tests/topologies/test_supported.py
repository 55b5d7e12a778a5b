"""The list of supported structures in the docs is the list of networks that are tested."""

from pathlib import Path

from topologies.networks import TOPOLOGIES, Topology

PAGE = Path(__file__).parents[2] / "docs" / "supported.md"


def line(name: str, topology: Topology) -> str:
    floats = "; ".join(f"`{layer}` stays float: {why}" for layer, why in topology.floats)
    return f"| {name} | {topology.quantized} | {floats} |"


def test_the_page_lists_the_tested_structures() -> None:
    lines = PAGE.read_text().splitlines()
    start = lines.index("| --- | --- | --- |") + 1
    assert lines[start : start + len(TOPOLOGIES)] == [
        line(name, topology) for name, topology in TOPOLOGIES.items()
    ]
