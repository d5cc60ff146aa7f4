"""What several tests need."""
import os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

@pytest.fixture(autouse=True)
def ctrl_c():
    "Ctrl-C interrupts, also in a process that runs tests beside others and ignores it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.fixture(scope='session')
def root(): return Path(__file__).parent.parent

@pytest.fixture(scope='session')
def data():
    "The folder of real recordings that SLEEPNB_DATA names; tests that need it skip where it is absent."
    folder = os.environ.get('SLEEPNB_DATA')
    if not folder: pytest.skip('SLEEPNB_DATA names no folder of recordings')
    if not Path(folder).is_dir(): pytest.skip(f'the folder that SLEEPNB_DATA names does not exist: {folder}')
    return Path(folder)

@pytest.fixture(scope='session')
def site(root, tmp_path_factory):
    "The site, built with warnings as errors."
    pytest.importorskip('myst_nb', reason='the site needs the extra `docs`')
    out = tmp_path_factory.mktemp('site')/'html'
    run = subprocess.run([sys.executable, root/'tools'/'build_docs.py', '--out', out], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out

@pytest.fixture(scope='session')
def browser():
    "Chromium, without a screen."
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright, of the extra `dev`, is not installed')
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
    if not found: pytest.skip('no chromium or chrome on this machine')
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=found, args=['--no-sandbox', '--disable-background-networking', '--no-first-run'])
        yield chromium
        chromium.close()
