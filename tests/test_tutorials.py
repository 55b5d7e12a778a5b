"""The tutorials do what they say, in less than fifty lines of code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
MOST_LINES = 50


def blocks(tutorial: str) -> list[tuple[str, str]]:
    """Language and text of each code block."""
    text = (TUTORIALS / f"{tutorial}.md").read_text()
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def code_lines(language: str, text: str) -> int:
    """Lines that somebody who follows the tutorial writes."""
    lines = text.splitlines()
    if language == "diff":
        lines = [line[1:] for line in lines if line.startswith("+")]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def apply(diff: str, folder: Path) -> None:
    """Changes a file as a block says: its first line names it, the others are one hunk."""
    head, *lines = diff.splitlines()
    file = folder / head.removeprefix("--- ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +")
    text = file.read_text()
    assert text.count(before) == 1, f"{head}: the tutorial changes lines that are not there"
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize("tutorial", sorted(page.stem for page in TUTORIALS.glob("*.md")))
def test_what_is_added_takes_less_than_fifty_lines(tutorial):
    found = blocks(tutorial)
    # The last block uses what the others add.
    assert 5 < sum(code_lines(*block) for block in found[:-1]) < MOST_LINES


def test_the_algorithm_of_the_tutorial_is_better_than_rounding_to_the_nearest(tmp_path):
    import amct_pytorch as amct

    register, use = (text for _, text in blocks("add_an_algorithm"))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(register, "add_an_algorithm.md", "exec"), names)
    exec(compile(use, "add_an_algorithm.md", "exec"), names)
    torch.testing.assert_close(names["deployed"], names["simulated"])

    def error(algorithm: str) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
        data = torch.randn(256, 64) * torch.linspace(0.1, 4, 64)
        with torch.no_grad():
            meant = model(data)
            amct.quantize(model, {**names["config"], "batch_num": 1, "algorithm": algorithm})
            model(data)
            return float((amct.convert(model)(data) - meant).square().mean())

    assert error("output_range") < 0.95 * error("minmax")


def test_what_the_other_tutorials_add_to_the_toolkit_works(tmp_path):
    shutil.copytree(
        ROOT / "src" / "amct_pytorch",
        tmp_path / "src" / "amct_pytorch",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    scripts = []
    for tutorial in ("add_an_observer", "add_a_layer_type"):
        for language, text in blocks(tutorial):
            new = re.match(r"# (src/\S+\.py)\n", text)
            if language == "diff":
                apply(text, tmp_path)
            elif new is not None:
                (tmp_path / new.group(1)).write_text(text[new.end() :])
            else:
                scripts.append(text)
    assert len(scripts) == 2
    # One process: most of its time goes into importing the exporter.
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(scripts)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
