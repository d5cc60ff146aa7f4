"The files of the tutorial on clusters, run here: processors in place of cards, and a script in place of SLURM's srun."
import os, re, subprocess, sys, time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
from execnb.nbio import read_nb
from torch.testing import assert_close

from sleepnb.data.psg import Night
from sleepnb.data.store import Cohort, prepare
from sleepnb.montage import parse_channel
from sleepnb.recipes import runs_of
from sleepnb.runs import is_done
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights

PAGE = Path(__file__).parent.parent/'nbs'/'750_cluster.ipynb'
FILES = dict(m.groups() for c in read_nb(PAGE).cells for m in re.finditer(r"(?ms)^cat > (\S+) <<'EOF'\n(.*?)^EOF$", c.source))
JOBS = [name for name in FILES if name.endswith('.sbatch')]

pytest.importorskip('accelerate', reason='the extra `cluster` is not installed')
pytest.importorskip('distributed', reason='the extra `cluster` is not installed')
if not sys.platform.startswith('linux'): pytest.skip('SLURM runs on Linux', allow_module_level=True)

def start(folder, *command, **slurm):
    "A job of the page, in a folder with all its files."
    for name,text in FILES.items():
        (folder/name).parent.mkdir(exist_ok=True)
        if not (folder/name).exists(): (folder/name).write_text(text)
    (folder/'bin'/'srun').chmod(0o755)
    path = os.pathsep.join([str(folder/'bin'), str(Path(sys.executable).parent), os.environ['PATH']])
    slurm = dict(SLURM_JOB_ID='7', SLURM_NTASKS='2', SLURM_GPUS_ON_NODE='2', SLURM_SUBMIT_DIR=str(folder))
    log = (folder/'log').open('a')
    return subprocess.Popen(['bash', *command], cwd=folder, env=os.environ | slurm | dict(PATH=path, OMP_NUM_THREADS='1'),
                            stdout=log, stderr=log)

def left(folder):
    "Processes that jobs in this folder have left."
    for process in psutil.process_iter():
        try:
            if process.environ().get('SLURM_SUBMIT_DIR') == str(folder) and process.status() != 'zombie': yield process
        except psutil.Error: pass # it ended, or is somebody else's

def end(process, folder):
    "The code with which a job ends, when nothing is left of it."
    code,deadline = process.wait(300), time.monotonic() + 60
    while (found := [*left(folder)]) and time.monotonic() < deadline: time.sleep(.2)
    for o in found: o.kill()
    assert not found
    return code

def wait_for(done, process):
    deadline = time.monotonic() + 240
    while not done() and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    assert done() and process.poll() is None

def test_the_page_has_its_files(): assert {*FILES} == {'pretrain.py', 'table.sbatch', 'cards.sbatch', 'bin/srun'}

@pytest.mark.parametrize('name', JOBS)
def test_jobs_are_bash_and_ask_before_they_begin(name):
    "SLURM reads its options up to the first command."
    assert subprocess.run(['bash', '-n'], input=FILES[name], text=True, capture_output=True).returncode == 0
    head,*lines = FILES[name].splitlines()
    asked = [bool(re.match(r'#SBATCH --[a-z-]+(=\S+)?( +# .*)?$', line)) for line in lines]
    assert head == '#!/bin/bash' and any(asked) and sorted(asked, reverse=True) == asked

def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(tmp_path):
    runs = runs_of('mtssrl-table1', 'smoke')
    job = 'table.sbatch', 'mtssrl-table1', '--scale', 'smoke'
    (tmp_path/'scheduler-7.json').write_text('{"address": "tcp://127.0.0.1:1"}')     # of the job before it was requeued
    process = start(tmp_path, *job)
    wait_for(lambda: is_done(runs[0], tmp_path/'runs'), process)
    process.terminate()
    assert end(process, tmp_path)
    before = {r: (tmp_path/'runs'/r.id/'result.json').stat().st_mtime_ns for r in runs if is_done(r, tmp_path/'runs')}
    assert 0 < len(before) < len(runs)
    assert end(start(tmp_path, *job), tmp_path) == 0, (tmp_path/'log').read_text()
    told = (tmp_path/'log').read_text()
    assert {r: (tmp_path/'runs'/r.id/'result.json').stat().st_mtime_ns for r in before} == before
    assert all(is_done(r, tmp_path/'runs') for r in runs)
    assert f'7 runs, {len(before)} done' in told and 'smoke: 7 of 7 runs found' in told
    assert all(told.count(f'done: {r}') == 1 for r in runs if r not in before)
    assert not [*tmp_path.rglob('failed.json')] and not [*tmp_path.glob('scheduler*')]

def test_a_job_ends_when_there_are_no_workers(tmp_path):
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'srun').write_text('#!/bin/bash\nexit 3\n')
    assert end(start(tmp_path, 'table.sbatch', 'mtssrl-table6', '--scale', 'smoke'), tmp_path) == 3
    assert not [*tmp_path.glob('scheduler*')]

def read(row, channels):
    made = synth_night(channels, n_epochs=24, subject=f'{channels} {row["subject"]}')
    return Night(list(made.x), [100]*len(channels), [parse_channel(c) for c in channels], made.stages)

def test_two_processes_that_were_stopped_end_with_the_same_weights(tmp_path):
    stores = []
    for name,channels in dict(home=('Fpz-Cz', 'Pz-Oz'), clinic=('F4-M1', 'C4-M1', 'O2-M1')).items():
        cohort = Cohort(name, pd.DataFrame(dict(subject=list('abcde'), night=1)), channels, partial(read, channels=channels))
        stores.append(str(prepare(cohort, tmp_path/'stores'/name, 'mtssrl', progress=False).path))
    weights = {}
    for name,stop in dict(whole=False, stopped=True).items():
        (folder := tmp_path/name).mkdir()
        (folder/'pretrain.py').write_text(FILES['pretrain.py'].replace('learn.fit(2,', 'learn.fit(4,'))
        if stop:
            process = start(folder, 'cards.sbatch', *stores)
            wait_for(lambda: [*folder.glob('pretrained-2.checkpoint.safetensors')], process)
            process.terminate()
            assert end(process, folder) and not (folder/'pretrained.safetensors').exists()
        assert end(start(folder, 'cards.sbatch', *stores), folder) == 0, (folder/'log').read_text()
        assert (folder/'log').read_text().count('processes: 2') == 1 + stop         # one of the two tells
        network,described = load_weights(folder/'pretrained.safetensors')
        assert set(described['fitted']) == {'home', 'clinic'}
        weights[name] = network.state_dict()
    assert_close(weights['stopped'], weights['whole'], atol=0, rtol=0)
