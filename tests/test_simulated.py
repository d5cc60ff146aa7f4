"""Simulated cohorts: every dataset's layout, from files through its reader to a prepared store."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest
from edfio import read_edf
from scipy.signal import butter, sosfiltfilt

from sleepnb import __version__
from sleepnb.core import SleepnbError, Stage
from sleepnb.data import simulated
from sleepnb.data.cohorts import CHANNELS, isruc, mass_ss3
from sleepnb.data.loaders import Stores
from sleepnb.data.psg import open_recording, read_hypnogram, read_night
from sleepnb.data.simulated import DATASETS, simulate
from sleepnb.data.splits import Split, holdout_split
from sleepnb.data.store import compare_counts, prepare
from sleepnb.synth import synth_hypnogram, synth_night

SUBJECTS = {'sleep-edf-20': [0, 13], 'sleep-edf-78': [19, 36], 'isruc-s1': [1, 4, 8, 40], 'isruc-s3': [4, 8], 'mass': [3, 5, 6], 'anphy': [1, 2, 3]}
PEOPLE = dict.fromkeys(SUBJECTS, 'adult') | {'isruc-s1': 'disordered'}
DATASET = {'sleep-edf-20': 'sleep-edf', 'sleep-edf-78': 'sleep-edf', 'isruc-s1': 'isruc', 'isruc-s3': 'isruc', 'mass': 'mass', 'anphy': 'anphy'}
UNSCORED = {'sleep-edf': (1, 2), 'anphy': (1,)}                  # how many epochs of a short night

def made(name, folder, hours=.2, **kwargs):
    return simulate(name, folder, kwargs.pop('subjects', SUBJECTS[name]), hours=hours, progress=False, **kwargs)

def rows(cohort): return cohort.nights.to_dict('records')

def who(name, row, seed=0):
    "The arguments with which a night is simulated."
    people,subject = name if DATASET[name] == 'isruc' else DATASET[name], int(row['subject'])
    population = 'older' if (name, subject) == ('sleep-edf-78', 36) else PEOPLE[name]
    return dict(seed=seed, subject=f'{people} {subject}', night=int(row['night']), population=population)

def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def cohorts(tmp_path_factory):
    "Each kind, written once."
    folder = tmp_path_factory.mktemp('simulated')
    return {name: made(name, folder/name) for name in SUBJECTS}

@pytest.mark.parametrize('name', SUBJECTS)
def test_from_files_to_a_store(cohorts, tmp_path, name):
    cohort = cohorts[name]
    subjects = [int(s) for s in cohort.nights.subject]
    assert subjects == [s for s,_ in DATASETS[name].nights if s in SUBJECTS[name]] and (cohort.nights.hypnogram != '').all()
    store = prepare(cohort, tmp_path/'store', 'sleepsmc', progress=False)
    assert not store.failed and store.there.all() and store.channels == CHANNELS[DATASET[name]]
    assert len(store.recordings) == len(cohort.nights) == compare_counts(store, cohort).found['nights']      # all different
    for row in rows(cohort):
        night = cohort.read(row)
        truth,scored = synth_hypnogram(len(night.stages), **who(name, row)), night.stages >= 0
        assert np.array_equal(night.stages[scored], truth[scored]) and 22 <= len(truth) <= 26
        assert (~scored).sum() in UNSCORED.get(DATASET[name], (0,))

@pytest.mark.parametrize('name', SUBJECTS)
def test_signals_are_those_of_synth(cohorts, name):
    like = {'sleep-edf': 'Fpz-Cz', 'mass': 'F3-LE', 'anphy': 'F3', 'isruc': 'C3-M2'}[DATASET[name]]
    for row in rows(cohorts[name]):
        recording,hypnogram = open_recording(row['recording']), read_hypnogram(row['hypnogram'], 'isruc')
        lead = hypnogram.duration[0] if name in ('mass', 'anphy') else 0
        after = 30 if name.startswith('isruc') else 0
        n = round(recording.duration / 30) - after - bool(lead)
        truth = np.pad(synth_hypnogram(n, **who(name, row)), (bool(lead), bool(lead) + after))
        night = read_night(row['recording'], wanted=[like])
        fs, = night.fs
        begin = round((30 - lead) * fs) if lead else 0
        x = synth_night([like], fs=fs, stages=truth, **who(name, row)).x[0][begin:][:len(night.x[0])]
        step,most = (384/4095, 192) if DATASET[name] == 'sleep-edf' else (.05, 1638)
        if row['subject'] == '40': step *= 2                                      # a difference of two rounded signals
        assert len(night.x[0]) == len(x) and np.abs(night.x[0] - x.clip(-most, most)).max() < .52*step

@pytest.mark.parametrize('name', SUBJECTS)
def test_mne_opens_every_file(cohorts, name):
    for row in rows(cohorts[name]):
        path = Path(row['recording'])
        if path.suffix == '.rec': path = shutil.copy(path, path.with_suffix('.edf'))
        raw,ours = mne.io.read_raw_edf(path, verbose='error'), open_recording(row['recording'])
        assert raw.ch_names == ours.names and raw.n_times == round(ours.duration * max(ours.fs)) and raw.info['sfreq'] == max(ours.fs)
        fast = [i for i,fs in enumerate(ours.fs) if fs == max(ours.fs)]
        np.testing.assert_allclose(raw.get_data(fast[:1])[0] * 1e6, ours.read(fast[0]), atol=1e-3)
        if path.suffix == '.edf' and row['hypnogram'].endswith('.edf'):
            notes,hypnogram = mne.read_annotations(row['hypnogram']), read_hypnogram(row['hypnogram'])
            assert np.allclose(notes.onset, hypnogram.onset) and np.allclose(notes.duration, hypnogram.duration)
            assert set(notes.description) <= {f'Sleep stage {s}' for s in 'W1234R?'} | {'Movement time'}
        if path != Path(row['recording']): path.unlink()

def test_every_file_says_that_it_is_simulated(cohorts):
    for cohort in cohorts.values():
        for row in rows(cohort):
            for path in {row['recording'], row['hypnogram']}:
                if not path.endswith('.txt'): assert b' simulated ' in Path(path).read_bytes()[:88]

# ---- each dataset's own

def test_sleep_edf_has_the_real_numbers_and_recorders():
    records = pd.read_csv(Path(mne.datasets.sleep_physionet.__file__).with_name('age_records.csv'))
    real = sorted(o for o in records.fname if o.endswith('PSG.edf'))
    ours = [simulated._lay_out('sleep-edf-78', s, n, hours=.1, seed=0)[0] for s,n in DATASETS['sleep-edf-78'].nights]
    assert sorted(o.recording for o in ours) == real and len(real) == 153
    old = {s for s,age in zip(records.subject, records.age) if age > 40}
    assert {s for s,_ in DATASETS['sleep-edf-78'].nights if DATASETS['sleep-edf-78'].population(s) == 'older'} == old

def test_sleep_edf_scoring_and_envelope(tmp_path):
    cohort = made('sleep-edf-20', tmp_path, subjects=[0], nights=1, hours=8)
    (row,) = rows(cohort)
    recording,annotations = open_recording(row['recording']), read_edf(row['hypnogram']).annotations
    assert {a.text for a in annotations} == {f'Sleep stage {s}' for s in 'W1234R?'} | {'Movement time'}
    onset,duration = np.array([[a.onset, a.duration] for a in annotations]).T
    assert np.allclose(onset[1:], (onset + duration)[:-1]) and (duration % 30 == 0).all() and onset[-1] + duration[-1] > recording.duration
    assert annotations[-1].text == 'Sleep stage ?' and onset[-1] < recording.duration
    assert [fs for fs in recording.fs] == [100, 100, 100, 1, 1, 1, 1]
    night = cohort.read(row)
    assert 5 <= (night.stages < 0).sum() <= 10 and len(night.x[3]) == 30*len(night.stages)
    chin = synth_night(['Chin'], stages=synth_hypnogram(len(night.stages), **who('sleep-edf-20', row)), **who('sleep-edf-20', row)).x[0]
    active = np.abs(sosfiltfilt(butter(4, 16, 'highpass', fs=100, output='sos'), chin)).reshape(-1, 30*100).mean(1) # another way to see it
    envelope = night.x[3].reshape(-1, 30).mean(1)
    assert np.corrcoef(active, envelope)[0, 1] > .9 and night.x[3].min() > -.01
    warm = read_edf(row['recording']).get_signal('Temp rectal').data
    assert 36 < warm.min() and warm.max() < 38 and np.ptp(warm) > .1

@pytest.mark.parametrize('first', [0, 20])
def test_hardly_any_wake_is_cut_off(first):
    seconds = []
    for s in range(first, first + 16):
        stages,people = (o for i,o in enumerate(simulated._lay_out('sleep-edf-78', s, 1, hours=8, seed=0)) if i in (1, 2))
        chin = synth_night(['Chin'], stages=stages, **people)
        seconds.append(simulated._envelope(chin.x[0], chin.fs, 1)[np.repeat(stages == Stage.W, 30)])
    at_rail = [np.mean(o >= 5) for o in seconds]
    assert np.mean(np.concatenate(seconds) >= 5) < .01 and max(at_rail) < .1 and 1 < np.median(np.concatenate(seconds)) < 3.4

def test_a_day_has_wake_around_one_night(tmp_path):
    files,stages,_,start = simulated._lay_out('sleep-edf-78', 0, 1, hours=22, seed=0)
    assert 2376 <= len(stages) <= 2904 and np.mean(stages == Stage.W) > .5 and start.hour in (16, 17)
    asleep = np.flatnonzero(stages)
    assert asleep[0] > 120 and len(stages) - asleep[-1] > 120

def test_isruc_surprises(cohorts, tmp_path):
    cohort = cohorts['isruc-s1']
    folder = Path(cohort.nights.recording[0]).parents[2]
    names = {int(r['subject']): open_recording(r['recording']).names for r in rows(cohort)}
    assert 'F3-M2' in names[1] and 'F3-A2' in names[4] and not any(n.startswith('F') for n in names[8])
    assert names[40][:10] == ['ROC', 'A1', 'LOC', 'A2', 'C4', 'O2', 'C3', 'O1', 'F4', 'F3']
    assert all({'X1', 'X2', 'X3', 'DC3', 'DC8', 'SaO2'} <= set(n) for n in names.values())
    by = {int(r['subject']): cohort.read(r) for r in rows(cohort)}
    assert np.array_equal(by[8].x[0], by[8].x[1]) and 'C3-M2 stands in for F3-M2' in by[8].notes
    bare = {n: open_recording(folder/'subgroupI'/'40'/'40.rec').read(i) for i,n in enumerate(names[40][:10])}
    np.testing.assert_allclose(by[40].x[0], (bare['F3'] - bare['A2'])[:len(by[40].x[0])], atol=1e-3)
    for n,night in by.items():
        scored = [read_hypnogram(folder/'subgroupI'/f'{n}'/f'{n}_{i}.txt', 'isruc').stage for i in (1, 2)]
        assert len(scored[0]) == len(scored[1]) == len(night.stages) + 30 and (scored[0][-30:] == 0).all()
        assert 30*len(scored[0]) == open_recording(night.where).duration and not np.array_equal(*scored)
    assert isruc(folder, scorer=2).read(rows(isruc(folder, scorer=2))[0]).stages.tolist() == read_hypnogram(folder/'subgroupI/1/1_2.txt', 'isruc').stage[:-30].tolist()
    assert len(isruc(Path(cohorts['isruc-s3'].nights.recording[0]).parents[2], 's3').nights) == 2

def test_scorers_agree_mostly():
    first = synth_hypnogram(population='disordered')
    second = simulated._second_opinion(first, np.random.default_rng(0))
    assert .8 < np.mean(first == second) < .99
    assert (np.abs(np.flatnonzero(first != second)[:, None] - np.flatnonzero(np.diff(first))).min(1) <= 1).all() # only near changes

def test_mass_surprises(cohorts):
    by = {int(r['subject']): r for r in rows(cohorts['mass'])}
    names = {s: open_recording(r['recording']).names for s,r in by.items()}
    assert {n.rpartition('-')[2] for n in names[5] if n.startswith('EEG')} == {'CLE'} and 'EEG F3-LER' in names[3] and 'EEG A2-LER' in names[3]
    chin = {s: cohorts['mass'].read(r).channels[-1].name for s,r in by.items()}
    assert chin == {3: 'Chin1-Chin2', 5: 'Chin1', 6: 'Chin1-Chin2'}
    for row in by.values():
        begins = read_hypnogram(row['hypnogram']).onset[1]
        night,whole = cohorts['mass'].read(row), read_night(row['recording'], wanted=['C4-LE'])
        assert 0 < begins < 30 and (begins * 256).is_integer()
        assert np.array_equal(night.x[4], whole.x[0][int(begins*256):][:len(night.x[4])])
    chins = {i: open_recording(by[3]['recording']).read(names[3].index(f'EMG Chin{i}')) for i in (1, 2)}
    night = cohorts['mass'].read(by[3])
    begin = round(read_hypnogram(by[3]['hypnogram']).onset[1] * 256)
    np.testing.assert_allclose(night.x[-1], (chins[1] - chins[2])[begin:][:len(night.x[-1])], atol=1e-3)
    assert {s for s,_ in DATASETS['mass'].nights} == {*range(1, 65)} - {43, 49}

def test_anphy_surprises(cohorts, tmp_path):
    by = {int(r['subject']): r for r in rows(cohorts['anphy'])}
    assert [Path(by[1][o]).name for o in ('recording', 'hypnogram')] == ['EPCTL01 - fixed.edf', 'test1.txt']
    names = {s: open_recording(r['recording']).names for s,r in by.items()}
    assert 'FPZ' in names[1] and 'CZ-Ref' in names[2] and {'F4-', 'C1-', 'T3'} <= set(names[3])
    for row in by.values():
        night,text = cohorts['anphy'].read(row), Path(row['hypnogram']).read_text().splitlines()
        begins = float(text[1].split('\t')[1])
        whole = read_night(row['recording'], wanted=['Fpz'])
        assert text[0].startswith('L\t0.000') and [o[0] for o in text[1:]].count('L') == 1 and 0 < begins < 30
        assert np.array_equal(night.x[6], whole.x[0][round(begins*1000):][:len(night.x[6])])
    cap = made('anphy', tmp_path/'cap', hours=.1, subjects=1, whole_cap=True)
    recording = open_recording(cap.nights.recording[0])
    sites = [n for n in recording.names if not n.startswith(('E', 'ChEMG', 'RLEG', 'LLEG'))]
    assert len(sites) == 83 and len(read_night(cap.nights.recording[0], wanted=sites).x) == 83    # all of them are known
    few = made('anphy', tmp_path/'few', hours=.1, subjects=1)
    assert np.array_equal(few.read(rows(few)[0]).x[3], cap.read(rows(cap)[0]).x[3])

# ---- again, elsewhere, interrupted

def test_same_seed_same_bytes_whichever_nights_and_processes(tmp_path):
    for name,subjects in (('sleep-edf-20', [0, 1]), ('isruc-s1', [4, 8]), ('anphy', [1, 2])):
        made(name, tmp_path/name/'a', .1, subjects=subjects)
        made(name, tmp_path/name/'b', .1, subjects=subjects, jobs=2)
        made(name, tmp_path/name/'c', .1, subjects=subjects[1:])
        made(name, tmp_path/name/'d', .1, subjects=subjects, seed=1)
        a,b,c,d = (contents(tmp_path/name/o) for o in 'abcd')
        assert a == b and c.items() < a.items()
        assert all(d[o] != a[o] for o in a if o in d and o.endswith(('.edf', '.rec')))
    part,whole = tmp_path/'sleep-edf-20'/'c', tmp_path/'sleep-edf-20'/'a'
    assert made('sleep-edf-78', part, .1, subjects=[0, 1]).nights.subject.tolist() == ['00', '00', '01', '01']  # goes on
    assert contents(part) == contents(whole)

def test_killed_and_continued(tmp_path):
    code = f'from sleepnb.data.simulated import simulate; simulate("isruc-s3", {str(tmp_path/"a")!r}, 6, hours=.2, progress=False)'
    process = subprocess.Popen([sys.executable, '-c', code])
    while not list((tmp_path/'a').rglob('2.rec')) and process.poll() is None: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = list((tmp_path/'a').rglob('*.rec'))
    assert 2 <= len(there) < 6
    (there[0].parent/f'.new.rec.{process.pid}.tmp').write_bytes(b'half')                           # as a process leaves it
    (there[0].parent/f'.new.rec.{os.getpid()}.tmp').write_bytes(b'half')                           # of one that lives
    when = there[0].stat().st_mtime_ns
    simulate('isruc-s3', tmp_path/'a', 6, hours=.2, progress=False)
    assert there[0].stat().st_mtime_ns == when
    (left,) = (tmp_path/'a').rglob('.*')
    assert left.name == f'.new.rec.{os.getpid()}.tmp'
    left.unlink()
    simulate('isruc-s3', tmp_path/'b', 6, hours=.2, progress=False)
    assert contents(tmp_path/'a') == contents(tmp_path/'b')

def test_a_night_without_its_hypnogram_is_made_again(tmp_path):
    made('mass', tmp_path, .1, subjects=1)
    before = contents(tmp_path)
    (tmp_path/'01-03-0001 Base.edf').unlink()
    made('mass', tmp_path, .1, subjects=1)
    assert contents(tmp_path) == before

def test_unfinished_files_are_not_seen(tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', lambda a, b: stop() if 'PSG' in str(b) else Path(a).rename(b))
    with pytest.raises(KeyboardInterrupt): made('mass', tmp_path, .1, subjects=1)
    with pytest.raises(SleepnbError, match='no recording of this dataset'): mass_ss3(tmp_path)

def test_folders_that_hold_something_else_are_refused(tmp_path):
    made('mass', tmp_path/'a', .1, subjects=1)
    before = contents(tmp_path/'a')
    assert json.loads(before['simulated.json']) == dict(what='Simulated by sleepnb, in the layout of a dataset. Nobody slept here.',
        cohort='mass', hours=.1, seed=0, whole_cap=False, version=__version__, format=simulated.FORMAT,
        fitted=simulated._decides('mass')['fitted'])
    for kwargs,found in ((dict(seed=1), 'seed 0'), (dict(hours=.2), 'hours 0.1'), (dict(whole_cap=True), 'whole_cap False')):
        with pytest.raises(SleepnbError, match=f'another simulation .*found {found}'): made('mass', tmp_path/'a', **dict(subjects=1, hours=.1) | kwargs)
    with pytest.raises(SleepnbError, match='expected cohort isruc-s3; found cohort mass'): made('isruc-s3', tmp_path/'a', .1, subjects=1)
    assert contents(tmp_path/'a') == before
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'01-03-0001 PSG.edf').write_bytes(b'real')
    with pytest.raises(SleepnbError, match='not empty, and nothing simulated .*01-03-0001 PSG.edf'): made('mass', tmp_path/'b', .1)
    for damaged in ('', '[]', '{'):
        (tmp_path/'a'/'simulated.json').write_text(damaged)
        with pytest.raises(SleepnbError, match='damaged simulated.json'): made('mass', tmp_path/'a', .1)

def test_other_programs_do_not_go_on(tmp_path, monkeypatch):
    made('mass', tmp_path/'a', .1, subjects=1)
    fitted = simulated._decides('mass')['fitted']
    with monkeypatch.context() as m:
        m.setattr(simulated, 'FORMAT', simulated.FORMAT + 1)
        with pytest.raises(SleepnbError, match='expected format 3; found format 2'): made('mass', tmp_path/'a', .1, subjects=2)
    (tmp_path/'synth.json').write_text((simulated.package_files('sleepnb')/'synth.json').read_text().replace('1', '2', 1))
    monkeypatch.setattr(simulated, 'package_files', lambda name: tmp_path)
    with pytest.raises(SleepnbError, match=f'another simulation .*found fitted {fitted}'): made('mass', tmp_path/'a', .1, subjects=2)

@pytest.mark.parametrize('name, subject', [('isruc-s3', 1), ('mass', 1), ('sleep-edf-20', 0)])
def test_files_that_were_cut_are_made_again(tmp_path, name, subject):
    made(name, tmp_path, .1, subjects=[subject], nights=1)
    before = contents(tmp_path)
    for file in before:
        if file == 'simulated.json': continue
        for keep in (0, 5000, len(before[file]) - 1):
            (tmp_path/file).write_bytes(before[file][:keep])
            made(name, tmp_path, .1, subjects=[subject], nights=1)
            assert contents(tmp_path) == before, (file, keep)
        (tmp_path/file).write_bytes(before[file] + b'0')
        made(name, tmp_path, .1, subjects=[subject], nights=1)
        assert contents(tmp_path) == before, file

def test_files_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done,sync,rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (done.append(os.fstat(f).st_size), sync(f)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(Path(a).stat().st_size), rename(a, b)))
    made('mass', tmp_path, .1, subjects=1)
    assert len(done) == 2*3 and done[::2] == done[1::2] and min(done) > 0

# ---- simulated nights among real ones

@pytest.mark.parametrize('name', SUBJECTS)
def test_a_simulated_cohort_says_so(cohorts, name):
    cohort,plain = cohorts[name], name if DATASET[name] == 'isruc' else DATASET[name]
    assert cohort.name == f'{plain}-simulated' and cohort.expected is None
    told = cohort.options['simulated']
    assert told == simulated._decides(name, hours=.2, seed=0, whole_cap=False) and 'what' not in told
    assert cohort.read(rows(cohort)[0]).cohort == cohort.name

def test_a_store_holds_simulated_or_real_nights(tmp_path):
    made('mass', tmp_path/'made', .1, subjects=2)
    prepare(mass_ss3(tmp_path/'made'), tmp_path/'store', progress=False)
    shutil.copytree(tmp_path/'made', tmp_path/'real')
    (tmp_path/'real'/'simulated.json').unlink()                                                    # as if somebody had slept
    real = mass_ss3(tmp_path/'real')
    assert real.name == 'mass' and real.expected.nights == 62 and 'simulated' not in real.options
    with pytest.raises(SleepnbError, match='expected cohort mass;.*found cohort mass-simulated'): prepare(real, tmp_path/'store', progress=False)
    made('mass', tmp_path/'other', .1, subjects=2, seed=1)
    with pytest.raises(SleepnbError, match='prepared differently'): prepare(mass_ss3(tmp_path/'other'), tmp_path/'store', progress=False)
    made('mass', tmp_path/'made', .1, subjects=3)
    assert len(prepare(mass_ss3(tmp_path/'made'), tmp_path/'store', progress=False).nights) == 3     # more of the same goes on

def test_simulated_and_real_nights_are_not_one_cohort(tmp_path):
    made('mass', tmp_path/'all'/'a', .1, subjects=[1])
    made('mass', tmp_path/'b', .1, subjects=[2])
    for file in (tmp_path/'b').glob('*.edf'): shutil.copy(file, tmp_path/'all')
    with pytest.raises(SleepnbError, match='simulated recordings lie among others .*others and simulated ones in'): mass_ss3(tmp_path/'all')
    (tmp_path/'all'/'simulated.json').write_text('{"what": "another"}')
    with pytest.raises(SleepnbError, match='simulated recordings lie among others'): mass_ss3(tmp_path/'all')
    (tmp_path/'all'/'a'/'simulated.json').unlink()
    assert mass_ss3(tmp_path/'all').name == 'mass-simulated'                                        # though nothing more is said
    (tmp_path/'all'/'simulated.json').write_text('{')
    with pytest.raises(SleepnbError, match='a damaged file'): mass_ss3(tmp_path/'all')

def test_simulated_cohorts_go_into_batches_and_splits(cohorts, tmp_path):
    stores = Stores([prepare(cohorts[o], tmp_path/o, progress=False) for o in ('mass', 'anphy')])
    assert stores.cohorts == ['mass-simulated', 'anphy-simulated']
    split = holdout_split(pd.concat([o.nights for o in stores.stores]), valid=1/3, test=1/3)
    split.save(tmp_path/'split.json')
    assert Split.load(tmp_path/'split.json') == split and set(split.counts.index) == set(stores.cohorts)

@pytest.mark.parametrize('subjects, nights', [(np.int64(2), np.int64(1)), (np.array([0, 1]), 1), (range(2), 1)])
def test_numbers_may_be_numpys(tmp_path, subjects, nights):
    cohort = simulate('sleep-edf-20', tmp_path, subjects, nights, hours=.1, seed=np.int64(0), progress=False)
    assert cohort.nights.subject.tolist() == ['00', '01'] and cohort.options['simulated']['seed'] == 0

def test_wrong_arguments(tmp_path, monkeypatch):
    wrong = [dict(cohort='bids'), dict(subjects=0), dict(subjects=63), dict(subjects=[]), dict(subjects=[43]), dict(nights=0), dict(hours=0), dict(hours=25),
             dict(hours=float('nan')), dict(subjects=True), dict(subjects=[True]), dict(subjects=1.), dict(subjects=[1.]), dict(subjects=None),
             dict(subjects='1'), dict(nights=True), dict(nights=1.5), dict(seed=.5), dict(seed=True)]
    for kwargs in wrong:
        with pytest.raises(SleepnbError): simulate(**dict(cohort='mass', folder=tmp_path/'new', progress=False) | kwargs)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**10, 0, 10**9))
    with pytest.raises(SleepnbError, match='expected 1.1 GB; found 1.0 GB'): simulate('sleep-edf-78', tmp_path/'new', 10, hours=24, progress=False)
    assert not (tmp_path/'new').exists()

def test_progress_is_shown(tmp_path, capfd):
    simulate('sleep-edf', tmp_path, 1, hours=.1)
    assert 'simulating sleep-edf-78' in capfd.readouterr().err and len(list(tmp_path.glob('*PSG.edf'))) == 2
