"Pages of results: they show what runs have left, all of it and nothing else, and stay whole when a run is gone."
import json, re, shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from sklearn.metrics import cohen_kappa_score

from sleepnb.recipes import METRICS, RECIPES, runs_of, table_rows
from sleepnb.results import CLAIMS, describe_runs, plot_claims, plot_results, results_claims, results_summary, results_table, show_claims
from sleepnb.trainings import code_checksum

ROOT = Path(__file__).parent.parent
RUNS = ROOT/'nbs'/'artifacts'/'runs'
PAGES = [p for p in sorted((ROOT/'nbs').glob('8[34]?_*.ipynb')) if not p.name.startswith('830')]

def code(page): return [c.source for c in read_nb(page).cells if c.cell_type == 'code']

def error_rate(run):
    "A world in which the papers are right: whatever they call better is wrong less often."
    c = run.config
    if run.task == 'sleepsmc': return .1 + .1*(not c['uncertainty']) + .1*(not c['contrast']) + .1*(c['score'] == 'negative')
    if run.task == 'scratch': return .5
    before = run.parent.config
    return .1 - .05*(not any(c['unfreeze'])) + .1*(before['weighting'] == 'equal') + .2*(len(before['tasks']) < 3) + .1*(len(before['data']) < 3) + .1*('cam' in before)

def stages_of(person, rate, epochs=200):
    "What a made-up person's night is, and what is staged."
    stage,wrong = np.arange(epochs) % 5, np.random.default_rng(person).random(epochs) < rate
    return stage, np.where(wrong, (stage + 1) % 5, stage)

def make_up(run, out, rate=None, people=3, epochs=200):
    "A result as a run leaves it; whoever is right less often is also wrong wherever the other is."
    using = [] if run.task == 'pretrain' else ['EEG'] if run.task in ('finetune', 'scratch') else \
        run.config['modalities'] if run.config['primary'] == 'any' else \
        ['+'.join(run.config['modalities'])] if run.config['primary'] == 'all' else [run.config['primary']]
    rate = error_rate(run) if using and rate is None else rate
    nights = []
    for u in using:
        for person in range(people):
            digits = [''.join(map(str, o)) for o in stages_of(person, rate, epochs)]
            nights.append(dict(using=u, cohort='c', subject=str(person), night='1', stage=digits[0], pred=digits[1]))
    scores = {u: {m: [1 - rate, .9 - rate, None, None, epochs] for m in METRICS.values()} for u in using}
    (out/run.id).mkdir(parents=True, exist_ok=True)
    (out/run.id/'result.json').write_text(json.dumps(dict(id=run.id, nights=nights, scores=scores, made=dict(code='made up'))))

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    for run in {r for recipe in RECIPES for r in runs_of(recipe)}: make_up(run, out)
    return out

def show_all(recipe, out):
    import matplotlib.pyplot as plt
    table,claims = results_table(recipe, out=out), results_claims(recipe, out=out)
    show_claims(claims)
    plot_claims(claims)
    plot_results(recipe, out=out)
    plt.close('all')
    return table, claims

@pytest.mark.parametrize('recipe', RECIPES)
def test_a_missing_run_is_a_missing_cell(recipe, out, tmp_path):
    "In a world in which the papers are right, all that can be tested holds, but for what needs the run that is gone."
    gone,n = runs_of(recipe)[-1], len(runs_of(recipe))
    (hidden := tmp_path/'hidden').mkdir()
    shutil.move(out/gone.id, hidden)
    try: (table,claims),said = show_all(recipe, out), describe_runs(recipe, out=out)
    finally: shutil.move(hidden/gone.id, out)
    rows = table_rows(recipe)
    built = [runs for runs in rows.runs if runs]
    assert f'{n - 1} of {n} runs found, {n - 1} of them made by earlier code, ' \
           f'{sum(gone not in runs for runs in built)} of {len(built)} rows complete' in said
    lacking = np.array([{*runs} <= {gone} for runs in rows.runs])
    partly = np.array([gone in runs and len(runs) > 1 for runs in rows.runs])
    assert table.map(lambda cell: cell.endswith(', 2 of 3')).all(axis=1).sum() == partly.sum()
    assert table.map(lambda cell: cell.startswith('–')).all(axis=1).sum() == lacking.sum() and (lacking.any() or partly.any())
    assert not table[~table.map(lambda cell: cell.startswith('–')).all(axis=1)].map(lambda cell: cell.startswith('–')).any(axis=None)
    built = {r.model for r in rows.itertuples() if r.runs}
    assert ({*rows.model} - built == set()) == ('not built' not in {*claims.verdict})
    assert {*claims.verdict} <= {'holds', 'not computed', 'not built'}
    places = {(r.dataset, r.modality) for r in rows.itertuples() if gone in r.runs}
    assert {(c.dataset, c.modality) for c in claims.itertuples() if c.verdict == 'not computed'} <= places
    if 'not built' not in {*claims.verdict} and not partly.any(): assert 'not computed' in {*claims.verdict}
    known = claims[claims.verdict == 'holds']
    assert (known.people == 3).all() and (known.low > 0).all()

def test_a_seed_is_compared_with_the_same_seed(tmp_path):
    "Where one side lacks a seed, the other does without it, too: κ by scikit-learn from the stages of the first two."
    rates = {(False, 0): .3, (False, 1): .4, (False, 2): .05, (True, 0): .2, (True, 1): .25}
    for run in runs_of('sleepsmc-seeds'):
        if (rate := rates.get((run.config['contrast'], run.config['seed']))): make_up(run, tmp_path, rate)
    claims = results_claims('sleepsmc-seeds', out=tmp_path)
    assert {*claims.verdict} == {'holds'} and {*claims.runs} == {2} and {*claims.expected} == {3}
    def kappa(*rates): return cohen_kappa_score(*np.concatenate([stages_of(p, r) for r in rates for p in range(3)], axis=1))
    np.testing.assert_allclose(claims.value, kappa(.2, .25) - kappa(.3, .4))
    assert results_table('sleepsmc-seeds', out=tmp_path).map(lambda cell: cell.endswith('2 of 3')).all(axis=1).sum() == 9

@pytest.mark.parametrize('recipe', RECIPES)
def test_without_any_run(recipe, tmp_path):
    table,claims = show_all(recipe, tmp_path)
    assert table.map(lambda cell: cell.startswith('–')).all(axis=None)
    assert {*claims.verdict} <= {'not computed', 'not built'} and claims.value.isna().all()
    assert ': 0 of ' in describe_runs(recipe, out=tmp_path)

def test_a_claim_turns_around(tmp_path):
    "Where what is called better is wrong more often, nothing holds."
    for run in runs_of('sleepsmc-table8'): make_up(run, tmp_path, .4 if run.config['score'] == 'exp' else .1)
    assert {*results_claims('sleepsmc-table8', out=tmp_path).verdict} == {'does not hold'}

def test_several_runs_have_a_spread(tmp_path):
    "Two of nine runs of the scale `paper`: mean and standard deviation by hand."
    runs = [r for r in runs_of('mtssrl-table6', 'paper') if r.task == 'finetune']
    assert len(runs) == 9
    for run,value in zip(runs, (.5, .7)):
        make_up(run, tmp_path)
        path = tmp_path/run.id/'result.json'
        found = json.loads(path.read_text())
        found['scores']['EEG']['macro_f1'] = [value, value - .1, value + .1, None, 200]
        path.write_text(json.dumps(found))
    assert results_table('mtssrl-table6', 'paper', tmp_path).loc['MTSSRL-MD (S+I+A)', 'MF1'] == '60.00 ± 14.14 (76.94), 2 of 9'
    assert describe_runs('mtssrl-table6', 'paper', tmp_path).startswith('mtssrl-table6, scale paper: 2 of 18 runs found')
    assert '0 of 1 rows complete' in describe_runs('mtssrl-table6', 'paper', tmp_path)
    assert drawn('mtssrl-table6', 'paper', tmp_path, 'MF1') == pytest.approx([60 - 200**.5, 60 + 200**.5])
    for run in runs[2:]: make_up(run, tmp_path)
    assert ', ' not in results_table('mtssrl-table6', 'paper', tmp_path).loc['MTSSRL-MD (S+I+A)', 'MF1']
    assert '1 of 1 rows complete' in describe_runs('mtssrl-table6', 'paper', tmp_path)

def drawn(recipe, scale, out, metric): # the ends of the only line that is ours
    ax, = plot_results(recipe, scale, out, metric)
    lines = [s for o in ax.collections if o.get_color()[0][:3].sum() == 0 for s in o.get_segments() if len(s) and np.isfinite(s).all()]
    assert len(lines) == 1
    return lines[0][:, 0].tolist()

def test_one_of_nine_runs_is_no_whole_row(tmp_path):
    run = next(r for r in runs_of('mtssrl-table6', 'paper') if r.task == 'finetune')
    make_up(run, tmp_path)
    path = tmp_path/run.id/'result.json'
    found = json.loads(path.read_text())
    found['scores']['EEG']['macro_f1'] = [.5, .4, .55, None, 200]
    path.write_text(json.dumps(found))
    assert results_table('mtssrl-table6', 'paper', tmp_path).loc['MTSSRL-MD (S+I+A)', 'MF1'] == '50.00 (76.94), 1 of 9'
    assert drawn('mtssrl-table6', 'paper', tmp_path, 'MF1') == pytest.approx([40, 55])

@pytest.mark.parametrize('passes,best,said', [((12, 12, 9), (11, 3, 8), '2 of 3 trainings ran to their last pass, without early stopping; in 1 it'),
                                              ((9, 9, 9), (1, 2, 3), '0 of 3 trainings ran to their last pass, without early stopping; in 0 it')])
def test_trainings_that_ran_to_their_last_pass_are_counted(passes, best, said, tmp_path):
    "Of two rates, the one with the best pass was chosen; what became of the other is of no account."
    for run,n,at in zip((r for r in runs_of('mtssrl-table2') if r.parent), passes, best):
        make_up(run, tmp_path)
        path,other = tmp_path/run.id/'result.json', 21 - n
        made = {'pass': [*range(other), *range(n)], 'lr': [.001]*other + [.003]*n, 'macro_f1': [.5]*(other + n)}
        made['macro_f1'][other + at] = .6
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(training=made)))
    assert f'\n{said}' in describe_runs('mtssrl-table2', out=tmp_path)

def test_a_pretraining_is_no_row(tmp_path):
    "Where only it is there, all cells are dashes, and nothing says otherwise."
    make_up(runs_of('mtssrl-table6')[0], tmp_path)
    said = describe_runs('mtssrl-table6', out=tmp_path)
    assert said.startswith('mtssrl-table6, scale small: 1 of 2 runs found, 1 of them made by earlier code, 0 of 1 rows complete')
    assert [*results_summary('small', tmp_path).loc['mtssrl-table6', ['found', 'expected']]] == [0, 1]

def test_a_claim_with_a_run_of_earlier_code_says_so(tmp_path):
    "Even if only one of the two is."
    fine,scratch = (next(r for r in runs_of('mtssrl-table1') if r.task == t) for t in ('finetune', 'scratch'))
    for run in (fine, scratch): make_up(run, tmp_path)
    path = tmp_path/scratch.id/'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(made=dict(code=code_checksum('scratch')))))
    claims = results_claims('mtssrl-table1', out=tmp_path).dropna(subset=['value'])
    assert claims.stale.tolist() == [True] and show_claims(claims).verdict.tolist() == ['holds (stale)']
    path = tmp_path/fine.id/'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(made=dict(code=code_checksum('finetune')))))
    claims = results_claims('mtssrl-table1', out=tmp_path).dropna(subset=['value'])
    assert claims.stale.tolist() == [False] and show_claims(claims).verdict.tolist() == ['holds']

def test_numbers_that_mean_nothing_say_so(tmp_path):
    assert 'The numbers mean nothing' in describe_runs('mtssrl-table6', 'smoke', tmp_path)
    assert 'The numbers mean nothing' not in describe_runs('mtssrl-table6', 'small', tmp_path)

# ---- pages

def run_page(path):
    "All code of a page, but for the export at its end."
    shell = CaptureShell(path)
    with working_directory(path.parent):
        for source in code(path):
            if 'nbdev_export()' in source: continue
            shell.run(source)
            if shell.exc: raise shell.exc

@pytest.mark.parametrize('kept', ['none', 'every other'])
@pytest.mark.parametrize('page', [*PAGES, ROOT/'nbs'/'index.ipynb'], ids=lambda p: p.name)
def test_pages_run_without_their_runs(page, kept, tmp_path):
    "What they say is checked where it was computed, and nowhere else."
    shutil.copy(page, tmp_path)
    shutil.copytree(ROOT/'nbs'/'artifacts', tmp_path/'artifacts', ignore=shutil.ignore_patterns('runs'))
    if kept != 'none':
        for run in sorted(RUNS.iterdir())[::2]: shutil.copytree(run, tmp_path/'artifacts'/'runs'/run.name)
    run_page(tmp_path/page.name)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_no_number_is_typed(page):
    "Text of pages that read runs has whole numbers only; other pages compare what they type with artefacts."
    text = '\n'.join(c.source for c in read_nb(page).cells if c.cell_type == 'markdown')
    assert not re.findall(r'(?<![\w.])\d*[.,]\d+', text)

@pytest.mark.parametrize('recipe', RECIPES)
def test_each_recipe_has_its_page(recipe):
    "One page shows it, tells how to run it, and its stored output knows how many runs there are."
    page, = [p for p in PAGES if f"describe_runs('{recipe}'" in '\n'.join(code(p))]
    text = '\n'.join(c.source for c in read_nb(page).cells if c.cell_type == 'markdown')
    assert '--scale small' in text and re.search(rf'\b{recipe}\b', text)
    said = describe_runs(recipe, out=RUNS).splitlines()[0]                   # also how many are stale
    stored = [''.join(o.get('text', '')) for c in read_nb(page).cells if c.cell_type == 'code' for o in c.outputs]
    assert any(said in o for o in stored), f'runs have changed: python tools/run_nbs.py nbs/{page.name}'

def test_the_front_page_says_what_was_computed():
    rows = dict(re.findall(r'(?m)^\| \[([^]]+)\]\(nbs/([^)]+)\)', readme := (ROOT/'README.md').read_text()))
    summary = results_summary('small', RUNS)
    assert [*rows] == [f'{r.paper}, {r.table}' for r in summary.itertuples()] and [*summary.index] == [*RECIPES] == [*CLAIMS]
    for recipe,row in summary.iterrows():
        said = '; '.join(o for o in (row.verdicts, f'besides: {row.besides}'*bool(row.besides)) if o)
        line = f'| {row.claim} | {said} | {row.found} of {row.expected}{f", {row.stale} stale"*bool(row.stale)} |'
        assert line in readme, 'runs have changed: python tools/run_nbs.py nbs/index.ipynb, then python tools/readme.py'
        page = ROOT/'nbs'/rows[f'{row.paper}, {row.table}']
        assert f"describe_runs('{recipe}'" in '\n'.join(code(page))
        claims = results_claims(recipe, 'small', RUNS)
        for besides,told in ((False, row.verdicts), (True, row.besides)):
            counts = claims[claims.besides == besides].verdict.value_counts().to_dict()
            one = {'hold': 'holds', 'do not hold': 'does not hold'}
            parts = Counter()
            for n,v in re.findall(r'(?<![\w.])(\d+) ([a-z ]+)', told): parts[one.get(v, v)] += int(n)
            assert parts == counts
