"""With the data of developers, the page of the fit makes the numbers that the package holds."""
import subprocess, sys
from pathlib import Path

import pytest

def run_page(root, page):
    command = [Path(sys.executable).parent/'nbdev_test', '--flags', 'data', '--path', page]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)

def test_the_page_makes_the_file(root, data):
    if not (data/'sleep-edf-bandpower').is_dir(): pytest.skip('no trajectories of band power among the recordings')
    done = run_page(root, 'nbs/821_simulator_fit.ipynb')
    assert done.returncode == 0, done.stdout + done.stderr
