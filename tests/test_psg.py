"""Reading nights: a real one whole, every kind of hypnogram file, and two thousand damaged inputs."""
import datetime
from pathlib import Path

import mne
import numpy as np
import pytest
import scipy.io
from edfio import Bdf, BdfSignal, Edf, EdfAnnotation, EdfSignal
from hypothesis import HealthCheck, given, settings, strategies as st

from sleepnb.core import EPOCH_SEC, HypnogramError, RecordingError, SleepnbError, Stage
from sleepnb.data.cohorts import plain_folder
from sleepnb.data.psg import NUMBERS, align, describe, find_hypnogram, open_recording, read_hypnogram, read_night, sample_files, stage_of_word

RNG = np.random.default_rng(0)
TRUTH = np.array([0, 1, 2, 3, 4, 2, 0, 0], np.int8)
WORDS = ['Sleep stage W', 'Sleep stage 1', 'Sleep stage 2', 'Sleep stage 4', 'Sleep stage R', 'Sleep stage 2', 'Sleep stage W', 'Sleep stage W']
EEG = np.round(RNG.normal(size=8*3000) * 30)                       # µV
EMG = np.round(RNG.normal(size=8*30) ** 2)

def write_psg(path, start=datetime.datetime(2020, 1, 2, 22, 0, 0), annotations=(), unit='uV', scale=1.):
    rng = (-3276.8 * scale, 3276.7 * scale)
    signals = [EdfSignal(EEG * scale, 100, label='EEG C3-A2', physical_dimension=unit, physical_range=rng),
               EdfSignal(EMG, 1, label='EMG submental', physical_dimension='uV', physical_range=(0, 4095))]
    edf = Edf(signals, starttime=start.time(), annotations=annotations or None, data_record_duration=30)
    edf.startdate = start.date()
    edf.write(path)
    return path

def write_hypnogram(path, start=datetime.datetime(2020, 1, 2, 22, 0, 0), words=WORDS, step=30., offset=0.):
    edf = Edf([], annotations=[EdfAnnotation(offset + i*step, step, w) for i,w in enumerate(words)], starttime=start.time())
    edf.startdate = start.date()
    edf.write(path)
    return path

# ---- the real night

def test_the_real_night_whole(data):
    folder = data/'sleep-edf'/'sleep-cassette'
    night = read_night(folder/'SC4001E0-PSG.edf', folder/'SC4001EC-Hypnogram.edf')
    assert [int((night.stages == s).sum()) for s in Stage] == [1997, 58, 250, 220, 125] and len(night.stages) == 2650
    assert [c.name for c in night.channels] == ['Fpz-Cz', 'Pz-Oz', 'HEOG', 'Chin'] and night.fs == [100, 100, 100, 1]
    cut = read_night(*sample_files())
    inside = slice(961, 1802)
    assert (night.stages[inside] == cut.stages).all()
    for whole,part,fs in zip(night.x, cut.x, night.fs): assert (whole[int(961*30*fs):int(1802*30*fs)] == part).all()
    envelope = night.x[3].reshape(-1, 30)[inside]
    assert [round(float(np.median(envelope[cut.stages == s])), 2) for s in (Stage.W, Stage.N3, Stage.REM)] == [3.31, 2.0, .21]

def test_slow_waves_of_the_real_night():
    from scipy.signal import welch
    night = read_night(*sample_files(), wanted=['Pz-Oz'])
    freqs,power = welch(night.x[0].reshape(-1, 3000), 100, nperseg=400)
    share = power[:, (freqs >= .5) & (freqs < 4)].sum(1) / power[:, (freqs >= .5) & (freqs < 40)].sum(1)
    measured = [np.median(share[night.stages == s]) for s in Stage]
    np.testing.assert_allclose(measured, [.536, .628, .814, .927, .642], atol=.01)

def test_only_the_wanted_channels_are_touched(monkeypatch):
    from edfio import EdfSignal
    touched,read = [], EdfSignal.get_digital_slice
    monkeypatch.setattr(EdfSignal, 'get_digital_slice', lambda self, *args: (touched.append(self.label), read(self, *args))[1])
    night = read_night(*sample_files(), wanted=['Pz', 'Chin'])
    assert len(night.x) == 2 and touched == ['EEG Pz-Oz', 'EMG submental']
    assert all(s._digital is None for s in open_recording(sample_files()[0]).source.signals)

@pytest.mark.parametrize('suffix', ['.edf', '.rec', '.bdf', '.fif', '.vhdr', '.set'])
def test_formats(tmp_path, suffix):
    path = tmp_path/f'night_raw{suffix}'
    if suffix in ('.edf', '.rec'): write_psg(path)
    elif suffix == '.bdf':
        Bdf([BdfSignal(EEG, 100, label='EEG C3-A2', physical_dimension='uV', physical_range=(-5000, 5000))]).write(path)
    elif suffix == '.fif':
        mne.io.RawArray(EEG[None] * 1e-6, mne.create_info(['EEG C3-A2'], 100, 'eeg'), verbose='error').save(path, verbose='error')
    elif suffix == '.set':
        eeg = dict(data=EEG[None].astype('f4'), srate=100., nbchan=1., pnts=float(len(EEG)), trials=1., xmin=0., event=[], epoch=[], setname='night',
                   chanlocs=np.array([('EEG C3-A2',)], dtype=[('labels', 'O')]), chaninfo=dict(nodatchans=[]), etc={}, icawinv=[], ref='common')
        scipy.io.savemat(path, dict(EEG=eeg), appendmat=False)
    else:
        path.write_text('Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nDataFile=n.eeg\nMarkerFile=n.vmrk\n'
            'DataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=1\nSamplingInterval=10000\n'
            '[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n[Channel Infos]\nCh1=EEG C3-A2,,1,µV\n', encoding='utf-8')
        (tmp_path/'n.vmrk').write_text('Brain Vision Data Exchange Marker File, Version 1.0\n[Marker Infos]\n')
        EEG.astype('<f4').tofile(tmp_path/'n.eeg')
    night = read_night(path)
    assert night.channels[0].name == 'C3-M2' and len(night.stages) == 8
    np.testing.assert_allclose(night.x[0], EEG, atol=.11)

@pytest.mark.parametrize('unit,scale', [('mV', 1e-3), ('V', 1e-6), ('uV', 1), ('', 1)])
def test_units(tmp_path, unit, scale):
    night = read_night(write_psg(tmp_path/'a.edf', unit=unit, scale=scale))
    np.testing.assert_allclose(night.x[0], EEG, atol=.11)

def test_a_unit_that_is_wrong_or_unknown(tmp_path):
    path = write_psg(tmp_path/'a.edf', unit='uV', scale=1e-3)      # millivolts that call themselves microvolts
    with pytest.raises(RecordingError, match='cannot be in microvolts'): read_night(path)
    np.testing.assert_allclose(read_night(path, wanted=['C3'], unit='mV').x[0], EEG, atol=.11)
    with pytest.raises(RecordingError, match='unknown unit'): read_night(write_psg(tmp_path/'b.edf', unit='furlong'))
    with pytest.raises(RecordingError, match='this unit is not known'): read_night(path, unit='furlong')

def test_only_volts_of_a_raw_are_scaled_as_volts():
    x = np.stack([EEG, EEG]) * 1e-6
    for kind in ('misc', 'temperature'):
        raw = mne.io.RawArray(x, mne.create_info(['C3', 'EMG1'], 100, ['eeg', kind]), verbose='error')
        assert [c.name for c in read_night(raw).channels] == ['C3'] and f"EMG1 is left out: not in volts, of mne type '{kind}'" in read_night(raw).notes
        with pytest.raises(RecordingError, match=f"channel 'EMG1' is not in volts.*mne type '{kind}'.*set_channel_types"): read_night(raw, wanted=['EMG1'])
        np.testing.assert_allclose(read_night(raw, wanted=['C3']).x[0], EEG, atol=1e-3)
        np.testing.assert_allclose(read_night(raw, unit='V').x[1], EEG, atol=1e-3)
    raw.set_channel_types({'EMG1': 'emg'}, verbose='error')
    np.testing.assert_allclose(read_night(raw).x[1], EEG, atol=1e-3)

def test_gaps_are_refused(tmp_path):
    path = write_psg(tmp_path/'a.edf', annotations=[EdfAnnotation(0, 30, 'Sleep stage W')])
    raw = path.read_bytes().replace(b'EDF+C', b'EDF+D', 1)
    (tmp_path/'same.edf').write_bytes(raw)
    assert len(read_night(tmp_path/'same.edf').stages) == 8        # declared, but nothing is missing
    assert raw.count(b'+120\x14\x14') == 1
    (tmp_path/'gap.edf').write_bytes(raw.replace(b'+120\x14\x14', b'+150\x14\x14'))
    with pytest.raises(RecordingError, match='gaps'): read_night(tmp_path/'gap.edf')

# ---- hypnograms

XML = '<CMPStudyConfig><EpochLength>30</EpochLength><SleepStages>{}</SleepStages></CMPStudyConfig>'
NSRR = '<PSGAnnotation><ScoredEvents><ScoredEvent><EventType>Respiratory|Respiratory</EventType><EventConcept>Apnea</EventConcept>' \
       '<Start>3</Start><Duration>9</Duration></ScoredEvent>{}</ScoredEvents></PSGAnnotation>'
EVENT = '\n<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>{}</EventConcept><Start>{}</Start><Duration>30.0</Duration></ScoredEvent>'
CONCEPTS = ['Wake|0', 'Stage 1 sleep|1', 'Stage 2 sleep|2', 'Stage 4 sleep|4', 'REM sleep|5', 'Stage 2 sleep|2', 'Wake|0', 'Wake|0']
FILES = { # name → text, vocabulary
    '1_1.txt': ('\n'.join('0 1 2 3 5 2 0 0'.split()) + '\n\n', 'isruc'),
    'nsrr.txt': ('\n'.join('0 1 2 4 5 2 0 0'.split()), 'nsrr'),
    'yasa.txt': ('\n'.join('WAKE N1 N2 N3 REM N2 WAKE WAKE'.split()), None),
    'yasa_int.txt': ('\n'.join('0 1 2 3 4 2 0 0'.split()), 'yasa'),
    'old.txt': ('\n'.join('W S1 S2 S4 REM S2 W W'.split()), None),
    'profusion.xml': (XML.format(''.join(f'\n<SleepStage>{i}</SleepStage>' for i in (0, 1, 2, 4, 5, 2, 0, 0))), None),
    'nsrr.xml': (NSRR.format(''.join(EVENT.format(c, 30.*i) for i,c in enumerate(CONCEPTS))), None),
    'EPCTL01.txt': ('\n'.join(f'{w}\t{30*i}\t30' for i,w in enumerate('W N1 N2 N3 R N2 W W'.split())), None),
    'x_events.tsv': ('onset\tduration\ttrial_type\n' + '\n'.join(f'{30*i}\t30\t{w}' for i,w in enumerate(WORDS)) + '\n17\t3\tarousal\n', None),
    'x_hypnogram.tsv': ('onset\tduration\tstage\n0\t30\tW\n30\t30\tN1\n60\t30\tN2\n90\t30\tN3\n120\t30\tR\n150\t30\tN2\n180\t60\tW', None),
    'h.csv': ('\ufeffonset,duration,stage\n0,30,0\n30,30,1\n60,30,2\n90,30,3\n120,30,5\n150,30,2\n180,60,0', 'isruc')}

@pytest.mark.parametrize('name', FILES)
def test_hypnogram_files(tmp_path, name):
    text,vocabulary = FILES[name]
    (tmp_path/name).write_text(text, encoding='utf-8')
    night = read_night(write_psg(tmp_path/'a.edf'), tmp_path/name, vocabulary=vocabulary)
    assert (night.stages == TRUTH).all()

def test_hypnogram_inside_the_recording_or_beside_it(tmp_path):
    inside = [EdfAnnotation(30*i, 30, w) for i,w in enumerate(WORDS)] + [EdfAnnotation(17, None, 'Lights off')]
    assert (read_night(write_psg(tmp_path/'a.edf', annotations=inside)).stages == TRUTH).all()
    assert (read_night(write_psg(tmp_path/'b.edf'), write_hypnogram(tmp_path/'h.edf')).stages == TRUTH).all()

def test_hypnogram_inside_an_mne_raw(tmp_path):
    raw = mne.io.RawArray(EEG[None] * 1e-6, mne.create_info(['C3'], 100, 'eeg'), verbose='error')
    raw.set_meas_date(datetime.datetime(2020, 1, 2, 22, tzinfo=datetime.timezone.utc))
    raw.set_annotations(mne.Annotations([30*i for i in range(8)], 30, WORDS, orig_time=raw.info['meas_date']))
    assert (read_night(raw).stages == TRUTH).all()
    later = raw.copy().crop(60)                                     # its first sample is a minute later
    assert (read_night(later).stages == TRUTH[2:]).all()
    later.save(tmp_path/'cut_raw.fif', verbose='error')
    assert (read_night(tmp_path/'cut_raw.fif').stages == TRUTH[2:]).all()
    assert (read_night(later, read_hypnogram(write_hypnogram(tmp_path/'h.edf'))).stages == TRUTH[2:]).all()

def test_every_number_of_every_vocabulary_is_a_stage_or_unscored():
    for numbers in NUMBERS.values(): assert set(numbers.values()) <= {-1, 0, 1, 2, 3, 4}
    assert [stage_of_word(f'Sleep stage {x}') for x in 'W1234R?'] == [0, 1, 2, 3, 3, 4, -1]

@settings(max_examples=300, deadline=None)
@given(st.integers(-240, 240), st.sampled_from([30., 20., 10., 60., 15.]), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_alignment_is_by_time(shift, step, n, seed):
    "Every epoch gets the stage that a naive clock, second by second, finds in most of it."
    from sleepnb.data.psg import Hypnogram
    stage = np.random.default_rng(seed).integers(-1, 5, n).astype(np.int8)
    start,duration = datetime.datetime(2020, 1, 2, 22), 900.
    h = Hypnogram('h', np.arange(n) * step, np.full(n, step), stage, start + datetime.timedelta(seconds=shift))
    seconds = np.full(900, -9)                                      # what was scored at each second of the recording
    for i,s in enumerate(stage):
        a,b = int(shift + i*step), int(shift + (i+1)*step)
        seconds[max(a, 0):max(b, 0)] = s
    try: stages,first,_ = align(h, duration, start)
    except HypnogramError:
        assert (seconds >= 0).sum() < (stage >= 0).sum() * step * .9 or not (seconds >= 0).any()
        return
    phases = [(shift + i*step) % 30 for i in np.flatnonzero(stage >= 0)]
    most = max(phases, key=phases.count)
    assert first == (most if 2*phases.count(most) > len(phases) else phases[0]) and len(stages) == (900 - first) // 30
    for k,s in enumerate(stages):
        counts = np.bincount(seconds[int(first) + 30*k:int(first) + 30*k + 30].clip(-1) + 1, minlength=6)[1:]
        assert (s == -1 and counts.max() < 15) or (counts[s] == counts.max() and counts[s] >= 15)

@pytest.mark.parametrize('labels,stages', [
    (['Wake', 'NREM 1', 'NREM 2', 'NREM 3', 'REM'], [0, 1, 2, 3, 4]), (['Awake', 'Stage1', 'Stage 2', 'SWS', 'R'], [0, 1, 2, 3, 4]),
    (['Sleep stage W', 'Sleep stage N1', 'Sleep_stage_N2', 'Sleep stage N3', 'REM sleep'], [0, 1, 2, 3, 4])])
def test_words_of_scorers(labels, stages): assert [stage_of_word(o) for o in labels] == stages

@pytest.mark.parametrize('labels', [['W', '1', '2', '3', 'R'], ['Wake', 'Light sleep', 'Deep sleep', 'REM'], ['W', 'N1', 'Stage X']])
def test_half_known_words_are_refused(tmp_path, labels):
    rows = ''.join(f'{30*i}\t30\t{o}\n' for i,o in enumerate(labels))
    (tmp_path/'a_events.tsv').write_text(f'onset\tduration\ttrial_type\n{rows}')
    with pytest.raises(HypnogramError, match='numbers|not the name'): read_hypnogram(tmp_path/'a_events.tsv')
    if '1' in labels: assert read_hypnogram(tmp_path/'a_events.tsv', vocabulary='nsrr').stage.tolist() == [0, 1, 2, 3, 4]

def test_pages_of_another_length_are_refused(tmp_path):
    (tmp_path/'h.txt').write_text('\n'.join(['W', 'N2', 'N2', 'R'] * 3))               # 12 pages of 20 s in 8 epochs of 30 s
    with pytest.raises(HypnogramError, match='does not belong'): read_night(write_psg(tmp_path/'a.edf'), tmp_path/'h.txt')
    assert read_night(tmp_path/'a.edf', tmp_path/'h.txt', epoch_sec=20).stages.tolist() == [0, 2, 4, 2, 2, 0, 2, 4]
    (tmp_path/'two.txt').write_text('2\n0\n2.0\n')                                      # the last was `2` and `0`
    with pytest.raises(HypnogramError, match='line 3: numbers are written in two ways'): read_hypnogram(tmp_path/'two.txt', 'isruc')
    (tmp_path/'gap.txt').write_text('W\n\nN2\n')
    with pytest.raises(HypnogramError, match='line 2'): read_hypnogram(tmp_path/'gap.txt')

ROWS = list(enumerate('W N1 N2 N3 R N2 W W'.split()))
def clock(seconds): return f'{(BEGIN + datetime.timedelta(seconds=seconds)):%H:%M:%S}'

@pytest.mark.parametrize('header,row', [
    ('start,end,stage', lambda i, w: f'{30*i},{30*i + 30},{w}'), ('epoch,stage', lambda i, w: f'{i},{w}'), ('Epoch;Stage', lambda i, w: f'{i + 1};{w}'),
    ('time,stage', lambda i, w: f'{clock(30*i)},{w}'), ('start,end,stage', lambda i, w: f'{clock(30*i)},{clock(30*i + 30)},{w}'),
    ('onset,duration,stage', lambda i, w: f'{clock(30*i)},30,{w}'), ('stage', lambda i, w: w), ('sleep_stage', lambda i, w: w)])
@pytest.mark.parametrize('ending,encoding', [('.csv', 'utf-8'), ('.csv', 'utf-16'), ('.txt', 'utf-8')])
def test_tables_made_at_home(tmp_path, header, row, ending, encoding):
    "From two minutes before midnight to two minutes after."
    path = tmp_path/f'h{ending}'
    path.write_text('\n'.join([header, *(row(i, w) for i,w in ROWS)]), encoding=encoding)
    night = read_night(write_psg(tmp_path/'a.edf', start=BEGIN), path)
    assert (night.stages == TRUTH).all()

BEGIN = datetime.datetime(2020, 1, 2, 23, 58)

@pytest.mark.parametrize('text,match', [
    ('onset,stage\n0,W\n1,N1', 'other columns'), ('epoch,start,stage\n0,0,W\n1,30,N1', 'other columns'), ('n,stage\n0,W\n1,N1', 'other columns'),
    ('epoch,stage\n0,W\n2,N1', 'numbered one after the other .expected 1; found 2'), ('epoch,stage\n7,W\n8,N1', 'expected 0 or 1; found 7'),
    ('time,stage\n23:59:00,W\n23:58:00,N1', 'row 2: the times of day go back'), ('time,stage\n00:00:00,W\n00:00:30,N1', 'may be times of day, or count'),
    ('time,stage\n23:59:00,W\n60,N1', "row 2: onset is not a time of day"), ('start,end,stage\n30,0,W', 'negative duration'),
    ('epoch,stage\n0,0\n1,4', 'stages are numbers'), ('onset,duration,stage\n0,30,"W\n30,30,N1', 'cannot be read'),
    ('onset,duration,stage\n0,30,W,30,30,N1', 'more cells than the first')])
def test_tables_that_could_mean_two_things_are_refused(tmp_path, text, match):
    (tmp_path/'h.csv').write_text(text)
    with pytest.raises(HypnogramError, match=match): read_night(write_psg(tmp_path/'a.edf', start=BEGIN), tmp_path/'h.csv')

def test_times_of_day_need_a_recording_with_one(tmp_path):
    (tmp_path/'h.csv').write_text('time,stage\n' + '\n'.join(f'{clock(30*i + 60)},{w}' for i,w in ROWS[:6]))
    assert read_night(write_psg(tmp_path/'a.edf', start=BEGIN), tmp_path/'h.csv').stages.tolist() == [-1, -1, *TRUTH[:6]]
    raw = mne.io.RawArray(EEG[None] * 1e-6, mne.create_info(['C3'], 100, 'eeg'), verbose='error')
    with pytest.raises(HypnogramError, match='times of day, but the recording has none'): read_night(raw, tmp_path/'h.csv')

@pytest.mark.parametrize('begin,match', [(b'PK\x03\x04', 'Excel'), (b'\xd0\xcf\x11\xe0', 'Excel'), (b'MATLAB 5.0 MAT-file', 'MATLAB'),
                                         (b'\x89HDF', 'HDF5'), (b'\x1f\x8b', 'gzip'), (b'W\0N\0', 'no text')])
def test_files_that_are_no_text(tmp_path, begin, match):
    (tmp_path/'h.dat').write_bytes(begin + bytes(100))
    with pytest.raises(HypnogramError, match=f'{match}.*CSV'): read_hypnogram(tmp_path/'h.dat')

def test_the_wrong_thing_in_the_wrong_place(tmp_path):
    psg,h = write_psg(tmp_path/'a.edf'), write_hypnogram(tmp_path/'h.edf')
    (tmp_path/'h.txt').write_text('W\n' * 8)
    for other in (h, tmp_path/'h.txt'):
        with pytest.raises(RecordingError, match='comes second'): read_night(other, psg)
    with pytest.raises(RecordingError, match='is a folder, not a file'): read_night(tmp_path)
    with pytest.raises(HypnogramError, match='is a folder, not a file'): read_night(psg, tmp_path)
    with pytest.raises(HypnogramError, match='no such file'): read_night(psg, tmp_path/'absent.txt')
    with pytest.raises(RecordingError, match='this is no recording .*found ndarray'): read_night(EEG)
    with pytest.raises(HypnogramError, match='read from a file .*found ndarray'): read_night(psg, TRUTH)
    for which in (None, h):
        with pytest.raises(HypnogramError, match="vocabulary is not known .*found 'irsuc'"): read_night(psg, which, vocabulary='irsuc')
    with pytest.raises(HypnogramError, match='must last longer'): read_hypnogram(h, epoch_sec=0)

def test_an_unscored_marker_ends_the_stage_before_it(tmp_path):
    def lasts(h): return [(o, d) for o,d,s in zip(h.onset, h.duration, h.stage) if s == 2], sorted(zip(h.onset[h.stage < 0], h.duration[h.stage < 0]))
    clock = tmp_path/'clock.csv'
    for mark in ('?', 'Sleep stage ?', 'unscored', 'MT'):
        clock.write_text(f'time,description\n22:00:30,N2\n22:00:40,arousal\n22:01:00,{mark}\n22:02:00,{mark}\n22:05:00,N3\n')
        h = read_hypnogram(clock)
        assert lasts(h) == ([(0, 30)], [(30, 60), (90, 180)]) and h.stage[-1] == 3 and '1 events that are no stages' in h.notes
        (tmp_path/'t.csv').write_text(f'onset,duration,description\n30,0,N2\n60,0,{mark}\n70,0,Movement\n300,0,N3\n')
        assert lasts(read_hypnogram(tmp_path/'t.csv')) == ([(30, 30)], [(60, 240)])
        blocks = [EdfAnnotation(0, None, 'Sleep stage N2'), EdfAnnotation(60, None, mark), EdfAnnotation(180, None, 'Sleep stage N3')]
        path = write_psg(tmp_path/'n.edf', annotations=blocks)
        assert lasts(read_hypnogram(path)) == ([(0, 60)], [(60, 120)])
        assert read_night(path).stages.tolist() == [2, 2, -1, -1, -1, -1, 3, -1]
    (tmp_path/'d.csv').write_text('onset,duration,description\n0,120,N2\n60,0,?\n120,30,N3\n')            # stages that say how long they last
    assert read_hypnogram(tmp_path/'d.csv').duration.tolist() == [120, 30]

def test_markers_are_no_hypnogram(tmp_path):
    for notes in ([EdfAnnotation(10, None, 'Movement')], [EdfAnnotation(10, None, 'L'), EdfAnnotation(40, None, 'R')]):
        night = read_night(write_psg(tmp_path/'a.edf', annotations=notes))
        assert (night.stages == -1).all() and 'there is no hypnogram' in night.notes
    blocks = [EdfAnnotation(0, None, 'Sleep stage W'), EdfAnnotation(60, None, 'Sleep stage N2'), EdfAnnotation(70, None, 'Movement')]
    assert read_night(write_psg(tmp_path/'b.edf', annotations=blocks)).stages.tolist()[:3] == [0, 0, 2]

def test_a_start_that_is_none(tmp_path):
    "EDF+ writers without a clock write 1 January 1985, midnight."
    night = read_night(write_psg(tmp_path/'a.edf'), write_hypnogram(tmp_path/'h.edf', datetime.datetime(1985, 1, 1)))
    assert (night.stages == TRUTH).all() and any('no start time' in o for o in night.notes)

@pytest.mark.parametrize('dated', [True, False])
def test_a_date_that_was_removed_leaves_the_time(tmp_path, dated):
    "`Startdate X`, as EDF+ wants it for privacy; the hypnogram begins a page later, or after midnight."
    def anonymous(path, signals, at, annotations=None):
        edf = Edf(signals, starttime=at, annotations=annotations, data_record_duration=30 if signals else None)
        if dated: edf.startdate = datetime.date(2020, 1, 2)
        edf.write(path)
        return path
    signals = [EdfSignal(EEG, 100, label='EEG C3-A2', physical_dimension='uV', physical_range=(-3276.8, 3276.7))]
    stages = [EdfAnnotation(30*i, 30, w) for i,w in enumerate(WORDS[:6])]
    psg = anonymous(tmp_path/'a.edf', signals, datetime.time(23, 59))
    night = read_night(psg, anonymous(tmp_path/'h.edf', [], datetime.time(23, 59, 30), stages))
    assert night.stages.tolist() == [-1, *TRUTH[:6], -1]
    (tmp_path/'clock.csv').write_text('time,stage\n23:59:00,W\n00:00:00,N2\n00:01:00,R\n')
    assert read_night(psg, tmp_path/'clock.csv').stages.tolist()[:5] == [0, 0, 2, 2, 4]
    if not dated: assert 'the file has no start date' in night.notes

def test_overlaps_are_found_wherever_they_are(tmp_path):
    for rows in ('0,120,W\n0,30,W\n30,30,N2\n', '0,120,W\n0,120,N2\n'):
        (tmp_path/'h.csv').write_text('onset,duration,stage\n' + rows)
        with pytest.raises(HypnogramError, match='same time'): read_night(write_psg(tmp_path/'a.edf'), tmp_path/'h.csv')
    inside = [EdfAnnotation(0, 120, 'Sleep stage W'), EdfAnnotation(0, 120, 'Sleep stage N2')]
    with pytest.raises(HypnogramError, match='same time'): read_night(write_psg(tmp_path/'b.edf', annotations=inside))

def test_a_cropped_raw_and_a_table_without_times(tmp_path):
    raw = mne.io.RawArray(EEG[None] * 1e-6, mne.create_info(['C3'], 100, 'eeg'), verbose='error').crop(60)
    (tmp_path/'h.txt').write_text('\n'.join('W N1 N2 N3 R N2 W W'.split()))
    with pytest.raises(HypnogramError, match='cropped'): read_night(raw, tmp_path/'h.txt')

def test_columns_in_any_order_and_with_semicolons(tmp_path):
    (tmp_path/'h.csv').write_text('stage;onset;duration\n' + ''.join(f'{w};{30*i};30\n' for i,w in enumerate('W N1 N2 N3 R N2 W W'.split())))
    assert (read_night(write_psg(tmp_path/'a.edf'), tmp_path/'h.csv').stages == TRUTH).all()
    (tmp_path/'e.tsv').write_text('onset\tduration\ttrial_type\n0\tn/a\tlights off\n0\t240\tN2\n')
    assert (read_night(tmp_path/'a.edf', tmp_path/'e.tsv').stages == 2).all()

def test_a_dead_lead_does_not_hide_a_wrong_unit():
    raw = mne.io.RawArray(np.stack([EEG * 1e-9, EEG*0]), mne.create_info(['C3', 'C4'], 100, 'eeg'), verbose='error')
    with pytest.raises(RecordingError, match='cannot be in microvolts'): read_night(raw)

# ---- damage

def cut(raw, draw): return raw[:draw(st.integers(0, len(raw) - 1))]
def flip(raw, draw):
    at = draw(st.integers(0, min(len(raw), 800) - 1))
    return raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at+1:]
def field(at, width):
    def change(raw, draw):
        value = draw(st.one_of(st.integers(-10**6, 10**6).map(str), st.sampled_from(['', 'nan', 'inf', '-1', '0', '1e9', 'x', '30.5'])))
        return raw[:at] + value.encode()[:width].ljust(width) + raw[at+width:]
    return change
def longer(raw, draw): return raw + bytes(draw(st.integers(1, 20_000)))
def nothing(raw, draw): return raw

CHANGES = dict(cut=cut, flip=flip, longer=longer, nothing=nothing, records=field(236, 8), seconds=field(244, 8), signals=field(252, 4),
               header_bytes=field(184, 8), physical_max=field(256 + 2*(16+80+8+8), 8), digital_max=field(256 + 2*(16+80+8+8+8+8), 8),
               samples=field(256 + 2*(16+80+8+8+8+8+8+80), 8))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp('damage')
    write_psg(made/'text.edf')
    return made

FIRST_ROW = {'EPCTL01.txt': 0, '1_1.txt': 0, 'nsrr.txt': 0, 'yasa.txt': 0, 'yasa_int.txt': 0, 'old.txt': 0} # line of epoch 0; 1 elsewhere

def damaged_epochs(name, raw, at):
    "The epochs whose row holds this byte; a line's end belongs to both rows."
    row = raw[:at].count(b'\n') - FIRST_ROW.get(name, 1)
    rows = {row, row + 1} if raw[at:at+1] == b'\n' else {row}
    return rows | {7} if 6 in rows and b'60' in raw.splitlines()[-1] else rows     # one row for two epochs

@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(sorted(FILES)), st.booleans())
def test_damaged_text_is_refused_or_wrong_only_where_it_is_damaged(folder, data, name, is_cut):
    text,vocabulary = FILES[name]
    raw = text.encode()
    at = data.draw(st.integers(0, len(raw) - 1))
    length = raw[:at].endswith(b'<EpochLength>') or raw[:at].endswith(b'<EpochLength>3')     # 20 s would be as good a length
    made = raw[:at] if is_cut or length else raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at+1:]
    (folder/name).write_bytes(made)
    try: stages = read_night(folder/'text.edf', folder/name, vocabulary=vocabulary).stages
    except HypnogramError as error:
        assert str(folder) in str(error) and error.what
        return
    wrong = {*np.flatnonzero(stages != TRUTH)}
    if len(made) < len(raw): assert (stages[list(wrong)] == -1).all() and wrong == {*range(8 - len(wrong), 8)}   # the truth, as far as it goes
    else: assert wrong <= damaged_epochs(name, raw, at)

@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(sorted(CHANGES)), st.sampled_from(['recording', 'hypnogram', *FILES]))
def test_damage_is_named_or_harmless(folder, data, kind, which):
    psg,hypnogram = write_psg(folder/'a.edf').read_bytes(), write_hypnogram(folder/'h.edf').read_bytes()
    draw,vocabulary = data.draw, None
    if which in FILES:
        text,vocabulary = FILES[which]
        name,raw = which, text.encode()
        if kind not in ('cut', 'flip', 'nothing'): kind = 'flip'
    else: name,raw = ('h.edf', hypnogram)
    if which == 'recording': psg = CHANGES[kind](psg, draw)
    else: raw = CHANGES[kind](raw, draw)
    (folder/'a.edf').write_bytes(psg)
    (folder/name).write_bytes(raw)
    try: night = read_night(folder/'a.edf', folder/name, vocabulary=vocabulary)
    except SleepnbError as error:
        assert str(folder) in str(error) and error.what                       # it says where, and what
        return
    assert len(night.x) == len(night.fs) == len(night.channels) and night.stages.dtype == np.int8
    assert set(np.unique(night.stages)) <= {-1, 0, 1, 2, 3, 4}
    for x,fs in zip(night.x, night.fs): assert np.isfinite(x).all() and abs(len(x) - len(night.stages)*EPOCH_SEC*fs) <= 1
    if kind in ('nothing', 'longer') or (kind == 'cut' and which == 'recording'):
        assert (night.stages[:8] == TRUTH).all() and np.allclose(night.x[0][:24000], EEG, atol=.11)

@pytest.mark.parametrize('change,match', [
    (lambda x: np.where(np.arange(len(x)) == 7, np.nan, x), 'no numbers'), (lambda x: x * 1e6, 'cannot be in microvolts'),
    (lambda x: x * 1e-6, 'cannot be in microvolts')])
def test_impossible_signals(change, match):
    raw = mne.io.RawArray(change(EEG)[None] * 1e-6, mne.create_info(['C3'], 100, 'eeg'), verbose='error')
    with pytest.raises(RecordingError, match=match): read_night(raw)

def test_a_flat_channel_is_noted_and_twins_are_kept_apart():
    raw = mne.io.RawArray(np.stack([EEG, EEG*0]) * 1e-6, mne.create_info(['C3', 'C4'], 100, 'eeg'), verbose='error')
    assert 'C4 is flat' in read_night(raw).notes

# ---- what mne makes of a file

@pytest.mark.filterwarnings('ignore:Loading an EDF with mixed')
@pytest.mark.parametrize('how', [dict(), dict(preload=True), dict(infer_types=True)])
def test_a_slow_channel_keeps_its_rate_by_way_of_mne(tmp_path, how):
    "mne gives 100 Hz to an envelope of 1 Hz; the file has 240 values."
    raw = mne.io.read_raw_edf(write_psg(tmp_path/'a.edf'), verbose='error', **how)
    assert raw.info['sfreq'] == 100
    night = read_night(raw)
    assert night.fs == [100, 1] and [c.modality for c in night.channels] == ['EEG', 'EMG']
    np.testing.assert_allclose(night.x[1], EMG, atol=.1)
    np.testing.assert_allclose(read_night(raw.copy().crop(60)).x[1], EMG[60:], atol=.1)
    np.testing.assert_allclose(read_night(raw, wanted=['Chin'], unit='V').x[0], EMG, atol=.1)
    loaded = raw.copy().load_data(verbose='error').apply_function(lambda x: 2*x, picks=[1])            # a change is kept
    np.testing.assert_allclose(read_night(loaded).x[1], 2*EMG, atol=.2)
    assert read_night(loaded.rename_channels({raw.ch_names[1]: 'Chin'})).fs == [100, 100]

# ---- days

def a_night(at, hours=8): # all of it N2
    from sleepnb.data.psg import Hypnogram
    return Hypnogram('h', np.arange(hours*120) * 30., np.full(hours*120, 30.), np.full(hours*120, 2, np.int8), at)

@pytest.mark.parametrize('start,hours,scored,begins,said', [
    ('2020-01-02 08:00', 36, '2020-01-02 22:00', 14, 'starts 50400 s after'), ('2020-01-02 08:00', 26, '2020-01-02 22:00', 14, 'starts 50400 s'),
    ('2020-01-02 20:00', 60, '2020-01-03 23:00', 27, 'starts 97200 s after'),    # the second night of two
    ('2020-01-02 08:00', 23, '1999-05-06 22:00', 14, 'dates do not fit: 2020-01-02, scored 1999-05-06'),
    ('2020-01-02 08:00', 36, '1999-05-06 22:00', 14, 'dates do not fit'), ('2020-01-02 08:00', 23, '22:00', 14, ''), ('2020-01-02 08:00', 36, '22:00', 14, ''),
    ('2020-01-02 22:00', 9, '2020-01-01 22:30', .5, 'dates do not fit'), ('2020-01-02 21:00', 9, '2020-01-02 20:59', -1/60, 'starts -60 s after'),
    ('2020-01-02 12:00', 24.2, '1999-05-06 22:00', 10, 'dates do not fit'), ('2020-01-02 23:50', 9, '00:10', 1/3, '')])
def test_the_day_of_a_long_recording(start, hours, scored, begins, said):
    "By the dates where they meet, and by the clock where they do not."
    begun = datetime.datetime.fromisoformat(scored) if ' ' in scored else datetime.time.fromisoformat(scored)
    stages,first,notes = align(a_night(begun), hours*3600, datetime.datetime.fromisoformat(start))
    at = first/3600 + np.flatnonzero(stages == 2)/120
    assert abs(at[0] - max(begins, 0)) < .02 and abs(at[-1] + 1/120 - (begins + 8)) < .02
    assert any(said in o for o in notes) and any('dates' in o for o in notes) == ('dates' in said) if said else not any('dates' in o for o in notes)

@pytest.mark.parametrize('scored', [datetime.time(22), datetime.datetime(1999, 5, 6, 22)])
def test_a_day_that_nothing_tells(scored):
    with pytest.raises(HypnogramError, match='several days.*found 60.0 h'): align(a_night(scored), 60*3600, datetime.datetime(2020, 1, 2, 20))

# ---- stages in the recording itself

@pytest.mark.parametrize('suffix', ['.edf', '.fif', '.fif.gz'])
def test_a_recording_is_its_own_hypnogram_in_any_format(tmp_path, suffix):
    path = tmp_path/f'night_raw{suffix}'
    if suffix == '.edf': write_psg(path, annotations=[EdfAnnotation(30*i, 30, w) for i,w in enumerate(WORDS)])
    else:
        raw = mne.io.RawArray(np.stack([EEG]) * 1e-6, mne.create_info(['C3'], 100, 'eeg'), first_samp=700, verbose='error')
        raw.set_annotations(mne.Annotations([30*i for i in range(8)], 30, WORDS)).save(path, verbose='error')
    for night in (read_night(path), read_night(path, path), read_night(path, read_hypnogram(path))): assert (night.stages == TRUTH).all()
    assert describe(path)['hypnogram']['file'] == str(path) and describe(path)['hypnogram']['epochs'] == 8
    if suffix == '.fif.gz': return                                   # which a folder passes over
    cohort = plain_folder(tmp_path)
    assert list(cohort.nights.hypnogram) == [str(path)] and (cohort.read(dict(cohort.nights.iloc[0])).stages == TRUTH).all()

def test_numbers_in_a_recording_need_their_vocabulary(tmp_path):
    path = write_psg(tmp_path/'a.edf', annotations=[EdfAnnotation(30*i, 30, w) for i,w in enumerate('0 1 2 4 5 2 0 0'.split())])
    with pytest.raises(HypnogramError, match='stages are numbers'): read_hypnogram(path)
    assert (read_hypnogram(path, 'nsrr').stage == TRUTH).all()

# ---- neighbours

@pytest.mark.parametrize('name', ['night_private.txt', 'night_private.csv', 'night_private.edf'])
def test_a_neighbour_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch, name):
    path,opened = write_psg(tmp_path/'night.edf'), Path.open
    (tmp_path/name).write_text('W\n' * 8)
    def refuse(self, *args, **kwargs):
        if self.name == name: raise PermissionError(13, 'Permission denied', str(self))
        return opened(self, *args, **kwargs)
    monkeypatch.setattr(Path, 'open', refuse)
    found = describe(path)
    assert found['hypnogram'] is None and found['channels'][0]['used']
    assert f'{name} cannot be read (Permission denied), and is passed over' in found['notes']
    with pytest.warns(UserWarning, match=f'night.edf: {name} cannot be read'): assert find_hypnogram(path) is None
    (tmp_path/'night.csv').write_text('\n'.join('W N1 N2 N3 R N2 W W'.split()))
    assert describe(path)['hypnogram']['epochs'] == 8                              # what may be read is found
    with pytest.warns(UserWarning, match='cannot be read'): assert find_hypnogram(path) == tmp_path/'night.csv'

def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    path = write_psg(tmp_path/'night.edf', annotations=[EdfAnnotation(30*i, 30, w) for i,w in enumerate(WORDS)])
    def refuse(self): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'iterdir', refuse)
    assert describe(path)['hypnogram']['file'] == str(path)                        # its own stages
    assert any('the folder cannot be listed (Permission denied)' in o for o in describe(path)['notes'])
    with pytest.warns(UserWarning, match='cannot be listed'): assert find_hypnogram(path) is None

# ---- channels that are not to be used

def three(tmp_path, kind='eeg', bads=()):
    x = np.stack([EEG, EEG + 5*np.sin(np.arange(len(EEG))), EEG[::-1]]) * 1e-6
    raw = mne.io.RawArray(x, mne.create_info(['C3', 'M2', 'Chin'], 100, ['eeg', 'eeg', kind]), verbose='error')
    raw.info['bads'] = list(bads)
    raw.save(tmp_path/'night_raw.fif', verbose='error', overwrite=True)
    return x*1e6, tmp_path/'night_raw.fif'

def test_one_channel_that_is_not_in_volts_is_skipped(tmp_path):
    x,path = three(tmp_path, 'misc')
    channels = describe(path)['channels']
    assert [c['used'] for c in channels][2] is False and channels[2]['reason'] == "not in volts, of mne type 'misc'" and channels[2]['canonical'] == 'Chin'
    night = read_night(path, wanted=['C3-M2'])
    assert night.channels[0].name == 'C3-M2' and read_night(path, unit='V').channels[2].name == 'Chin'
    assert plain_folder(tmp_path).wanted == ('C3',)
    other = mne.io.RawArray(x*1e-6, mne.create_info(['C3', 'M2', 'Chin'], 100), verbose='error')      # all are misc
    with pytest.raises(RecordingError, match='no channel may be used .*C3 is left out: not in volts.*set_channel_types'): read_night(other)

def test_a_channel_that_is_marked_bad_is_left_out(tmp_path):
    x,path = three(tmp_path, bads=['M2'])
    night = read_night(path)
    assert [c.name for c in night.channels] == ['C3', 'Chin'] and 'M2 is left out: marked bad' in night.notes
    assert [c['reason'] for c in describe(path)['channels']] == ['', 'marked bad', '']
    alone,asked = read_night(path, wanted=['C3']), read_night(path, wanted=['C3-M2'])
    assert alone.channels[0].name == 'C3' and asked.channels[0].name == 'C3-M2' and 'M2 is left out: marked bad' in alone.notes
    np.testing.assert_allclose(alone.x[0], x[0], atol=1e-3)
    np.testing.assert_allclose(asked.x[0], x[0] - x[1], atol=1e-3)
    assert not any('left out' in o for o in asked.notes)
    assert read_night(path, wanted=['O1-M1'], aliases={'M2': 'O1-M1'}).channels[0].name == 'O1-M1'
