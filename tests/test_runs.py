"Runs and recipes: killed, damaged, repeated, on a cluster, and counted by hand."
import ast, hashlib, json, os, re, shutil, signal, subprocess, sys, time
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score
from torch.optim.optimizer import register_optimizer_step_post_hook

import sleepnb
from sleepnb.core import SleepnbError, WeightsError
from sleepnb.data.store import EpochStore
from sleepnb.metrics import score_difference
from sleepnb.recipes import DATASETS, RECIPES, SCALES, Run, runs_of, table_rows
from sleepnb.results import describe_runs, results_table
from sleepnb.runs import (_begin, _workers, carry_out, compare_runs, compare_stages, estimate_hours, is_done, read_result, read_stages,
                          recipe_status, recipe_table, run_recipe, runs_to_do)
from sleepnb.trainings import _SHOWS, _UNUSED, TASKS, _read_code, code_checksum
from sleepnb.weights import FORMAT, load_weights, write_tensors

RUNS = Path(__file__).parent.parent/'nbs'/'artifacts'/'runs'

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "The two runs of a table."
    out = tmp_path_factory.mktemp('runs')
    run_recipe('mtssrl-table6', 'smoke', out, progress=False)
    return out

def tiny(seed): # a training of a second or two
    return Run('scratch', next(r for r in runs_of('mtssrl-table2', 'smoke') if r.task == 'scratch').config | dict(seed=seed))

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
    assert str(eog) == f'sleepsmc on isruc3-simulated, EOG, C + U, fold 0, seed 0 ({eog.id})'

@pytest.mark.parametrize('recipe', RECIPES)
def test_every_printed_row_has_a_place(recipe):
    "Rows of systems that are built have runs of the dataset and the labels that the row names; others have none."
    for scale in ('small', 'paper'):
        for row in table_rows(recipe, scale).itertuples():
            assert bool(row.runs) == (row.model in ('MTSSRL-MD', 'from scratch', 'SleepSMC', 'FeatureNet'))
            for run in row.runs:
                names = [o['name'] for o in run.config['data']]
                assert names == [DATASETS[RECIPES[recipe][0]][row.dataset][0 if scale == 'paper' else 1] + '-simulated'*(scale == 'small')]
                if 'labels=' in row.setting: assert f'labels={run.config["labels"]:.0%}' in row.setting
                if run.task == 'sleepsmc' and '+' in row.modality: assert run.config['primary'] == 'all'
                if run.task == 'sleepsmc' and '+' not in row.modality: assert run.config['primary'] in (row.modality, 'any')
                if run.parent: assert run.parent.config['seed'] == run.config['seed'] and run.parent.config['split'] == run.config['split']

def test_from_scratch_differs_in_what_it_begins_with():
    "It learns from the same labels of the same people, with the same rates and as many passes, and ends no earlier."
    for recipe in ('mtssrl-table1', 'mtssrl-table2', 'mtssrl-table3'):
        rows = table_rows(recipe).query('model in ["MTSSRL-MD", "from scratch"]').set_index(['dataset', 'model']).runs.str[0].unstack()
        for tuned,scratch in zip(rows['MTSSRL-MD'], rows['from scratch']):
            same = dict(scratch.config)
            assert same.pop('drop') == tuned.parent.config['drop'] and not scratch.parent
            unfreeze,patience = tuned.config['unfreeze'], tuned.config['patience']       # which counts once all is free
            assert same == {k: v for k,v in tuned.config.items() if k != 'unfreeze'} | dict(patience=patience + max(unfreeze))

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

@pytest.mark.parametrize('scale', ['smoke', 'small'])
def test_scores_are_those_of_the_stages(scale, out):
    "Of a run of just now, and of one that is kept and has learned: five stages with five scores, against scikit-learn's."
    run,where = runs_of('mtssrl-table6', scale)[1], out if scale == 'smoke' else RUNS
    stages,table = read_stages([run], out=where), recipe_table('mtssrl-table6', scale, where).query('model == "MTSSRL-MD"')
    f1 = f1_score(stages.stage, stages.pred, average=None, labels=range(5), zero_division=0)
    if scale == 'small': assert len({*f1.round(3)}) == 5 and f1.min() > 0
    ours = table.set_index('metric').ours
    np.testing.assert_allclose(ours[['F1_W', 'F1_N1', 'F1_N2', 'F1_N3', 'F1_REM']], 100*f1, atol=1e-3)
    np.testing.assert_allclose(ours[['MF1', 'kappa', 'BACC']], [100*f(stages.stage, stages.pred) for f in (
        partial(f1_score, average='macro'), cohen_kappa_score, balanced_accuracy_score)], atol=1e-3)
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

DAMAGES = {'empty': '', 'cut': '{"id": "', 'brace': '{', 'nothing in it': '{}', 'a list': '[]', 'not text': b'\xff\x00'}

@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['result.json', 'failed.json'])
def test_a_damaged_file_is_named_and_never_taken_for_a_missing_one(name, damage, out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    run = runs_of('mtssrl-table6', 'smoke')[1]
    path,content = copy/run.id/name, DAMAGES[damage]
    if name == 'failed.json': (copy/run.id/'result.json').unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    readers = [lambda: carry_out([run], copy, progress=False), lambda: run_recipe('mtssrl-table6', 'smoke', copy, progress=False),
               lambda: recipe_status('mtssrl-table6', 'smoke', copy), lambda: describe_runs('mtssrl-table6', 'smoke', copy)]
    if name == 'result.json': readers += [lambda: read_result(run, copy), lambda: results_table('mtssrl-table6', 'smoke', copy)]
    for read in readers:
        with pytest.raises(SleepnbError) as error: read()
        assert str(path) in str(error.value) and 'Delete this file' in str(error.value)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())   # it is still there
    path.unlink()
    assert runs_to_do([run], copy) == [run]

def test_a_pretraining_without_weights_is_trained_again_where_they_are_needed(out, tmp_path, capsys):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    weights = copy/before.id/'weights.safetensors'
    weights.unlink()
    assert runs_to_do([before, after], copy) == []                    # nobody needs them
    (copy/after.id/'result.json').unlink()
    assert runs_to_do([after], copy) == [before, after] and runs_to_do([before], copy) == []
    result = (copy/before.id/'result.json').read_bytes()
    assert carry_out([after], copy) == {}
    assert f'its weights are gone, and it is trained again: {before}' in capsys.readouterr().err
    assert (copy/before.id/'result.json').read_bytes() == result      # the same code made it
    one,two = (load_weights(o/before.id/'weights.safetensors')[0].state_dict() for o in (out, copy))
    assert all((one[k] == v).all() for k,v in two.items())
    assert read_result(after, copy)['scores'] == read_result(after, out)['scores']
    assert runs_to_do([before, after], copy) == []

def test_a_result_of_earlier_code_does_not_stay_beside_new_weights(out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    (copy/before.id/'weights.safetensors').unlink()
    shutil.rmtree(copy/after.id)
    make_stale(before, copy)
    assert carry_out([after], copy, progress=False) == {}
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'done']

@pytest.mark.parametrize('damage', ['empty', 'cut', 'one byte'])
def test_damaged_weights_are_told_before_anything_begins(damage, out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    shutil.rmtree(copy/after.id)
    shutil.rmtree(copy/'stores')
    path = copy/before.id/'weights.safetensors'
    whole = path.read_bytes()
    path.write_bytes(dict(empty=b'', cut=whole[:len(whole) // 2])[damage] if damage != 'one byte' else whole[:-1] + bytes([whole[-1] ^ 1]))
    for begin in (lambda: carry_out([after], copy, progress=False), lambda: run_recipe('mtssrl-table6', 'smoke', copy, progress=False)):
        with pytest.raises(WeightsError, match=re.escape(f'Delete the folder {path.parent}: the pretraining')): begin()
    assert not (copy/after.id).exists() and not (copy/'stores').exists()
    shutil.rmtree(path.parent)
    assert runs_to_do([after], copy) == [before, after]

def make_stale(run, out): # as if earlier code had made it
    path = out/run.id/'result.json'
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | dict(made=found['made'] | dict(code='0', started='2000-01-01T00:00:00+00:00'))))

def test_other_code_makes_results_stale(out, tmp_path):
    package = shutil.copytree(Path(sleepnb.__file__).parent, tmp_path/'sleepnb', ignore=shutil.ignore_patterns('__pycache__'))
    checksum = lambda task='finetune': code_checksum(task, _read_code(package))
    assert checksum() == code_checksum('finetune')
    file = package/'learner.py'
    text = file.read_text()
    file.write_text('# a word more\n' + text.replace('"Trains a network to stages from random weights."', '"Trains."'))
    assert checksum() == code_checksum('finetune')
    error = next(line for line in text.splitlines() if line.strip().startswith('raise '))
    file.write_text(text.replace(error, error.replace("'", "'other words: ", 1)))
    assert file.read_text() != text and checksum() == code_checksum('finetune')
    file.write_text(text.replace('raise WeightsError(', 'raise KeyError(', 1))
    assert checksum() != code_checksum('finetune')
    file.write_text(text)
    (package/'report.py').write_text('shown = 1')                     # does not decide
    (package/'__init__.py').write_text('__version__ = "99"')          # neither does a version
    assert checksum() == code_checksum('finetune')
    file.write_text(text.replace('lr:float=1e-3', 'lr:float=2e-3'))
    assert checksum() != code_checksum('finetune') and checksum('sleepsmc') != code_checksum('sleepsmc')
    file.write_text(text)
    for path,tasks in {'ssrl/mtssrl.py': {'pretrain', 'finetune', 'scratch'}, 'multimodal/contrast.py': {'sleepsmc'},
                       'multimodal/sleepsmc.py': {'sleepsmc'}, 'multimodal/reliability.py': {*TASKS}, 'trainings.py': {*_UNUSED},
                       'synth.json': {*_UNUSED}, 'paper_tables.csv': set()}.items():
        text = (package/path).read_text()
        (package/path).write_text(text + ('\nmore = 1\n' if path.endswith('.py') else '\n'))
        code = _read_code(package)
        assert {t for t in _UNUSED if code_checksum(t, code) != code_checksum(t)} == tasks
        (package/path).write_text(text)
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    make_stale(after, copy)
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'stale']
    copy = shutil.copytree(out, tmp_path/'another')
    make_stale(before, copy)                                          # from which the other began
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['stale', 'stale']

class Forbids(ast.NodeTransformer):
    "Whatever a function did, now it fails."
    def visit_FunctionDef(self, node):
        node.body = [ast.parse("raise AssertionError('this is not used')").body[0]]
        return node

@pytest.mark.parametrize('task', _UNUSED)
def test_a_task_does_not_use_what_its_checksum_leaves_out(task, tmp_path):
    "In a copy of the package in which no function of that works, it trains as here; and the other paper's does not."
    package = shutil.copytree(Path(sleepnb.__file__).parent, tmp_path/'sleepnb', ignore=shutil.ignore_patterns('__pycache__'))
    for path in package.rglob('*.py'):
        if not path.relative_to(package).as_posix().startswith(_UNUSED[task]): continue
        assert path.stem not in _SHOWS
        tree = ast.parse(path.read_text())
        path.write_text(ast.unparse(Forbids().visit(tree)))
    code = ('import sys, sleepnb; from pathlib import Path; from sleepnb.recipes import *; from sleepnb.runs import *\n'
            'assert Path(sleepnb.__file__).parent.parent == Path.cwd()\n'
            'runs,smc = runs_of("mtssrl-table6", "smoke"), {r.what: r for r in runs_of("sleepsmc-table3", "smoke") if r.data == "isruc3-simulated"}\n'
            'asked = dict(pretrain=runs[:1], finetune=runs, scratch=[r for r in runs_of("mtssrl-table2", "smoke") if r.task == "scratch"][:1],\n'
            '             sleepsmc=[smc[o] for o in ("any, FeatureNet", "any, C", "all, C + U", "EOG, C + U")])\n'
            'from sleepnb.trainings import _store\n'
            'Path("out/stores").mkdir(parents=True)\n'
            'for task in sys.argv[1:]:\n'
            '    if task == "nights": print(_store(runs[0].config["data"][0], Path("out/stores")).failed or "fine")\n'
            '    else: print(carry_out(asked[task], "out", progress=False) or "fine")')
    done = subprocess.run([sys.executable, '-c', code, task, 'pretrain' if task == 'sleepsmc' else 'sleepsmc'], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=''))
    assert done.returncode == 0, done.stderr
    own,other = done.stdout.splitlines()
    assert own == 'fine' and 'this is not used' in other

def test_what_earlier_code_has_made_is_redone_when_asked(out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    make_stale(before, copy)
    shown = (copy/after.id/'result.json').read_bytes()
    assert carry_out([after], copy, progress=False) == {} and (copy/after.id/'result.json').read_bytes() == shown
    assert runs_to_do([after], copy) == [] and runs_to_do([after], copy, redo_stale=True) == [before, after]
    assert carry_out([before], copy, redo_stale=True, progress=False) == {}
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'done']             # it began from the same weights
    found = json.loads((copy/after.id/'result.json').read_text())
    (copy/after.id/'result.json').write_text(json.dumps(found | dict(before='others')))
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'stale']
    assert carry_out([after], copy, redo_stale=True, progress=False) == {}
    assert [*recipe_status('mtssrl-table6', 'smoke', copy).state] == ['done', 'done']
    for run in (before, after): assert read_result(run, copy)['training'] == read_result(run, out)['training']
    assert runs_to_do([after], copy, redo_stale=True) == []

def test_what_cannot_be_redone_stays(out, tmp_path, monkeypatch):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    make_stale(before, copy)
    results = [(copy/r.id/'result.json').read_bytes() for r in (before, after)]
    tried = []
    def fail(run, *args):
        tried.append(run)
        raise ValueError('no')
    monkeypatch.setitem(TASKS, 'pretrain', fail)
    assert [*carry_out([after], copy, redo_stale=True, progress=False)] == [before.id, after.id]
    assert [(copy/r.id/'result.json').read_bytes() for r in (before, after)] == results
    assert [*carry_out([after], copy, redo_stale=True, progress=False)] == [before.id, after.id]
    assert tried == [before]                                          # a second time only when that is asked for

def test_a_claim_is_a_difference_over_people(tmp_path):
    "Two runs made by hand: one is right always, the other in nine of ten epochs."
    runs = [tiny(seed) for seed in (0, 1)]
    stage = '01234'*20
    wrong = ''.join('0' if i % 10 == 4 else o for i,o in enumerate(stage))
    for run,pred in zip(runs, (stage, wrong)):
        nights = [dict(using='EEG', cohort='c', subject=str(s), night='1', stage=stage, pred=pred) for s in range(4)]
        (tmp_path/run.id).mkdir()
        (tmp_path/run.id/'result.json').write_text(json.dumps(dict(id=run.id, scores={}, nights=nights, made={})))
    for run in runs: run.config['seed'] = 0                           # nights are the same only under the same seed
    found = compare_runs(runs[:1], runs[1:], out=tmp_path)
    f1 = f1_score([*stage], [*wrong], average='macro')
    assert found['verdict'] == 'holds' and (found['people'], found['runs']) == (4, 1)
    np.testing.assert_allclose([found[k] for k in ('value', 'low', 'high')], 1 - f1)
    assert compare_runs(runs[1:], runs[:1], out=tmp_path)['verdict'] == 'does not hold'
    path = tmp_path/runs[1].id/'result.json'
    path.write_text(path.read_text().replace(f'"stage": "{stage}"', f'"stage": "{wrong}"', 1))    # one night is another
    assert compare_runs(runs[:1], runs[1:], out=tmp_path)['verdict'] == 'not computed'

def test_all_ways_to_draw_few_people_are_counted():
    "Naively: every order of three people, their epochs put together, and scikit-learn asked about both."
    g = np.random.default_rng(0)
    epochs = pd.DataFrame(dict(cohort='c', subject=np.repeat([*'abc'], 60), night=1, stage=g.integers(0, 5, 180)))
    wrong = lambda share: np.where(g.random(180) < share, g.integers(0, 5, 180), epochs.stage)
    a,b = epochs.assign(pred=wrong(.2)), epochs.assign(pred=wrong(.3))
    tail = stats.norm.cdf(-np.sqrt(3/2)*stats.t.ppf(.975, 2))
    for metric,score in dict(macro_f1=partial(f1_score, average='macro'), kappa=cohen_kappa_score).items():
        apart = []
        for who in product('abc', repeat=3):
            x,y = (pd.concat([o[o.subject == s] for s in who]) for o in (a, b))
            apart.append(score(x.stage, x.pred) - score(y.stage, y.pred))
        found = compare_stages(a, b, metric)
        np.testing.assert_allclose([found['low'], found['high']], np.quantile(apart, [tail, 1 - tail]))
        np.testing.assert_allclose(found['value'], score(a.stage, a.pred) - score(b.stage, b.pred))

def made_up_people(people, seed=0, epochs=60):
    "What two models that err differently often stage."
    g = np.random.default_rng(seed)
    of = pd.DataFrame(dict(cohort='c', subject=np.repeat(np.arange(people), epochs), night=1, stage=g.integers(0, 5, epochs*people)))
    return [of.assign(pred=np.where(g.random(len(of)) < share, 0, of.stage)) for share in (.2, .3)]

@pytest.mark.parametrize('people', [1, 2, 6, 7, 8])
def test_up_to_seven_people_are_counted_and_more_are_drawn(people):
    "What is counted has nearly the interval of many draws; what is drawn has that of `score_difference`."
    a,b = made_up_people(people)
    found,drawn,many = compare_stages(a, b), score_difference(a, b), score_difference(a, b, n_boot=50_000, seed=1)
    of = lambda table: table.loc['macro_f1', ['low', 'high']].tolist()
    np.testing.assert_allclose([found['low'], found['high']], of(many), atol=.003)
    if people in (6, 7): assert [found['low'], found['high']] != of(drawn)
    if people == 8: np.testing.assert_allclose([found['low'], found['high']], of(drawn), rtol=1e-9)
    assert found['people'] == people and found['value'] == pytest.approx(drawn.value['macro_f1'])

def test_people_are_paired_by_name():
    "However their names are written: as numbers, 10 comes after 2, and as texts before it."
    a,b = made_up_people(3)
    a,b = (o.assign(subject=o.subject.map({0: 2, 1: 3, 2: 10})) for o in (a, b))
    assert compare_stages(a, b) == compare_stages(a, b.assign(subject=b.subject.astype(str)))

def test_a_comparison_with_itself_is_undecided():
    a,_ = made_up_people(6)
    found = compare_stages(a, a)
    assert (found['low'], found['high'], found['verdict']) == (0, 0, 'undecided')

def test_people_without_a_scored_epoch_are_no_error():
    a,b = (o.assign(stage=o.stage.where(o.subject == 0, -1)) for o in made_up_people(3))
    found = compare_stages(a, b)
    assert found['low'] == found['value'] == found['high'] > 0

def test_what_cannot_be_compared_is_an_error():
    a,b = made_up_people(3)
    with pytest.raises(SleepnbError, match='the two are not of the same epochs'): compare_stages(a, b[b.subject > 0])
    with pytest.raises(SleepnbError, match='the table has no column cohort'): compare_stages(a, b.drop(columns='cohort'))
    with pytest.raises(SleepnbError, match="no such metric .*macro_f1.* found 'MF1'"): compare_stages(a, b, 'MF1')

def test_runs_of_two_systems_are_not_mixed(out):
    run = runs_of('mtssrl-table6', 'smoke')[1]
    with pytest.raises(SleepnbError, match='a night is staged twice with one split and seed'): read_stages([run, run], out=out)

def test_hours_by_hand():
    run = next(r for r in runs_of('sleepsmc-table2') if r.config['primary'] == 'EOG')
    assert estimate_hours([run]) == pytest.approx((.64*30*480*6*.0035*2 + 1) / 3600)
    run = runs_of('mtssrl-table6')[0]
    assert estimate_hours([run]) == pytest.approx((520*100*6*.003 + 1) / 3600)   # two views, three epochs, one

@pytest.mark.parametrize('recipe', ['mtssrl-table1', 'mtssrl-table3', 'mtssrl-table4', 'mtssrl-table5', 'sleepsmc-table2',
                                    'mtssrl-figure4', 'sleepsmc-table3', 'sleepsmc-equation8', 'sleepsmc-seeds'])
def test_hours_are_those_of_the_committed_runs(recipe):
    "Within a factor of two for a table; within three for a training, by the passes that patience left of it."
    runs = [r for r in runs_of(recipe) if is_done(r, RUNS)]
    found = [read_result(r, RUNS) for r in runs]
    took = [o['made']['cpu_seconds'] / 3600 for o in found]
    assert runs and .5 < estimate_hours(runs) / sum(took) < 2
    for run,o,hours in zip(runs, found, took):
        c = run.config
        left = len(o['training']['pass']) / (c['passes']*len(c['rates'])) if 'patience' in c else 1
        assert 1/3 < left*estimate_hours([run]) / hours < 3, run

def test_hours_at_the_scale_smoke():
    "What 20 runs took on a small machine: 33 seconds of a core, within a factor of two."
    assert 16 < 3600*estimate_hours(runs_of('mtssrl-table4', 'smoke')) < 66

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

def test_jobs_and_schedulers_that_there_are_not(tmp_path):
    import dask, distributed
    for jobs in (0, -2):
        with pytest.raises(SleepnbError, match=f'jobs is a number of processes .*found {jobs}'): carry_out([tiny(0)], tmp_path, jobs=jobs)
    with pytest.raises(SleepnbError, match='Add --backend dask'): carry_out([tiny(0)], tmp_path, scheduler='tcp://localhost:1')
    where = dict(backend='dask', scheduler='tcp://localhost:1', progress=False)
    with pytest.raises(SleepnbError, match='a scheduler has workers of its own'): carry_out([tiny(0)], tmp_path, jobs=2, **where)
    with dask.config.set({'distributed.comm.timeouts.connect': '1s'}), \
            pytest.raises(SleepnbError, match='tcp://localhost:1: no scheduler of Dask answers'): carry_out([tiny(0)], tmp_path, **where)
    assert not carry_out([tiny(0)], tmp_path, progress=False)
    began = time.monotonic()
    assert carry_out([tiny(0)], tmp_path, **where) == {}                      # nothing is left to do, and nobody is asked
    assert time.monotonic() - began < 5

@pytest.fixture
def steps():
    "Which optimizer took each step."
    taken = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: taken.append(optimizer))
    yield taken
    hook.remove()

def test_a_killed_run_goes_on_to_the_same_result(out, tmp_path, steps):
    code = ('import sys; from sleepnb.callbacks import Checkpoint; from sleepnb.runs import run_recipe; Checkpoint.__init__.__defaults__ = (0.,); '
            'run_recipe("mtssrl-table6", "smoke", sys.argv[1], progress=False)')     # written down after every step
    first,second = runs_of('mtssrl-table6', 'smoke')
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)])
    while process.poll() is None and not (tmp_path/first.id/'checkpoint.safetensors').exists(): time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not is_done(first, tmp_path)
    assert not carry_out([first], tmp_path, progress=False)
    left = len(steps)
    assert not carry_out([first], tmp_path/'whole', progress=False)
    assert left < len(steps) - left                                           # than at one go
    run_recipe('mtssrl-table6', 'smoke', tmp_path, progress=False)
    for run in (first, second):
        one,two = (read_result(run, o) for o in (out, tmp_path))
        for k in ('scores', 'nights', 'training'): assert one[k] == two[k]
    assert not [*tmp_path.rglob('*checkpoint*')]

def test_a_killed_training_for_any_modality_goes_on_to_the_same_result(tmp_path, steps):
    "Killed after the second of three passes, by whose validation the weights of each modality are chosen."
    run, = {r for r in runs_of('sleepsmc-table2', 'smoke') if r.config['primary'] == 'any'}
    run = Run(run.task, run.config | dict(passes=3))
    code = ('import os, signal, sys; from sleepnb.callbacks import Checkpoint; from sleepnb.recipes import *; from sleepnb.runs import carry_out\n'
            'saved = Checkpoint.after_epoch\n'
            'def after_epoch(self):\n'
            '    saved(self)\n'
            '    if self.epoch == 1: os.kill(os.getpid(), signal.SIGKILL)\n'
            'Checkpoint.after_epoch = after_epoch\n'
            f'carry_out([Run("sleepsmc", {run.config!r})], sys.argv[1], progress=False)')
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path/'killed')]).returncode == -signal.SIGKILL
    assert (tmp_path/'killed'/run.id/'checkpoint.safetensors').exists()
    for folder in ('killed', 'whole'): assert carry_out([run], tmp_path/folder, progress=False) == {}
    left,whole = Counter(map(id, steps)).values()
    assert 3*left == whole                                                    # of three passes one was left
    one,two = (read_result(run, tmp_path/folder) for folder in ('killed', 'whole'))
    for k in ('scores', 'nights', 'training'): assert one[k] == two[k]

@pytest.mark.parametrize('other', ['code', 'weights of the pretraining'])
def test_a_checkpoint_of_other_code_or_weights_is_not_continued(other, tmp_path):
    parent,run = runs_of('mtssrl-table6', 'smoke')
    folder,weights = tmp_path/run.id, tmp_path/parent.id/'weights.safetensors'
    for made in (folder, weights.parent): made.mkdir()
    write = lambda value: write_tensors(weights, {'a': torch.tensor([value])}, dict(kind='weights', format=FORMAT))
    write(1.)
    left = [folder/'checkpoint.safetensors', folder/'lr 0.1.checkpoint.safetensors']
    def begin(task):
        _begin(Run(task, run.config, run.parent) if task != run.task else run, folder, tmp_path)
        return [p.exists() for p in left]
    for p in left: p.touch()
    assert begin(run.task) == [False, False]                                  # nothing says whose these were
    for p in left: p.touch()
    assert begin(run.task) == [True, True]                                    # it goes on
    if other != 'code': write(2.)
    assert begin('sleepsmc' if other == 'code' else run.task) == [False, False]   # its checksum is another

def trains(*options, out):
    "A command that trains for minutes, when its first run has begun, and all processes that it has started."
    command = ['sleepnb', 'run', 'sleepsmc-table2', '--out', str(out), '--jobs', '2', '--yes', *options]
    with (out/'told').open('w') as told: parent = psutil.Popen(command, stderr=told, start_new_session=True)
    deadline = time.monotonic() + 120
    while not [*out.glob('*/.lock')] and parent.poll() is None and time.monotonic() < deadline: time.sleep(.1)
    below = parent.children(recursive=True)
    assert len(below) >= 2, (out/'told').read_text()
    return parent, below

def end(parent, below): # who is left of them after a minute, and is killed
    _,left = psutil.wait_procs([parent, *below], timeout=60)
    for p in left: p.kill()
    return left

@pytest.mark.parametrize('how, backend', [(signal.SIGKILL, 'loky'), (signal.SIGTERM, 'loky'), (signal.SIGKILL, 'dask')])
def test_workers_end_with_their_parent(how, backend, tmp_path):
    "Trainings of minutes, of which the parent is ended: its workers end, too."
    parent,below = trains('--backend', backend, out=tmp_path)
    parent.send_signal(how)
    left,told = end(parent, below), (tmp_path/'told').read_text()
    assert not left, told
    if how == signal.SIGTERM: assert parent.returncode == 130 and 'The same command, given again, goes on.' in told, told

def test_a_process_that_is_lost_is_told(tmp_path):
    "One of two processes is killed, as for want of memory; what to do is said, and nobody is left behind."
    parent,below = trains(out=tmp_path)
    next(p for p in below if any('popen_loky' in o for o in p.cmdline())).kill()
    left,told = end(parent, below), (tmp_path/'told').read_text()
    assert not left and parent.returncode not in (0, 130) and 'Traceback' not in told, told
    assert 'a process was lost' in told and 'use fewer jobs' in told, told

def test_a_cohort_that_lacks_somebody_makes_no_result(tmp_path, monkeypatch):
    "One night of five cannot be prepared, as for want of memory; tried again, it can."
    import sleepnb.trainings as trainings
    whole = trainings._simulated
    def four(row, *args, **kwargs):
        if row['subject'] == '03': raise MemoryError('no')
        return whole(row, *args, **kwargs)
    run = tiny(0)
    with monkeypatch.context() as patched:
        patched.setattr(trainings, '_simulated', four)
        why, = carry_out([run], tmp_path, progress=False).values()
        assert 'not whole' in why and 'found 4 nights' in why and not is_done(run, tmp_path)
    assert not carry_out([run], tmp_path, retry=True, progress=False)
    tested = {(n['cohort'], n['subject']) for n in read_result(run, tmp_path)['nights']}
    assert tested == {*trainings.split_of(run.config, EpochStore(*tmp_path.glob('stores/S-*/')).nights).test}

def test_a_result_in_the_folder_of_another_run_is_refused(out, tmp_path):
    before,after = runs_of('mtssrl-table6', 'smoke')
    shutil.copytree(out/before.id, tmp_path/after.id)
    with pytest.raises(SleepnbError, match='the result of another run'): recipe_status('mtssrl-table6', 'smoke', tmp_path)

def test_home_is_understood(out, monkeypatch):
    monkeypatch.setenv('HOME', str(out.parent))
    table = run_recipe('mtssrl-table6', 'smoke', f'~/{out.name}', progress=False)
    assert table.found.sum() > 0 and table.equals(recipe_table('mtssrl-table6', 'smoke', f'~/{out.name}'))

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
    assert 'mtssrl-table4, scale smoke: 20 of 20 runs found, 15 of 15 rows complete' in again.stdout
    assert 'The numbers mean nothing' in again.stdout and '– (' not in again.stdout
    assert len(re.findall(r'\d+\.\d\d \(\d+\.\d\d\)', again.stdout)) == 30           # two metrics of the fifteen rows that are printed
    states = json.loads(subprocess.run(['sleepnb', 'runs', 'mtssrl-table4', '--scale', 'smoke', '--out', str(tmp_path), '--json'],
                                       capture_output=True, text=True, check=True).stdout)['mtssrl-table4']
    assert (states['expected'], states['done'], states['missing']) == (20, 20, 0)

def test_the_shell_shows_what_there_is_when_a_run_failed(out, tmp_path):
    copy = shutil.copytree(out, tmp_path/'copy')
    before,after = runs_of('mtssrl-table6', 'smoke')
    shutil.rmtree(copy/after.id)
    (copy/after.id).mkdir()
    (copy/after.id/'failed.json').write_text(json.dumps(dict(why='ValueError: no')))
    shown = subprocess.run(['sleepnb', 'run', 'mtssrl-table6', '--scale', 'smoke', '--out', copy], capture_output=True, text=True)
    assert shown.returncode == 1 and '1 of 2 runs found, 1 failed' in shown.stdout and 'Traceback' not in shown.stderr
    assert '1 of 2 runs failed: ValueError: no' in shown.stderr and '--retry' in shown.stderr

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
