"""A store is whole after kill -9, with two processes at once, and whatever its files suffer."""
import hashlib, json, os, random, signal, stat, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from sleepnb.core import RecordingError, SleepnbError, StoreError
from sleepnb.data import store as store_module
from sleepnb.data.preprocess import filter_resample, normalise, to_epochs
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

def read_file(row):
    "Noise; the first byte of the recording says how loud it is, and that of the hypnogram which stage all epochs have."
    loud,stage = (Path(row[k]).read_bytes()[0] for k in ('recording', 'hypnogram'))
    x = np.random.default_rng(0).normal(scale=loud, size=10*3000).astype(np.float32)
    return Night([x], [100], [parse_channel('C3-M2')], np.full(10, stage, np.int8), missing=())

def files_cohort(folder, subjects):
    "A recording and a hypnogram for each subject, and the cohort that reads them."
    rows = []
    for i,s in enumerate(subjects):
        paths = {k: folder/f'{s}.{k}' for k in ('recording', 'hypnogram')}
        if not paths['recording'].exists():
            paths['recording'].write_bytes(bytes([20 + i]))
            paths['hypnogram'].write_bytes(bytes([2]))
        rows.append(dict(subject=s, night=1) | {k: str(p) for k,p in paths.items()})
    return Cohort('files', pd.DataFrame(rows), ('C3-M2',), read_file)

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

def assert_whole(store, undisturbed):
    "What a reader would find in the store, finished or not, is what it would find in one that was never disturbed."
    for record in (store/'nights').glob('*.json'):
        for path in (record, record.with_suffix('.npy')):
            assert path.exists(), f'{path} is not there'
            name = path.relative_to(store).as_posix()
            assert hashlib.sha256(path.read_bytes()).hexdigest() == undisturbed[name], f'{path} is not whole'

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
            assert_whole(store, undisturbed)
        process = start(store)
        assert process.wait() == 0, process.stderr.read()
        assert contents(store) == undisturbed

DYING = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from test_store import cohort
from sleepnb.data import store

class Dying:
    "A file; when so many bytes have been written to all files together, the process is killed."
    left = 0
    def __init__(self, path): self.file = open(path, 'wb')
    def write(self, raw):
        raw = bytes(raw)
        self.file.write(raw[:Dying.left])
        if len(raw) > Dying.left:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.left -= len(raw)
    def flush(self): self.file.flush()
    def fileno(self): return self.file.fileno()
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()

def plain(path, save, new=False):
    with path.open('wb') as f: save(f)

if {plainly!r}: store._write = plain
pathlib.Path.open = lambda path, *args, **kwargs: Dying(path) if args == ('wb',) else open(path, *args, **kwargs)
wanted = cohort([f's{{i}}' for i in range(12)])
for moment in {moments!r}:
    child = os.fork()
    if not child:
        Dying.left = moment
        store.prepare(wanted, pathlib.Path({folder!r})/str(moment), progress=False)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL: sys.exit(f'not killed after {{moment}} bytes')
"""

def killed_after(folder, moments, plainly=False):
    "Stores whose processes were killed after so many written bytes."
    script = DYING.format(tests=str(Path(__file__).parent), folder=str(folder), moments=moments, plainly=plainly)
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [folder/str(m) for m in moments]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a process must be able to fork')
def test_killed_within_any_file(tmp_path, undisturbed):
    "Killed in the middle of the manifest, of arrays and of records. The last line shows that this test would notice plain writing."
    night = 20 * len(CHANNELS) * 6004
    records = [night + n for n in range(600, 2400, 200)]            # after the manifest and one array: within its record
    moments = [0, 100, night//2, *records, *np.random.default_rng(0).integers(2*night, 6*night, 4).tolist()]
    for store in killed_after(tmp_path/'atomic', moments):
        assert_whole(store, undisturbed)
        if int(store.name) in records[1:]: continue                 # resumed from nearly the same
        prepare(cohort([f's{i}' for i in range(12)]), store, progress=False)
        assert contents(store) == undisturbed
    lost = 0
    for store in killed_after(tmp_path/'plain', records, plainly=True):
        try: assert_whole(store, undisturbed)
        except AssertionError: lost += 1
    assert lost > 0

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

def test_leftovers_where_processes_cannot_be_asked(tmp_path, monkeypatch):
    prepare(cohort(['a']), tmp_path, progress=False)
    for name,days in (('old', 2), ('young', .5)):
        path = tmp_path/'nights'/f'{name}.npy.{os.getpid()}.tmp'
        path.write_text('')
        os.utime(path, (time.time() - days*86400,)*2)
    monkeypatch.setattr(store_module, '_CAN_ASK', False)
    prepare(cohort(['a']), tmp_path, progress=False)
    assert [p.name[:5] for p in (tmp_path/'nights').glob('*.tmp')] == ['young']

@pytest.mark.skipif(os.name == 'nt', reason='Windows cannot flush a folder')
def test_a_renaming_is_flushed_before_the_next(tmp_path, monkeypatch):
    done = []
    flush,rename = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (done.append('folder' if stat.S_ISDIR(os.fstat(f).st_mode) else 'file'), flush(f)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append('rename'), rename(a, b)))
    monkeypatch.setattr(os, 'link', lambda a, b, link=os.link: (done.append('rename'), link(a, b)))
    prepare(cohort(['a']), tmp_path, progress=False)
    assert done == ['file', 'rename', 'folder'] * 3                 # manifest, array, record

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

@pytest.mark.parametrize('failing', ['broken', 'bug'])
def test_a_store_that_holds_no_night_is_in_nobodys_way(tmp_path, failing):
    "What the first settings could not prepare, corrected settings may, in the same folder."
    with pytest.raises(StoreError, match='no night could be prepared'): prepare(cohort([failing]), tmp_path/'s', progress=False)
    assert not (tmp_path/'s').exists()
    store = prepare(cohort(['a'], name='other'), tmp_path/'s', 'mtssrl', progress=False)
    assert store.cohort == 'other' and len(store.nights) == 1
    with pytest.raises(StoreError, match='no night could'): prepare(cohort([failing], name='other'), tmp_path/'s', 'mtssrl', progress=False)
    assert len(EpochStore(tmp_path/'s').failed) == 1                # a store with nights keeps the reasons

def test_of_two_at_once_that_differ_one_gets_the_store(tmp_path):
    "The other comes while the first reads its first night, and has a night first."
    prepared,mine = [], cohort(['a', 'b'])
    def read(row):
        if not prepared: prepared.append(prepare(cohort(['a'], name='other'), tmp_path/'s', progress=False))
        return read_synth(row)
    with pytest.raises(StoreError, match='no night could be prepared .*prepared differently .*expected cohort example; found cohort other'):
        prepare(replace(mine, read=read), tmp_path/'s', progress=False)
    store = EpochStore(tmp_path/'s')
    assert (store.cohort, len(store.nights), len(store.failed)) == ('other', 1, 2)

def test_a_manifest_is_written_once_whoever_writes(tmp_path, monkeypatch):
    manifests = [dict(cohort=c) for c in 'ab']
    def both_at_once(a, b): # between looking and linking
        monkeypatch.undo()
        Path(b).write_text(json.dumps(manifests[1]))
        os.link(a, b)
    monkeypatch.setattr(os, 'link', both_at_once)
    with pytest.raises(FileExistsError): store_module._write_json(tmp_path/'m.json', manifests[0], new=True)
    assert json.loads((tmp_path/'m.json').read_text()) == manifests[1] and len([*tmp_path.iterdir()]) == 1
    def without_links(a, b): raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', without_links)
    store_module._write_json(tmp_path/'n.json', manifests[0], new=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m.json', 'n.json']

def test_ctrl_c_is_heard_by_one_process(tmp_path):
    "Workers would print where they were."
    def read(row):
        (tmp_path/f'{row["subject"]}.txt').write_text(signal.getsignal(signal.SIGINT).name)
        return read_synth(row)
    before = signal.getsignal(signal.SIGINT)
    get_reusable_executor().shutdown()                                   # workers that an earlier test has left hear it
    prepare(replace(cohort(['a', 'b']), read=read), tmp_path/'s', jobs=2, progress=False)
    assert [(tmp_path/f'{s}.txt').read_text() for s in 'ab'] == ['SIG_IGN']*2 and signal.getsignal(signal.SIGINT) is before

def test_a_manifest_without_nights_says_so(tmp_path):
    prepare(cohort(['a']), tmp_path, progress=False)
    for p in (tmp_path/'nights').iterdir(): p.unlink()
    with pytest.raises(StoreError, match='prepared differently .*It holds no night: delete it'): prepare(cohort(['a'], name='other'), tmp_path, progress=False)

@pytest.mark.parametrize('change,what', [
    (dict(name='other'), 'cohort'), (dict(wanted=('C3-M2', 'Chin')), 'channels'), (dict(crop_wake_min=30), 'crop_wake_min'),
    (dict(options=dict(scorer=2)), 'scorer')])
def test_what_differs_is_refused(tmp_path, change, what):
    first = cohort(['a'])
    prepare(first, tmp_path, progress=False)
    changed = Cohort(**{k: getattr(first, k) for k in ('name', 'nights', 'wanted', 'read', 'crop_wake_min')} | change)
    with pytest.raises(StoreError, match=what): prepare(changed, tmp_path, progress=False)
    with pytest.raises(StoreError, match=r'\(expected recipe mtssrl; found recipe stager\)'): prepare(first, tmp_path, 'mtssrl', progress=False)
    assert len(prepare(cohort(['a', 'b']), tmp_path, progress=False).nights) == 2    # more nights of the same are welcome

def test_a_store_shows_the_nights_of_its_cohort(tmp_path):
    "The whole dataset is prepared first, and then a part of it into the same folder; and the other way round."
    for first,second in (('abcd', 'bc'), ('bc', 'abcd')):
        folder = tmp_path/first
        for subjects in (first, second):
            store = prepare(cohort([*subjects]), folder, progress=False)
            assert store.nights.subject.tolist() == [*subjects] and len(store) == 20*len(subjects)
            assert {*store.epochs.subject} == {*subjects}
        assert EpochStore(folder).nights.subject.tolist() == [*'abcd']
        store = prepare(cohort(['b', 'c']), folder, progress=False)
        rows = np.flatnonzero(EpochStore(folder).epochs.subject == 'c')
        assert np.array_equal(store.read(np.arange(20, 40)), EpochStore(folder).read(rows))

def test_failures_of_other_nights_are_kept(tmp_path):
    prepare(cohort(['a', 'broken', 'bug']), tmp_path, progress=False)
    assert prepare(cohort(['a']), tmp_path, progress=False).failed == {}
    assert len(EpochStore(tmp_path).failed) == 2
    assert len(prepare(cohort(['a', 'bug']), tmp_path, progress=False).failed) == 1

def test_changed_files_are_prepared_again(tmp_path):
    "Also when name, length and time of modification are as before; other nights stay as they are."
    files = files_cohort(tmp_path, 'abc')
    store = prepare(files, tmp_path/'store', progress=False)
    before = contents(tmp_path/'store')
    hypnogram = Path(files.nights.hypnogram[1])
    times = hypnogram.stat()
    hypnogram.write_bytes(bytes([3]))
    os.utime(hypnogram, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.warns(UserWarning, match='1 night must be prepared again.*b_1-'):
        store = prepare(files, tmp_path/'store', progress=False)
    assert store.stages.reshape(3, 10).tolist() == [[2]*10, [3]*10, [2]*10]
    assert {k.split('/')[-1][:2] for k,v in contents(tmp_path/'store').items() if v != before[k]} == {'b_'}
    Path(files.nights.recording[0]).write_bytes(bytes([40]))
    with pytest.warns(UserWarning, match='a_1-'): again = prepare(files, tmp_path/'store', progress=False)
    assert again.read([0]).std() > 1.8*store.read([10]).std()

def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch, recwarn):
    files = files_cohort(tmp_path, 'abc')
    prepare(files, tmp_path/'store', progress=False)
    before,read = contents(tmp_path/'store'), []
    checksum = store_module._checksum
    monkeypatch.setattr(store_module, '_checksum', lambda path: (read.append(path.name), checksum(path))[1])
    for path in tmp_path.glob('a.*'): path.touch()                  # as after copying: younger, and the same
    for expected in (['a.recording', 'a.hypnogram'], []):
        read.clear()
        prepare(files, tmp_path/'store', progress=False)
        assert read == expected
    after = contents(tmp_path/'store')
    assert [k.split('/')[-1][:2] for k in after if after[k] != before[k]] == ['a_'] and not recwarn.list # the times of its files

def test_another_folder_with_the_same_names_is_another_cohort(tmp_path):
    "Also when all its files are older than the store."
    for folder in ('one', 'two'): (tmp_path/folder).mkdir()
    one,two = files_cohort(tmp_path/'one', 'ab'), files_cohort(tmp_path/'two', 'ab')
    for path in (tmp_path/'two').glob('*.hypnogram'): path.write_bytes(bytes([3]))
    for path in tmp_path.glob('*/*'): os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1000))
    time.sleep(.05)
    assert set(prepare(one, tmp_path/'store', progress=False).stages) == {2}
    with pytest.warns(UserWarning, match='prepared again'): again = prepare(two, tmp_path/'store', progress=False)
    assert set(again.stages) == {3}

def test_a_file_that_changes_while_it_is_read(tmp_path):
    files = files_cohort(tmp_path, 'ab')
    def read(row):
        night = files.read(row)
        if 'a' in str(row['subject']): Path(row['hypnogram']).write_bytes(bytes([1, 1]))
        return night
    store = prepare(replace(files, read=read), tmp_path/'store', progress=False)
    assert store.nights.subject.tolist() == ['b'] and 'changed while it was read' in str(store.failed)

def test_a_silent_channel_gives_numbers(tmp_path):
    "Dead but for a pop now and then: its scale must not vanish."
    def read(row):
        night = read_synth(row)
        x = [np.zeros_like(o) for o in night.x]
        for o in x: o[::9000] = 200
        return replace(night, x=x)
    store = prepare(replace(cohort(['a']), read=read), tmp_path, progress=False)
    assert store.scale.min() > 0
    made = normalise(store.read(np.arange(len(store))), store.median[0], store.scale[0])
    assert np.isfinite(made).all()

def test_killed_while_it_prepares_again(tmp_path):
    "Never old stages beside new signals."
    files = files_cohort(tmp_path, 'ab')
    prepare(files, tmp_path/'store', progress=False)
    for path in tmp_path.glob('a.*'): path.write_bytes(bytes([4]))
    killed = replace(files, read=lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt): prepare(killed, tmp_path/'store', progress=False)
    assert EpochStore(tmp_path/'store').nights.subject.tolist() == ['b']
    assert prepare(files, tmp_path/'store', progress=False).nights.subject.tolist() == ['a', 'b']

def test_channels_are_compared_by_what_they_are(tmp_path):
    first = cohort(['a'])
    store = prepare(first, tmp_path, progress=False)
    other = prepare(replace(first, wanted=('C3-A2', 'EEG O1-A2', 'EMG chin')), tmp_path, progress=False)
    assert other.manifest == store.manifest and other.channels == store.channels == CHANNELS
    manifest = json.loads((tmp_path/'manifest.json').read_text())
    (tmp_path/'manifest.json').write_text(json.dumps(manifest | dict(channels=['C3-A2', 'O1-A2', 'Chin'])))   # an older one
    assert prepare(first, tmp_path, progress=False).channels == CHANNELS

def test_arguments_that_cannot_be(tmp_path):
    store = prepare(cohort(['a']), tmp_path/'s', progress=False)
    (tmp_path/'file').write_text('')
    def refused(what, call):
        with pytest.raises(StoreError, match=what): call()
    for jobs in (0, 1.5, None, '2'):
        with pytest.raises(SleepnbError, match='number of processes'): prepare(cohort(['a']), tmp_path/'t', jobs=jobs)
    for swapped in (tmp_path/'s', store, str(tmp_path/'s')): refused('only a cohort', lambda: prepare(swapped, cohort(['a'])))
    for folder in (cohort(['a']), store, None, 3): refused('named by its folder', lambda: prepare(cohort(['a']), folder))
    for other in (store, None, 3): refused('named by its folder', lambda: EpochStore(other))
    refused('this is a file', lambda: prepare(cohort(['a']), tmp_path/'file'))
    refused('this is a file', lambda: EpochStore(tmp_path/'file'))
    refused('no such folder', lambda: EpochStore(tmp_path/'nothing'))
    refused('found 0 rows', lambda: prepare(cohort([]), tmp_path/'t'))
    for rows in (0, [0.], [[0]], [True], None, 'a', ['0']): refused('asked for by their numbers', lambda: store.read(rows))
    for rows in ([-1], [20], np.array([2**63], np.uint64)): refused('no such epoch', lambda: store.read(rows))
    assert store.read([]).shape == (0, 3, 3000)
    assert not (tmp_path/'t').exists()

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
    assert record['sources'] == [[o.name, hashlib.sha256(o.read_bytes()).hexdigest(), o.stat().st_size, o.stat().st_mtime_ns]
                                 for o in (psg, hypnogram)]

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
    with pytest.warns(UserWarning, match='a_1-'): assert len(prepare(cohort(['a', 'b']), tmp_path/'s', progress=False)) == 40

def test_an_array_of_another_length_is_prepared_again(tmp_path):
    "Opening and preparing agree on what is whole."
    prepare(cohort(['a', 'b']), tmp_path, progress=False)
    array = next((tmp_path/'nights').glob('a*.npy'))
    whole = array.read_bytes()
    for raw in (whole + b'x', whole[:-1], whole + whole[:6004], whole[:-3*6004], b''):
        array.write_bytes(raw)
        with pytest.raises(StoreError, match='cannot be read'): EpochStore(tmp_path)
        with pytest.warns(UserWarning, match='a_1-'): prepare(cohort(['a', 'b']), tmp_path, progress=False)
        assert array.read_bytes() == whole

def test_damaged_stores_say_so(tmp_path):
    prepare(cohort(['a', 'broken']), tmp_path, progress=False)
    array = next((tmp_path/'nights').glob('*.npy'))
    record = next((tmp_path/'nights').glob('*.json'))
    for path,raw,match in ((array, array.read_bytes()[:5000], 'cannot be read'), (array, b'', 'cannot be read'),
                           (record, b'{}', 'cannot be read'), (record, record.read_bytes()[:50], 'cannot be read'),
                           (tmp_path/'manifest.json', b'{"format": 99}', 'another format'), (tmp_path/'manifest.json', b'x', 'no store'),
                           (tmp_path/'failed.json', b'{', 'no store')):
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
