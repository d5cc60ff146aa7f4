"""A store is whole after kill -9, with two processes at once, and whatever its files suffer."""
import hashlib, json, os, random, signal, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sleepnb.core import RecordingError, StoreError
from sleepnb.data.preprocess import filter_resample, to_epochs
from sleepnb.data.psg import Night, read_night, sample_files
from sleepnb.data.store import Cohort, EpochStore, Whole, prepare
from sleepnb.montage import parse_channel
from sleepnb.synth import synth_night

CHANNELS = ('C3-M2', 'O1-M2', 'Chin')

def read_synth(row):
    if row['subject'] == 'broken': raise RecordingError('the file is damaged', where='broken.edf')
    if row['subject'] == 'bug': raise ZeroDivisionError('a mistake in a reader')
    made = synth_night(['C3-M2', 'Chin'], n_epochs=row.get('epochs', 20), subject=row['subject'], night=row['night'])
    return Night(list(made.x), [100]*2, [parse_channel(c) for c in ('C3-M2', 'Chin')], made.stages, missing=('O1-M2',))

def cohort(subjects, name='example', **columns):
    return Cohort(name, pd.DataFrame(dict(subject=subjects, night=1, **columns)), CHANNELS, read_synth)

def test_a_channel_that_ends_early_is_refused(tmp_path):
    "A second and a half at the end would otherwise be zeros that nobody notices."
    def read(row):
        night = read_synth(row)
        return replace(night, x=[night.x[0], night.x[1][:-row['missing']]])
    nights = pd.DataFrame(dict(subject=['a', 'b'], night=1, missing=[1, 150]))
    store = prepare(Cohort('example', nights, CHANNELS, read), tmp_path/'store', progress=False)
    assert store.nights.subject.tolist() == ['a'] and 'Chin ends before the night does (expected 600 s; found 598.5 s)' in [*store.failed.values()][0]

def test_counts_are_compared_when_all_nights_are_there(tmp_path):
    counts = tuple(int(n) for n in np.bincount(prepare(cohort(['a', 'b']), tmp_path/'0', progress=False).stages, minlength=5))
    other = (counts[0] + 1, *counts[1:])
    for i,(whole,differs) in enumerate([(Whole(2, counts), False), (Whole(2, other), True), (Whole(9, other), False), (None, False)]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            prepare(replace(cohort(['a', 'b']), expected=whole), tmp_path/f'{i}', progress=False)
        assert [o.filename == __file__ for o in caught if 'not the epochs that were published' in str(o.message)] == [True] * differs

def contents(folder):
    "Every file of a store and its checksum."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob('*') if p.is_file()}

SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from test_store import cohort; from sleepnb.data.store import prepare
prepare(cohort([f's{{i}}' for i in range(12)]), {store!r}, progress=False, jobs={jobs})
"""

def start(store, jobs=1):
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(store), jobs=jobs)
    return subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    store = tmp_path_factory.mktemp('undisturbed')/'store'
    assert start(store).wait() == 0
    return contents(store)

def test_killed_at_thirty_moments(tmp_path, undisturbed):
    "Each time the process is killed while it writes, at a random moment; what is resumed equals what was never disturbed."
    random.seed(0)
    kills = 0
    while kills < 30:
        store = tmp_path/f'store-{kills}'
        for _ in range(3):                                          # up to three kills of one store
            process = start(store)
            begun = time.time()
            while not (store/'nights').exists() and process.poll() is None and time.time() - begun < 60: time.sleep(.002)
            time.sleep(random.random() * .6)
            if process.poll() is not None: break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            for record in (store/'nights').glob('*.json'): json.loads(record.read_text())   # what is there is whole
        process = start(store)
        assert process.wait() == 0, process.stderr.read()
        assert contents(store) == undisturbed

def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    from sleepnb.data.store import _write
    def fail(f):
        f.write(b'half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): _write(tmp_path/'a.npy', fail)
    assert not (tmp_path/'a.npy').exists()
    _write(tmp_path/'a.npy', lambda f: f.write(b'old'))
    with pytest.raises(KeyboardInterrupt): _write(tmp_path/'a.npy', fail)
    assert (tmp_path/'a.npy').read_bytes() == b'old'

def test_only_our_own_leftovers_are_swept(tmp_path):
    prepare(cohort(['a']), tmp_path, progress=False)
    for name in ('thesis.tmp', 'nights/x.99999999.tmp', 'nights/a.npy.99999999.tmp'): (tmp_path/name).write_text('')
    prepare(cohort(['a']), tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.rglob('*.tmp')) == ['thesis.tmp', 'x.99999999.tmp']

def test_two_at_once(tmp_path, undisturbed):
    for jobs in (1, 2):
        both = [start(tmp_path/f'store-{jobs}', jobs) for _ in range(2)]
        for process in both: assert process.wait() == 0, process.stderr.read()
        assert contents(tmp_path/f'store-{jobs}') == undisturbed

def test_failed_nights_are_reported_and_the_rest_goes_on(tmp_path):
    store = prepare(cohort(['a', 'broken', 'bug', 'b']), tmp_path/'s', progress=False)
    assert sorted(store.nights.subject) == ['a', 'b'] and len(store.failed) == 2
    assert any('broken.edf: the file is damaged' in o for o in store.failed.values())
    assert any('ZeroDivisionError: a mistake in a reader' in o for o in store.failed.values())
    assert EpochStore(tmp_path/'s').failed == store.failed and '2 nights failed' in repr(EpochStore(tmp_path/'s'))
    assert prepare(cohort(['a', 'b']), tmp_path/'s', progress=False).failed == {}
    with pytest.raises(StoreError, match='no night could be prepared'): prepare(cohort(['broken']), tmp_path/'t', progress=False)

@pytest.mark.parametrize('change,what', [
    (dict(name='other'), 'cohort'), (dict(wanted=('C3-M2', 'Chin')), 'channels'), (dict(crop_wake_min=30), 'crop_wake_min'),
    (dict(options=dict(scorer=2)), 'scorer')])
def test_what_differs_is_refused(tmp_path, change, what):
    first = cohort(['a'])
    prepare(first, tmp_path, progress=False)
    changed = Cohort(**{k: getattr(first, k) for k in ('name', 'nights', 'wanted', 'read', 'crop_wake_min')} | change)
    with pytest.raises(StoreError, match=what): prepare(changed, tmp_path, progress=False)
    with pytest.raises(StoreError, match='recipe'): prepare(first, tmp_path, 'mtssrl', progress=False)
    assert len(prepare(cohort(['a', 'b']), tmp_path, progress=False).nights) == 2    # more nights of the same are welcome

def test_every_epoch_comes_back(tmp_path):
    store = prepare(cohort(['a', 'b/c', 'b-c', 'ü'], epochs=[3, 5, 7, 1]), tmp_path, progress=False)
    assert len(store) == 16 and store.nights.file.is_unique
    rows = np.random.default_rng(0).permutation(16).repeat(2)
    x,epochs = store.read(rows), store.epochs
    for row,one in zip(rows, x):
        of = epochs.iloc[row]
        night = read_synth(dict(subject=of.subject, night=1, epochs=int(store.nights.set_index('subject').epochs[of.subject])))
        truth = to_epochs(filter_resample(night.x[0], 100))[of.epoch]
        assert np.abs(one[0] - truth).max() <= np.abs(truth).max() / 32767 and not one[1].any()
        assert night.stages[of.epoch] == of.stage

def test_statistics_and_checksums(tmp_path):
    psg,hypnogram = sample_files()
    read = lambda row: read_night(row['recording'], row['hypnogram'], wanted=['Fpz', 'Chin'])
    nights = pd.DataFrame([dict(subject='SC400', night=1, recording=str(psg), hypnogram=str(hypnogram))])
    store = prepare(Cohort('sample', nights, ('Fpz', 'Chin'), read, crop_wake_min=10), tmp_path, progress=False)
    assert len(store) == 761 and store.epoch[0] == 40 and store.epochs.epoch.iloc[-1] == 800
    x = store.read(np.arange(761))[:, 0]
    low,middle,high = np.percentile(x, [25, 50, 75])
    np.testing.assert_allclose([store.median[0, 0], store.scale[0, 0]], [middle, (high - low) / 1.349], atol=.01)
    record = json.loads(next((tmp_path/'nights').glob('*.json')).read_text())
    assert record['sources'] == [[o.name, hashlib.sha256(o.read_bytes()).hexdigest()] for o in (psg, hypnogram)]

def test_one_recording_under_two_names_is_refused(tmp_path):
    psg,hypnogram = sample_files()
    nights = pd.DataFrame([dict(subject=s, night=1, recording=str(psg), hypnogram=str(hypnogram)) for s in 'ab'])
    twins = Cohort('twins', nights, ('Chin',), lambda row: read_night(row['recording'], row['hypnogram'], ['Chin']))
    with pytest.raises(StoreError, match='the same recording is there twice'): prepare(twins, tmp_path/'store', progress=False)

def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path/'night.edf').write_text('')
    with pytest.raises(StoreError, match='not empty, and no store'): prepare(cohort(['a']), tmp_path, progress=False)
    with pytest.raises(StoreError, match='only a cohort'): prepare('folder', tmp_path/'s')

def test_a_lost_array_is_prepared_again(tmp_path):
    prepare(cohort(['a', 'b']), tmp_path/'s', progress=False)
    next((tmp_path/'s'/'nights').glob('a*.npy')).unlink()
    with pytest.raises(StoreError, match='cannot be read'): EpochStore(tmp_path/'s')
    assert len(prepare(cohort(['a', 'b']), tmp_path/'s', progress=False)) == 40

def test_damaged_stores_say_so(tmp_path):
    prepare(cohort(['a']), tmp_path, progress=False)
    array = next((tmp_path/'nights').glob('*.npy'))
    record = next((tmp_path/'nights').glob('*.json'))
    for path,raw,match in ((array, array.read_bytes()[:5000], 'cannot be read'), (array, b'', 'cannot be read'),
                           (record, b'{}', 'cannot be read'), (record, record.read_bytes()[:50], 'cannot be read'),
                           (tmp_path/'manifest.json', b'{"format": 99}', 'another format'), (tmp_path/'manifest.json', b'x', 'no store')):
        whole = path.read_bytes()
        path.write_bytes(raw)
        with pytest.raises(StoreError, match=match): EpochStore(tmp_path).read([0])
        path.write_bytes(whole)
    EpochStore(tmp_path).read([0])

def test_reading_holds_no_file_open(tmp_path):
    store = prepare(cohort([f's{i:03d}' for i in range(70)], epochs=1), tmp_path, progress=False)
    opened = lambda: len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
    before = opened()
    for _ in range(3): store.read(np.arange(70))
    assert opened() == before

def test_memory_does_not_grow_with_nights(tmp_path):
    "Opening and sampling 2,000 nights takes as much memory as 10; the nights are links to one file, which readers cannot know."
    code = ('import resource, sys, numpy as np; from sleepnb.data.store import EpochStore; s = EpochStore(sys.argv[1])\n'
            'for i in range(50): s.read(np.random.default_rng(i).integers(0, len(s), 100))\n'
            'print(len(s), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    peak = {}
    for n in (10, 2000):
        folder = tmp_path/str(n)
        prepare(cohort(['s0'], epochs=[960]), folder, progress=False)
        first = next((folder/'nights').glob('*.json'))
        for i in range(1, n):
            (folder/'nights'/f's{i}.json').write_text(json.dumps(json.loads(first.read_text()) | dict(subject=f's{i}')))
            os.link(first.with_suffix('.npy'), folder/'nights'/f's{i}.npy')
        run = subprocess.run([sys.executable, '-c', code, str(folder)], check=True, capture_output=True, text=True)
        epochs,peak[n] = map(int, run.stdout.split())
        assert epochs == 960 * n
    assert peak[2000] < 1.1 * peak[10], peak
