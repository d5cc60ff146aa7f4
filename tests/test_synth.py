"""Simulated nights for any montage, length and rate, and what must hold between two of them."""
import subprocess, sys, time
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.signal import welch

from sleepnb.core import HypnogramError, MontageError, SleepnbError, Stage
from sleepnb.montage import AASM, ALIASES, POSITIONS, parse_channel
from sleepnb.synth import POPULATIONS, synth_hypnogram, synth_night

SITES = st.sampled_from(sorted(POSITIONS) + ['E1', 'E2'])
OTHERS = ['HEOG', 'VEOG', 'EOG', 'EOG horizontal', 'LOC-A2', 'ROC-A1', 'E2-E1', 'Chin', 'Chin1', 'Chin1-Chin2', 'ChEMG2', 'EMG submental',
          'LLEG+', 'RLEG-', 'Leg', 'ECG', 'ECG1-ECG2', 'EKG', 'ECG I', 'EEG F3-CLE', 'EEG Fz-LER', 'T3-Ref', 'C4-(M1+M2)/2', 'Cz-AVG']
PAIRS = st.tuples(SITES, SITES).filter(lambda p: p[0] != p[1]).map('-'.join)
CHANNELS = st.lists(st.one_of(SITES, PAIRS, st.sampled_from(OTHERS)), min_size=1, max_size=6)
RATES = st.one_of(st.sampled_from([10, 50, 100, 128, 200, 256, 500, 512, 1000, 173.61, 199.99, 97.65625]), st.floats(50, 1000))
WHO = st.one_of(st.integers(-5, 500), st.sampled_from(['SC400', 'é']))

@pytest.fixture(scope='session')
def read(root): return lambda name: pd.read_csv(root/'nbs'/'artifacts'/f'simulator_{name}.csv')

# ---- hypnograms

@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 2880), seed=st.integers(0, 99), subject=WHO, night=WHO, population=st.sampled_from(sorted(POPULATIONS)))
def test_any_hypnogram(n, seed, subject, night, population):
    stages = synth_hypnogram(n, seed, subject, night, population)
    assert stages.shape == (n,) and stages.dtype == np.int8 and np.isin(stages, list(Stage)).all()
    assert np.array_equal(stages, synth_hypnogram(n, seed, subject, night, population))
    if n >= 20: assert len(set(stages)) >= 3 and stages[0] == stages[-1] == Stage.W

def test_a_night_has_all_stages():
    assert np.mean([len(set(synth_hypnogram(960, subject=s))) == 5 for s in range(100)]) > .95

def test_sleep_in_a_day_is_a_night_long():
    hours = [np.sum(synth_hypnogram(2880, subject=s) != Stage.W) / 120 for s in range(50)]
    assert 5 <= min(hours) and max(hours) < 9.5

def test_cycles_last_about_ninety_minutes():
    "From one long REM bout to the next, awakenings filled in."
    gaps = []
    for subject in range(40):
        rem = np.flatnonzero(synth_hypnogram(960, subject=subject) == Stage.REM)
        breaks = np.flatnonzero(np.diff(rem) > 40)
        gaps += [(rem[b+1] - rem[a+1]) / 2 for a,b in zip(breaks, breaks[1:])]
    assert 75 < np.mean(gaps) < 115

def test_runs_are_as_long_as_real_ones(read):
    "Quarters and the longest, in epochs, beside the real ones; and nothing follows that never did."
    nights = [synth_hypnogram(1200, seed=7, subject=subject) for subject in range(60)]
    runs = [(night[cuts], np.diff(np.append(cuts, len(night)))) for night in nights
            for cuts in [np.flatnonzero(np.diff(night, prepend=-1))]]
    real = read('runs').query('nights == "real"').set_index('stage')
    for stage in (Stage.N2, Stage.REM):
        found = np.quantile(np.concatenate([length[of == stage] for of,length in runs]), [.5, .75, .95])
        assert np.allclose(found, real.loc[stage.name, ['q50', 'q75', 'q95']].astype(float), rtol=.2)
    pairs = {(a, b) for night in nights for a,b in zip(night, night[1:])}
    assert not pairs & {(Stage.N3, Stage.REM), (Stage.REM, Stage.N3), (Stage.W, Stage.N3), (Stage.N1, Stage.N3)}

# ---- signals

@settings(max_examples=60, deadline=None)
@given(channels=CHANNELS, n=st.integers(1, 12), fs=RATES, subject=WHO, night=WHO, population=st.sampled_from(sorted(POPULATIONS)))
def test_any_night(channels, n, fs, subject, night, population):
    made = synth_night(channels, n, fs, 3, subject, night, population)
    assert made.x.shape == (len(channels), round(n * 30 * fs)) and made.x.dtype == np.float32
    assert np.isfinite(made.x).all() and (made.x.std(axis=1) > (.1 if fs >= 50 else .001)).all() and np.abs(made.x).max() < 5000
    assert made.channels == tuple(channels) and (made.fs, made.subject, made.night) == (fs, subject, night)
    assert np.array_equal(made.stages, synth_hypnogram(n, 3, subject, night, population))
    assert made.x.tobytes() == synth_night(channels, n, fs, 3, subject, night, population).x.tobytes()

@pytest.mark.parametrize('n', [1, 2, 7, 953, 2880])
def test_any_length(n):
    made = synth_night(['C3-M2', 'Chin'], n, fs=50)
    assert made.x.shape == (2, n*1500) and np.isfinite(made.x).all()

@settings(max_examples=40, deadline=None)
@given(pair=PAIRS, others=CHANNELS, fs=st.sampled_from([100, 128, 200]))
def test_a_derivation_is_the_difference_of_its_electrodes(pair, others, fs):
    "Whatever else is asked for with them."
    a,b = pair.split('-')
    derived = synth_night([*others, pair], 3, fs).x[-1]
    first,second = synth_night([b, a, *others], 3, fs).x[:2]
    np.testing.assert_allclose(derived, second - first, atol=2e-4)

def test_spellings_are_one_channel():
    x = synth_night(['C3-M2', 'EEG C3-A2', 'c3:a2', 'X1', 'Chin'], 2, aliases=ALIASES['isruc']).x
    assert (x[:3] == x[0]).all() and (x[3] == x[4]).all()

def test_other_references():
    x = synth_night(['F3-LE', 'F3-M1', 'F3-M2', 'HEOG', 'E1', 'E2', 'Chin', 'Chin1', 'Chin2'], 3).x
    np.testing.assert_allclose(x[0], (x[1] + x[2])/2, atol=2e-4)
    np.testing.assert_allclose(x[3], x[4] - x[5], atol=2e-4)
    np.testing.assert_allclose(x[6], x[7] - x[8], atol=2e-4)

def test_the_hypnogram_can_be_given():
    given_ = np.array([4, 4, 0, 3])
    made = synth_night(['C3-M2'], stages=given_)
    assert made.stages.tolist() == given_.tolist() and made.stages is not given_ and made.x.shape == (1, 12000)
    own = synth_night(['C3-M2'], 30, subject=3)
    assert synth_night(['C3-M2'], subject=3, stages=own.stages).x.tobytes() == own.x.tobytes()

# ---- what depends on what

def test_another_seed_subject_or_night_is_another_one():
    made = [synth_night(['C3-M2'], 4, seed=a, subject=b, night=c).x for a in range(2) for b in range(2) for c in range(2)]
    correlations = np.corrcoef(np.concatenate(made))[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < .5 and np.abs(correlations).mean() < .1

def test_the_same_bytes_in_another_process():
    code = ("from sleepnb.synth import synth_night; from hashlib import sha256; "
            "print(sha256(synth_night(['C3-M2', 'HEOG', 'Chin', 'ECG'], 5, subject='a').x.tobytes()).hexdigest())")
    there = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip()
    synth_night(['Cz'], 2)                                       # leaves no trace
    assert there == sha256(synth_night(['C3-M2', 'HEOG', 'Chin', 'ECG'], 5, subject='a').x.tobytes()).hexdigest()

@pytest.mark.parametrize('fs', [128, 200, 256, 1000])
def test_one_night_at_any_rate(fs):
    "Same stages, and the same power in every band that 100 Hz can hold."
    def spectrum(night):
        f,power = welch(night.x, fs=night.fs, nperseg=round(4*night.fs))
        return power[:, (f >= .5) & (f <= 40)]
    coarse,fine = (synth_night(AASM, 30, fs=r) for r in (100, fs))
    assert np.array_equal(coarse.stages, fine.stages)
    ratio = spectrum(fine) / spectrum(coarse)
    assert np.abs(np.log(ratio)).mean() < .05

def test_rates_that_divide_share_their_samples():
    "Up to the noise of the amplifier, and what lies above 50 Hz."
    coarse,fine = (synth_night(['C3-M2', 'Fpz-Cz', 'HEOG'], 12, fs=fs).x for fs in (100, 200))
    assert min(np.corrcoef(a, b)[0, 1] for a,b in zip(coarse, fine[:, ::2])) > .97

def test_populations_differ():
    power = {p: np.mean([synth_night(['F3-M2'], subject=s, population=p, stages=np.full(20, 3)).x.var() for s in range(5)]) for p in POPULATIONS}
    assert power['older'] < .6*power['adult']
    def night(subject, population):
        stages = synth_hypnogram(1100, subject=subject, population=population)
        return np.sum(stages == Stage.N3), np.sum((stages[1:] == Stage.W) & (stages[:-1] != Stage.W))
    deep,awoken = {}, {}
    for p in POPULATIONS: deep[p],awoken[p] = np.mean([night(s, p) for s in range(80)], axis=0)
    assert .3 < deep['older'] / deep['adult'] < .6 and .5 < deep['disordered'] / deep['adult'] < 1
    assert 1.5 < awoken['older'] / awoken['adult'] < 2.5 and 2.5 < awoken['disordered'] / awoken['adult'] < 4.5

# ---- what a scorer looks at

NIGHTS = [0, 1, 2]

@pytest.mark.parametrize('subject', NIGHTS)
def test_amplitudes_are_those_of_sleep(subject):
    night = synth_night(AASM, stages=np.repeat(Stage, 30), subject=subject)
    sd = np.median(night.x.reshape(9, 5, 30, -1).std(-1), axis=-1)                      # c s
    assert (sd[:6] > 3).all() and (sd[:6] < 90).all()
    assert (sd[:4, 1:].argmax(axis=1) + 1 == Stage.N3).all()                            # frontal and central
    assert sd[8, 0] > sd[8, 1] > sd[8, 2:4].max() and sd[8, 2:4].min() > sd[8, 4]       # the chin relaxes
    assert (sd[6:8, [0, 1, 4]].min(axis=1) > .8*sd[6:8, 2]).all()

@pytest.mark.parametrize('subject', NIGHTS)
def test_eyes_move_against_each_other(subject):
    night = synth_night(['E1-M2', 'E2-M2', 'Fp1-M2'], stages=np.repeat(Stage, 30), subject=subject)
    r = [np.corrcoef(part)[0, 1] for part in np.split(night.x, 5, axis=1)]
    assert max(r[1], r[4]) < -.15 and r[0] < .6 and min(r[2], r[3]) > 0

def test_alpha_is_occipital_and_spindles_are_central():
    night = synth_night(['O1-M2', 'C3-M2', 'F3-M2'], stages=np.repeat([0, 2], 60))
    f,power = welch(night.x.reshape(3, 2, -1), fs=100, nperseg=400)                     # c s f
    band = lambda low, high: power[..., (f >= low) & (f < high)].sum(-1)
    assert band(9, 11)[:, 0].argmax() == 0 and band(12, 14)[1, 1] > 1.5*band(12, 14)[0, 1]
    assert band(9, 11)[0, 0] > band(9, 11)[0, 1] and band(12, 14)[1, 1] > 3*band(12, 14)[1, 0]

# ---- what goes wrong, and how fast it is

@pytest.mark.parametrize('kwargs, kind, words', [
    (dict(channels=['SaO2']), MontageError, 'SaO2'), (dict(channels=['C3', 'EEG 7']), MontageError, 'EEG 7'),
    (dict(channels=[]), MontageError, 'list of channels'),
    (dict(channels='C3'), MontageError, 'list of channels'), (dict(channels=['']), MontageError, 'no name'),
    (dict(channels=[3]), MontageError, 'int'), (dict(n_epochs=0), SleepnbError, 'at least one'), (dict(n_epochs=-3), SleepnbError, 'at least one'),
    (dict(n_epochs=2.5), SleepnbError, '2.5'), (dict(fs=0), SleepnbError, 'rate'), (dict(fs=np.nan), SleepnbError, 'rate'),
    (dict(fs=1e9), SleepnbError, 'rate'), (dict(population='x'), SleepnbError, "'x'"), (dict(stages=[]), HypnogramError, 'shape'),
    (dict(stages=[0, 5]), HypnogramError, '5'), (dict(stages=[[0]]), HypnogramError, 'shape'), (dict(stages=[0, .5]), HypnogramError, '0.5'),
    (dict(stages=[-1, 2]), HypnogramError, '-1')])
def test_what_cannot_be_simulated_says_so(kwargs, kind, words):
    with pytest.raises(kind, match='.') as error: synth_night(**(dict(channels=['C3'], n_epochs=2) | kwargs))
    assert words in str(error.value)

@pytest.mark.parametrize('names', [ALIASES['isruc']])
def test_names_of_a_cohort(names):
    assert synth_night(list(names), 1, aliases=names).x.shape[0] == len(names)
    assert parse_channel('X1', names).site == 'Chin'

def test_a_night_takes_seconds():
    start = time.process_time()
    synth_night(AASM)
    assert time.process_time() - start < 5
