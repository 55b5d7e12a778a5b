"""Killed at any moment: no half file, no wrong pair, no litter, and the next run works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the moments are forked from one process")
def test_the_flow_killed_at_every_sixth_change_of_a_file(tmp_path):
    """`make fuzz` takes every one; killed_flow.py says what is held against what is left."""
    path = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_flow.py"), "6"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    moments = json.loads(done.stdout)
    # Nine files at least, each created, written, brought to the disk and renamed.
    assert min(moments.values()) >= 36
