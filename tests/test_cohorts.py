"""Every cohort from files in its dataset's layout, with its quirks, to a prepared store."""
import datetime
import pickle
import re
import shutil
import warnings
from pathlib import Path
from zlib import crc32

import mne
import numpy as np
import pytest
from edfio import Edf, EdfAnnotation, EdfSignal, Patient

from sleepnb.core import EPOCH_SEC, SleepnbError, Stage
from sleepnb.data.cohorts import CHANNELS, COHORTS, EXPECTED, anphy, bids, fetch_sleep_edf, isruc, mass_ss3, plain_folder, sleep_edf
from sleepnb.data.psg import open_recording, read_night, sample_files
from sleepnb.data.store import Whole, compare_counts, prepare

STAGES = np.resize([0, 1, 2, 3, 4, 2], 8)
WORDS = [f'Sleep stage {Stage(s).label}' for s in STAGES]
BEGIN = datetime.datetime(2020, 1, 2, 22)

def write_psg(path, names, fs=100, epochs=8, annotations=(), start=BEGIN, values=None):
    "`values`: name → signal, where it matters; fs may differ per name."
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = []
    for name in names:
        rate = fs.get(name, 100) if isinstance(fs, dict) else fs
        n = int(epochs * EPOCH_SEC * rate)
        x = (values or {}).get(name)
        if x is None: x = np.random.default_rng(crc32(name.encode())).normal(size=n) * 20
        signals.append(EdfSignal(np.clip(x, -2000, 2000), rate, label=name, physical_dimension='uV', physical_range=(-2000, 2000)))
    edf = Edf(signals, annotations=[EdfAnnotation(*a) for a in annotations] or None, starttime=start.time(),
              data_record_duration=30 if signals else None,
              patient=Patient(code=f'{crc32(str(path).encode()):x}'))   # or files of different people would be the same bytes
    edf.startdate = start.date()
    edf.write(path)
    return path

def write_hypnogram(path, pieces, start=BEGIN): return write_psg(path, [], annotations=pieces, start=start)

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def pieces(words=WORDS, at=0., step=30.): return [(at + step*i, step, w) for i,w in enumerate(words)]

def made(cohort, tmp_path, recipe='sleepsmc', jobs=1): return prepare(cohort, tmp_path/'store', recipe, jobs=jobs, progress=False)

def read(cohort, i=0): return cohort.read(cohort.nights.to_dict('records')[i])

# ---- Sleep-EDF

EDF_NAMES = ['EEG Fpz-Cz', 'EEG Pz-Oz', 'EOG horizontal', 'Resp oro-nasal', 'EMG submental', 'Temp rectal', 'Event marker']
EDF_FS = {n: 100 if n[0] == 'E' and n[1] in 'EO' else 1 for n in EDF_NAMES}

def write_sleep_edf(folder, nights, words=WORDS, epochs=8):
    for psg,hypnogram in nights:
        write_psg(folder/f'{psg}-PSG.edf', EDF_NAMES, EDF_FS, epochs)
        if hypnogram: write_hypnogram(folder/f'{hypnogram}-Hypnogram.edf', pieces(words))

def test_sleep_edf_names_stages_and_subjects(tmp_path):
    words = ['Sleep stage W', 'Sleep stage 1', 'Sleep stage 3', 'Sleep stage 4', 'Movement time', 'Sleep stage R', 'Sleep stage 2', 'Sleep stage W',
             'Sleep stage ?', 'Sleep stage ?']                                                  # the last two after the recording's end
    folder = tmp_path/'sleep-edfx'/'sleep-cassette'
    write_sleep_edf(folder, [('SC4001E0', 'SC4001EC'), ('SC4002E0', 'SC4002EC'), ('SC4182F0', 'SC4182FW'), ('SC4822G0', 'SC4822GP')], words)
    write_psg(tmp_path/'sleep-edfx'/'sleep-telemetry'/'ST7011J0-PSG.edf', EDF_NAMES[:1])        # another study
    cohort = sleep_edf(tmp_path/'sleep-edfx')
    assert cohort.nights[['subject', 'night']].to_numpy().tolist() == [['00', 1], ['00', 2], ['18', 2], ['82', 2]]
    assert sleep_edf(tmp_path, '20').nights.subject.tolist() == ['00', '00', '18']
    assert sleep_edf(tmp_path, '20').name == sleep_edf(tmp_path, '78').name == 'sleep-edf'      # the same people
    assert (cohort.expected, sleep_edf(tmp_path, 20).expected) == (EXPECTED['sleep-edf-78'], EXPECTED['sleep-edf-20'])
    store = made(cohort, tmp_path)
    assert store.channels == CHANNELS['sleep-edf'] and store.there.all() and not store.failed
    assert store.stages.reshape(4, 8).tolist() == [[0, 1, 3, 3, -1, 4, 2, 0]] * 4
    chin = store.read([0])[0, 3]
    assert len(np.unique(chin[:100])) == 1                                                      # an envelope, held
    assert compare_counts(store, cohort).found.tolist() == [4, 8, 4, 4, 8, 4, 28]               # unscored epochs do not count

def test_sleep_edf_crop(tmp_path):
    words = ['Sleep stage W'] * 10 + ['Sleep stage 2'] + ['Sleep stage W'] * 10
    write_sleep_edf(tmp_path, [('SC4001E0', 'SC4001EC')], words, epochs=21)
    assert len(made(sleep_edf(tmp_path, '20'), tmp_path/'a')) == 21
    store = made(sleep_edf(tmp_path, '20', crop_wake_min=2), tmp_path/'b')
    assert len(store) == 9 and store.epoch[0] == 6                                              # four on either side
    assert sleep_edf(tmp_path, '20', crop_wake_min=30).expected == EXPECTED['sleep-edf-20, 30 min']
    assert sleep_edf(tmp_path, '78', crop_wake_min=None).expected is None

def test_a_recording_without_hypnogram_is_reported_and_the_rest_goes_on(tmp_path):
    write_sleep_edf(tmp_path, [('SC4001E0', 'SC4001EC'), ('SC4011E0', None)])
    (tmp_path/'SC4021E0-PSG.edf').write_bytes(b'damaged')
    write_hypnogram(tmp_path/'SC4021EH-Hypnogram.edf', pieces())
    cohort = sleep_edf(tmp_path)
    assert cohort.nights.subject.tolist() == ['00', '01', '02']
    store = made(cohort, tmp_path)
    assert store.nights.subject.tolist() == ['00'] and len(store.failed) == 2
    whys = ' '.join(store.failed.values())
    assert 'SC4011E0-PSG.edf: this recording has no hypnogram (expected SC4…-Hypnogram.edf beside it)' in whys and 'SC4021E0-PSG.edf' in whys

def test_a_night_that_is_there_twice(tmp_path):
    for folder in ('a', 'b'): write_sleep_edf(tmp_path/folder, [('SC4001E0', 'SC4001EC')])
    with pytest.raises(SleepnbError, match='night 1 of subject 00 is there 2 times .*a/SC4001E0.* and .*b/SC4001E0.*Move the copies'):
        sleep_edf(tmp_path)

@pytest.mark.parametrize('which,crop,counts', [('20', 'as published', (1997, 58, 250, 220, 125)), ('78', 'as published', (188, 58, 250, 220, 125))])
def test_the_real_night(data, tmp_path, which, crop, counts):
    cohort = sleep_edf(data/'sleep-edf', which, ['Fpz'], crop)
    store = made(cohort, tmp_path)
    assert tuple(int((store.stages == s).sum()) for s in Stage) == counts
    table = compare_counts(store, cohort)
    assert table.found.tolist() == [1, *counts, sum(counts)] and table.difference['nights'] == 1 - table.expected['nights']

def test_fetch_sleep_edf(tmp_path, monkeypatch):
    def fetch_data(subjects, recording, path, on_missing):
        assert (subjects, recording, on_missing) == ([0, 1], [1], 'ignore')
        for o in sample_files(): shutil.copy(o, Path(path)/o.name)
    monkeypatch.setattr(mne.datasets.sleep_physionet.age, 'fetch_data', fetch_data)
    assert len(sleep_edf(fetch_sleep_edf(tmp_path/'deep'/'new', range(2), [1])).nights) == 1
    for wrong in (dict(subjects=[39]), dict(subjects=[83]), dict(nights=[3])):
        with pytest.raises(SleepnbError, match='no such subject or night'): fetch_sleep_edf(tmp_path, **wrong)

# ---- ISRUC-Sleep

NEW = ['E1-M2', 'E2-M1', 'F3-M2', 'C3-M2', 'O1-M2', 'F4-M1', 'C4-M1', 'O2-M1', 'X1', 'X2', 'X3', 'SaO2']
OLD = ['LOC-A2', 'ROC-A1', 'F3-A2', 'C3-A2', 'O1-A2', 'F4-A1', 'C4-A1', 'O2-A1', 'X1', 'X2', 'DC3']
BARE = ['ROC', 'A1', 'LOC', 'A2', 'C4', 'O2', 'C3', 'O1', 'F4', 'F3', 'X1', 'X2', 'X3']
LABELS = [0, 1, 2, 3, 5, 2, 0, 0] + [0] * 30

def write_isruc(folder, n, names, labels=LABELS, epochs=38, ending='.rec'):
    write_psg(folder/f'{n}'/f'{n}{ending}', names, 200, epochs)
    write(folder/f'{n}'/f'{n}_1.txt', '\n'.join(map(str, labels)) + '\n\n\n')
    write(folder/f'{n}'/f'{n}_2.txt', '\n'.join(map(str, labels[::-1])))

def test_isruc_names_references_stand_ins_and_last_epochs(tmp_path):
    folder = tmp_path/'ISRUC'/'subgroupI'
    for n,names in {1: NEW, 2: OLD, 8: [n for n in OLD if n[:2] not in ('F3', 'F4')], 40: BARE}.items(): write_isruc(folder, n, names)
    write_isruc(tmp_path/'ISRUC'/'subgroupIII'/'1', 1, NEW)                                       # nested, as some unpack it
    cohort = isruc(tmp_path/'ISRUC', wanted='all')
    assert cohort.nights.subject.tolist() == ['1', '2', '8', '40'] and cohort.name == 'isruc-s1'
    assert len(isruc(tmp_path/'ISRUC', 's3').nights) == 1
    store = made(cohort, tmp_path)
    assert store.there.all() and store.nights.epochs.tolist() == [8] * 4
    assert store.stages.reshape(4, 8).tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]] * 4
    x = store.read([store.first_row[list(store.nights.subject).index('8')]])[0]
    assert np.array_equal(x[0], x[1]) and np.array_equal(x[3], x[4]) and not np.array_equal(x[1], x[4])
    assert [c.name for c in read(cohort, 3).channels] == list(CHANNELS['isruc'])

def test_isruc_reference_is_subtracted(tmp_path):
    write_isruc(tmp_path, 40, BARE)
    night = read(isruc(tmp_path, wanted='eeg', drop_last=0))
    recording = open_recording(tmp_path/'40'/'40.rec')
    signal = {n: recording.read(i) for i,n in enumerate(recording.names)}
    pairs = ['F3 A2', 'C3 A2', 'O1 A2', 'F4 A1', 'C4 A1', 'O2 A1']
    for x,pair in zip(night.x, pairs, strict=True):
        site,ear = pair.split()
        np.testing.assert_allclose(x, signal[site] - signal[ear], atol=1e-3)

def test_isruc_choices(tmp_path):
    write_isruc(tmp_path, 8, [n for n in OLD if n[:2] not in ('F3', 'F4')])
    night = read(isruc(tmp_path, fill=False))
    assert night.missing == ('F3-M2', 'F4-M1') and len(night.x) == 7
    store = made(isruc(tmp_path, fill=False), tmp_path)
    assert store.there.tolist() == [[False, True, True, False, True, True, True, True, True]]
    only = read(isruc(tmp_path, wanted=['O1-M2', 'F3-M2']))                                     # C3 is not asked for, and stands in nevertheless
    assert [c.name for c in only.channels] == ['O1-M2', 'C3-M2'] and only.missing == ()
    assert read(isruc(tmp_path, scorer=2, drop_last=0)).stages[-8:].tolist() == [0, 0, 2, 4, 3, 2, 1, 0]
    assert isruc(tmp_path, scorer=2).expected is None and isruc(tmp_path).expected == EXPECTED['isruc-s1']
    for wrong in (dict(group='s2'), dict(scorer=3), dict(drop_last=-1)):
        with pytest.raises(SleepnbError, match='no such part of ISRUC'): isruc(tmp_path, **wrong)
    with pytest.raises(SleepnbError, match='nothing is left'): read(isruc(tmp_path, drop_last=38))
    write(tmp_path/'8'/'8_1.txt', '4\n' * 38)                                                   # N3 or REM elsewhere, nothing here
    with pytest.raises(SleepnbError, match='no stage in the vocabulary "isruc"'): read(isruc(tmp_path))

def test_isruc_counts_labels_not_signal(tmp_path):
    write_isruc(tmp_path, 1, NEW, labels=LABELS, epochs=40)                                     # the signal goes on after the scoring
    write_isruc(tmp_path, 2, NEW, labels=LABELS + [0, 0], epochs=38)                            # and the other way round
    cohort = isruc(tmp_path)
    for i,n in ((0, 8), (1, 10)):
        night = read(cohort, i)
        assert len(night.stages) == n and (night.stages >= 0).all() and {len(x) for x in night.x} == {n*30*200}

def test_isruc_renamed_to_edf_and_missing_scorer(tmp_path):
    write_isruc(tmp_path, 1, NEW)
    shutil.copy(tmp_path/'1'/'1.rec', tmp_path/'1'/'1.edf')
    write_isruc(tmp_path, 2, OLD, ending='.edf')
    write_isruc(tmp_path, 3, OLD)
    (tmp_path/'3'/'3_1.txt').unlink()
    cohort = isruc(tmp_path, 's3')
    assert [Path(p).name for p in cohort.nights.recording] == ['1.rec', '2.edf', '3.rec']
    store = made(cohort, tmp_path)
    assert len(store.nights) == 2 and '3.rec: this recording has no hypnogram (expected n_1.txt' in next(iter(store.failed.values()))

def test_isruc_with_every_night_is_compared_with_what_was_published(tmp_path, monkeypatch):
    for n in (1, 2): write_isruc(tmp_path, n, NEW)
    shares = (37.5, 12.5, 25, 12.5, 12.5)
    for whole,differs in ((Whole(2, (16,), shares), ''), (Whole(2, (17,), shares), 'epochs .*17 .*-1'), (Whole(3, (99,), shares), ''),
                          (Whole(2, (16,), (37.7, 12.3, 25, 12.5, 12.5)), 'W .*37.5 .*37.7')):
        monkeypatch.setitem(EXPECTED, 'isruc-s1', whole)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            made(isruc(tmp_path), tmp_path)
        texts = [str(o.message) for o in caught if 'not the epochs that were published' in str(o.message)]
        assert len(texts) == bool(differs) and all(re.search(differs, o) for o in texts)

# ---- MASS

def test_mass_references_alignment_and_chin(tmp_path):
    sites,rest = ['C3', 'C4', 'F3', 'F4', 'O1', 'O2', 'T3'], ['EOG Left Horiz', 'EOG Right Horiz', 'ECG I']
    chins = ['EMG Chin1', 'EMG Chin2', 'EMG Chin3']
    x = {f'EMG Chin{i}': np.random.default_rng(i).normal(size=8*30*256) * 20 for i in (1, 2)}
    write_psg(tmp_path/'SS3'/'01-03-0001 PSG.edf', [f'EEG {s}-CLE' for s in [*sites, 'A2']] + rest + chins, 256, values=x)
    write_hypnogram(tmp_path/'SS3'/'01-03-0001 Base.edf', [(0, 17.5, 'Sleep stage ?'), *pieces(WORDS[:7], 17.5)])
    write_psg(tmp_path/'SS3'/'01-03-0002 PSG.edf', [f'EEG {s}-LER' for s in sites] + rest + chins[:1], 256)
    write_hypnogram(tmp_path/'SS3'/'01-03-0002 Base.edf', pieces(WORDS[:6], 60 + 3), BEGIN - datetime.timedelta(seconds=3))  # its own clock
    write_psg(tmp_path/'SS1'/'01-01-0001 PSG.edf', ['EEG C3-CLE'])                              # another subset
    cohort = mass_ss3(tmp_path)
    assert cohort.nights.subject.tolist() == ['0001', '0002'] and cohort.expected == EXPECTED['mass']
    first,second = read(cohort), read(cohort, 1)
    assert first.stages.tolist() == STAGES[:7].tolist() and second.stages.tolist() == [-1, -1, *STAGES[:6]]
    assert [c.name for c in first.channels[:8]] == [c.name for c in second.channels[:8]] == list(CHANNELS['mass'][:8])
    assert (first.channels[8].name, second.channels[8].name) == ('Chin1-Chin2', 'Chin1')
    cut = slice(int(17.5*256), int(17.5*256) + 7*30*256)
    np.testing.assert_allclose(first.x[8], (x['EMG Chin1'] - x['EMG Chin2'])[cut], atol=.1)
    assert read(mass_ss3(tmp_path, ['C3-LE', 'Chin1'])).channels[1].name == 'Chin1'
    store = made(cohort, tmp_path)
    assert store.there.all() and store.stages.tolist() == [*STAGES[:7], -1, -1, *STAGES[:6]]
    table = compare_counts(store, cohort)
    assert table.expected['epochs'] == 59304 and table.expected.isna().sum() == 5 and table.found['epochs'] == 13

# ---- ANPHY-Sleep

ANPHY = ['F3', 'F4-', 'C3-Ref', 'C4', 'O1', 'O2', 'FPZ', 'FZ', 'CZ-Ref', 'PZ', 'OZ', 'T3', 'T4', 'T5', 'T6', 'C1-', 'P9', 'F10', 'TP10', 'ChEMG1',
         'ChEMG2', 'RLEG+', 'RLEG-', 'LLEG+', 'LLEG-', 'ECG1', 'ECG2', 'EOG1', 'EOG2']

def write_anphy(folder, subject, edf='{}.edf', txt='{}.txt', shift=0., without=()):
    write_psg(folder/subject/edf.format(subject), ANPHY, 500, epochs=10)
    rows = [f'{o.removeprefix("Sleep stage ")}\t{shift + 30*i:g}\t30' for i,o in enumerate(WORDS) if i not in without]
    write(folder/subject/txt.format(subject), '\n'.join([f'L\t0\t{shift:g}'] * bool(shift) + rows + [f'L\t{shift + 240:g}\t30']) + '\n')

def test_anphy_names_and_times(tmp_path):
    write_anphy(tmp_path, 'EPCTL01', '{} - fixed.edf', 'test1.txt', shift=12.25)
    write_anphy(tmp_path, 'EPCTL02', without=(2, 3))
    write(tmp_path/'Artifact matrix'/'EPCTL01_artndxn.mat', '')
    write_psg(tmp_path/'EPCTL03'/'EPCTL03.edf', ANPHY, 500, epochs=2)                           # not scored
    cohort = anphy(tmp_path)
    assert cohort.nights.subject.tolist() == ['01', '02', '03'] and cohort.expected is None
    first,second = read(cohort), read(cohort, 1)
    assert [c.name for c in first.channels] == [*CHANNELS['anphy'][:-1], 'Chin1-Chin2'] and first.missing == ()
    assert first.stages.tolist() == [*STAGES, -1] and second.stages.tolist() == [0, 1, -1, -1, *STAGES[4:], -1, -1]
    whole = read_night(tmp_path/'EPCTL01'/'EPCTL01 - fixed.edf', wanted=['F3'])
    assert np.array_equal(first.x[0], whole.x[0][round(12.25*500):][:9*30*500])
    store = made(anphy(tmp_path, 'eeg'), tmp_path, 'mtssrl')
    assert store.channels == CHANNELS['anphy'][:11] and store.there.all() and len(store.failed) == 1
    assert compare_counts(store, cohort).expected.isna().all()
    assert read(anphy(tmp_path, ['F3-TP10'])).channels[0].name == 'F3-TP10'                     # another reference
    write(tmp_path/'EPCTL02'/'notes.txt', '')
    with pytest.raises(SleepnbError, match='EPCTL02: which of these files is meant. .*EPCTL02.txt, notes.txt'): anphy(tmp_path)

# ---- BIDS

def test_bids(tmp_path):
    for sub,ses,name in (('01', 'ses-1', 'C3-A2'), ('01', 'ses-2', 'C3-A2'), ('02', '', 'C3')):
        stem = '_'.join(filter(None, [f'sub-{sub}', ses, 'task-sleep']))
        folder = tmp_path/f'sub-{sub}'/ses/'eeg'
        write_psg(folder/f'{stem}_eeg.edf', [name, 'LOC', 'EMG1'])
        write(folder/f'{stem}_events.tsv', 'onset\tduration\ttrial_type\n17\t3\tarousal\n' + ''.join(f'{30*i}\t30\t{w}\n' for i,w in enumerate(WORDS)))
    write(tmp_path/'sub-02'/'eeg'/'sub-02_task-sleep_channels.tsv', 'name\ttype\tunits\treference\nC3\tEEG\tuV\tA2\nLOC\tEOG\tuV\tn/a\n')
    write(tmp_path/'sub-02'/'eeg'/'sub-02_task-sleep_hypnogram.tsv', 'onset\tduration\tstage\n0\t120\tN2\n120\t120\tR\n')
    write_psg(tmp_path/'derivatives'/'x'/'sub-01'/'eeg'/'sub-01_task-sleep_eeg.edf', ['C3'])
    cohort = bids(tmp_path)
    assert cohort.nights[['subject', 'night']].to_numpy().tolist() == [['01', 'ses-1_task-sleep'], ['01', 'ses-2_task-sleep'], ['02', 'task-sleep']]
    assert cohort.wanted == ('C3-M2', 'E1', 'Chin')
    store = made(cohort, tmp_path)
    assert store.there.all() and store.stages.reshape(3, 8).tolist() == [STAGES.tolist()] * 2 + [[2]*4 + [4]*4]

def test_bids_other_formats_numbers_and_units(tmp_path):
    eeg = tmp_path/'sub-a'/'eeg'
    eeg.mkdir(parents=True)
    x = np.random.default_rng(0).normal(size=(2, 8*30*100)) * 20e-6
    raw = mne.io.RawArray(x, mne.create_info(['C3', 'M2'], 100, 'eeg'), verbose='error')
    raw.save(eeg/'sub-a_task-sleep_eeg.fif', verbose='error')
    write(eeg/'sub-a_task-sleep_hypnogram.tsv', 'onset\tduration\tstage\n' + ''.join(f'{30*i}\t30\t{5 if s == 4 else s}\n' for i,s in enumerate(STAGES)))
    night = read(bids(tmp_path, vocabulary='isruc'))
    assert [c.name for c in night.channels] == ['C3-M2'] and night.stages.tolist() == STAGES.tolist()
    np.testing.assert_allclose(night.x[0], (x[0] - x[1]) * 1e6, atol=1e-3)
    assert 'stages are numbers' in _why(bids(tmp_path), tmp_path)

def _why(cohort, tmp_path):
    with pytest.raises(SleepnbError) as e: made(cohort, tmp_path)
    return str(e.value)

# ---- any folder

def test_plain_folder_pairs(tmp_path):
    stages = '\n'.join(w.removeprefix('Sleep stage ') for w in WORDS)
    for name in ('a1', 'a10', 'b PSG', 'c_eeg', 'd-1', 'd-1_x'): write_psg(tmp_path/f'{name}.edf', ['C3-A2', 'EOG1', 'EMG'])
    write_psg(tmp_path/'e.edf', ['C3-A2'], annotations=[*pieces(), (17, 3, 'arousal')])          # carries its own
    for name in ('a1.txt', 'a10_stages.csv', 'd-1_x.txt', 'd-1_hyp.txt', 'README.txt'): write(tmp_path/name, stages)
    write(tmp_path/'a10_stages.csv', 'onset,duration,stage\n0,120,N2\n120,120,R\n')
    write_hypnogram(tmp_path/'b Base.edf', pieces())
    write_hypnogram(tmp_path/'c_hypnogram.edf', pieces())
    cohort = plain_folder(tmp_path)
    names = {Path(r.recording).name: Path(r.hypnogram).name for r in cohort.nights.itertuples()}
    assert names == {'a1.edf': 'a1.txt', 'a10.edf': 'a10_stages.csv', 'b PSG.edf': 'b Base.edf', 'c_eeg.edf': 'c_hypnogram.edf',
                     'd-1.edf': 'd-1_hyp.txt', 'd-1_x.edf': 'd-1_x.txt', 'e.edf': 'e.edf'}
    store = made(cohort, tmp_path)
    right = {s: [2]*4 + [4]*4 if s == 'a10' else STAGES.tolist() for s in cohort.nights.subject}
    assert {s: store.stages[store.night_of == i].tolist() for i,s in enumerate(store.nights.subject)} == right

def test_plain_folder_takes_no_other_nights_hypnogram(tmp_path):
    write_psg(tmp_path/'a1.edf', ['C3-A2'])
    write(tmp_path/'a10.txt', 'W\n' * 8)
    write(tmp_path/'other'/'a1.txt', 'W\n' * 8)
    assert plain_folder(tmp_path).nights.hypnogram.tolist() == ['']

def test_names_of_sleep_edf_in_a_plain_folder(tmp_path):
    "Their hypnograms are not named after them; and two nights are one person."
    for p in sample_files(): shutil.copy(p, tmp_path)
    with pytest.raises(SleepnbError, match=r'names of Sleep-EDF.*found SC4001E0-PSG.edf\). Prepare it as sleep-edf.'): plain_folder(tmp_path)
    (tmp_path/'SC4001EC-Hypnogram.edf').rename(tmp_path/'SC4001E0-Hypnogram.edf')
    assert plain_folder(tmp_path).nights.hypnogram.tolist() == [str(tmp_path/'SC4001E0-Hypnogram.edf')]

def test_a_cohort_is_called_like_its_folder(tmp_path, monkeypatch):
    write_psg(tmp_path/'lab'/'sub-a'/'sub-a_eeg.edf', ['C3-A2'], annotations=pieces())
    monkeypatch.chdir(tmp_path/'lab')
    for make in (plain_folder, bids):
        assert [make(o).name for o in (tmp_path/'lab', '.', 'sub-a/..')] == ['lab']*3 and make('.', name='x').name == 'x'

def test_plain_folder_subjects(tmp_path):
    for name in ('x/one', 'x/two', 'y/one', 'z_1', 'z_2'): write_psg(tmp_path/f'{name}.edf', ['C3-A2'], annotations=pieces())
    assert plain_folder(tmp_path).nights.subject.tolist() == ['x', 'x', 'y', 'z_1', 'z_2']
    assert plain_folder(tmp_path, subject=r'^[a-z]').nights.subject.tolist() == ['x', 'x', 'y', 'z', 'z']
    assert plain_folder(tmp_path, subject=r'^(x|y)/|(z)_').nights.subject.tolist() == ['x', 'x', 'y', 'z', 'z']
    with pytest.raises(SleepnbError, match='z_1.edf: this name does not tell the subject'): plain_folder(tmp_path, subject=r'(.+)/')

def test_plain_folder_subjects_that_may_be_one(tmp_path):
    for name in ('A_n1', 'A_n2', 'B_n1'): write_psg(tmp_path/f'{name}.edf', ['C3-A2'], annotations=pieces())
    assert repr(plain_folder(tmp_path)) == f'{tmp_path.name}: 3 nights of 3 subjects (A_n1, A_n2, B_n1), channels C3-M2'
    for how in (r'(.+)_n', lambda path: path.split('_')[0]):
        cohort = plain_folder(tmp_path, subject=how)
        assert '3 nights of 2 subjects (A, B)' in repr(cohort)
        assert made(cohort, tmp_path/f'{callable(how)}').nights.subject.tolist() == ['A', 'A', 'B']
    for how,match in ((r'(', 'no regular expression .*missing'), (7, 'no regular expression'), (r'(x?)', 'does not tell the subject'),
                      (lambda path: None, 'does not tell the subject')):
        with pytest.raises(SleepnbError, match=match): plain_folder(tmp_path, subject=how)

@pytest.mark.parametrize('names', [('1/a', '01/b'), ('p1', 'p001')])
def test_one_subject_in_two_spellings(tmp_path, names):
    for name in (*names, '10/x', '100/y'): write_psg(tmp_path/f'{name}.edf', ['C3-A2'])
    with pytest.raises(SleepnbError, match=r'written in two ways. .found \w+ and \w+\)'): plain_folder(tmp_path)

def test_channels_that_most_recordings_have(tmp_path):
    for name,channels in (('a', ['C4-A1']), ('b', ['EMG', 'C3-A2', 'LOC']), ('c', ['C3-A2', 'LOC', 'O1-A2']), ('d', ['C3-A2', 'EMG'])):
        write_psg(tmp_path/f'{name}.edf', channels)
        write_psg(tmp_path/'bids'/f'sub-{name}'/f'sub-{name}_eeg.edf', channels)
    assert bids(tmp_path/'bids').wanted == plain_folder(tmp_path/'bids').wanted == ('C3-M2', 'E1', 'Chin')
    for n in '12345': write_psg(tmp_path/'odd'/f'{n}.edf', [f'EEG P{n}-A2'])
    with pytest.raises(SleepnbError, match='no channel is in half of the recordings .*Name those you want'): plain_folder(tmp_path/'odd')

def test_pages_of_twenty_seconds(tmp_path):
    words = ['W', 'N2', 'N2', 'R'] * 3
    write_psg(tmp_path/'sub-1'/'sub-1_eeg.edf', ['C3-A2'])
    write(tmp_path/'sub-1'/'sub-1_eeg.csv', '\n'.join(['epoch,stage', *(f'{i},{w}' for i,w in enumerate(words))]))
    write(tmp_path/'sub-1'/'sub-1_hypnogram.tsv', '\n'.join(['epoch\tstage', *(f'{i}\t{w}' for i,w in enumerate(words))]))
    for cohort in (bids(tmp_path, epoch_sec=20), plain_folder(tmp_path, epoch_sec=20, ending='.csv')):
        assert read(cohort).stages.tolist() == [0, 2, 4, 2, 2, 0, 2, 4]

def test_plain_folder_scorers_damage_and_channels(tmp_path):
    (tmp_path/'a.edf').write_bytes(b'0       ' + b'damaged' * 100)
    write_psg(tmp_path/'b.edf', ['signal 1', 'C3', 'A2', 'EEG LOC'])
    for i,stage in enumerate(('N2', 'R')): write(tmp_path/f'b_scorer{i}.txt', '\n'.join([stage] * 8))
    with pytest.raises(SleepnbError, match='b.edf: several files could be the hypnogram .*b_scorer0.txt, b_scorer1.txt.*ending='): plain_folder(tmp_path)
    cohort = plain_folder(tmp_path, ending='_scorer1.txt')
    assert cohort.wanted == ('C3', 'E1')                                                        # of the one that can be opened
    store = made(cohort, tmp_path)
    assert (store.stages == 4).all() and len(store) == 8 and len(store.failed) == 1
    aliased = plain_folder(tmp_path, ending='_scorer0.txt', aliases={'signal 1': 'O1-M2'}, crop_wake_min=5, name='mine')
    assert (aliased.wanted, aliased.name, aliased.crop_wake_min) == (('O1-M2', 'C3', 'E1'), 'mine', 5)
    assert read(aliased, 1).channels[0].recorded and read(aliased, 1).missing == ()

# ---- all

@pytest.mark.parametrize('name', COHORTS)
def test_folders_that_are_missing_empty_or_wrong(tmp_path, name):
    with pytest.raises(SleepnbError, match='absent: there is no such folder'): COHORTS[name](tmp_path/'absent')
    with pytest.raises(SleepnbError, match='found an empty folder'): COHORTS[name](tmp_path)
    for i in range(7): write(tmp_path/f'{i}.doc', '')
    with pytest.raises(SleepnbError, match='found 0.doc, 1.doc, 2.doc, 3.doc, 4.doc and 2 more'): COHORTS[name](tmp_path)

def test_a_name_that_is_no_dataset(tmp_path):
    with pytest.raises(SleepnbError, match="no such dataset .expected sleep-edf-20, .*found 'sleepedf'"): COHORTS['sleepedf']
    write(tmp_path/'file', '')
    for make in COHORTS.values():
        with pytest.raises(SleepnbError, match='this is a file, not a folder'): make(tmp_path/'file')

def test_two_processes_make_the_same_store(tmp_path):
    for n in (1, 2, 3): write_isruc(tmp_path, n, OLD)
    (tmp_path/'3'/'3_1.txt').unlink()
    cohort = isruc(tmp_path)
    one,two = (made(cohort, tmp_path/f'jobs{jobs}', jobs=jobs) for jobs in (1, 2))
    assert one.failed == two.failed and len(one.failed) == 1
    files = [sorted((s.path/'nights').iterdir()) for s in (one, two)]
    assert [p.name for p in files[0]] == [p.name for p in files[1]] and all(a.read_bytes() == b.read_bytes() for a,b in zip(*files))

def test_every_cohort_can_be_sent_to_another_process(tmp_path):
    write_sleep_edf(tmp_path/'edf', [('SC4001E0', 'SC4001EC')])
    write_isruc(tmp_path/'isruc', 1, NEW)
    write_psg(tmp_path/'mass'/'01-03-0001 PSG.edf', ['EEG C3-CLE'])
    write_anphy(tmp_path/'anphy', 'EPCTL01')
    write_psg(tmp_path/'bids'/'sub-1'/'eeg'/'sub-1_eeg.edf', ['C3'], annotations=pieces())
    folders = {'sleep-edf-20': 'edf', 'sleep-edf-78': 'edf', 'isruc-s1': 'isruc', 'isruc-s3': 'isruc', 'folder': 'bids'}
    for name,make in COHORTS.items():
        cohort = make(tmp_path/folders.get(name, name))
        again = pickle.loads(pickle.dumps(cohort))
        assert again.nights.equals(cohort.nights) and again.read.func is cohort.read.func
