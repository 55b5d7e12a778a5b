"""What the reference pages say is in the code: messages, files, papers, spellings, figures."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

from amct_pytorch.flows.arguments import OTHER_SPELLINGS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "amct_pytorch"
DOCS = ROOT / "docs"
ALGORITHM_PAGES = tuple(DOCS / f"algorithms{part}.md" for part in ("", "_low_bit", "_smaller"))
ANY = "…"


def _template(node: ast.expr) -> str | None:
    """The text of a string in the source, `…` where a value goes in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-+.0-9]*[sdrgf]", ANY, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else ANY for p in node.values]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _template(node.left), _template(node.right)
        return None if left is None and right is None else f"{left or ANY}{right or ANY}"
    return None


@functools.cache
def _templates() -> tuple[str, ...]:
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            text = _template(node) if isinstance(node, ast.expr) else None
            if text and " " in text:
                found.add(" ".join(text.split()))
    return tuple(found)


def _is_told(message: str) -> bool:
    """Whether some string of the source says this, values aside."""
    pieces = [piece.strip() for piece in message.split(ANY)]
    wanted = re.compile(".*?".join(re.escape(piece) for piece in pieces if piece))
    return any(wanted.search(template) for template in _templates())


def _quoted_messages(text: str) -> list[str]:
    """Messages that the page shows: what is quoted with blanks in it and is no code."""
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [q for q in quoted if " " in q and not re.match(r'"|[\w.]+(=|\()', q)]


def test_the_messages_that_troubleshooting_shows_are_those_of_the_code():
    messages = _quoted_messages((DOCS / "troubleshooting.md").read_text())
    assert len(messages) > 60
    assert [message for message in messages if not _is_told(message)] == []


def test_a_message_that_nobody_gives_would_be_found():
    assert not _is_told("the modified ONNX model has not been finished by calibration")
    assert _is_told("… does not fit the model: …. It must be of a model")


def test_the_algorithm_pages_name_each_algorithm_and_only_files_that_exist():
    text = "".join(page.read_text() for page in ALGORITHM_PAGES)
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    known = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py")}
    by_name = {Path(file).name for file in known}
    assert {file for file in named if file not in known and file not in by_name} == set()
    # Tools that several algorithms use and that compute nothing a reader looks for.
    tools = {"__init__.py", "finite.py", "solve.py"}
    algorithms = {file.name for file in (SOURCE / "algorithms").glob("*.py")} - tools
    assert algorithms <= {Path(file).name for file in named}


def test_the_papers_that_the_code_follows_are_on_the_algorithm_pages():
    code = "".join(file.read_text() for file in SOURCE.rglob("*.py"))
    told = "".join(page.read_text() for page in ALGORITHM_PAGES)
    paper = re.compile(r"arXiv\s+(\d{4}\.\d{5})")
    assert set(paper.findall(code)) <= set(paper.findall(told))


def test_formulas_are_shown_without_anything_from_the_network():
    for page in DOCS.rglob("*.md"):
        assert not re.search(r"\$\$|\\\(|\\frac|<script|https?://\S+\.js", page.read_text()), page


@pytest.mark.parametrize("documented", OTHER_SPELLINGS)
def test_migration_names_every_spelling_that_is_accepted(documented):
    row = re.search(rf"^\| `{documented}` \| (.*) \|$", (DOCS / "migration.md").read_text(), re.M)
    assert row is not None
    assert tuple(re.findall(r"`(\w+)`", row.group(1))) == OTHER_SPELLINGS[documented]


def test_the_tables_of_costs_and_accuracy_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    accuracy = importlib.import_module("accuracy")
    costs = importlib.import_module("costs")
    for page, marker, table in (
        (DOCS / "costs.md", "costs", costs.markdown()),
        (DOCS / "accuracy.md", "accuracy", accuracy.markdown(accuracy.kept())),
    ):
        text = page.read_text().split(f"<!-- {marker}: begin -->\n")[1]
        shown = text.split(f"\n<!-- {marker}: end -->")[0]
        assert shown == table, f"run benchmarks/{marker}.py (accuracy: with --table)"
