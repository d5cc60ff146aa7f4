"""The command as a shell runs it."""
import io, json, os, shutil, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edfio import Edf, EdfAnnotation, EdfSignal
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score

import sleepnb
from sleepnb import cli
from sleepnb.callbacks import TerminalProgress
from sleepnb.core import RecordingError, Stage
from sleepnb.data.loaders import labelled_loaders
from sleepnb.data.psg import describe, find_hypnogram, sample_files
from sleepnb.data.splits import Split
from sleepnb.data.store import EpochStore
from sleepnb.learner import load_learner, predict_stages, saved_split
from sleepnb.weights import load_weights, read_description, write_tensors

SLEEPNB = Path(sys.executable).with_name('sleepnb')

def run(*args, encoding='utf-8', **kwargs):
    return subprocess.run([SLEEPNB, *map(str, args)], capture_output=True, encoding=encoding, **kwargs)

class Stream(io.StringIO):
    def reconfigure(self, **how): pass

def call(*args):
    "The command within this process, which saves the seconds of importing torch."
    argv,sys.argv = sys.argv,['sleepnb', *map(str, args)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            streams = {n: Stream() for n in ('stdout', 'stderr')}
            for n,s in streams.items(): patch.setattr(sys, n, s)
            with pytest.raises(SystemExit) as stop: cli.main()
    finally: sys.argv = argv
    return SimpleNamespace(returncode=stop.value.code, **{n: s.getvalue() for n,s in streams.items()})

def test_simulate_writes_a_cohort_and_goes_on(tmp_path):
    for subjects in (1, 2):
        done = run('simulate', 'sleep-edf', tmp_path/'made', '--subjects', subjects, '--nights', 1, '--hours', .1, '--seed', 7, '--jobs', 1)
        assert done.returncode == 0 and len(list((tmp_path/'made').glob('*PSG.edf'))) == subjects
        assert done.stdout.startswith(f'{subjects} simulated nights in the layout of sleep-edf are in') and str(tmp_path/'made') in done.stdout
    assert '"seed": 7' in (tmp_path/'made'/'simulated.json').read_text()

def test_simulate_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'night.edf').write_text('')
    for args,why in ((('dream', tmp_path/'new', '--hours', 1), 'expected sleep-edf-20'), (('mass', tmp_path/'mine'), 'Name a new folder')):
        done = call('simulate', *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and why in done.stderr and not (tmp_path/'new').exists()
    assert call('simulate', 'mass').returncode == 2

def test_help_and_version():
    assert run('--version').stdout.strip() == f'sleepnb {sleepnb.__version__}'
    assert 'demo' in run('--help').stdout
    wrong = run('dream')
    assert wrong.returncode == 2 and 'dream' in wrong.stderr

def test_an_error_is_one_line_and_a_traceback_only_on_request(monkeypatch, capsys):
    def fail(**how): raise RecordingError('no signal', where='night.edf', remedy='Check the electrodes.')
    monkeypatch.setattr(cli, 'app', fail)
    with pytest.raises(SystemExit) as stop: cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err == 'sleepnb: night.edf: no signal. Check the electrodes.\n'
    monkeypatch.setenv('SLEEPNB_DEBUG', '1')
    with pytest.raises(RecordingError): cli.main()

# Fixtures: two cohorts of five people, seven minutes each

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('work')
    for name,nights in {'isruc-s3': 1, 'sleep-edf': 1}.items():
        done = call('simulate', name, folder/name, '--subjects', 5, '--nights', nights, '--hours', .1)
        assert done.returncode == 0, done.stderr
        done = call('prepare', name, folder/name, '--store', folder/f'store-{name}', '--recipe', 'mtssrl')
        assert done.returncode == 0 and '5 nights of 5 subjects' in done.stdout, done.stderr
    return folder

@pytest.fixture(scope='module')
def isruc(work): return work/'store-isruc-s3'

@pytest.fixture(scope='module')
def cassette(work): return work/'store-sleep-edf'                          # two channels, so that steps are quick

@pytest.fixture(scope='module')
def pretrained(work, isruc):
    done = call('pretrain', isruc, '--out', out := work/'made'/'pretrained.safetensors', '--passes', 1)
    assert (done.returncode, done.stdout) == (0, f'{out}: the weights are there\n'), done.stderr
    return out

@pytest.fixture(scope='module')
def tuned(work, isruc, pretrained):
    done = call('finetune', isruc, '--weights', pretrained, '--labels', .5, '--out', out := work/'made'/'tuned.safetensors',
                '--passes', 2, '--steps', 2)
    assert done.returncode == 0, done.stderr
    return out

# info

LABELS = ['EEG C3', 'A2', 'EOG Left', 'EMG Chin', 'ECG I', 'SaO2']

def write_edf(path, labels=LABELS, seconds=95, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(seed)
    Edf([EdfSignal(g.normal(0, 20, n*seconds).clip(-99, 99), n, label=l, physical_dimension='uV', physical_range=(-100, 100))
         for l,n in zip(labels, [100, 100, 100, 200, 50, 1])]).write(path)
    return path

def test_info_says_what_is_used_and_why_not(tmp_path):
    edf = write_edf(tmp_path/'anna PSG.edf')
    (tmp_path/'anna.csv').write_text('onset,duration,stage\n0,30,W\n30,30,N2\n60,30,N2\n')
    (tmp_path/'annabel.csv').write_text('of somebody else')
    done = call('info', edf, '--json')
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not done.stderr and found == describe(edf)
    assert (found['file'], found['duration_s'], [c['sfreq'] for c in found['channels']]) == (str(edf), 95, [100, 100, 100, 200, 50, 1])
    rows = [(c['canonical'], c['modality'], c['used']) for c in found['channels']]
    assert rows == [('C3', 'EEG', True), ('M2', 'EEG', True), ('E1', 'EOG', True), ('Chin', 'EMG', True), ('ECG-I', 'ECG', False),
                    (None, 'other', False)]                       # A2 is the reference of C3
    assert [bool(c['reason']) for c in found['channels']] == [False]*4 + [True]*2
    assert found['hypnogram'] == dict(file=str(tmp_path/'anna.csv'), epochs=3, stages=dict(W=1, N1=0, N2=2, N3=0, R=0, unscored=0))
    text = call('info', edf).stdout
    assert 'SaO2' in text and '0 h 1 min 35 s' in text and 'W 1, N2 2' in text

def test_info_finds_hypnograms_of_every_kind(tmp_path):
    assert find_hypnogram(sample_files()[0]) == sample_files()[1]
    for name in ('1.rec', 'sub-01_task-sleep_eeg.edf', '01-03-0001 PSG.edf', 'nobody.edf'): write_edf(tmp_path/name)
    for name in ('1_1.txt', '1_2.txt', 'sub-01_task-sleep_channels.tsv', 'sub-01_task-sleep_events.tsv'): (tmp_path/name).write_text('')
    Edf([], annotations=[EdfAnnotation(0, 30, 'Sleep stage W')]).write(tmp_path/'01-03-0001 Base.edf')
    assert find_hypnogram(tmp_path/'01-03-0001 PSG.edf').name == '01-03-0001 Base.edf'
    assert find_hypnogram(tmp_path/'sub-01_task-sleep_eeg.edf').name == 'sub-01_task-sleep_events.tsv'
    assert find_hypnogram(tmp_path/'nobody.edf') is None
    found = describe(tmp_path/'1.rec')
    assert found['hypnogram'] is None and 'several files could be the hypnogram' in found['notes'][-1]
    assert 'there is no hypnogram' in describe(tmp_path/'nobody.edf')['notes']

def test_info_of_what_staging_cannot_use(tmp_path):
    edf = write_edf(tmp_path/'breath.edf', ['Flow', 'Snore', 'ECG'])
    done = call('info', edf)
    assert done.returncode == 0 and done.stdout.count('not used') == 3

@pytest.mark.parametrize('args', [['--help'], ['demo', '--help'], ['pretrain', '--help'], ['info', str(sample_files()[0])]], ids=lambda a: a[0])
def test_quick_commands_load_nothing_that_takes_long(args):
    heavy = ['torch', 'fastai', 'mne', 'scipy', 'sklearn', 'matplotlib']
    code = f'import sys\nsys.argv = ["sleepnb", *{args}]\nfrom sleepnb.cli import main\ntry: main()\n' \
           f'finally: print([m for m in {heavy} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stderr

@pytest.mark.parametrize('command', ['demo', 'info', 'prepare', 'pretrain', 'finetune', 'train supervised', 'evaluate'])
def test_help_teaches_by_examples(command):
    done = call(*command.split(), '--help')
    assert done.returncode == 0 and f'  sleepnb {command} ' in done.stdout

# prepare

def test_a_bad_night_does_not_stop_the_others(work, tmp_path):
    shutil.copytree(work/'isruc-s3', tmp_path/'isruc')
    bad = next(tmp_path.rglob('2.rec'))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:5000])
    command = 'prepare', 'isruc-s3', tmp_path/'isruc', '--store', tmp_path/'store', '--jobs', 1
    done = call(*command)
    assert done.returncode == 1 and '4 nights of 4 subjects' in done.stdout
    assert done.stderr.count('failed: ') == 1 and str(bad) in done.stderr and len(done.stderr.splitlines()) == 1
    made = {p: p.stat().st_mtime_ns for p in (tmp_path/'store').rglob('*.npy')}
    bad.write_bytes(whole)
    done = call(*command)
    assert (done.returncode, done.stderr) == (0, '') and '5 nights of 5 subjects' in done.stdout
    assert all(p.stat().st_mtime_ns == t for p,t in made.items()) and len(made) == 4

def test_ctrl_c_leaves_no_half_of_a_night(work, tmp_path, monkeypatch):
    command,save,nights = ('prepare', 'isruc-s3', work/'isruc-s3', '--store', tmp_path/'store'), np.save, []
    def interrupted(f, x):
        nights.append(x)
        if len(nights) > 2:
            f.write(b'half')
            raise KeyboardInterrupt
        save(f, x)
    with monkeypatch.context() as patch:
        patch.setattr(np, 'save', interrupted)
        done = call(*command)
    assert done.returncode == 130 and done.stderr.splitlines() == ['sleepnb: interrupted. The same command, given again, goes on.']
    assert sorted(p.suffix for p in (tmp_path/'store').rglob('*') if p.is_file()) == ['.json']*3 + ['.npy']*2   # and a manifest
    assert '5 nights of 5 subjects' in call(*command).stdout

def test_a_folder_of_ones_own(tmp_path):
    for seed,who in enumerate(('anna-1', 'anna-2', 'bo-1')):
        write_edf(tmp_path/'mine'/f'{who}.edf', seed=seed)
        for scorer in 'ab': (tmp_path/'mine'/f'{who}_{scorer}.txt').write_text('0\n1\n2\n')
    done = call('prepare', 'folder', tmp_path/'mine', '--store', tmp_path/'store', '--ending', '_b.txt', '--subject', '[a-z]+',
                '--vocabulary', 'yasa', '--channels', 'C3, E1', '--name', 'naps')
    assert done.returncode == 0, done.stderr
    store = EpochStore(tmp_path/'store')
    assert (store.cohort, store.channels, sorted(set(store.nights.subject))) == ('naps', ('C3', 'E1'), ['anna', 'bo'])
    assert store.stages.tolist() == [0, 1, 2]*3

# Training

def test_pretraining_notes_its_split_and_whom_it_saw(pretrained, isruc):
    split,described = saved_split(pretrained), read_description(pretrained)
    people = {(c, s) for c,ids in described['fitted'].items() for s in ids}
    assert people == {*split.train} and len(split.test) == 1 and set(EpochStore(isruc).nights.subject) == {str(i) for i in range(1, 6)}
    assert [p.name for p in pretrained.parent.glob('pretrained*')] == ['pretrained.safetensors']

def test_the_same_command_again_does_nothing_and_another_is_refused(pretrained, isruc):
    before = pretrained.read_bytes()
    again = call('pretrain', isruc, '--out', pretrained, '--passes', 1)
    assert (again.returncode, again.stderr) == (0, '') and 'were there already' in again.stdout
    for other in (('--passes', 2), ('--lr', .1), ('--seed', 1)):
        done = call('pretrain', isruc, '--out', pretrained, '--passes', 1, *other)          # the last of two counts
        assert done.returncode == 2 and 'there are other weights already' in done.stderr and len(done.stderr.splitlines()) == 1
    assert pretrained.read_bytes() == before

def test_a_split_of_ones_own_is_kept(work, isruc, tmp_path):
    c = 'isruc-s3-simulated'
    split = Split(train=[(c, '1'), (c, '2')], valid=[(c, '3')], test=[(c, '4'), (c, '5')])
    split.save(tmp_path/'split.json')
    done = call('train', 'supervised', isruc, '--out', out := tmp_path/'x.safetensors', '--split', tmp_path/'split.json', '--passes', 1,
                '--steps', 1, '--labels', .5)
    assert done.returncode == 0 and f'split {split.id}' in done.stderr
    assert saved_split(out) == split and read_description(out)['notes']['labels'] == .5

def test_fine_tuning_inherits_the_split(tuned, pretrained):
    assert saved_split(tuned) == saved_split(pretrained)
    before,after = (load_weights(p)[0].backbone.alignment.state_dict() for p in (pretrained, tuned))
    assert all(torch.equal(before[k], after[k]) for k in before)

def test_a_new_cohort_borrows_an_alignment(work, pretrained, tmp_path):
    done = call('finetune', work/'store-sleep-edf', '--weights', pretrained, '--out', out := tmp_path/'x.safetensors', '--passes', 1,
                '--steps', 1, '--heads-of', 'isruc-s3-simulated')
    assert done.returncode == 0, done.stderr
    assert {c for c,_ in saved_split(out).train} == {'sleep-edf-simulated'}
    assert set(read_description(out)['fitted']) == {'isruc-s3-simulated', 'sleep-edf-simulated'}

def test_a_terminal_has_a_bar_and_a_file_has_none(cassette, tmp_path, monkeypatch):
    plain = call('pretrain', cassette, '--out', tmp_path/'a.safetensors', '--passes', 2).stderr
    rows = plain.splitlines()
    assert '\r' not in plain and [r.split()[0] for r in rows[2:]] == ['pass', 'loss', '1', '2'] and max(map(len, rows[2:])) < 80
    monkeypatch.setattr(Stream, 'isatty', lambda self: True)
    assert '2/2' in call('pretrain', cassette, '--out', tmp_path/'b.safetensors', '--passes', 2).stderr

def test_a_training_survives_ctrl_c_and_a_kill(cassette, tmp_path, monkeypatch):
    "Interrupted after a pass, killed after the next, finished by the third call: as if nothing had happened."
    command = ['pretrain', str(cassette), '--passes', '3', '--out', str(out := tmp_path/'cut.safetensors')]
    checkpoint = out.with_suffix('.checkpoint.safetensors')
    def state(): return dict(read_description(checkpoint)['state']['dict'])
    after_epoch,threads = TerminalProgress.after_epoch, torch.get_num_threads()
    def press_ctrl_c(self):
        after_epoch(self)
        signal.raise_signal(signal.SIGINT)
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(TerminalProgress, 'after_epoch', press_ctrl_c)
        done = call(*command)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == 'sleepnb: interrupted. The same command, given again, goes on.'
    assert [*tmp_path.iterdir()] == [checkpoint] and state()['pass'] == 1

    process = subprocess.Popen([SLEEPNB, *command], stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not (line := process.stderr.readline()).startswith('     2 '): assert line, 'it ended early'
    process.kill()
    assert (process.wait(), process.stderr.read()) == (-signal.SIGKILL, '')
    assert not out.exists() and state()['pass'] == 2

    done,whole = call(*command), call(*command[:-1], tmp_path/'whole.safetensors')
    torch.set_num_threads(threads)
    assert done.returncode == whole.returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {'cut.safetensors', 'whole.safetensors'}
    table = [r.split()[:-1] for r in done.stderr.splitlines()]         # without the time
    assert table == [r.split()[:-1] for r in whole.stderr.splitlines()] and len(table) == 7
    a,b = (load_weights(tmp_path/f'{n}.safetensors')[0].state_dict() for n in ('cut', 'whole'))
    assert all(torch.equal(a[k], b[k]) for k in b)

def test_a_training_that_was_cut_off_before_its_weights_were_written_goes_on(cassette, tmp_path, monkeypatch):
    command = 'pretrain', cassette, '--passes', 1, '--out', tmp_path/'x.safetensors'
    def press_ctrl_c(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('sleepnb.learner.save_learner', press_ctrl_c)
        assert call(*command).returncode == 130 and [p.name for p in tmp_path.iterdir()] == ['x.checkpoint.safetensors']
    done = call(*command)
    assert done.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ['x.safetensors'], done.stderr

def test_a_training_that_diverges_leaves_no_weights(cassette, tmp_path):
    done = call('train', 'supervised', cassette, '--out', tmp_path/'x.safetensors', '--lr', '1e30', '--passes', 1, '--steps', 2)
    assert done.returncode == 2 and 'the training diverged' in done.stderr.splitlines()[-1] and not [*tmp_path.iterdir()]

# evaluate

def test_scores_are_those_of_another_library(isruc, tuned):
    done = call('evaluate', isruc, '--weights', tuned, '--json')
    found = json.loads(done.stdout)
    split = saved_split(tuned)
    epochs = predict_stages(load_learner(tuned, labelled_loaders(isruc, split)))
    true,pred = epochs.stage, epochs.pred
    assert {(found['cohort'], n['subject']) for n in found['by_night']} == {*split.test} and found['epochs'] == len(true)
    assert found['confusion'] == confusion_matrix(true, pred, labels=range(5)).tolist()
    scores = found['scores']['pooled']
    f1 = f1_score(true, pred, labels=range(5), average=None, zero_division=0)
    assert scores['kappa']['value'] == pytest.approx(cohen_kappa_score(true, pred), abs=1e-6)
    assert [scores[f'f1_{s.label}']['value'] for s in Stage] == pytest.approx(f1, abs=1e-6)
    assert scores['macro_f1'] == dict(value=pytest.approx(f1.mean(), abs=1e-6), low=None, high=None) # of one subject
    assert found['by_night'][0]['kappa'] == scores['kappa']['value']
    text = call('evaluate', isruc, '--weights', tuned).stdout
    assert f'1 subject, 1 night, {len(true)} epochs (split {split.id})' in text and f'{f1.mean():.3f}' in text

# Wrong uses

@pytest.fixture(scope='module')
def wrong(work, tuned, pretrained):
    "Files that are not what they should be."
    (work/'text.edf').write_text('This is a text.')
    (work/'text.safetensors').write_text('This is a text.')
    (work/'text.json').write_text('{}')
    (work/'cut.edf').write_bytes(sample_files()[0].read_bytes()[:100_000])
    (work/'cut.safetensors').write_bytes(tuned.read_bytes()[:-100])
    (work/'mine').mkdir()
    (work/'mine'/'letter.txt').write_text('')
    shutil.copytree(work/'store-sleep-edf', work/'renamed')                # as if of another recipe
    manifest = json.loads((work/'renamed'/'manifest.json').read_text())
    manifest['recipe']['eeg'] = [1, 35]
    (work/'renamed'/'manifest.json').write_text(json.dumps(manifest))
    s = saved_split(pretrained)
    Split(train=s.test, valid=s.valid, test=s.train).save(work/'other.json')
    return work

OUT,FROM = ['--out', '@new/x.safetensors'], ['--weights', '@made/pretrained.safetensors']
ISRUC,SLEEP = '@store-isruc-s3', '@store-sleep-edf'
FILES = ['isruc-s3', '@isruc-s3', '--store']
WRONG = { # why → command; @ is the folder of the files
    "No such command 'dream'": ['dream'],
    "Missing argument 'FILE'. See sleepnb info --help.": ['info'],
    'No such option: --loud': ['info', '@cut.edf', '--loud'],
    'there is no such file': ['info', '@none.edf'],
    'this is a folder, not a file': ['info', '@'],
    'the file cannot be read': ['info', '@text.edf'],
    'this file holds no signals': ['info', str(sample_files()[1])],
    'the file is shorter than its header says': ['info', '@cut.edf'],
    'there is no such dataset': ['prepare', 'dream', '@', '--store', '@new'],
    'there is no such folder': ['prepare', 'isruc-s3', '@none', '--store', '@new'],
    'there is no recording of this dataset': ['prepare', 'mass', '@isruc-s3', '--store', '@new'],
    'there is no such recipe': ['prepare', *FILES, '@new', '--recipe', 'soup'],
    'this is a file, and a store is a folder': ['prepare', *FILES, '@text.edf'],
    'this folder is not empty, and no store': ['prepare', *FILES, '@mine'],
    'this store was prepared differently': ['prepare', *FILES, ISRUC, '--recipe', 'stager'],
    'this dataset takes no such option (found --ending)': ['prepare', *FILES, '@new', '--ending', '.txt'],
    'jobs is a number of processes': ['prepare', *FILES, '@new', '--jobs', '0'],
    'several files could be the hypnogram': ['prepare', 'folder', *FILES[1:], '@new'],
    "Missing option '--out'": ['pretrain', ISRUC],
    'found no such folder': ['pretrain', '@none', *OUT],
    'this is no store': ['pretrain', '@isruc-s3', *OUT],
    'each cohort needs one store': ['pretrain', ISRUC, ISRUC, *OUT],
    'prepared with different recipes': ['pretrain', ISRUC, '@renamed', *OUT],
    "Invalid value for '--passes'": ['pretrain', ISRUC, *OUT, '--passes', '0'],
    "Invalid value for '--lr'": ['pretrain', ISRUC, *OUT, '--lr', 'fast'],
    "found 'moon'": ['pretrain', ISRUC, *OUT, '--device', 'moon'],
    "found the ending '.pth'": ['pretrain', ISRUC, '--out', '@x.pth'],
    'found a folder': ['pretrain', ISRUC, '--out', '@mine'],
    'nothing can be written there': ['pretrain', ISRUC, '--out', '@text.edf/x.safetensors'],
    'this is not a split': ['pretrain', ISRUC, *OUT, '--split', '@text.json'],
    'subjects that the split does not know': ['pretrain', SLEEP, *OUT, '--split', '@other.json'],
    'none.safetensors: there is no such file': ['finetune', ISRUC, '--weights', '@none.safetensors', *OUT],
    'text.safetensors: the file is damaged': ['finetune', ISRUC, '--weights', '@text.safetensors', *OUT],
    'cut.safetensors: the file is damaged': ['finetune', ISRUC, '--weights', '@cut.safetensors', *OUT],
    '--heads-of isruc-s3-simulated': ['finetune', SLEEP, *FROM, *OUT],
    'found mass': ['finetune', SLEEP, *FROM, *OUT, '--heads-of', 'mass'],
    '5 % is 0.05': ['finetune', ISRUC, *FROM, *OUT, '--labels', '5'],
    'the model has already seen 3 of 3 test subjects': ['finetune', ISRUC, *FROM, *OUT, '--split', '@other.json'],
    'there are other weights already': ['finetune', ISRUC, *FROM, '--out', FROM[1]],
    "No such command 'dreams'": ['train', 'dreams', ISRUC, *OUT],
    'the weights do not stage these recordings': ['evaluate', ISRUC, *FROM],
    'the weights were trained without this cohort': ['evaluate', SLEEP, '--weights', '@made/tuned.safetensors'],
    'already seen': ['evaluate', ISRUC, '--weights', '@made/tuned.safetensors', '--split', '@other.json'],
    'no split is noted': ['evaluate', ISRUC, '--weights', '@bare.safetensors']}

@pytest.mark.parametrize('why', WRONG)
def test_wrong_uses_are_told_in_one_line_and_leave_nothing(why, wrong):
    if 'no split' in why: write_tensors(wrong/'bare.safetensors', {}, dict(kind='checkpoint', format=1))
    before = {p: p.stat().st_mtime_ns for p in wrong.rglob('*')}
    done = call(*(a.replace('@', f'{wrong}/') for a in WRONG[why]))
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert {p: p.stat().st_mtime_ns for p in wrong.rglob('*')} == before

def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    def fail(**how): raise ValueError('two\nlines')
    monkeypatch.setattr(cli, 'app', fail)
    with pytest.raises(SystemExit) as stop: cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err == 'sleepnb: ValueError: two lines. SLEEPNB_DEBUG=1 shows where.\n'
