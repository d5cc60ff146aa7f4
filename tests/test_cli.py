"""The command as a shell runs it."""
import os, subprocess, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import sleepnb
from sleepnb import cli
from sleepnb.core import RecordingError

SLEEPNB = Path(sys.executable).with_name('sleepnb')

def run(*args, encoding='utf-8', **kwargs):
    return subprocess.run([SLEEPNB, *map(str, args)], capture_output=True, encoding=encoding, **kwargs)

def test_demo_leaves_what_it_says(tmp_path):
    done = run('demo', '--out', tmp_path/'made', cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert str(tmp_path/'made') in done.stdout.splitlines()[-1]
    assert (tmp_path/'made'/'montages.png').read_bytes().startswith(b'\x89PNG')
    table = pd.read_csv(tmp_path/'made'/'channels.csv', keep_default_na=False)
    assert table[table.how == 'missing'].got.eq('').all() and len(table) == 48
    mass = table[table.dataset == 'MASS-SS3'].set_index('wanted')
    assert mass.loc['Chin', 'details'] == 'EMG Chin1 − EMG Chin2' and mass.loc['C3', 'got'] == 'C3-LE'

def test_the_picture_of_the_readme_is_the_one_that_demo_draws(root, tmp_path):
    run('demo', '--out', tmp_path)
    made,shown = (plt.imread(p/'montages.png') for p in (tmp_path, root/'nbs'/'images'))
    assert made.shape == shown.shape and abs(made - shown).mean() < .01, 'copy montages.png of sleepnb demo to nbs/images'

def test_demo_into_a_place_that_cannot_be_written(tmp_path):
    (tmp_path/'taken').write_text('')
    (tmp_path/'folder'/'montages.png').mkdir(parents=True)
    for out in ('taken', 'folder'):
        done = run('demo', '--out', tmp_path/out)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and out in done.stderr

def test_demo_on_a_terminal_that_knows_few_letters(tmp_path):
    done = run('demo', '--out', tmp_path, env=os.environ | {'PYTHONIOENCODING': 'cp1252'}, encoding='cp1252')
    assert done.returncode == 0 and 'Chin1 ? EMG Chin2' in done.stdout

def test_simulate_writes_a_cohort_and_goes_on(tmp_path):
    for subjects in (1, 2):
        done = run('simulate', 'sleep-edf', tmp_path/'made', '--subjects', subjects, '--nights', 1, '--hours', .1, '--seed', 7, '--jobs', 1)
        assert done.returncode == 0 and len(list((tmp_path/'made').glob('*PSG.edf'))) == subjects
        assert done.stdout.startswith(f'{subjects} simulated nights in the layout of sleep-edf are in') and str(tmp_path/'made') in done.stdout
    assert '"seed": 7' in (tmp_path/'made'/'simulated.json').read_text()

def test_simulate_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'night.edf').write_text('')
    for args,why in ((('dream', tmp_path/'new', '--hours', 1), 'expected sleep-edf-20'), (('mass', tmp_path/'mine'), 'Name a new folder')):
        done = run('simulate', *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and why in done.stderr and not (tmp_path/'new').exists()
    assert run('simulate', 'mass').returncode == 2

def test_help_and_version():
    assert run('--version').stdout.strip() == f'sleepnb {sleepnb.__version__}'
    assert 'demo' in run('--help').stdout
    wrong = run('dream')
    assert wrong.returncode == 2 and 'dream' in wrong.stderr

def test_an_error_is_one_line_and_a_traceback_only_on_request(monkeypatch, capsys):
    def fail(): raise RecordingError('no signal', where='night.edf', remedy='Check the electrodes.')
    monkeypatch.setattr(cli, 'app', fail)
    with pytest.raises(SystemExit) as stop: cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err == 'sleepnb: night.edf: no signal. Check the electrodes.\n'
    monkeypatch.setenv('SLEEPNB_DEBUG', '1')
    with pytest.raises(RecordingError): cli.main()
