"""Gathers the pages of the site where mkdocs reads them, with the paths they have here.

    python docs/gather.py FOLDER

Links between pages then work on the site as they do in the repository, and a link to a file that
is not there is a warning, which `make docs` takes as an error.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Pages, and files that they link to.
PATTERNS = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "examples/*.md",
    "examples/*.py",
    "benchmarks/*.md",
)


def main(folder: Path) -> None:
    """Copies every page, and nothing that is no longer one stays."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in PATTERNS:
        for source in sorted(ROOT.glob(pattern)):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
