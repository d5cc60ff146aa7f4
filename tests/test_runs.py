"Runs and recipes: killed, repeated, on a cluster, and counted by hand."
import hashlib, json, os, re, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

import sleepnb
from sleepnb.core import SleepnbError
from sleepnb.recipes import RECIPES, SCALES, Run, runs_of, table_rows
from sleepnb.runs import (_workers, carry_out, code_checksum, compare_runs, estimate_hours, is_done, read_result, read_stages,
                          recipe_status, recipe_table, run_recipe)
from sleepnb.weights import load_weights

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "The two runs of a table."
    out = tmp_path_factory.mktemp('runs')
    run_recipe('mtssrl-table6', 'smoke', out, progress=False)
    return out

def tiny(seed): # a training of a second or two
    config = next(r for r in runs_of('mtssrl-table6', 'smoke') if r.task == 'finetune').config
    return Run('scratch', config | dict(seed=seed))

def test_an_id_is_the_hash_of_what_decides():
    parent = Run('pretrain', dict(seed=0))
    text = '{"config": {"lr": 0.001, "seed": 1}, "parent": "%s", "task": "finetune"}' % parent.id
    assert Run('finetune', dict(seed=1, lr=1e-3), parent).id == hashlib.sha256(text.encode()).hexdigest()[:12]
    others = [Run('finetune', dict(seed=1, lr=1e-3)), Run('scratch', dict(seed=1, lr=1e-3), parent),
              Run('finetune', dict(seed=2, lr=1e-3), parent), Run('finetune', dict(seed=1, lr=1e-3), Run('pretrain', dict(seed=1)))]
    assert len({o.id for o in others} | {Run('finetune', dict(seed=1, lr=1e-3), parent).id}) == 5
    with pytest.raises(ValueError): Run('finetune', dict(lr=float('nan')))

@pytest.mark.parametrize('scale', SCALES)
def test_runs_of_a_recipe_are_told_apart_in_words(scale):
    for recipe in RECIPES:
        said = [str(r).removesuffix(f' ({r.id})') for r in runs_of(recipe, scale)]
        assert len({*said}) == len(said)
    eog, = {r for r in runs_of('sleepsmc-table2') if r.config['primary'] == 'EOG'}
    assert str(eog) == f'sleepsmc on nine-simulated, EOG, C + U, fold 0, seed 0 ({eog.id})'

@pytest.mark.parametrize('recipe', RECIPES)
def test_every_printed_row_has_a_place(recipe):
    "Rows of systems that are built have runs of the dataset and the labels that the row names; others have none."
    for scale in ('small', 'paper'):
        for row in table_rows(recipe, scale).itertuples():
            assert bool(row.runs) == (row.model in ('MTSSRL-MD', 'SleepSMC', 'FeatureNet'))
            for run in row.runs:
                if 'labels=' in row.setting: assert f'labels={run.config["labels"]:.0%}' in row.setting
                if run.task == 'sleepsmc' and '+' in row.modality: assert run.config['primary'] == 'all'
                if run.task == 'sleepsmc' and '+' not in row.modality: assert run.config['primary'] in (row.modality, 'any')
                if run.parent: assert run.parent.config['seed'] == run.config['seed'] and run.parent.config['split'] == run.config['split']

def test_ablations_differ_in_what_they_ablate():
    "A row of each kind against the whole system, by hand."
    rows = table_rows('sleepsmc-table3').query('dataset == "ISRUC-S3" and modality == "EEG"').set_index('setting').runs.str[0]
    config = {k: r.config for k,r in rows.items()}
    whole = config['ablation:U=yes;C=yes;unimodal testing']
    differ = lambda other: {k: v for k,v in other.items() if whole[k] != v}
    assert differ(config['ablation:U=no;C=yes;unimodal testing']) == dict(uncertainty=False, primary='any')
    assert differ(config['ablation:U=no;C=no;unimodal testing']) == dict(uncertainty=False, contrast=False, primary='any')
    minus = table_rows('sleepsmc-table8').query('dataset == "ISRUC-S3" and modality == "EEG"').set_index('setting').runs.str[0]
    assert differ(minus['weight=-r;unimodal testing'].config) == dict(score='negative')
    assert minus['weight=exp(-r);unimodal testing'] == rows['ablation:U=yes;C=yes;unimodal testing']

def test_people_are_tested_once_and_unseen(out):
    result = read_result(runs_of('mtssrl-table6', 'smoke')[1], out)
    assert [n['subject'] for n in result['nights']] == sorted({n['subject'] for n in result['nights']})
    from sleepnb.weights import read_description
    seen = read_description(out/result['id']/'weights.safetensors')
    trained = {(c, s) for part in ('fitted', 'judged') for c,names in seen[part].items() for s in names}
    assert not trained & {(n['cohort'], n['subject']) for n in result['nights']}
    assert result['made']['split'] == seen['split']['id'] and result['made']['device'] == 'cpu'

def test_scores_are_those_of_the_stages(out):
    run = runs_of('mtssrl-table6', 'smoke')[1]
    stages,table = read_stages([run], out=out), recipe_table('mtssrl-table6', 'smoke', out).query('model == "MTSSRL-MD"')
    f1 = f1_score(stages.stage, stages.pred, average=None, labels=range(5), zero_division=0)
    ours = table.set_index('metric').ours
    np.testing.assert_allclose(ours[['F1_W', 'F1_N1', 'F1_N2', 'F1_N3', 'F1_REM']], 100*f1, atol=1e-3)
    np.testing.assert_allclose(ours['MF1'], 100*f1.mean(), atol=1e-3)
    assert table.printed.notna().all() and (table.ids.str[0] == run.id).all()

def test_a_result_that_is_gone_is_a_missing_cell(out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    asked = runs_of('mtssrl-table6', 'smoke')[1]
    (copy/asked.id/'result.json').unlink()
    table = recipe_table('mtssrl-table6', 'smoke', copy)
    assert table.ours.isna().all() and table.printed.notna().all() and table.found.sum() == 0
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'missing']
    carry_out([asked], copy, progress=False)                          # from the pretraining that is there
    before,again = (read_result(asked, o) for o in (out, copy))
    assert [before[k] for k in ('scores', 'nights', 'training')] == [again[k] for k in ('scores', 'nights', 'training')]

def test_other_code_makes_results_stale(out, tmp_path):
    package = shutil.copytree(Path(sleepnb.__file__).parent, tmp_path/'sleepnb', ignore=shutil.ignore_patterns('__pycache__'))
    assert code_checksum(package) == code_checksum()
    file = package/'learner.py'
    text = file.read_text()
    file.write_text('# a word more\n' + text.replace('"Trains a network to stages from random weights."', '"Trains."'))
    assert code_checksum.__wrapped__(package) == code_checksum()
    (package/'report.py').write_text('shown = 1')                     # does not decide
    assert code_checksum.__wrapped__(package) == code_checksum()
    file.write_text(text.replace('lr:float=1e-3', 'lr:float=2e-3'))
    assert code_checksum.__wrapped__(package) != code_checksum()
    copy = shutil.copytree(out, tmp_path/'copy')
    path = copy/runs_of('mtssrl-table6', 'smoke')[0].id/'result.json'
    path.write_text(json.dumps((found := json.loads(path.read_text())) | dict(made=found['made'] | dict(code='0'))))
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['stale', 'done']

def test_a_claim_is_a_difference_over_people(tmp_path):
    "Two runs made by hand: one is right always, the other in nine of ten epochs."
    runs = [tiny(seed) for seed in (0, 1)]
    stage = '01234'*20
    wrong = ''.join('0' if i % 10 == 4 else o for i,o in enumerate(stage))
    for run,pred in zip(runs, (stage, wrong)):
        nights = [dict(using='EEG', cohort='c', subject=str(s), night='1', stage=stage, pred=pred) for s in range(4)]
        (tmp_path/run.id).mkdir()
        (tmp_path/run.id/'result.json').write_text(json.dumps(dict(nights=nights)))
    for run in runs: run.config['seed'] = 0                           # nights are the same only under the same seed
    found = compare_runs(runs[:1], runs[1:], out=tmp_path)
    f1 = f1_score([*stage], [*wrong], average='macro')
    assert found['verdict'] == 'holds' and found['people'] == 4
    np.testing.assert_allclose([found[k] for k in ('value', 'low', 'high')], 1 - f1)
    assert compare_runs(runs[1:], runs[:1], out=tmp_path)['verdict'] == 'does not hold'

def test_hours_by_hand():
    run = next(r for r in runs_of('sleepsmc-table2') if r.config['primary'] == 'EOG')
    assert estimate_hours([run]) == pytest.approx(.64*30*480*10*.006*2 / 3600)
    run = runs_of('mtssrl-table6')[0]
    assert estimate_hours([run]) == pytest.approx(520*100*.01 / 3600)

def test_what_fails_is_noted_and_tried_again_when_asked(tmp_path):
    bad = Run('scratch', tiny(0).config | dict(rates=['fast']))
    assert [*carry_out([bad, tiny(0)], tmp_path, progress=False)] == [bad.id] and is_done(tiny(0), tmp_path)
    noted = json.loads((tmp_path/bad.id/'failed.json').read_text())
    assert 'Traceback' in noted['traceback'] and noted['why']
    before = (tmp_path/bad.id/'failed.json').stat().st_mtime_ns
    carry_out([bad], tmp_path, progress=False)
    assert (tmp_path/bad.id/'failed.json').stat().st_mtime_ns == before
    carry_out([bad], tmp_path, retry=True, progress=False)
    assert (tmp_path/bad.id/'failed.json').stat().st_mtime_ns > before
    with pytest.raises(SleepnbError, match='there is no such backend'): carry_out([bad], tmp_path, backend='ray', progress=False)

def test_a_killed_run_goes_on_to_the_same_result(out, tmp_path):
    code = ('import sys; from sleepnb.runs import run_recipe, Checkpoint; Checkpoint.__init__.__defaults__ = (0.,); '
            'run_recipe("mtssrl-table6", "smoke", sys.argv[1], progress=False)')     # written down after every step
    first,second = runs_of('mtssrl-table6', 'smoke')
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)])
    while process.poll() is None and not (tmp_path/first.id/'checkpoint.safetensors').exists(): time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not is_done(first, tmp_path)
    run_recipe('mtssrl-table6', 'smoke', tmp_path, progress=False)
    for run in (first, second):
        one,two = (read_result(run, o) for o in (out, tmp_path))
        for k in ('scores', 'nights', 'training'): assert one[k] == two[k]
    assert not [*tmp_path.rglob('*checkpoint*')]

def test_a_cluster_that_loses_a_worker(tmp_path):
    "Two Dask workers; the one that holds a run is killed. Every run finishes, and those that were finished are not touched."
    import distributed
    runs = [tiny(seed) for seed in range(4)]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0, host='127.0.0.1') as cluster:
        failed = {}
        at = cluster.scheduler_address
        work = Thread(target=lambda: failed.update(carry_out(runs, tmp_path, backend='dask', scheduler=at, progress=False)))
        work.start()
        deadline = time.monotonic() + 240
        while not any(is_done(r, tmp_path) for r in runs) and time.monotonic() < deadline: time.sleep(.02)
        finished = {r.id: (tmp_path/r.id/'result.json').stat().st_mtime_ns for r in runs if is_done(r, tmp_path)}
        assert 0 < len(finished) < len(runs)
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
        work.join(240)
    assert not work.is_alive() and not failed and all(is_done(r, tmp_path) for r in runs)
    assert {id: (tmp_path/id/'result.json').stat().st_mtime_ns for id in finished} == finished
    assert Counter(p.parent.name for p in tmp_path.rglob('result.json')) == Counter(r.id for r in runs)

LOCAL = dict(dashboard_address=None, memory_limit=0, host='127.0.0.1')

def test_one_worker_of_two_threads_trains_as_one_process_does(tmp_path, monkeypatch):
    "The worker does it all, one run after the other, and finds the scheduler by its file."
    import distributed
    runs = [tiny(seed) for seed in range(2)]
    carry_out(runs, tmp_path/'here', progress=False)
    def elsewhere(*args, **how): raise AssertionError('the client trains')
    monkeypatch.setattr('sleepnb.runs._carry_out', elsewhere)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, **LOCAL) as cluster:
        (tmp_path/'scheduler.json').write_text(json.dumps(dict(address=cluster.scheduler_address)))
        how = dict(backend='dask', scheduler=str(tmp_path/'scheduler.json'), progress=False)
        assert not carry_out(runs, tmp_path/'there', **how)
    for run in runs:
        here,there = (read_result(run, tmp_path/o) for o in ('here', 'there'))
        for k in ('scores', 'nights', 'training'): assert here[k] == there[k]

def test_a_run_that_kills_its_workers_does_not_stop_the_others():
    import dask, distributed
    runs = [tiny(seed) for seed in range(2)]                                  # one for each worker
    def work(run):
        if run == runs[0]: os._exit(1)
        return run, ''
    with dask.config.set({'distributed.scheduler.allowed-failures': 0}), \
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, **LOCAL) as cluster, \
            _workers(1, 'dask', cluster.scheduler_address) as each: found = dict(each(work, runs))
    assert {*found} == {*runs} and found[runs[0]].startswith('KilledWorker')

def test_the_shell_computes_nothing_twice(tmp_path):
    "Table 4 of MTSSRL-MD from one end to the other, interrupted in between."
    command = ['sleepnb', 'run', 'mtssrl-table4', '--scale', 'smoke', '--out', str(tmp_path)]
    runs = runs_of('mtssrl-table4', 'smoke')
    first = subprocess.Popen([*command, '--jobs', '2'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while first.poll() is None and not any(is_done(r, tmp_path) for r in runs) and time.monotonic() < deadline: time.sleep(.02)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and 'Traceback' not in told, told
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('result.json')}
    assert 0 < len(before) < len(runs)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f'20 runs, {len(before)} done' in again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert all(is_done(r, tmp_path) for r in runs) and not [*tmp_path.rglob('failed.json')]
    assert 'mtssrl-table4, scale smoke: 20 of 20 runs found' in again.stdout and '– (' not in again.stdout
    assert len(re.findall(r'\d+\.\d\d \(\d+\.\d\d\)', again.stdout)) == 30           # two metrics of the fifteen rows that are printed
    states = json.loads(subprocess.run(['sleepnb', 'runs', 'mtssrl-table4', '--scale', 'smoke', '--out', str(tmp_path), '--json'],
                                       capture_output=True, text=True, check=True).stdout)['mtssrl-table4']
    assert (states['expected'], states['done'], states['missing']) == (20, 20, 0)

def test_a_training_for_any_modality_is_tested_with_each(tmp_path):
    "FeatureNet's one training has the three tests of SleepSMC's Table 2."
    run, = {r for r in runs_of('sleepsmc-table2', 'smoke') if r.config['primary'] == 'any'}
    assert not carry_out([run], tmp_path, progress=False)
    found = read_result(run, tmp_path)
    assert [*found['scores']] == ['EEG', 'EOG', 'EMG'] == [m for m in dict.fromkeys(n['using'] for n in found['nights'])]
    assert all((tmp_path/run.id/f'weights {m}.safetensors').exists() for m in found['scores'])

def test_a_figure_trains_what_its_rows_name(tmp_path):
    "One corner of the grid of channel alignment, to its table; the numbers of a figure are not printed."
    row = table_rows('mtssrl-figure4', 'smoke').query('dataset == "SleepEDF-20" and setting.str.endswith("n_dims=32;n_virtual=8")').iloc[0]
    assert carry_out(row.runs, tmp_path, progress=False) == {}
    network,_ = load_weights(tmp_path/row.runs[0].id/'weights.safetensors')
    assert [tuple(cam.heads.shape) for cam in network.backbone.alignment.cams] == [(8, 32)]
    table = recipe_table('mtssrl-figure4', 'smoke', tmp_path)
    assert table.printed.isna().all() and len(table) == 27*3
    assert {*table[table.ours.notna()].setting} == {row.setting} and table.ours.notna().sum() == 3
