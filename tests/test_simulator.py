"""Simulated nights beside real ones: what was measured agrees with itself, and a little of it is measured again."""
import importlib.util

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from sleepnb.core import Stage
from sleepnb.synth import synth_night

STAGES = [stage.name for stage in Stage]
MIXED = np.repeat([0, 1, 2, 3, 2, 4, 1, 0], 15)      # an hour with every stage
SITES = {'sleep-edf': ['Fpz-Cz', 'Pz-Oz'], 'isruc': ['F3-M2', 'C3-M2', 'O1-M2', 'F4-M1', 'C4-M1', 'O2-M1'],
         'anphy': ['Fpz', 'Fz', 'Cz', 'Pz', 'Oz', 'F3', 'F4', 'C3', 'C4', 'O1', 'O2']}

@pytest.fixture(scope='session')
def simulator(root):
    "The tool that measured."
    spec = importlib.util.spec_from_file_location('simulator', root/'tools'/'simulator.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='session')
def read(root): return lambda name: pd.read_csv(root/'nbs'/'artifacts'/f'simulator_{name}.csv')

@pytest.fixture(scope='session')
def cohort(simulator): return simulator.simulated(5, subjects=3, nights=1, progress=False)

# ---- the files

def test_every_seed_was_measured_once(read):
    assert len(read('difficulty')) == 2 + 5*2 and len(read('crossing')) == 5*4 and len(read('apart')) == 5 * 3*3*5
    assert len(read('quantiles')) == 6 * 5*2*6 and len(read('transitions')) == 6*25 and len(read('runs')) == 6*5
    for name,key in (('difficulty', ['nights', 'seed', 'classifier']), ('fresh', ['seed', 'classifier']),
                     ('crossing', ['seed', 'classifier', 'way']),
                     ('apart', ['what', 'seed', 'how', 'stage']), ('quantiles', ['nights', 'seed', 'stage', 'channel', 'band']),
                     ('transitions', ['nights', 'seed', 'before', 'after']), ('runs', ['nights', 'seed', 'stage']),
                     ('waves', ['subject', 'what', 'channel', 'stage']), ('network', ['seed', 'nights'])):
        assert not read(name).duplicated(key).any(), name

def test_macro_f1_is_the_mean_of_the_five(read):
    for name in ('difficulty', 'fresh', 'network'):
        table = read(name)
        assert np.allclose(table[STAGES].mean(axis=1), table.macro_f1, atol=1e-3)

def test_the_real_nights_are_as_hard_as_they_were_found_to_be_elsewhere(read):
    "To the third digit: the reference of the data's own description."
    real = read('difficulty').query('nights == "real"').set_index('classifier')
    assert real.epochs.tolist() == [13_837]*2
    assert np.allclose(real.loc['trees', ['kappa', 'macro_f1']].astype(float), [.684, .704], atol=.01)
    assert np.allclose(real.loc['logistic regression', ['kappa', 'macro_f1']].astype(float), [.674, .690], atol=.01)

def test_runs_and_transitions_are_of_the_same_nights(read):
    "Of each stage: epochs with one after them, and the runs that end, are as many."
    after,runs = read('transitions'), read('runs').set_index(['nights', 'seed', 'stage'])
    for (nights,seed),rows in after.groupby(['nights', 'seed']):
        leave = rows[rows.before != rows.after].groupby('before').epochs.sum()
        n = 14 if nights == 'real' else 20
        ended = (runs.loc[(nights, seed)].runs_per_night * n).round().astype(int)
        assert 0 <= (ended - leave.reindex(ended.index)).sum() <= n                  # the last run of a night is not left
        assert abs(rows.epochs.sum() + n - runs.loc[(nights, seed)].minutes_per_night.sum() * 2*n) < 1

def test_the_confusion_gives_the_figures(read):
    for (seed,nights),rows in read('confusion').groupby(['seed', 'nights']):
        found = read('network').set_index(['seed', 'nights']).loc[(seed, nights)]
        assert rows.epochs.sum() == found.epochs
        kappa = cohen_kappa_score(rows.scorer.repeat(rows.epochs), rows.network.repeat(rows.epochs))
        assert abs(kappa - found.kappa) < 1e-3
    assert set(read('network').query('nights == "real"').epochs) == {841}

def test_files_hold_statistics_alone(root):
    "No row per epoch of a real night is passed on."
    files = list((root/'nbs'/'artifacts').glob('simulator_*.csv'))
    assert len(files) == 10 and sum(f.stat().st_size for f in files) < 100_000

# ---- measured again

def test_bands_are_where_those_of_real_nights_are(simulator, cohort, read):
    "Three people differ from seven; 6 dB are twice the amplitude."
    x,y,*_ = cohort
    found = pd.DataFrame(simulator.quantiles(x, y)).set_index(['stage', 'channel', 'band']).q50
    real = read('quantiles').query('nights == "real"').set_index(['stage', 'channel', 'band']).q50
    away = found - real
    assert len(away) == 60 and away.abs().max() < 12 and away.abs().mean() < 3

def test_a_small_cohort_is_neither_trivial_nor_hopeless(simulator, cohort, monkeypatch):
    x,y,subject,_ = cohort
    monkeypatch.delitem(simulator.CLASSIFIERS, 'trees')                        # which take long, and three people are few
    row, = simulator.difficulty(x, y, subject)
    assert .35 < row['kappa'] < .85 and .4 < row['macro_f1'] < .85, row

def test_the_real_nights_give_the_stored_figures(simulator, data, read):
    real = simulator.real(data)
    assert pd.DataFrame(simulator.quantiles(*real[:2])).q50.to_numpy() == pytest.approx(read('quantiles').query('nights == "real"').q50, abs=1e-3)
    nights = simulator.of_nights(real[1], *real[2:])
    assert len(nights) == 14 and [r['epochs'] for r in simulator.transitions(nights)] == read('transitions').query('nights == "real"').epochs.tolist()

# ---- how the tool measures

def test_subjects_are_told_apart_by_row_but_not_by_subject(simulator):
    "People of one kind that differ only by their levels."
    draw = np.random.default_rng(0)
    def group(first): return [np.concatenate([draw.normal(draw.normal(size=4), .1, (100, 4)) for _ in range(6)]), np.tile(range(5), 120),
                              first + np.repeat(range(6), 100), np.zeros(600)]
    a,b = group(0), group(10)
    by_row,by_subject = (np.mean([row['auc'] for row in simulator.apart(a, b, how)]) for how in ('by row', 'by subject'))
    assert by_row > .97 and by_subject < .8
    b[0] += 3
    assert np.mean([row['auc'] for row in simulator.apart(a, b, 'by subject')]) > .9

def test_files_are_written_part_by_part(simulator, monkeypatch, tmp_path):
    monkeypatch.setattr(simulator, 'OUT', tmp_path)
    assert not simulator.is_done('x', seed=0)
    simulator.write('x', [dict(a=1), dict(a=2)], seed=1)
    simulator.write('x', [dict(a=3)], seed=0)
    simulator.write('x', [dict(a=4)], seed=1)
    assert pd.read_csv(tmp_path/'simulator_x.csv').to_dict('list') == dict(seed=[0, 1], a=[3, 4])
    assert simulator.is_done('x', seed=1) and not simulator.is_done('x', seed=2)

def test_runs_and_transitions_by_hand(simulator):
    night = np.array([0, 0, 1, 2, 2, 0, 2, 0])
    assert {(r['before'], r['after']): r['epochs'] for r in simulator.transitions([night]) if r['epochs']} == {
        ('N1', 'N2'): 1, ('N2', 'N2'): 1, ('N2', 'W'): 1, ('W', 'N2'): 1}

# ---- one head, three montages

@pytest.fixture(scope='session')
def heads():
    return [{name: synth_night(channels, seed=1, subject=subject, stages=MIXED).x for name,channels in SITES.items()} for subject in range(8)]

def correlation(a, b):
    "Of each epoch."
    a,b = (x.reshape(-1, 3000) - x.reshape(-1, 3000).mean(-1, keepdims=True) for x in (a, b))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))

def test_electrodes_that_montages_share_record_the_same(heads):
    for head in heads[:2]:
        edf,isruc,anphy = (dict(zip(SITES[name], x)) for name,x in head.items())
        for pair in SITES['sleep-edf']:
            a,b = pair.split('-')
            assert np.allclose(edf[pair], anphy[a] - anphy[b], atol=.01)
        for site,other in (('F3', 'C3'), ('C3', 'O1')):                       # the mastoid is common to both
            assert np.allclose(isruc[f'{site}-M2'] - isruc[f'{other}-M2'], anphy[site] - anphy[other], atol=.01)

@pytest.mark.parametrize('a, b, low, high', [
    ('isruc C3-M2', 'isruc C4-M1', .5, .9), ('isruc F3-M2', 'isruc C3-M2', .5, .9), ('isruc O1-M2', 'isruc O2-M1', .8, 1),
    ('sleep-edf Fpz-Cz', 'isruc C3-M2', -.9, -.5),          # Cz is subtracted in one, and beside C3
    ('sleep-edf Pz-Oz', 'isruc O1-M2', -1, -.5), ('sleep-edf Pz-Oz', 'isruc C3-M2', .2, .7), ('sleep-edf Fpz-Cz', 'sleep-edf Pz-Oz', -.6, -.2)])
def test_what_derivations_have_in_common(heads, a, b, low, high):
    "In N2 and N3, median over people."
    asleep,found = np.isin(MIXED, [Stage.N2, Stage.N3]), []
    for head in heads:
        x,y = (head[name][SITES[name].index(channel)] for name,channel in (a.split(), b.split()))
        found.append(np.median(correlation(x, y)[asleep]))
    assert low < np.median(found) < high

# ---- an independent detector

def test_yasa_finds_spindles_in_n2_and_slow_waves_in_n3(simulator):
    yasa = pytest.importorskip('yasa', reason='yasa, of the extra `dev`, is not installed')
    stages = np.repeat([0, 2, 3, 2, 4, 0], 30)
    found = pd.concat(pd.DataFrame(simulator.detected(yasa, synth_night(['C3-M2', 'F3-M2', 'Fpz-Cz'], seed=100, subject=subject, stages=stages)))
                      for subject in range(3)).groupby(['what', 'channel', 'stage'])[['found', 'minutes']].sum()
    rate = (found.found / found.minutes).unstack()
    spindles,slow = rate.loc[('spindles', 'C3-M2')], rate.loc[('slow waves', 'F3-M2')]
    assert .5 < spindles['N2'] < 6 and spindles['N2'] > 3*max(spindles['N3'], spindles['REM'], spindles['W'])
    assert slow['N3'] > 3*slow['N2'] and slow['REM'] < 2
