"""Recordings of many kinds give the stages that they should, and those that cannot be staged are refused or flagged."""
import json, re, subprocess, sys
from datetime import datetime
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest
import torch
from edfio import Edf, EdfSignal
from scipy.signal import resample_poly
from sklearn.metrics import accuracy_score, cohen_kappa_score

from sleepnb.core import HypnogramError, MontageError, RecordingError, SleepnbError, WeightsError
from sleepnb.data.preprocess import filter_resample, robust_stats, to_epochs
from sleepnb.data.psg import Hypnogram, Night, align, read_hypnogram, read_night, sample_files
from sleepnb.hypnogram import smooth_stages, write_stages
from sleepnb.models.network import Backbone, StageNetwork
from sleepnb.montage import POSITIONS, parse_channel
from sleepnb.multimodal.sleepsmc import SleepSMC, SleepSMCLoss
from sleepnb.report import _spectrogram_of, write_report
from sleepnb.ssrl.mtssrl import MTSSRL
from sleepnb.stager import EEG_SITES, Stager, signal_quality
from sleepnb.synth import synth_hypnogram, synth_night
from sleepnb.weights import save_weights

HOME = ['C3-M2', 'HEOG', 'Chin']

def train():
    "Seconds of steps on simulated signals: stages differ, which is all that is asked."
    torch.manual_seed(0)
    network = SleepSMC({'home': HOME}, primary=None, channel_mode='cam', n_chans={'EEG': 2}, hide=.3, drop=0)
    loss,opt,draw = SleepSMCLoss(network, contrast=False), torch.optim.Adam(network.parameters(), 3e-3), np.random.default_rng(0)
    y = np.repeat(range(5), 20)
    x = synth_night(HOME, seed=1, stages=y).x
    x = [to_epochs(filter_resample(o, 100, *band)) for o,band in zip(x, [(.3, 40), (.3, 40), (10, None)])]
    median,scale = np.stack([robust_stats(o.ravel()) for o in x], axis=1)
    def part(k, rows):
        full = torch.full((len(rows), 1), 1.)
        return dict(x=torch.tensor(x[k][rows, None]), median=full*median[k], scale=full*scale[k], there=full > 0,
                    at=torch.arange(len(rows)))
    for _ in range(16):
        rows = draw.choice(100, 20, replace=False)
        parts = {'home': {m: part(k, rows) for k,m in enumerate(['EEG', 'EOG', 'EMG'])}}
        value = loss(network.train()((torch.arange(20), parts)), torch.tensor(y[rows]))
        opt.zero_grad(); value.backward(); opt.step()
    return network.eval()

@pytest.fixture(scope='module')
def network(): return train()

@pytest.fixture(scope='module')
def stager(network): return Stager(network)

STAGES = np.tile(np.repeat([0, 2, 3, 4, 1], 4), 2) # 40 epochs
NAMES = ['C3', 'C4', 'A1', 'A2', 'LOC', 'ROC', 'Chin']

@pytest.fixture(scope='module')
def x(): return synth_night(NAMES, fs=200, seed=3, stages=STAGES).x

def night(x, names=NAMES, fs=200, stages=None, start=None):
    n = int(x.shape[1] / fs / 30)
    return Night([np.array(o, np.float32) for o in x], [fs]*len(names), [parse_channel(n) for n in names],
                 np.full(n, -1, np.int8) if stages is None else stages, start)

@pytest.fixture(scope='module')
def edf(x, tmp_path_factory):
    path = tmp_path_factory.mktemp('stager')/'home.edf'
    Edf([EdfSignal(o.astype(float), 200, label=n, physical_dimension='uV', physical_range=(-3000, 3000))
         for o,n in zip(x, NAMES)]).write(path)
    return path

@pytest.fixture(scope='module')
def whole(stager, x): return stager.stage(night(x))

def close(a, b, eps=1e-3): np.testing.assert_allclose(a.prob, b.prob, atol=eps)

def test_the_stages_differ(whole):
    "Or nothing below would mean anything."
    assert len(np.unique(whole.stages)) >= 3 and whole.prob.std(0).max() > .1
    np.testing.assert_allclose(whole.prob.sum(1), 1, atol=1e-5)

def test_path_raw_and_night_give_the_same(stager, edf):
    by_path,by_night = stager.stage(edf), stager.stage(read_night(edf))
    raw = mne.io.read_raw_edf(edf, preload=True, verbose='error')
    assert abs(raw.get_data()).max() < .01                                      # volts
    for other in (by_night, stager.stage(raw), stager.stage(str(edf))):
        close(by_path, other)
        assert list(other.channels.channel[other.channels.used]) == ['C3-M2', 'C4-M1', 'E1-E2', 'Chin']
    assert by_path.name == 'home' and stager.stage(raw).name == 'home'

@pytest.mark.parametrize('fs', [100, 256, 500])
def test_the_rate_does_not_matter(stager, whole, x, fs):
    other = stager.stage(night(resample_poly(x, fs, 200, axis=1), fs=fs))
    assert accuracy_score(whole.stages, other.stages) > .94
    assert abs(whole.prob - other.prob).mean() < .02

def test_names_and_order_do_not_matter(stager, whole, x):
    order = [6, 3, 0, 5, 2, 4, 1]
    spelled = ['EMG Chin', 'M2', 'EEG C3', 'EOG ROC', 'EEG A1-Ref', 'e1', 'c4']
    other = stager.stage(night(x[order], spelled))
    close(whole, stager.stage(night(np.stack([x[0]-x[3], x[1]-x[2], x[4]-x[5], x[6]]), ['EEG C3-A2', 'C4_M1', 'HEOG', 'Chin'])))
    assert {*other.channels.channel[other.channels.used]} == {'C3-M2', 'C4-M1', 'E1-E2', 'Chin'}
    close(whole, other)

@pytest.mark.parametrize('fast', [0, 2])
def test_electrodes_and_their_references_may_have_different_rates(stager, whole, x, fast):
    "Either comes at twice the rate of the other."
    half = resample_poly(x, 1, 2, axis=1)
    made = [x[i] if (i in (0, 1)) == (fast == 0) else half[i] for i in range(7)]
    fs = [200 if len(o) == x.shape[1] else 100 for o in made]
    found = stager.stage(Night([o.astype(np.float32) for o in made], fs, [parse_channel(n) for n in NAMES], np.full(40, -1, np.int8)))
    assert list(found.channels.channel[found.channels.used])[:2] == ['C3-M2', 'C4-M1'] and (found.quality == 'good').all()
    assert abs(found.prob - whole.prob).mean() < .02
    made[0] = made[0].copy()
    made[0][10*30*fs[0] + 7] = np.nan                                         # of one epoch; the other channel is left
    found = stager.stage(Night([made[i].astype(np.float32) for i in (0, 3)], [fs[0], fs[3]], [parse_channel(n) for n in ('C3', 'A2')],
                               np.full(40, -1, np.int8)))
    assert list(np.flatnonzero(found.quality != 'good')) == [10] and found.quality[10] == 'missing'

def test_any_subset_of_modalities(stager, x):
    one = {'EEG': stager.stage(night(x[:4], NAMES[:4])), 'EOG': stager.stage(night(x[4:6], NAMES[4:6])),
           'EMG': stager.stage(night(x[6:], NAMES[6:]))}
    for m,found in one.items():
        assert found.modalities == (m,) and (found.stages >= 0).all()
        close(found, stager.stage(night(x), [m]), 1e-5)
        close(found, stager.stage(night(x), m.lower()), 1e-5)
    assert stager.stage(night(x), ('EMG', 'EEG')).modalities == ('EEG', 'EMG')
    with pytest.raises(MontageError, match='no channel of EOG'): stager.stage(night(x[:4], NAMES[:4]), ['EEG', 'EOG'])
    with pytest.raises(SleepnbError, match='found ECG'): stager.stage(night(x), ['ECG'])
    with pytest.raises(MontageError, match='EEG or EOG or EMG'): stager.stage(night(x[:2], ['Thorax', 'SpO2']))

def test_a_nap_and_one_epoch(stager, x):
    for n in (1, 2, 7):
        found = stager.stage(night(x[:, :n*6000 + 1234]))
        assert len(found.stages) == n and (found.stages >= 0).all() and f': {n} epoch{"s" * (n > 1)}, ' in repr(found)
    with pytest.raises(RecordingError, match='shorter than one epoch'): stager.stage(night(x[:, :5999]))

def test_more_than_a_day(stager, x):
    "Five minutes again and again for 25 hours: the same stages again and again."
    short = np.tile(resample_poly(x[0] - x[3], 1, 2)[:30000], 300)
    found = stager.stage(night(short[None], ['C3-M2'], 100))
    assert len(found.stages) == 3000
    prob = found.prob.reshape(300, 10, 5)
    np.testing.assert_allclose(prob[1:-1], np.broadcast_to(prob[1], (298, 10, 5)), atol=.01)

def test_what_fills_no_epoch_is_left_out_and_said(stager, tmp_path, x):
    path = tmp_path/'odd.edf'
    Edf([EdfSignal(x[0, :12000 + 2400].astype(float), 200, label='C3', physical_dimension='uV', physical_range=(-3000, 3000))],
        data_record_duration=1).write(path)
    found = stager.stage(path)
    assert len(found.stages) == 2 and 'the last 12 s fill no epoch' in found.notes

WRONG = dict(zeros=('flat', lambda t: 0*t), nan=('missing', lambda t: t*np.nan), inf=('missing', lambda t: t + np.inf),
             white=('noise', lambda t: np.random.default_rng(0).normal(0, 200, len(t))), offset=('flat', lambda t: 0*t + 150),
             hum_50=('noise', lambda t: 100*np.sin(2*np.pi*50*t)), hum_60=('noise', lambda t: np.linspace(300, 400, len(t))*np.sin(2*np.pi*60*t)),
             rail=('clipped', lambda t: np.clip(4000*np.sin(2*np.pi*1.3*t), -3000, 3000)))

@pytest.mark.parametrize('wrong', WRONG)
def test_unplugged_half_way(stager, x, wrong):
    word,make = WRONG[wrong]
    bad = np.array([x[0] - x[3], x[4] - x[5]])
    bad[:, 120000:] = make(np.arange(120000) / 200)
    found = stager.stage(night(bad, ['C3-M2', 'HEOG']))
    assert list(found.quality) == ['good']*20 + [word]*20
    assert (found.stages[20:] == -1).all() and np.isnan(found.prob[20:]).all()
    assert list(found.table.stage[20:]) == ['?']*20 and f'20 epochs {word}' in repr(found)
    alone = stager.stage(night(bad[:, :120000], ['C3-M2', 'HEOG']))             # the bad half changes nothing
    np.testing.assert_allclose(found.prob[:19], alone.prob[:19], atol=.05)      # but a few samples less give the scale

def test_muscle_that_is_off(stager, x):
    bad = x[6:].copy()
    bad[:, 120000:] = 7.
    assert list(stager.stage(night(bad, ['Chin'])).quality) == ['good']*20 + ['flat']*20

@pytest.mark.parametrize('value', [0, 1.1, -150])
def test_an_eeg_that_is_flat_throughout_is_no_matter_of_units(stager, x, tmp_path, value):
    Edf([EdfSignal(np.full(x.shape[1], value), 200, label='C3-M2', physical_dimension='uV', physical_range=(-187.5, 187.5)),
         EdfSignal(x[6].astype(float), 200, label='Chin', physical_dimension='uV', physical_range=(-3000, 3000))]).write(tmp_path/'flat.edf')
    found = stager.stage(tmp_path/'flat.edf')
    assert found.channels.set_index('channel').epochs_flat['C3-M2'] == 40 and (found.stages >= 0).all()

def test_a_bad_channel_counts_as_missing(stager, x):
    pair = np.stack([x[0] - x[3], x[1] - x[2]])
    bad = pair.copy()
    bad[1, 120000:] = 0
    found,one = stager.stage(night(bad, ['C3-M2', 'C4-M1'])), stager.stage(night(pair[:1], ['C3-M2']))
    assert (found.quality == 'good').all()
    np.testing.assert_allclose(found.prob[21:], one.prob[21:], atol=1e-3)
    assert abs(found.prob[:20] - one.prob[:20]).max() > .01
    assert list(found.channels.epochs_flat) == [0, 20]

def test_channels_marked_bad_or_not_in_volts_are_left_out(stager, x):
    kinds = ['eeg']*6 + ['misc']
    raw = mne.io.RawArray(x*1e-6, mne.create_info(NAMES, 200, kinds), verbose='error')
    raw.info['bads'] = ['C3']
    found = stager.stage(raw)
    table = found.channels.set_index('channel')
    assert list(table.index[table.used]) == ['C4-M1', 'E1-E2']
    assert table.details['C3'] == 'marked bad' and table.details['Chin'] == "not in volts, of mne type 'misc'" and table.modality['Chin'] == 'EMG'
    assert {'C3 is left out: marked bad', "Chin is left out: not in volts, of mne type 'misc'"} <= {*found.notes}
    close(found, stager.stage(night(x[[1, 2, 4, 5]], ['C4', 'A1', 'LOC', 'ROC'])))
    asked = stager.stage(raw, channels=['C3-M2'])
    assert list(asked.channels.channel[asked.channels.used]) == ['C3-M2']
    with pytest.raises(RecordingError, match='not in volts.*set_channel_types'): stager.stage(raw, channels=['C3-M2', 'Chin'])
    raw.info['bads'] = NAMES
    with pytest.raises(RecordingError, match='no channel may be used'): stager.stage(raw)

@pytest.mark.parametrize('channels,bad,drawn', [(None, ['A1', 'A2'], 'C3'), (['C3-M2'], ['A2'], 'C3 − A2'), (['C3'], ['A1', 'A2'], 'C3'), (['C3'], [], 'C3 − A2')])
def test_the_spectrogram_is_of_what_was_staged(stager, x, tmp_path, channels, bad, drawn):
    "With the mastoids marked bad, C3 is staged alone."
    raw = mne.io.RawArray(x * 1e-6, mne.create_info(NAMES, 200, ['eeg']*4 + ['eog']*2 + ['emg']), verbose='error')
    raw.info['bads'] = bad
    found = stager.stage(raw, 'EEG', channels)
    assert found.channels.details[0] == drawn
    name,signal,fs = _spectrogram_of(found, raw, None, None)
    assert name == found.channels.channel[0]
    np.testing.assert_allclose(signal, x[0] - x[3] if '−' in drawn else x[0], atol=1e-3)

def test_the_spectrogram_of_two_eyes_is_that_of_their_difference(tmp_path):
    "Without EEG; each eye against the opposite mastoid."
    names = ['E1-M2', 'E2-M1']
    made = synth_night(names, n_epochs=20, subject='eyes')
    Edf([EdfSignal(o, 100, label=n, physical_dimension='uV') for o,n in zip(made.x.astype(float), ('EOG E1-M2', 'EOG E2-M1'))]).write(tmp_path/'eyes.edf')
    found = Stager.load().stage(tmp_path/'eyes.edf')
    name,signal,_ = _spectrogram_of(found, tmp_path/'eyes.edf', None, None)
    assert name == 'E1-E2' and found.made_of == {'E1-E2': {'EOG E1-M2': 1, 'EOG E2-M1': -1}}
    np.testing.assert_allclose(signal, made.x[0] - made.x[1], atol=.1)

def test_a_mastoid_at_its_end_spoils_what_is_made_with_it(x):
    "Difference and electrodes are both looked at."
    bad = x.copy()
    bad[3, 120000:] = np.sign(bad[3, 120000:]) * 3000
    found = Stager(SleepSMC({'home': HOME}, primary=None, channel_mode='cam')).stage(night(bad, NAMES), ['EEG'])
    assert list(found.channels.set_index('channel').epochs_clipped[['C3-M2', 'C4-M1']]) == [20, 0]

@pytest.mark.parametrize('fs', [100, 200, 512])
def test_a_chin_electrode_that_came_off(fs):
    "White noise or hum, with its harmonics, far above muscle; and muscle itself, strong, or without a high-pass."
    x,g = synth_night(['Chin'], n_epochs=40, fs=fs, seed=2).x[0], np.random.default_rng(0)
    t,drift = np.arange(len(x)) / fs, np.cumsum(g.normal(0, .3, len(x)))
    def noisy(x): return (signal_quality(x.astype(np.float32), fs, 'EMG') == 'noise').mean()
    hum = 300*np.sin(2*np.pi*49.9*t) + (200*np.sin(2*np.pi*150*t) if fs > 300 else 0)
    for wrong in (g.normal(0, 150, len(x)), x + g.normal(0, 150, len(x)), x + hum, hum + g.normal(0, 20, len(x)), hum + g.normal(0, 120, len(x))):
        assert noisy(wrong) > .95
    for right in (x, 5*x, x + drift, g.normal(0, 20, len(x))): assert noisy(right) == 0

def test_quality_of_simulated_nights():
    made = synth_night(['C3-M2', 'O1-M2', 'HEOG', 'Chin'], 240, seed=5)
    words = [signal_quality(o, 100, m) for o,m in zip(made.x, ['EEG', 'EEG', 'EOG', 'EMG'])]
    assert (np.array(words) != 'good').mean() < .005

@pytest.mark.parametrize('fs', [1, 100])
def test_an_envelope_goes_to_the_network_as_it_is(network, stager, fs):
    "Each value held for its second; or smooth, at the rate of a signal."
    g = np.random.default_rng(0)
    envelope = 5 + 3*np.sin(np.arange(600*fs) / fs / 7) + (g.random(600) if fs == 1 else 2*np.sin(np.arange(60000)/8))
    found = stager.stage(Night([envelope.astype(np.float32)], [fs], [parse_channel('Chin')], np.full(20, -1, np.int8)))
    signal = np.repeat(envelope, 100 // fs)
    low,median,high = np.percentile(signal, [25, 50, 75])
    full = torch.ones(20, 1)
    part = dict(x=torch.tensor(signal.reshape(20, 1, 3000), dtype=torch.float32), median=full*median, scale=full*(high - low)/1.349,
                there=full > 0, at=torch.arange(20))
    with torch.no_grad(): expected = network.stage((torch.arange(20), {'home': dict(EMG=part)}), ('EMG',)).softmax(-1)
    np.testing.assert_allclose(found.prob, expected, atol=1e-3)

def test_an_envelope_is_said_to_be_unreliable(stager, x):
    chin,of = np.abs(np.random.default_rng(0).normal(5, 1, 13*3600)).astype(np.float32), [parse_channel(n) for n in ('C3-M2', 'Chin')]
    eeg = np.tile(resample_poly(x[0] - x[3], 1, 2)[:30000], 156).astype(np.float32)
    def notes(hours, k):
        n = int(hours*120)
        made = Night([o[:round(n*30*fs)] for o,fs in ((eeg, 100), (chin, 1))][k], [100, 1][k], of[k], np.full(n, -1, np.int8))
        return [o for o in stager.stage(made).notes if 'unreliable' in o]
    both,alone = slice(0, 2), slice(1, 2)
    assert notes(.1, both) == [] and notes(.1, alone) == ['Chin is an envelope of muscle, which is unreliable by itself']
    assert notes(13, both) == ['Chin is an envelope of muscle, which is unreliable in a recording of more than 12 h']
    assert not [o for o in stager.stage(night(x[6:], ['Chin'])).notes if 'unreliable' in o]

def test_nan_in_a_raw(stager, x):
    raw = mne.io.RawArray(np.stack([x[0] - x[3]])*1e-6, mne.create_info(['C3-M2'], 200, 'eeg'), verbose='error')
    raw._data[0, 120000:126000] = np.nan
    found = stager.stage(raw)
    assert list(np.flatnonzero(found.quality == 'missing')) == [20] and (found.stages == -1).sum() == 1

def test_wrong_units(stager, x, tmp_path):
    info = mne.create_info(['C3', 'C4', 'A1', 'A2', 'E1', 'E2', 'Chin'], 200, 'eeg')
    raw = mne.io.RawArray(x.astype(float), info, verbose='error')               # microvolts where mne has volts
    with pytest.raises(RecordingError, match='cannot be in microvolts'): stager.stage(raw)
    with pytest.raises(RecordingError, match='cannot be in microvolts.*say so with unit="uV"'): stager.stage(raw)
    with pytest.raises(RecordingError, match='cannot be in microvolts.*Scale them: a Night is in microvolts.$'): stager.stage(night(x*1e-6))
    with pytest.raises(RecordingError, match="a Night is in microvolts .found unit='V'"): stager.stage(night(x*1e-6), unit='V')
    close(stager.stage(raw, unit='uV'), stager.stage(night(x)))
    with pytest.raises(RecordingError, match='Leave unit="V" out, or give another of uV, mV and V.$'): stager.stage(raw, unit='V') # as it is taken
    for factor,unit in ((1e-6, 'V'), (1e-3, 'mV'), (1e6, 'uV')):                  # of numbers that a file calls µV, or V
        said = 'V' if unit == 'uV' else 'uV'
        edf = Edf([EdfSignal(o*(1 if unit == 'uV' else factor), 200, label=n, physical_dimension=said) for o,n in zip(x.astype(float), NAMES)])
        edf.write(path := tmp_path/f'{unit}.edf')
        with pytest.raises(RecordingError, match=f'{unit} by their size: say so with unit="{unit}".$'): stager.stage(path)
        close(stager.stage(path, unit=unit), stager.stage(night(x)), .02)

def test_epochs_begin_with_the_hypnogram(stager, x):
    start = datetime(2020, 1, 1, 22)
    scored = Hypnogram('scored', 45. + 30*np.arange(30), np.full(30, 30.), STAGES[:30].astype(np.int8))
    found = stager.stage(night(x, start=start), hypnogram=scored)
    later = stager.stage(night(x[:, 3000:], start=start))
    assert found.onset == 15 and len(found.stages) == 39
    close(found, later, .05)
    assert list(found.reference[:2]) == [-1, STAGES[0]] and (found.reference[31:] == -1).all()
    assert list(found.table.onset[:2]) == [15, 45]
    scores,there = found.agreement(), found.reference >= 0
    assert scores['epochs'] == 30
    np.testing.assert_allclose(scores['kappa'], cohen_kappa_score(found.reference[there], found.stages[there]))
    np.testing.assert_allclose(scores['accuracy'], accuracy_score(found.reference[there], found.stages[there]))
    assert found.agreement(scored) == scores
    with pytest.raises(SleepnbError, match='begin between epochs'): stager.stage(night(x, start=start)).agreement(scored)

def test_a_night_knows_where_its_recording_begins(stager, x, tmp_path):
    "Scoring begins after 15 s: by path, as a Night, and in the report of either."
    path,hypnogram = tmp_path/'late.edf', tmp_path/'late.csv'
    edf = Edf([EdfSignal(o.astype(float), 200, label=n, physical_dimension='uV', physical_range=(-3000, 3000)) for o,n in zip(x, NAMES)],
              starttime=datetime(2020, 1, 1, 22).time())
    edf.startdate = datetime(2020, 1, 1).date()
    edf.write(path)
    hypnogram.write_text('onset,duration,stage\n' + ''.join(f'{15 + 30*i},30,{"W N1 N2 N3 R".split()[s]}\n' for i,s in enumerate(STAGES[:39])))
    by_path,read = stager.stage(path, hypnogram=hypnogram), read_night(path, hypnogram)
    assert (by_path.onset, read.onset, read.start) == (15, 15, datetime(2020, 1, 1, 22, 0, 15))
    for found in (stager.stage(read), stager.stage(read, hypnogram=hypnogram)):
        close(found, by_path, 1e-6)
        assert (found.name, found.start, found.onset) == ('late', datetime(2020, 1, 1, 22), 15) and len(found.stages) == 39
        assert list(found.table.onset[:2]) == [15, 45] and list(found.reference) == list(STAGES[:39])
        assert write_report(found, tmp_path/'r.html', path) and write_report(found, tmp_path/'r.html', read)
    assert write_report(by_path, tmp_path/'r.html', read)
    early = stager.stage(read, hypnogram=Hypnogram('h', 30.*np.arange(39), np.full(39, 30.), STAGES[:39].astype(np.int8)))
    assert early.onset == 0 and list(early.quality[:2]) == ['missing', 'good']   # of its first epoch, half is not in the Night

def test_agreement_is_by_time(stager, x):
    start = datetime(2020, 1, 1, 22)
    found = stager.stage(night(x, start=start))
    scored = Hypnogram('scored', np.arange(10)*30., np.full(10, 30.), found.stages[5:15], datetime(2020, 1, 1, 22, 2, 30))
    assert found.agreement(scored)['accuracy'] == 1 and found.agreement(scored)['epochs'] == 10

def test_a_recording_that_was_cut_out_of_what_was_scored(stager, x, tmp_path):
    "Scored are three hours, in which the twenty minutes begin after one: by dates only, and not by a start that was kept."
    around = np.concatenate([np.zeros(120), STAGES, np.zeros(200)]).astype(np.int8)
    scored = Hypnogram('scored', 30.*np.arange(360), np.full(360, 30.), around, datetime(2020, 1, 1, 21))
    path = write_stages(tmp_path/'scored.edf', around, start=scored.start)
    def cut(start, dated=True):
        edf = Edf([EdfSignal(o.astype(float), 200, label=n, physical_dimension='uV', physical_range=(-3000, 3000)) for o,n in zip(x, NAMES)],
                  starttime=start.time())
        if dated: edf.startdate = start.date()
        edf.write(tmp_path/f'{start:%H%M}{dated}.edf')
        return tmp_path/f'{start:%H%M}{dated}.edf'
    right = datetime(2020, 1, 1, 22)
    for given in (scored, path):
        found = stager.stage(cut(right), hypnogram=given)
        assert (found.reference == STAGES).all() and found.onset == 0
        assert 'by their dates, the recording is a part of what was scored' in found.notes and '9600 s of the scoring lie outside the recording' in found.notes
    assert found.scorer == 'scored.edf' and not stager.stage(cut(right)).scorer
    assert found.agreement() == stager.stage(cut(right)).agreement(path) and found.agreement()['epochs'] == 40
    for start,dated in ((datetime(2020, 1, 1, 21), True), (datetime(2020, 1, 2, 1), True), (datetime(2021, 1, 1, 22), True), (right, False)):
        with pytest.raises(HypnogramError, match='does not belong.*has to say its own start, with the date'):
            stager.stage(cut(start, dated), hypnogram=path)
        with pytest.raises(HypnogramError, match='does not belong'): stager.stage(cut(start, dated)).agreement(path)

def test_a_part_is_staged_as_if_it_were_cut_out(stager, x, tmp_path):
    "By path, Raw and Night; what is written counts from the start of the recording."
    start = datetime(2020, 1, 1, 22)
    made = Edf([EdfSignal(o.astype(float), 200, label=n, physical_dimension='uV', physical_range=(-3000, 3000)) for o,n in zip(x, NAMES)],
               starttime=start.time())
    made.startdate = start.date()
    made.write(path := tmp_path/'long.edf')
    scored = write_stages(tmp_path/'scored.csv', STAGES)
    part,read = dict(tmin=305, tmax=900), read_night(path)
    found = stager.stage(path, **part)
    assert (found.start, found.onset, len(found.stages), found.span) == (start, 305, 19, '22:05:05 to 22:14:35')
    assert 'the last 25 s fill no epoch' in found.notes
    close(found, stager.stage(night(x[:, 305*200:900*200])), .02)
    for other in (mne.io.read_raw_edf(path, verbose='error'), read): close(stager.stage(other, **part), found)
    close(stager.stage(path, tmin=305), stager.stage(night(x[:, 305*200:])), .02)
    for given in (path, read, mne.io.read_raw_edf(path, verbose='error')):
        whole,some = stager.stage(given, hypnogram=scored), stager.stage(given, hypnogram=scored, **part)
        assert some.onset == 330 and (some.reference == whole.reference[11:30]).all()      # on the epochs of the scorer
        assert some.agreement(scored) == some.agreement() and some.agreement()['epochs'] == 19
        assert write_report(some, tmp_path/'r.html', given)
    for name in ('a.csv', 'a.tsv', 'a_events.tsv', 'a.edf'):
        read_back = read_hypnogram(found.write(tmp_path/name))
        assert read_back.onset[0] == 305 and read_back.onset[-1] + read_back.duration[-1] == 305 + 19*30
    assert found.annotations().onset[0] == 305
    assert found.statistics_note == 'the statistics are of a part of the recording, 22:05:05 to 22:14:35' and found.span in repr(found)
    assert not stager.stage(path).statistics_note and stager.stage(path).part is None
    for tmin,tmax in ((900, 305), (0, 1201), (-5, 300), (1300, None), (300, 300)):
        with pytest.raises(RecordingError, match='this is no part of the recording'): stager.stage(path, tmin=tmin, tmax=tmax)
    with pytest.raises(RecordingError, match='this part of the recording is shorter than one epoch'): stager.stage(path, tmin=300, tmax=329)

def test_smoothing_is_off_and_named_when_on(stager, whole, x):
    smooth = stager.stage(night(x), smooth=True)
    assert not whole.smoothed and smooth.smoothed and 'smoothed' in repr(smooth) and 'smoothed' not in repr(whole)
    assert (whole.stages == whole.prob.argmax(1)).all() and (smooth.stages == smooth_stages(whole.prob)).all()

@pytest.mark.parametrize('name', ['a.csv', 'a.tsv', 'a_events.tsv', 'a.edf'])
def test_files_read_back(stager, edf, tmp_path, name):
    found = stager.stage(edf)
    read = read_hypnogram(found.write(tmp_path/name))
    assert (align(read, 40*30, found.start)[0] == found.stages).all()

def test_what_is_written_begins_where_staging_begins(stager, edf, tmp_path):
    "Scoring begins after 45 s, so the first epoch after 15."
    raw = mne.io.read_raw_edf(edf, preload=True, verbose='error')
    found = stager.stage(edf, hypnogram=Hypnogram('scored', 45. + 30*np.arange(30), np.full(30, 30.), STAGES[:30].astype(np.int8)))
    for name in ('a.csv', 'a.tsv', 'a_events.tsv', 'a.edf'):
        stages,first,_ = align(read_hypnogram(found.write(tmp_path/name)), 40*30, found.start)
        assert first == 15 and (stages[:39] == found.stages).all()
    assert (pd.read_csv(tmp_path/'a.csv').onset == 15 + 30*np.arange(39)).all()
    raw.set_annotations(found.annotations())
    assert raw.annotations.onset[0] == 15 and raw.annotations.onset[-1] + raw.annotations.duration[-1] == 15 + 39*30

def test_annotations_go_on_the_raw(stager, edf):
    raw = mne.io.read_raw_edf(edf, preload=True, verbose='error')
    raw.set_annotations(stager.stage(raw).annotations())
    assert (read_night(raw).stages == stager.stage(raw).stages).all()

def test_several_nights_with_bad_ones(stager, edf, tmp_path, capsys):
    text,cut = tmp_path/'text.edf', tmp_path/'cut.edf'
    text.write_text('this is no recording')
    cut.write_bytes(edf.read_bytes()[:50000])
    done,failed = stager.stage_all([edf, text, cut, tmp_path/'none.edf', edf])
    assert [o.name for o in done] == ['home', 'home'] and [Path(p).name for p in failed] == ['text.edf', 'cut.edf', 'none.edf']
    assert all('\n' not in why for why in failed.values())
    for one in (str(edf), edf):
        with pytest.raises(SleepnbError, match='several recordings are a list'): stager.stage_all(one)
    assert 'staging' in capsys.readouterr().err
    assert not stager.stage_all([], progress=False)[0]
    with pytest.raises(SleepnbError, match='differ in number'): stager.stage_all([edf], [None, None])

def test_of_a_cap_eight_are_used(network):
    names = [n for n in POSITIONS if n not in ('M1', 'M2')][:83]
    found,_ = Stager(network).choose(names)
    assert len(found.derivations) == len(EEG_SITES) and {d.got.site for d in found.derivations} >= {'F3', 'C4', 'Fpz'}

def test_networks_for_one_montage(x):
    torch.manual_seed(0)
    for network in (SleepSMC({'a': ['C3-M2', 'C4-M1', 'HEOG']}, ('EEG', 'EOG'), primary=None),
                    SleepSMC({'a': ['C3-M2', 'C4-M1', 'HEOG']}, ('EEG', 'EOG'), channel_mode='shared'),
                    StageNetwork(Backbone({'b': ['O1-M2'], 'a': ['C3-M2', 'C4-M1', 'HEOG']}))):
        found = Stager(network).stage(night(x))
        assert list(found.channels.channel[found.channels.used])[:2] == ['C3-M2', 'C4-M1'] and (found.stages >= 0).all()
        z = np.stack([x[0]-x[3], x[1]-x[2], x[4]-x[5]])
        y = [to_epochs(filter_resample(o, 200)) for o in z]                     # what the network itself makes of it
        median,scale = np.stack([robust_stats(o.ravel()) for o in y], axis=1)
        b = len(y[0])
        def part(k): return dict(x=torch.tensor(np.stack([y[i] for i in k], 1)), at=torch.arange(b), there=torch.ones(b, len(k)) > 0,
                                 **{n: torch.tensor(o[k], dtype=torch.float32).expand(b, -1) for n,o in (('median', median), ('scale', scale))})
        parts = {'a': {'EEG': part([0, 1]), 'EOG': part([2])} if isinstance(network, SleepSMC) else part([0, 1, 2])}
        with torch.no_grad(): expected = network.eval()((torch.arange(b), parts)).softmax(-1)
        np.testing.assert_allclose(found.prob, expected, atol=1e-3)
        with pytest.raises(MontageError, match='trained on'): Stager(network).stage(night(x[:1], ['C3']))

def test_channels_by_name(stager, x):
    found = stager.stage(night(x), channels=['C4', 'E1-M2'])
    assert list(found.channels.channel[found.channels.used]) == ['C4-M1', 'E1-M2'] and found.modalities == ('EEG', 'EOG')
    with pytest.raises(MontageError, match='O1-M2: no O1'): stager.stage(night(x), channels=['C4', 'O1-M2'])
    fixed = Stager(StageNetwork(Backbone({'a': ['C3-M2']})))
    with pytest.raises(SleepnbError, match='cannot be chosen'): fixed.stage(night(x), channels=['C4'])
    brain = Stager(StageNetwork(Backbone({'a': ['C3-M2', 'HEOG', 'Chin']})))
    assert brain.montages == {'a': ['C3-M2']}                             # what else the cohort has, it does not take
    with pytest.raises(MontageError, match='expected C3-M2[;)]'): brain.choose(['O1-M2', 'HEOG'])

def test_why_a_channel_is_not_used_is_true(x):
    fixed = Stager(SleepSMC(dict(home=['C3-M2', 'E1-M2', 'Chin']), primary='EOG'))
    one,cam = Stager(SleepSMC(dict(home=HOME), ('EEG', 'EOG'), 'EOG', 'cam')), Stager(SleepSMC(dict(home=HOME), primary=None, channel_mode='cam'))
    def why(stager, **how):
        table = stager.stage(night(x[:, :6000]), **how).channels
        return table[~table.used].set_index('channel').details.to_dict()
    assert why(one) == dict.fromkeys(['C3', 'C4', 'M1', 'M2'], 'staged with EOG alone') | {'Chin': 'the network does not take it'}
    assert why(fixed)['C3'] == why(fixed)['Chin'] == 'staged with EOG alone' and why(fixed)['E2'] == 'others were preferred'
    assert why(cam, modalities=('EEG', 'EMG'), channels=['C3', 'Chin']) == dict(C4='others were preferred', M1='others were preferred',
                                                                              E1='staged with EEG, EMG alone', E2='staged with EEG, EMG alone')

def test_a_network_that_shares_its_heads_takes_any_montage(x):
    torch.manual_seed(0)
    stager = Stager(StageNetwork(Backbone({'a': ['Fpz-Cz', 'Pz-Oz'], 'b': ['O1-M2']}, align='shared')))
    found = stager.stage(night(x))
    assert list(found.channels.channel[found.channels.used]) == ['C3-M2', 'C4-M1'] and (found.stages >= 0).all()

def test_weights(network, x, tmp_path, edf):
    recipe = dict(name='mine', eeg=[1., 30.], eog=[.3, 40.], emg=[10., None], ecg=[.3, 40.])
    path = save_weights(tmp_path/'night.safetensors', network, recipe=recipe)
    loaded = Stager.load(path)
    assert loaded.recipe.eeg == [1., 30.] and loaded.stage(edf).weights == 'night.safetensors'
    assert abs(loaded.stage(edf).prob - Stager(network).stage(edf).prob).max() > .01 # another filter, other signals
    other = save_weights(tmp_path/'ssl.safetensors', MTSSRL(Backbone({'a': ['C3']})))
    with pytest.raises(WeightsError, match='does not stage'): Stager.load(other)
    with pytest.raises(WeightsError, match='another order'): Stager(network, dict(stages=['R', 'W', 'N1', 'N2', 'N3']))
    with pytest.raises(WeightsError, match='no such file'): Stager.load(tmp_path/'none')

def test_the_weights_that_come_along_stage_the_real_night():
    stager = Stager.load()
    assert stager.any_montage and stager.modalities == ('EEG', 'EOG', 'EMG') and stager.primary is None
    assert all(c.endswith('-simulated') for p in ('fitted', 'judged') for c in stager.description[p])
    recording,hypnogram = sample_files()
    least = dict(EEG=.6, EOG=.1)                                     # chance is 0
    for m,kappa in least.items(): assert stager.stage(recording, (m,), hypnogram=hypnogram).agreement()['kappa'] > kappa

@pytest.mark.filterwarnings('ignore:Loading an EDF with mixed')
def test_an_envelope_by_way_of_mne(tmp_path):
    "Sleep-EDF has the chin at 1 Hz; mne says 100 Hz. With the scoring, a path has R; so has the Raw, and what was saved of it."
    stager,(recording,hypnogram) = Stager.load(), sample_files()
    by_path = stager.stage(recording, hypnogram=hypnogram)
    raw = mne.io.read_raw_edf(recording, verbose='error')
    close(stager.stage(raw), by_path)
    raw.load_data(verbose='error').save(tmp_path/'night_raw.fif', verbose='error')
    saved = stager.stage(tmp_path/'night_raw.fif', hypnogram=hypnogram)
    assert any('Chin has nothing above 10 Hz' in o for o in saved.notes) and not any('Chin' in o for o in by_path.notes)
    assert abs(saved.agreement()['kappa'] - by_path.agreement()['kappa']) < .03 and saved.agreement()['f1_R'] > .7

def test_threads_are_given_back(stager, x):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stager.stage(night(x[:, :6000]))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)

def test_the_real_night_is_good_and_staging_loads_little(network, tmp_path):
    path = save_weights(tmp_path/'w.safetensors', network)
    code = ('import sys, json; from sleepnb.stager import Stager; '
            f's = Stager.load({str(path)!r}).stage({str(sample_files()[0])!r}); '
            'print(json.dumps([sorted({"fastai", "mne", "matplotlib", "sklearn", "scipy.signal"} & {*sys.modules}), '
            '(s.quality != "good").sum().item(), int((s.channels.epochs_good == 841).sum()), len(s.stages)]))')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[], 0, 4, 841]

def test_a_long_recording_is_scaled_by_its_night():
    "Three hours of wake, a nap of half an hour, two of wake, a night of eight hours, one of wake."
    parts = [np.zeros(360, int), np.full(60, 2), np.zeros(240, int), synth_hypnogram(960, subject=7), np.zeros(120, int)]
    stages = np.concatenate(parts)
    asleep = 660 + np.flatnonzero(parts[3])
    made = synth_night(['Fpz-Cz', 'HEOG'], stages=stages, subject=7)
    found = Stager.load().stage(Night(list(made.x), [100, 100], [parse_channel(c) for c in made.channels], made.stages))
    said = next(n for n in found.notes if 'scaled by the night' in n)
    start,stop = (float(o)*120 for o in re.search(r'from ([\d.]+) to ([\d.]+) h', said).groups())
    assert abs(start - (asleep[0] - 60)) < 40 and abs(stop - (asleep[-1] + 61)) < 40      # 20 minutes
    night = stages[660:1620]
    cut = Night([o[660*3000:1620*3000] for o in made.x], [100, 100], [parse_channel(c) for c in made.channels], night)
    apart = Stager.load().stage(cut)
    assert cohen_kappa_score(found.stages[660:1620], apart.stages) > .95

def test_crop_and_whole_agree(data):
    "The real 22 hours, and the same file from 30 minutes before sleep to 30 minutes after."
    night = read_night(next(data.rglob('SC4001E0-PSG.edf')), next(data.rglob('SC4001EC-Hypnogram.edf')))
    asleep = np.flatnonzero(night.stages > 0)
    a,b = asleep[0] - 60, asleep[-1] + 61
    crop = Night([o[round(a*30*fs):round(b*30*fs)] for o,fs in zip(night.x, night.fs)], night.fs, night.channels, night.stages[a:b])
    for using,apart in ((('EEG',), .02), (('EEG', 'EOG', 'EMG'), .04)):
        whole,part = (Stager.load().stage(o, using) for o in (night, crop))
        assert len(whole.stages) == 2650
        kappas = [cohen_kappa_score(night.stages[a:b], o) for o in (whole.stages[a:b], part.stages)]
        print(f'{"+".join(using)}: κ {kappas[0]:.3f} of the whole recording, {kappas[1]:.3f} of the crop')
        assert abs(kappas[0] - kappas[1]) < apart

def test_channels_without_a_good_epoch_are_not_used():
    "EEG a million times too large, beside eyes in microvolts: nobody takes it for staged by EEG."
    made = synth_night(HOME, n_epochs=20, subject='loud')
    x = [made.x[0] * 1e6, made.x[1], made.x[2]]
    staging = Stager.load().stage(Night(x, [100]*3, [parse_channel(c) for c in HOME], made.stages))
    assert staging.modalities == ('EOG', 'EMG')
    used = staging.channels.set_index('channel').used
    assert used.to_dict() == {'C3-M2': False, 'HEOG': True, 'Chin': True}
    assert any(n.startswith('C3-M2 has no good epoch (most are noise)') for n in staging.notes)
    alone = Stager.load().stage(Night(x[1:], [100]*2, [parse_channel(c) for c in HOME[1:]], made.stages))
    np.testing.assert_allclose(alone.prob, staging.prob, atol=1e-6)

def test_eeg_under_names_of_its_own_is_told_of(tmp_path):
    "The chin alone has a name that is known: the note names what was left out, and an alias ends it."
    made = synth_night(['C3-M2', 'Chin'], n_epochs=10, subject='named')
    file = tmp_path/'named.edf'
    Edf([EdfSignal(x, 100, label=n, physical_dimension='uV') for x,n in zip(made.x.astype(float), ('frontal', 'chin1'))]).write(file)
    notes = Stager.load().stage(file).notes
    assert any('staged without EEG, by EMG alone' in n and 'frontal (not EEG' in n for n in notes)
    named = Stager.load().stage(file, aliases={'frontal': 'C3-M2'})
    assert named.modalities == ('EEG', 'EMG') and not any('without EEG' in n for n in named.notes)

@pytest.mark.parametrize('bad', [0, np.nan, 'noise'])
@pytest.mark.parametrize('lost', ['E1-M2', 'E2-M1'])
def test_of_two_eyes_the_good_one_is_used_alone(stager, bad, lost):
    names = ['C3-M2', 'E1-M2', 'E2-M1']
    made = synth_night(names, n_epochs=40, subject='eyes')
    def staged(x, epochs): # what becomes of the eyes, where one is bad from then on
        x = x.copy()
        x[names.index(lost), epochs*3000:] = np.random.default_rng(0).normal(0, 500, (40 - epochs)*3000) if bad == 'noise' else bad
        return stager.stage(Night(list(x), [100]*3, [parse_channel(n) for n in names], made.stages))
    other, = {'E1-M2', 'E2-M1'} - {lost}
    whole = staged(made.x, 0)
    assert whole.channels.query('used').channel.tolist() == ['C3-M2', other]
    assert any(f'{lost} has no signal most of the time: {other} is used alone' in n for n in whole.notes)
    some = staged(made.x, 30).channels.set_index('channel')                           # good for most of the time
    assert some.loc['E1-E2', 'epochs_good'] == 30
