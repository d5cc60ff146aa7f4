"""What the README shows is run, from the day on which all that it calls exists."""
import ast, importlib.util, re, shutil, subprocess, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import sleepnb
from sleepnb.data.psg import sample_files

README = (Path(__file__).parent.parent/'README.md').read_text()
PYTHON = re.findall(r'(?ms)^```python\n(.*?)^```', README)
SHELL = re.findall(r'(?ms)^```sh\n(.*?)^```', README)

def missing(source):
    "Modules of sleepnb that the code imports and that do not exist, and names that they lack."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith('sleepnb'): continue
        try: module = importlib.import_module(node.module)
        except ModuleNotFoundError as error:
            if not (error.name or '').startswith('sleepnb'): raise
            yield node.module
            continue
        yield from (f'{node.module}.{a.name}' for a in node.names if not hasattr(module, a.name))

def test_readme_has_its_commands_and_doors():
    assert len(SHELL) == 3 and len(PYTHON) == 6
    assert SHELL[0].rstrip().endswith('&& sleepnb demo')
    assert SHELL[1].rstrip().endswith('&& nbdev_test --n_workers 2 && python -m pytest -q -n 2 --dist loadfile tests')
    assert all(s.startswith('python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt ') for s in SHELL[:2])

def test_the_shell_stages_a_night(tmp_path):
    shutil.copy(sample_files()[0], tmp_path/'night.edf')
    subprocess.run([Path(sys.executable).with_name('sleepnb'), *SHELL[2].split()[1:]], cwd=tmp_path, check=True)
    assert {p.name for p in tmp_path.iterdir()} == {'night.edf', 'night_stages.csv', 'night_report.html'}

def write_recordings(folder):
    "Five nights of five people, each with a table of stages beside it."
    from edfio import Edf, EdfSignal
    from sleepnb.core import Stage
    from sleepnb.synth import synth_night
    folder.mkdir()
    for who in ('anna', 'bo', 'cleo', 'dan', 'eva'):
        night = synth_night(['C3-A2', 'E1-M2', 'Chin'], n_epochs=60, subject=who)
        Edf([EdfSignal(x.clip(-3000, 3000), 100, label=n, physical_dimension='uV', physical_range=(-3000, 3000))
             for n,x in zip(night.channels, night.x)]).write(folder/f'{who}.edf')
        rows = ''.join(f'{30*i},30,{Stage(s).label}\n' for i,s in enumerate(night.stages))
        (folder/f'{who}.csv').write_text(f'onset,duration,stage\n{rows}')

def write_stores(folder):
    "Three small cohorts of five people each, prepared."
    from functools import partial
    import pandas as pd
    from sleepnb.data.psg import Night
    from sleepnb.data.store import Cohort, prepare
    from sleepnb.montage import parse_channel
    from sleepnb.synth import synth_night
    def read(row, channels):
        made = synth_night(channels, n_epochs=24, subject=f'{channels} {row["subject"]}')
        return Night(list(made.x), [100]*len(channels), [parse_channel(c) for c in channels], made.stages)
    nights = pd.DataFrame(dict(subject=list('abcde'), night=1))
    for name,channels in {'sleep-edf': ['Fpz-Cz', 'Pz-Oz'], 'isruc': ['F3-M2', 'C4-M1', 'O2-M1', 'E1-M2'], 'anphy': ['Cz']}.items():
        prepare(Cohort(name, nights, channels, partial(read, channels=channels)), folder/name, progress=False)

@pytest.mark.parametrize('source', PYTHON, ids=lambda s: s.split()[1])
def test_python(source, tmp_path):
    if absent := list(missing(source)): pytest.skip(f'not built yet: {", ".join(absent)}')
    if 'my-recordings' in source: write_recordings(tmp_path/'my-recordings')
    if 'stores/' in source: write_stores(tmp_path/'stores')
    if 'night.edf' in source: shutil.copy(sample_files()[0], tmp_path/'night.edf')
    source = re.sub(r'\.fit\(\d+\)', '.fit(2)', source)               # how long it trains changes nothing of what it says
    source = re.sub(r'min_steps=\d+', 'min_steps=2', source)
    run = subprocess.run([sys.executable, '-c', source], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

def test_the_skip_does_not_hide_a_broken_import():
    assert list(missing('from sleepnb.montage import resolve_montage, no_such_name')) == ['sleepnb.montage.no_such_name']
    assert list(missing('from sleepnb.no_such_module import x')) == ['sleepnb.no_such_module']

def test_the_picture_is_the_one_that_its_tool_draws(root, tmp_path):
    subprocess.run([sys.executable, root/'tools'/'montages.py', tmp_path/'made.png'], check=True)
    made,shown = plt.imread(tmp_path/'made.png'), plt.imread(root/'nbs'/'images'/'montages.png')
    assert made.shape == shown.shape and abs(made - shown).mean() < .01, 'run python tools/montages.py'
