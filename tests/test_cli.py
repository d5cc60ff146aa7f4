"""The command as a shell runs it."""
import io, json, os, shutil, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mne
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from edfio import Edf, EdfAnnotation, EdfSignal
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score

import sleepnb
from sleepnb import cli
from sleepnb.callbacks import TerminalProgress
from sleepnb.core import HypnogramError, RecordingError, SleepnbError, Stage
from sleepnb.data.loaders import labelled_loaders
from sleepnb.data.psg import describe, find_hypnogram, read_hypnogram, read_night, sample_files
from sleepnb.data.splits import Split
from sleepnb.data.store import EpochStore
from sleepnb.learner import load_learner, predict_stages, saved_split
from sleepnb.models.network import Backbone, StageNetwork
from sleepnb.multimodal.sleepsmc import SleepSMC
from sleepnb.ssrl.mtssrl import MTSSRL
from sleepnb.stager import Stager
from sleepnb.weights import load_weights, read_description, save_weights, write_tensors

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
        assert done.stdout.startswith(f'{tmp_path/"made"}: {subjects} simulated night{"s" * (subjects > 1)} in the layout of sleep-edf')
    assert 'simulating' not in done.stderr                                # a bar is for terminals
    assert '"seed": 7' in (tmp_path/'made'/'simulated.json').read_text()

def test_simulate_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'night.edf').write_text('')
    for args,why in ((('dream', tmp_path/'new', '--hours', 1), 'expected sleep-edf-20'), (('mass', tmp_path/'mine'), 'Name a new folder')):
        done = call('simulate', *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and why in done.stderr and not (tmp_path/'new').exists()
    assert call('simulate', 'mass').returncode == 2
    (tmp_path/'text.edf').write_text('This is a text.')
    for command in (('simulate', 'sleep-edf', tmp_path/'text.edf'), ('demo', '--out', tmp_path/'text.edf')):
        done = call(*command)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert 'text.edf: nothing can be written there (found' in done.stderr and 'text.edf is a file). Name another folder' in done.stderr

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

@pytest.fixture(scope='module')
def allthree(work, isruc):
    done = call('train', 'sleepsmc', isruc, '--primary', 'all', '--hide', .3, '--passes', 1, '--out', out := work/'made'/'all.safetensors')
    assert (done.returncode, done.stdout) == (0, f'{out}: the weights are there\n'), done.stderr
    return out

@pytest.fixture(scope='module')
def quick(work, cassette):
    "Of EEG alone."
    done = call('train', 'featurenet', cassette, '--modalities', 'EEG', '--passes', 1, '--out', out := work/'made'/'quick.safetensors')
    assert done.returncode == 0, done.stderr
    return out

# info

LABELS = ['EEG C3', 'A2', 'EOG Left', 'EMG Chin', 'ECG I', 'SaO2']

def write_edf(path, labels=LABELS, seconds=95, seed=0, white=True): # noise that is white is no EEG
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(seed)
    def noise(n): return (g.normal(0, 20, n) if white else np.cumsum(g.normal(0, 2, n)) % 160 - 80).clip(-99, 99)
    Edf([EdfSignal(noise(n*seconds), n, label=l, physical_dimension='uV', physical_range=(-100, 100))
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

@pytest.mark.parametrize('args', [['--help'], ['demo', '--help'], ['pretrain', '--help'], ['stage', '--help'], ['train', 'sleepsmc', '--help'], ['export', '--help'], ['run', '--help'],
                                  ['info', str(sample_files()[0])]], ids=lambda a: a[0])
def test_quick_commands_load_nothing_that_takes_long(args):
    heavy = ['torch', 'fastai', 'mne', 'scipy', 'sklearn', 'matplotlib']
    code = f'import sys\nsys.argv = ["sleepnb", *{args}]\nfrom sleepnb.cli import main\ntry: main()\n' \
           f'finally: print([m for m in {heavy} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stderr

@pytest.mark.parametrize('command', ['demo', 'info', 'prepare', 'pretrain', 'finetune', 'train supervised', 'train sleepsmc', 'train featurenet',
                                     'evaluate', 'stage', 'export', 'run'])
def test_help_teaches_by_examples(command):
    done = call(*command.split(), '--help')
    assert done.returncode == 0 and f'  sleepnb {command} ' in done.stdout

def test_commands_that_train_refuse_to_be_one_of_several(cassette, tmp_path, monkeypatch):
    "Each process would train the whole, and write where the others write."
    monkeypatch.setenv('WORLD_SIZE', '2')
    for args in (('pretrain', cassette, '--out', tmp_path/'w.safetensors'), ('run', 'mtssrl-table6', '--scale', 'smoke', '--out', tmp_path)):
        done = call(*args)
        assert done.returncode == 2 and 'trains in one process (found one of 2)' in done.stderr
    assert not [*tmp_path.iterdir()]

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

def test_a_folder_whose_channels_have_names_of_their_own(tmp_path):
    for seed,who in enumerate(('anna', 'bo')):
        write_edf(tmp_path/'mine'/f'{who}.edf', ['one', 'two'], seed=seed)
        (tmp_path/'mine'/f'{who}.txt').write_text('W\nN1\nN2\n')
    command = 'prepare', 'folder', tmp_path/'mine', '--store', tmp_path/'store'
    done = call(*command)
    assert done.returncode == 2 and 'Say what they are: --alias "its name=C3-M2".' in done.stderr and not (tmp_path/'store').exists()
    assert call(*command, '--alias', 'one=C3-M2', '--alias', 'two=E1-M2').returncode == 0
    assert EpochStore(tmp_path/'store').channels == ('C3-M2', 'E1-M2')

def test_what_a_first_prepare_got_wrong_a_second_may_correct(tmp_path):
    for seed,who in enumerate(('anna', 'bo')):
        write_edf(tmp_path/'lab'/f'{who}.edf', seed=seed)
        (tmp_path/'lab'/f'{who}.txt').write_text('0\n1\n5\n')
    command = 'prepare', 'folder', tmp_path/'lab', '--store', tmp_path/'store'
    done = call(*command)
    assert done.returncode == 2 and 'no night could be prepared' in done.stderr and '--vocabulary sleepnb or' in done.stderr
    assert 'vocabulary=' not in done.stderr
    done = call(*command, '--vocabulary', 'isruc')
    assert done.returncode == 0 and EpochStore(tmp_path/'store').stages.tolist() == [0, 1, 4]*2 and done.stdout.startswith('lab: 2 nights')
    done = call(*command, '--vocabulary', 'yasa', '--channels', 'C3')
    assert 'expected channels C3; vocabulary yasa; found channels C3, E1, Chin; vocabulary isruc)' in done.stderr, done.stderr

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

def test_what_was_fine_tuned_already_is_said_to_be(isruc, pretrained, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, '_train', lambda *args, **how: None)
    for weights,said in ((tuned, f'sleepnb: {tuned} can stage already: its encoder goes on from there, and its classifier begins anew\n'), (pretrained, '')):
        done = call('finetune', isruc, '--weights', weights, '--out', tmp_path/'x.safetensors')
        assert (done.returncode, done.stderr) == (0, said)

def test_a_new_cohort_borrows_an_alignment(work, pretrained, tmp_path):
    done = call('finetune', work/'store-sleep-edf', '--weights', pretrained, '--out', out := tmp_path/'x.safetensors', '--passes', 1,
                '--steps', 1, '--heads-of', 'isruc-s3-simulated')
    assert done.returncode == 0, done.stderr
    assert {c for c,_ in saved_split(out).train} == {'sleep-edf-simulated'}
    assert set(read_description(out)['fitted']) == {'isruc-s3-simulated', 'sleep-edf-simulated'}

def test_the_montage_most_like_it_is_recommended():
    known = dict(first=['Cz-M1', 'Chin'], second=['Fpz-M2', 'Oz-M2'], third=['F3-M2', 'C3-M2', 'O1-M2'])
    for channels,best in ((['F3-M2', 'O1-M2', 'Fpz-M2'], 'third'), (['Fpz-Cz', 'Pz-Oz', 'Chin'], 'second'), (['C1-M2'], 'first')):
        assert cli._most_like(channels, known) == best                     # two equal names; near places; one place between

def test_other_people_of_the_same_cohort_name_are_not_taken_for_known(isruc, pretrained, tuned, tmp_path):
    shutil.copytree(isruc, tmp_path/'other')
    for path in (tmp_path/'other'/'nights').glob('*.json'):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | dict(subject=f'x{record["subject"]}')))
    for command in (('finetune', tmp_path/'other', '--weights', pretrained, '--out', tmp_path/'x.safetensors'),
                    ('evaluate', tmp_path/'other', '--weights', tuned)):
        done = call(*command)
        assert done.returncode == 2 and 'know other people by the name isruc-s3-simulated (expected 1, 2, 3, 4, 5; found x1, x2, x3, x4, x5)' in done.stderr

def test_a_cohort_that_the_weights_do_not_know_is_scored_whole(isruc, tuned, allthree, tmp_path):
    shutil.copytree(isruc, tmp_path/'own')
    manifest = json.loads((tmp_path/'own'/'manifest.json').read_text())
    (tmp_path/'own'/'manifest.json').write_text(json.dumps(manifest | dict(cohort='own')))
    for weights in (tuned, allthree):
        done = call('evaluate', tmp_path/'own', '--weights', weights)
        assert done.returncode == 0 and done.stdout.startswith('5 subjects, 5 nights, '), done.stderr
        assert '(everybody in own, of whom the weights have seen nobody)' in done.stdout.splitlines()[0]
    found = json.loads(call('evaluate', tmp_path/'own', '--weights', tuned, '--json').stdout)
    scored = EpochStore(isruc).epochs.query('stage >= 0')
    assert found['split'] is None and found['epochs'] == len(scored)
    learn = load_learner(tuned, labelled_loaders(isruc, saved_split(tuned)))
    known = pd.concat([predict_stages(learn, part) for part in ('train', 'valid', 'test')])     # the same people, under their name
    assert sum(found['confusion'][i][i] for i in range(5)) == (known.pred == known.stage).sum()

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
    done = call(*command, '--lr', 1e-4)
    assert 'the checkpoint is of another training (found another training: other learning rate' in done.stderr and 'hypers' not in done.stderr
    done = call(*command)
    assert done.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ['x.safetensors'], done.stderr

def test_a_training_that_diverges_leaves_no_weights(cassette, tmp_path):
    done = call('train', 'supervised', cassette, '--out', tmp_path/'x.safetensors', '--lr', '1e30', '--passes', 1, '--steps', 2)
    assert done.returncode == 2 and 'the training diverged' in done.stderr.splitlines()[-1] and not [*tmp_path.iterdir()]
    assert 'checkpoint' not in done.stderr and 'Train again with a lower learning rate.' in done.stderr.splitlines()[-1]

def test_sleepsmc_and_featurenet_differ_in_their_loss_alone(allthree, quick):
    both = [read_description(p) for p in (allthree, quick)]
    assert [d['network'] for d in both] == ['SleepSMC']*2
    assert [(d['notes']['loss']['uncertainty'], d['notes']['loss']['contrast']) for d in both] == [(True, True), (False, False)]
    a,b = (d['arguments'] for d in both)
    assert (a['primary'], a['modalities'], a['channel_mode'], a['hide']) == (None, ['EEG', 'EOG', 'EMG'], 'joint', .3)
    assert (b['primary'], b['modalities'], b['channel_mode'], b['hide']) == ('EEG', ['EEG'], 'joint', 0)
    assert both[0]['notes']['training']['batch'] == 128 and both[0]['notes']['training']['hypers'][0]['lr'] == 1e-3
    again = [call('train', what, *rest, '--out', p) for what,p,rest in (
        ('sleepsmc', allthree, [allthree.parent.parent/'store-isruc-s3', '--primary', 'all', '--hide', .3, '--passes', 1]),
        ('sleepsmc', quick, [quick.parent.parent/'store-sleep-edf', '--modalities', 'EEG', '--passes', 1]))]
    assert (again[0].returncode, again[0].stderr) == (0, '') and 'were there already' in again[0].stdout
    assert again[1].returncode == 2 and 'another training: other loss' in again[1].stderr

def test_two_cohorts_with_any_montage_are_evaluated_one_by_one(isruc, cassette, tmp_path):
    done = call('train', 'featurenet', isruc, cassette, '--channel-mode', 'cam', '--primary', 'all', '--passes', 1, '--modalities', 'EEG,EOG',
                '--out', out := tmp_path/'any.safetensors')
    assert done.returncode == 0, done.stderr
    for store in (isruc, cassette):
        done = call('evaluate', store, '--weights', out, '--json')
        found = json.loads(done.stdout)
        assert {n['cohort'] for n in found['by_night']} == {EpochStore(store).cohort} == {found['cohort']}

def test_sleepsmc_survives_a_kill(isruc, tmp_path):
    "Killed after a pass, finished by the second call: as if nothing had happened."
    command = ['train', 'sleepsmc', str(isruc), '--modalities', 'EEG,EOG', '--passes', '2', '--out', str(out := tmp_path/'cut.safetensors')]
    process = subprocess.Popen([SLEEPNB, *command], stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not (line := process.stderr.readline()).startswith('     1 '): assert line, 'it ended early'
    process.kill()
    assert (process.wait(), process.stderr.read(), out.exists()) == (-signal.SIGKILL, '', False)
    assert dict(read_description(out.with_suffix('.checkpoint.safetensors'))['state']['dict'])['pass'] == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done,whole = call(*command), call(*command[:-1], tmp_path/'whole.safetensors')
    torch.set_num_threads(threads)
    assert done.returncode == whole.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {'cut.safetensors', 'whole.safetensors'}
    a,b = (load_weights(tmp_path/f'{n}.safetensors')[0].state_dict() for n in ('cut', 'whole'))
    assert all(torch.equal(a[k], b[k]) for k in b)

# evaluate

def test_every_subset_of_modalities_is_scored(isruc, allthree):
    done = call('evaluate', isruc, '--weights', allthree, '--subsets', '--json')
    found = json.loads(done.stdout)
    assert [*found['subsets']] == ['EEG+EOG+EMG', 'EEG+EOG', 'EEG+EMG', 'EOG+EMG', 'EEG', 'EOG', 'EMG']
    learn = load_learner(allthree, labelled_loaders(isruc, saved_split(allthree), modalities=('EEG', 'EOG', 'EMG')))
    for using in (('EEG', 'EOG', 'EMG'), ('EOG',)):
        epochs = predict_stages(learn, using=using)
        scores = found['subsets']['+'.join(using)]
        assert scores['kappa']['value'] == pytest.approx(cohen_kappa_score(epochs.stage, epochs.pred), abs=1e-6)
        assert scores['accuracy']['value'] == pytest.approx((epochs.stage == epochs.pred).mean(), abs=1e-6)
    assert found['scores']['pooled']['kappa'] == found['subsets']['EEG+EOG+EMG']['kappa']
    text = call('evaluate', isruc, '--weights', allthree, '--subsets').stdout
    assert text.startswith(call('evaluate', isruc, '--weights', allthree).stdout) and 'staged with' in text and '  EOG+EMG ' in text

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

# stage

@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "Recordings of 95 s, weights of networks that have learned nothing, and much that is wrong."
    folder = tmp_path_factory.mktemp('shelf')
    for name in ('night', 'other', 'deep/night'): write_edf(folder/f'{name}.edf', seed=len(name), white=False)
    write_edf(folder/'eyes.edf', ['EOG Left', 'EOG Right'], white=False)
    write_edf(folder/'noise.edf', ['EOG Left', 'EOG Right'])
    write_edf(folder/'breath.edf', ['Flow', 'Snore', 'ECG'])
    write_edf(folder/'lab.edf', ['one', 'two'], white=False)
    write_edf(folder/'short.edf', seconds=20)
    torch.manual_seed(0)
    toy = SleepSMC({'home': ['C3-M2', 'HEOG', 'Chin']}, primary=None, channel_mode='cam', n_chans={'EEG': 1})
    recipe = dict(name='toy', eeg=[.3, 40.], eog=[.3, 40.], emg=[10., None], ecg=[.3, 40.])
    save_weights(folder/'toy.safetensors', toy, recipe=recipe)
    save_weights(folder/'fixed.safetensors', StageNetwork(Backbone({'a': ['C3-M2']})))
    save_weights(folder/'encoder.safetensors', MTSSRL(Backbone({'a': ['C3-M2']})))
    write_tensors(folder/'checkpoint.safetensors', {}, dict(kind='checkpoint', format=1))
    (folder/'cut.safetensors').write_bytes((folder/'toy.safetensors').read_bytes()[:-100])
    (folder/'cut.edf').write_bytes((folder/'night.edf').read_bytes()[:-1000])
    (folder/'empty.edf').write_bytes(b'')
    (folder/'taken'/'night_report.html').mkdir(parents=True)
    texts = {'text.edf': 'This is a text.', 'text.safetensors': 'This is a text.', 'words.csv': 'onset,duration,stage\n0,30,dream\n',
             'late.csv': 'onset,duration,stage\n90000,30,W\n', 'numbers.txt': '0\n1\n2\n', 'scorers.csv': 'onset,duration,anna,bo\n0,30,W,N1\n',
             'taken/night_stages.csv': 'onset,duration,stage\n0,90,W\n', 'scored.csv': 'onset,duration,stage\n0,60,N2\n60,30,W\n'}
    for name,text in texts.items(): (folder/name).write_text(text)
    return folder

def stage(shelf, *args): # @ is the shelf
    return call('stage', *(str(a).replace('@', f'{shelf}/') for a in args), '--weights', shelf/'toy.safetensors')

def test_stage_writes_what_python_gives(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = stage(shelf, '@night.edf')
    assert done.returncode == 0 and not done.stderr and [*tmp_path.iterdir()] == [tmp_path/'night_stages.csv']
    expected = Stager.load(shelf/'toy.safetensors').stage(shelf/'night.edf')
    table = pd.read_csv('night_stages.csv')
    assert list(table.columns) == ['onset', 'duration', 'stage', 'p_W', 'p_N1', 'p_N2', 'p_N3', 'p_R', 'quality']
    pd.testing.assert_frame_equal(table, expected.table, check_dtype=False)
    assert 'EEG  C3-M2' in done.stdout and 'written: night_stages.csv' in done.stdout and 'flagged epochs: none' in done.stdout
    assert f'TST {(expected.stages > 0).sum() / 2:.1f} min' in done.stdout and 'agreement' not in done.stdout

def test_stage_as_json_and_with_a_hypnogram(shelf, tmp_path):
    done = stage(shelf, '@night.edf', '@eyes.edf', '--json', '--out', tmp_path, '--report')
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [o['file'] for o in found] == [str(shelf/f'{n}.edf') for n in ('night', 'eyes')]
    assert found[1]['channels_used'] == ['E1-E2'] and found[1]['agreement'] is None and found[1]['statistics']['TIB'] == 1.5
    assert {p.name for p in tmp_path.iterdir()} == {f'{n}_{o}' for n in ('night', 'eyes') for o in ('stages.csv', 'report.html')}
    assert 'Spectrogram' in (tmp_path/'eyes_report.html').read_text()
    real,scored = sample_files()
    one, = (json.loads(o) for o in stage(shelf, real, '--json', '--out', tmp_path).stdout.splitlines())
    true = pd.Series(read_night(real, scored, wanted=['Fpz-Cz']).stages).map(lambda s: Stage(s).label)    # found beside it
    pred,agreement = pd.read_csv(tmp_path/'SC4001E0-PSG_stages.csv').stage, one['agreement']
    assert one['stages'] == pred.tolist() and agreement['epochs'] == 841
    labels = [s.label for s in Stage]
    f1 = dict(zip(labels, f1_score(true, pred, labels=labels, average=None, zero_division=0)))
    assert agreement['f1'] == pytest.approx(f1, abs=1e-6) and agreement['macro_f1'] == pytest.approx(np.mean([*f1.values()]), abs=1e-6)
    assert agreement['kappa'] == pytest.approx(cohen_kappa_score(true, pred), abs=1e-6)
    assert agreement['accuracy'] == pytest.approx((true == pred).mean(), abs=1e-6)

def test_stage_compares_with_what_is_beside_but_never_with_itself(shelf, tmp_path):
    shutil.copy(sample_files()[0], edf := tmp_path/'night.edf')
    (tmp_path/'night_anna.csv').write_text('onset,duration,stage\n0,600,W\n600,300,N2\n')
    for _ in range(2):
        done = stage(shelf, edf, '--out', tmp_path)
        assert done.returncode == 0 and f'agreement with {tmp_path/"night_anna.csv"}' in done.stdout and 'over 30 epochs' in done.stdout
    (tmp_path/'night_anna.csv').write_text('onset,duration,stage\n0,30,0\n')
    done = stage(shelf, edf, '--out', tmp_path)
    assert done.returncode == 0 and 'no agreement is computed' in done.stderr and '--vocabulary sleepnb' in done.stderr
    (tmp_path/'night_anna.csv').unlink()
    done = stage(shelf, edf, '--out', tmp_path)
    assert done.returncode == 0 and 'agreement' not in done.stdout + done.stderr

def test_stage_compares_with_stages_in_the_recording_itself(shelf, tmp_path):
    x = np.cumsum(np.random.default_rng(0).normal(0, 3, 9000)) % 100
    Edf([EdfSignal(x, 100, label='EEG C3-A2', physical_dimension='uV', physical_range=(-1, 100))],
        annotations=[EdfAnnotation(0, 30, 'Sleep stage W'), EdfAnnotation(30, 60, 'Sleep stage N2')]).write(tmp_path/'own.edf')
    found = json.loads(stage(shelf, tmp_path/'own.edf', '--json', '--out', tmp_path).stdout)
    assert found['agreement']['epochs'] == sum(s != '?' for s in found['stages']) == 3

def test_info_and_stage_read_the_same_stages(shelf, tmp_path):
    "A FIF that carries its stages; a scoring of seven hours beside a recording of one minute and a half."
    raw = mne.io.read_raw_edf(shelf/'night.edf', verbose='error')
    raw.set_annotations(mne.Annotations([0, 30], [30, 60], ['Sleep stage W', 'Sleep stage N2'], orig_time=raw.info['meas_date']))
    raw.save(fif := tmp_path/'night_raw.fif', verbose='error')
    assert f'hypnogram: {fif}, 3 epochs (W 1, N2 2)' in call('info', fif).stdout
    done = stage(shelf, fif, '--out', tmp_path)
    assert f'agreement with {fif}' in done.stdout and 'over 3 epochs' in done.stdout and not done.stderr
    shutil.copy(shelf/'night.edf', edf := tmp_path/'cut.edf')
    (tmp_path/'cut.csv').write_text('onset,duration,stage\n0,25200,N2\n')
    assert 'does not belong to this recording' in call('info', edf).stdout
    done = stage(shelf, edf, '--out', tmp_path)
    assert done.returncode == 0 and 'does not belong to this recording' in done.stderr and 'agreement with' not in done.stdout
    with pytest.raises(HypnogramError, match='does not belong'): Stager.load(shelf/'toy.safetensors').stage(edf).agreement(tmp_path/'cut.csv')
    raw = mne.io.read_raw_edf(edf, verbose='error')                          # a Raw may be a part of a recording
    assert Stager.load(shelf/'toy.safetensors').stage(raw).agreement(tmp_path/'cut.csv')['epochs'] == 3

@pytest.mark.parametrize('kind,name', [('tsv', 'night_stages.tsv'), ('bids', 'night_desc-stages_events.tsv'), ('edf', 'night_stages.edf')])
def test_stage_in_other_formats(shelf, tmp_path, kind, name):
    for _ in range(2):
        done = stage(shelf, '@night.edf', '--format', kind, '--out', tmp_path)
        assert done.returncode == 0 and {*done.stdout.splitlines()[-1].removeprefix('  written: ').split(', ')} == {str(p) for p in tmp_path.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {name, name.replace('.tsv', '.json') if kind == 'bids' else name}

@pytest.mark.parametrize('theirs', ['night_desc-stages_events.tsv', 'night_desc-stages_events.json'])
def test_bids_events_of_somebody_else_are_kept(shelf, tmp_path, monkeypatch, theirs):
    (tmp_path/theirs).write_text('onset\tduration\ttrial_type\n0\t30\tW\n')
    monkeypatch.setattr(Stager, 'stage', lambda *args, **how: pytest.fail('it was staged'))
    done = stage(shelf, '@night.edf', '--format', 'bids', '--out', tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and [p.name for p in tmp_path.iterdir()] == [theirs]
    assert f'{theirs}: this is there already, and was not written by sleepnb. Name another folder' in done.stderr

@pytest.mark.parametrize('kind,name', [('csv', 'night_stages.csv'), ('tsv', 'night_stages.tsv'), ('bids', 'night_desc-stages_events.tsv'),
                                       ('edf', 'night_stages.edf')])
def test_other_stages_are_replaced_by_force_only(shelf, tmp_path, kind, name):
    "Of another recording of the same name, or corrected by hand."
    write_edf(tmp_path/'b'/'night.edf', seconds=185, white=False)
    command = '@night.edf', '--format', kind, '--out', tmp_path
    for _ in range(2): assert stage(shelf, *command, '--report').returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob('night*')}
    assert len(before) == 2 + (kind == 'bids')
    other = tmp_path/'b'/'night.edf', *command[1:]
    done = stage(shelf, *other)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert f'{name}: this is there already, and is not the same' in done.stderr and '--out DIR, or replace it: --force.' in done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.glob('night*')} == before
    assert stage(shelf, *other, '--force').returncode == 0 and (tmp_path/name).read_bytes() != before[name]
    if kind == 'edf': return
    corrected = (tmp_path/name).read_text()[:-2] + '!\n'
    (tmp_path/name).write_text(corrected)
    assert stage(shelf, *other).returncode == 2 and (tmp_path/name).read_text() == corrected
    done = stage(shelf, *other, '--report', '--force')
    assert done.returncode == 0 and (tmp_path/name).read_text() != corrected

def test_another_report_is_kept_too(shelf, tmp_path):
    assert stage(shelf, '@night.edf', '--out', tmp_path, '--report').returncode == 0
    changed = (tmp_path/'night_report.html').read_text().replace('</body>', '<p>A remark.</p></body>')
    (tmp_path/'night_report.html').write_text(changed)
    done = stage(shelf, '@night.edf', '--out', tmp_path, '--report')
    assert done.returncode == 1 and 'but the report failed' in done.stderr and '--force' in done.stderr
    assert (tmp_path/'night_report.html').read_text() == changed

def test_nothing_that_can_be_staged_is_a_failure(shelf, tmp_path):
    done = stage(shelf, '@noise.edf', '--out', tmp_path, '--report')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'noise.edf: no epoch could be staged' in done.stderr
    assert 'TST –, SE –, SOL –, WASO –, Lat_REM –' in done.stdout
    assert '<td>TST</td><td>– min</td>' in (tmp_path/'noise_report.html').read_text()
    statistics = json.loads(stage(shelf, '@noise.edf', '--out', tmp_path, '--json').stdout)['statistics']
    assert {k for k,v in statistics.items() if v is not None} == {'TIB', 'UNS'}

def test_json_holds_what_the_text_says(shelf, tmp_path):
    write_edf(tmp_path/'late.edf', ['EEG C3-A2', 'EMG Chin'], white=False)
    (tmp_path/'late.csv').write_text('onset,duration,stage\n5,30,W\n35,30,N2\n')
    found = json.loads(stage(shelf, tmp_path/'late.edf', '--out', tmp_path, '--json', '--report').stdout)
    assert (found['hypnogram'], found['onset'], found['weights']) == (str(tmp_path/'late.csv'), 5, 'toy.safetensors')
    assert found['written'] == [str(tmp_path/f'late_{o}') for o in ('stages.csv', 'report.html')]
    text = stage(shelf, tmp_path/'late.edf', '--out', tmp_path).stdout
    assert found['notes'] and sorted(line[8:] for line in text.splitlines() if line.startswith('  note: ')) == sorted(found['notes'])
    (tmp_path/'late.csv').unlink()
    found = json.loads(stage(shelf, tmp_path/'late.edf', '--out', tmp_path/'new', '--json').stdout)
    assert found['hypnogram'] is None and found['onset'] == 0

def test_statistics_of_a_day_are_not_those_of_a_night(shelf, tmp_path):
    for name,hours in (('night', 12), ('day', 13)):
        write_edf(tmp_path/f'{name}.edf', ['EEG C3-A2'], hours*3600, white=False)
        done = stage(shelf, tmp_path/f'{name}.edf', '--out', tmp_path, '--report')
        said = [i for i,line in enumerate(done.stdout.splitlines()) if line.startswith(f'  note: the statistics are of all {hours}.0 h')]
        there = 'The statistics are of all 13.0 h, not of a night' in (tmp_path/f'{name}_report.html').read_text()
        assert done.returncode == 0 and (len(said), there) == ((1, True) if hours == 13 else (0, False))
    assert done.stdout.splitlines()[said[0] - 1].startswith('  TST ')

def test_a_part_of_the_day(shelf, tmp_path):
    "From 23:59:00 on: a part by the clock, the same in hours, and what is none."
    write_edf(tmp_path/'day.edf', ['EEG C3-A2', 'EMG Chin'], 1200, white=False)
    write_edf(tmp_path/'timeless.edf', ['EEG C3-A2', 'EMG Chin'], 1200, white=False)
    with (tmp_path/'day.edf').open('r+b') as f:
        f.seek(168)
        f.write(b'01.02.2023.59.00')
    for args,first,n in ((('--start', '0:03', '--stop', '00:10:30'), 240, 15), (('--start', '.1'), 360, 28), (('--stop', '0:09'), 0, 20)):
        for kind,name in (('csv', 'day_stages.csv'), ('bids', 'day_desc-stages_events.tsv'), ('edf', 'day_stages.edf')):
            done = stage(shelf, tmp_path/'day.edf', *args, '--out', tmp_path/'new', '--force', '--format', kind, '--report', '--json')
            assert done.returncode == 0, done.stderr
            h,found = read_hypnogram(tmp_path/'new'/name), json.loads(done.stdout)
            assert (h.onset[0], h.onset[-1] + h.duration[-1]) == (first, first + 30*n) and len(found['stages']) == n
            assert found['onset'] == first and found['notes'][-1].startswith('the statistics are of a part of the recording')
        assert 'a part of the recording' in (tmp_path/'new'/'day_report.html').read_text()
    for file,args,why in (('day', ('--start', '0:10', '--stop', '0:03'), 'this is no part'), ('day', ('--stop', '9'), 'found --stop 9)'),
                          ('day', ('--start', '23:58'), '(23:59:00 to 00:19:00), that ends after it begins; found --start 23:58:00)'),
                          ('day', ('--start', 'dusk'), 'this is no time'), ('timeless', ('--start', '0:10'), 'does not say when it starts')):
        done = stage(shelf, tmp_path/f'{file}.edf', *args, '--out', tmp_path/'none')
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and why in done.stderr and not (tmp_path/'none').exists()

def test_macro_f1_says_which_stages_are_in_neither_hypnogram(shelf, tmp_path, monkeypatch):
    "Two stages, all of them right: κ is 1, and the mean of five F1 is 2/5."
    whole = Stager.stage
    def right(self, file, **how):
        found = whole(self, file, **how)
        return replace(found, stages=found.reference, prob=np.eye(5)[found.reference])
    monkeypatch.setattr(Stager, 'stage', right)
    done = stage(shelf, '@night.edf', '--hypnogram', '@scored.csv', '--out', tmp_path, '--report')
    said = 'acro-F1 is over five stages; without N1 and N3 and R, in neither hypnogram and counted as 0, it is 1.000'
    assert 'κ 1.000, macro-F1 0.400, accuracy 1.000, over 3 epochs\n' in done.stdout and said in done.stdout
    assert said in (tmp_path/'night_report.html').read_text()
    (tmp_path/'all.csv').write_text('onset,duration,stage\n0,30,W\n30,30,N2\n60,30,N3\n')
    assert 'without N1 and R, in neither' in stage(shelf, '@night.edf', '--hypnogram', tmp_path/'all.csv', '--out', tmp_path, '--force').stdout

def test_stages_are_told_when_their_report_fails(shelf, tmp_path, monkeypatch):
    def full(path, content, replace): raise SleepnbError('the file cannot be written', where=path, found='No space left on device')
    monkeypatch.setattr('sleepnb.report.write_file', full)
    done = stage(shelf, '@night.edf', '--out', tmp_path, '--report')
    assert done.returncode == 1 and f'written: {tmp_path/"night_stages.csv"}\n' in done.stdout and (tmp_path/'night_stages.csv').is_file()
    assert len(done.stderr.splitlines()) == 1 and f'the stages are in {tmp_path/"night_stages.csv"}, but the report failed: ' in done.stderr
    assert 'night_report.html: the file cannot be written' in done.stderr

def test_one_is_no_plural(shelf, tmp_path):
    write_edf(tmp_path/'one.edf', seconds=30)
    (tmp_path/'one.csv').write_text('onset,duration,stage\n0,30,W\n')
    for args in (('info', tmp_path/'one.edf'), ('stage', tmp_path/'one.edf', '--out', tmp_path, '--report', '--weights', shelf/'toy.safetensors')):
        assert '1 epoch' in (said := call(*args).stdout) and '1 epochs' not in said
    assert '1 epochs' not in (tmp_path/'one_report.html').read_text()

def test_of_many_channels_the_first_are_named(shelf, tmp_path):
    "A cap, a network of one, and weights of two montages."
    cap = 'Fp1 Fpz Fp2 AF3 F7 F5 F3 F1 Fz F2 F4 F6 F8 FC3 FCz FC4 C3 C1 Cz C2 C4 CP3 CPz CP4 P3 Pz P4 PO3 O1 Oz O2'.split()
    x = np.random.default_rng(0).normal(0, 20, 9500).clip(-99, 99)
    Edf([EdfSignal(x, 100, label=n, physical_dimension='uV', physical_range=(-100, 100)) for n in cap]).write(tmp_path/'cap.edf')
    save_weights(tmp_path/'cap.safetensors', StageNetwork(Backbone({'cap': cap, 'a': ['C3-M2']})))
    few = 'Fp1, Fpz, Fp2, AF3, F7, F5, F3, F1, Fz, F2, F4, F6 and 19 more'
    for args,why in ((('@night.edf', '--weights', tmp_path/'cap.safetensors', '--modalities', 'EEG', '--channels', 'C3'), f'(expected {few} or C3-M2'),
                     ((tmp_path/'cap.edf', '--modalities', 'EMG'), f'that can be used (found {few})'),
                     ((tmp_path/'cap.edf', '--alias', 'X=C3'), f'(expected {few}; found X)')):
        args = args if '--weights' in args else (*args, '--weights', shelf/'toy.safetensors')
        done = call('stage', *(str(a).replace('@', f'{shelf}/') for a in args), '--out', tmp_path/'new')
        assert done.returncode == 2 and why in done.stderr, done.stderr
    done = call('stage', shelf/'eyes.edf', '--weights', tmp_path/'cap.safetensors', '--out', tmp_path/'new')
    assert f'(expected {few} or C3-M2; found EOG Left, EOG Right)' in done.stderr
    done = call('stage', tmp_path/'cap.edf', '--weights', shelf/'fixed.safetensors', '--out', tmp_path/'new')
    assert f'(expected C3-M2; found {few})' in done.stderr
    done = call('export', tmp_path/'cap.safetensors', '--onnx', tmp_path/'x.onnx')
    assert f'(found cap: {few}; a: C3-M2). Name channels that it is for, with --channels.' in done.stderr
    done = call('export', tmp_path/'cap.safetensors', '--onnx', tmp_path/'x.onnx', '--channels', 'O1')
    assert f'(expected {few} or C3-M2; found O1). Name others, with --channels.' in done.stderr and '--alias' not in done.stderr

def test_stage_with_names_and_choices_of_ones_own(shelf, tmp_path):
    done = stage(shelf, '@lab.edf', '--alias', 'one=C3-M2', '--alias', 'two=E1-M2', '--out', tmp_path, '--report', '--smooth', '--json')
    assert json.loads(done.stdout)['channels_used'] == ['C3-M2', 'E1-M2'] and 'smoothed' in (tmp_path/'lab_report.html').read_text()
    for choice in (('--channels', 'C3-M2'), ('--modalities', 'eeg')):
        done = stage(shelf, '@night.edf', *choice, '--out', tmp_path/choice[1], '--json')
        assert json.loads(done.stdout)['channels_used'] == ['C3-M2']

def test_a_bad_recording_does_not_stop_the_others(shelf, tmp_path, monkeypatch):
    done = stage(shelf, '@night.edf', '@cut.edf', '@none.edf', '@eyes.edf', '--out', tmp_path, '--report')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2 and done.stdout.count('written: ') == 2
    assert {p.name.split('_')[0] for p in tmp_path.iterdir()} == {'night', 'eyes'}
    done = stage(shelf, '@cut.edf', '@none.edf', '--out', tmp_path/'new')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and not (tmp_path/'new').exists()
    whole = Stager.stage
    def fail(self, file, **how): return 1/0 if file.stem == 'other' else whole(self, file, **how)
    monkeypatch.setattr(Stager, 'stage', fail)                           # what nobody foresaw
    done = stage(shelf, '@other.edf', '@eyes.edf', '--out', tmp_path/'new')
    assert done.returncode == 1 and done.stderr == f'sleepnb: {shelf}/other.edf: ZeroDivisionError: division by zero. SLEEPNB_DEBUG=1 shows where.\n'
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['eyes_stages.csv']

def test_a_terminal_is_told_which_recording_is_staged(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, 'isatty', lambda self: True)
    done = stage(shelf, '@night.edf', '@eyes.edf', '--out', tmp_path)
    assert done.stderr.splitlines() == [f'sleepnb: {i} of 2, {shelf}/{n}.edf' for i,n in ((1, 'night'), (2, 'eyes'))]

@pytest.mark.parametrize('when', ['staging', 'writing', 'reporting'])
def test_ctrl_c_leaves_whole_files_only(shelf, tmp_path, monkeypatch, when):
    (tmp_path/'eyes_stages.csv').write_text(before := 'stage,p_W of an earlier run')
    def press(*args, **how):
        if when != 'staging' or args[1].stem == 'eyes': signal.raise_signal(signal.SIGINT)
        return whole(*args, **how)
    place = dict(staging=(Stager, 'stage'), writing=(os, 'fsync'), reporting=(os, 'replace'))[when]
    whole,calls = getattr(*place), []
    def second(*args): # of the second recording
        calls.append(args)
        return press() if len(calls) == {'writing': 3, 'reporting': 4}[when] else whole(*args)
    monkeypatch.setattr(*place, press if when == 'staging' else second)
    done = stage(shelf, '@night.edf', '@eyes.edf', '--out', tmp_path, '--report', '--force')
    assert done.returncode == 130 and done.stderr.startswith('sleepnb: interrupted.') and len(done.stderr.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {'night_stages.csv', 'night_report.html', 'eyes_stages.csv'}
    assert ((tmp_path/'eyes_stages.csv').read_text() == before) == (when != 'reporting')

def test_stage_loads_neither_fastai_nor_mne_nor_a_plotting_library(shelf, tmp_path):
    code = f'''import sys
sys.argv = {["sleepnb", "stage", str(shelf/"night.edf"), "--weights", str(shelf/"toy.safetensors"), "--out", str(tmp_path)]}
from sleepnb.cli import main
try: main()
finally: print([m for m in ("fastai", "mne", "matplotlib", "sklearn") if m in sys.modules])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stderr

NEW = ['--out', '@new']
STAGE_WRONG = { # why → what follows `sleepnb stage`; --weights are added
    "Missing argument 'FILE...'. See sleepnb stage --help.": [],
    'No such option: --loud': ['@night.edf', '--loud'],
    'none.edf: there is no such file': ['@none.edf', *NEW],
    'this is a folder, not a file': ['@', *NEW],
    'text.edf: the file cannot be read': ['@text.edf', *NEW],
    'If this is the hypnogram, name its recording': ['@numbers.txt', *NEW],
    'empty.edf: ': ['@empty.edf', *NEW],
    'cut.edf: the file is shorter than its header says': ['@cut.edf', *NEW],
    'this file holds no signals': [str(sample_files()[1]), *NEW],
    'short.edf: the recording is shorter than one epoch': ['@short.edf', *NEW],
    'say what they are with --alias.': ['@breath.edf', *NEW],
    'expected some of EEG, EOG, EMG; found EEG, SMELL': ['@night.edf', '--modalities', 'EEG,SMELL', *NEW],
    'there is no channel of EMG that can be used': ['@eyes.edf', '--modalities', 'EOG,EMG', *NEW],
    'channels that were asked for are not there': ['@night.edf', '--channels', 'C3,O1', *NEW],
    'say what they are: --alias "its name=C3-M2".': ['@night.edf', '--channels', 'O1', *NEW],
    'the channels of this network cannot be chosen': ['@night.edf', '--channels', 'C3', *NEW, '--weights', '@fixed.safetensors'],
    'the recording lacks channels that the network was trained on': ['@eyes.edf', *NEW, '--weights', '@fixed.safetensors'],
    'this unit is not known': ['@night.edf', '--unit', 'kV', *NEW],
    'Leave --unit "V" out, or give another of uV, mV and V.': ['@night.edf', '--unit', 'V', *NEW],
    'lab.edf: there is no channel of this name (expected one, two; found Ch 9)': ['@lab.edf', '--alias', 'one=C3-M2', '--alias', 'Ch 9=C4-M1', *NEW],
    'an alias has two sides': ['@lab.edf', '--alias', 'one', *NEW],
    "'xml' is not one of": ['@night.edf', '--format', 'xml', *NEW],
    'is a file). Name another folder: --out DIR.': ['@night.edf', '--out', '@text.edf'],
    'text.edf is a file': ['@night.edf', '--out', '@text.edf/below'],
    'is not yours to write to': ['@night.edf', '--out', '@locked/below'],
    'none.safetensors: there is no such file': ['@night.edf', *NEW, '--weights', '@none.safetensors'],
    'text.safetensors: the file is damaged, or no weights file': ['@night.edf', *NEW, '--weights', '@text.safetensors'],
    'cut.safetensors: the file is damaged': ['@night.edf', *NEW, '--weights', '@cut.safetensors'],
    'this is another kind of file': ['@night.edf', *NEW, '--weights', '@checkpoint.safetensors'],
    'this network does not stage': ['@night.edf', *NEW, '--weights', '@encoder.safetensors'],
    'none.csv: there is no such file': ['@night.edf', '--hypnogram', '@none.csv', *NEW],
    'the hypnogram does not belong to this recording': ['@night.edf', '--hypnogram', '@late.csv', *NEW],
    "found 'dream'": ['@night.edf', '--hypnogram', '@words.csv', *NEW],
    'whose numbers they are: --vocabulary sleepnb or yasa': ['@night.edf', '--hypnogram', '@numbers.txt', *NEW],
    'for example --column "scorer_1".': ['@night.edf', '--hypnogram', '@scorers.csv', *NEW],
    'this vocabulary is not known': ['@night.edf', '--hypnogram', '@numbers.txt', '--vocabulary', 'mine', *NEW],
    'one hypnogram belongs to one recording': ['@night.edf', '@other.edf', '--hypnogram', '@scored.csv', *NEW],
    'taken/night_report.html: this is there already': ['@night.edf', '--out', '@taken', '--report', '--format', 'edf'],
    'two recordings would be written to the same file': ['@night.edf', '@deep/night.edf', *NEW],
    'night.edf and': ['@night.edf', '@night.edf', *NEW],
    'this is there already, and was not written by sleepnb': ['@night.edf', '--out', '@taken']}

@pytest.mark.parametrize('why', STAGE_WRONG)
def test_wrong_uses_of_stage_are_told_in_one_line_and_leave_nothing(why, shelf, monkeypatch):
    access = os.access
    if 'not yours' in why: monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK and access(path, mode)) # root may write anywhere
    before = {p: p.stat().st_mtime_ns for p in shelf.rglob('*')}
    args = STAGE_WRONG[why]
    done = call('stage', *([] if '--weights' in args else ['--weights', shelf/'toy.safetensors']), *(a.replace('@', f'{shelf}/') for a in args))
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert {p: p.stat().st_mtime_ns for p in shelf.rglob('*')} == before

def test_modalities_of_a_training_are_named_in_any_case(monkeypatch):
    asked = []
    monkeypatch.setattr('sleepnb.data.loaders.labelled_loaders', lambda *args, modalities, **how: asked.append(modalities))
    monkeypatch.setattr('sleepnb.learner.sleepsmc_learner', lambda dls, primary, *args, **how: asked.append(primary))
    monkeypatch.setattr(cli, '_train', lambda *args, **how: None)
    for primary in ('eog', 'ALL'):
        done = call('train', 'sleepsmc', 'store', '--out', 'x.safetensors', '--primary', primary, '--modalities', 'eog,Emg')
        assert done.returncode == 0, done.stderr
    assert asked == [('EOG', 'EMG'), 'EOG', ('EOG', 'EMG'), None]

def test_stage_takes_the_weights_that_come_along(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr('sleepnb.stager.OWN_WEIGHTS', tmp_path/'own.safetensors')
    done = call('stage', shelf/'night.edf', '--out', tmp_path/'new')
    assert done.returncode == 2 and 'own.safetensors: there is no such file' in done.stderr and not [*tmp_path.iterdir()]
    shutil.copy(shelf/'toy.safetensors', tmp_path/'own.safetensors')
    done = call('stage', shelf/'night.edf', '--out', tmp_path/'new')
    assert done.returncode == 0 and 'staged by the weights that come with sleepnb (learned from simulated nights only)' in done.stdout
# export

def test_an_exported_network_gives_the_probabilities_that_are_evaluated(isruc, tuned, tmp_path):
    done = call('export', tuned, '--onnx', path := tmp_path/'new'/'tuned.onnx')
    assert (done.returncode, done.stdout, done.stderr) == (0, f'{path}: the network is there, as ONNX\n', '')
    session,store = onnxruntime.InferenceSession(path), EpochStore(isruc)
    names = json.loads(session.get_modelmeta().custom_metadata_map['channels'])
    pick = [store.channels.index(n) for n in names]
    epochs = predict_stages(load_learner(tuned, labelled_loaders(isruc, saved_split(tuned))))
    night = store.night_of[epochs.index[0]]
    there = np.tile(store.there[night][pick], (len(epochs), 1))
    inputs = dict(x=store.read(epochs.index)[:, pick], there=there, median=store.median[night][pick].astype(np.float32),
                  scale=store.scale[night][pick].astype(np.float32))
    assert len(names) == 6 and epochs[['subject', 'night']].drop_duplicates().shape[0] == 1
    np.testing.assert_allclose(session.run(None, inputs)[0], epochs.filter(like='p_'), rtol=0, atol=1e-5)

def test_export_takes_the_weights_that_come_along(tmp_path):
    done = call('export', '--onnx', tmp_path/'own.onnx')
    assert done.returncode == 2 and 'with --channels.' in done.stderr and 'there is no such file' not in done.stderr
    done = call('export', '--onnx', tmp_path/'own.onnx', '--channels', 'C3-M2')
    held = onnxruntime.InferenceSession(tmp_path/'own.onnx').get_modelmeta().custom_metadata_map
    assert done.returncode == 0 and held['weights'].startswith('the weights that come with sleepnb') and json.loads(held['channels']) == ['C3-M2']

def test_export_without_its_packages(tuned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    done = call('export', tuned, '--onnx', tmp_path/'x.onnx')
    assert done.returncode == 2 and done.stderr.endswith("pip install 'sleepnb[onnx]'\n") and len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]

# Wrong uses

@pytest.fixture(scope='module')
def wrong(work, tuned, pretrained, allthree, quick):
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
    done = call('prepare', 'sleep-edf', work/'sleep-edf', '--store', work/'eeg', '--recipe', 'mtssrl', '--channels', 'Fpz-Cz,Pz-Oz')
    assert done.returncode == 0, done.stderr
    s = saved_split(pretrained)
    Split(train=s.test, valid=s.valid, test=s.train).save(work/'other.json')
    return work

OUT,FROM = ['--out', '@new/x.safetensors'], ['--weights', '@made/pretrained.safetensors']
ISRUC,SLEEP = '@store-isruc-s3', '@store-sleep-edf'
ONNX = ['--onnx', '@new/x.onnx']
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
    'takes no such option (found --alias)': ['prepare', *FILES, '@new', '--alias', 'X9=Chin'],
    'jobs is a number of processes': ['prepare', *FILES, '@new', '--jobs', '0'],
    'several files could be the hypnogram': ['prepare', 'folder', *FILES[1:], '@new'],
    'or -1 for one per core; found -5': ['simulate', 'isruc-s3', '@new', '--jobs', '-5'],
    'or -1 for one per core; found -2': ['prepare', *FILES, '@new', '--jobs', '-2'],
    'or -1 for one per core; found 0': ['run', 'mtssrl-table4', '--out', '@new', '--jobs', '0'],
    'Name the one that sleepnb run was given': ['runs', '--out', '@none'],
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
    '/proc is write-protected': ['pretrain', ISRUC, '--out', '/proc/x.safetensors'],
    'found a damaged file, or one of another kind': ['pretrain', ISRUC, *OUT, '--split', '@text.edf'],
    'this is not a split': ['pretrain', ISRUC, *OUT, '--split', '@text.json'],
    'subjects that the split does not know': ['pretrain', SLEEP, *OUT, '--split', '@other.json'],
    'none.safetensors: there is no such file': ['finetune', ISRUC, '--weights', '@none.safetensors', *OUT],
    'text.safetensors: the file is damaged': ['finetune', ISRUC, '--weights', '@text.safetensors', *OUT],
    'cut.safetensors: the file is damaged': ['finetune', ISRUC, '--weights', '@cut.safetensors', *OUT],
    '--heads-of isruc-s3-simulated': ['finetune', SLEEP, *FROM, *OUT],
    'found mass': ['finetune', SLEEP, *FROM, *OUT, '--heads-of', 'mass'],
    '--labels is a share of the labels (expected more than 0, at most 1; found 5.0). 5 % is 0.05.': ['finetune', ISRUC, *FROM, *OUT, '--labels', '5'],
    'the model has already seen 3 of 3 test subjects': ['finetune', ISRUC, *FROM, *OUT, '--split', '@other.json'],
    'there are other weights already': ['finetune', ISRUC, *FROM, '--out', FROM[1]],
    "No such command 'dreams'": ['train', 'dreams', ISRUC, *OUT],
    'the weights do not stage (expected those of a network': ['evaluate', ISRUC, *FROM],
    'Chin (isruc-s3-simulated); found Fpz-Cz, Pz-Oz, HEOG, Chin (sleep-edf-simulated)). Prepare': ['evaluate', SLEEP, '--weights', '@made/tuned.safetensors'],
    'already seen': ['evaluate', ISRUC, '--weights', '@made/tuned.safetensors', '--split', '@other.json'],
    'each of which is named once (expected EEG, EOG, EMG; found ECG)': ['train', 'sleepsmc', ISRUC, *OUT, '--primary', 'ECG'],
    'channel mode is unknown': ['train', 'sleepsmc', ISRUC, *OUT, '--channel-mode', 'soup'],
    'no store has such a modality (expected EEG; found EMG, EOG)': ['train', 'sleepsmc', '@eeg', *OUT],
    'prepared with different recipes (found isruc': ['train', 'sleepsmc', ISRUC, '@renamed', *OUT],
    'cohorts have different numbers of channels': ['train', 'featurenet', ISRUC, SLEEP, *OUT, '--modalities', 'EEG'],
    'nothing is hidden from a network that stages with one modality': ['train', 'sleepsmc', ISRUC, *OUT, '--hide', '.3'],
    "Invalid value for '--hide'": ['train', 'sleepsmc', ISRUC, *OUT, '--primary', 'all', '--hide', '1'],
    "Missing argument 'STORE...'": ['train', 'featurenet', *OUT],
    'another training: other passes': ['train', 'featurenet', SLEEP, '--modalities', 'EEG', '--out', '@made/quick.safetensors', '--passes', '3'],
    'another training: other learning rate': ['train', 'featurenet', SLEEP, '--modalities', 'EEG', '--out', '@made/quick.safetensors', '--passes', '1', '--lr', '.5'],
    'no backbone to fine-tune': ['finetune', ISRUC, '--weights', '@made/all.safetensors', *OUT],
    'filtered differently from those that the weights know': ['evaluate', '@renamed', '--weights', '@made/quick.safetensors'],
    'no modalities to choose from': ['evaluate', ISRUC, '--weights', '@made/tuned.safetensors', '--subsets'],
    "Missing option '--onnx'": ['export', '@made/tuned.safetensors'],
    'a file such as stager.onnx': ['export', '@made/tuned.safetensors', '--onnx', '@x.safetensors'],
    'weights.safetensors: there is no such file': ['export', '@weights.safetensors', *ONNX],
    'this network does not stage': ['export', '@made/pretrained.safetensors', *ONNX],
    'these lack channels that the network was trained on': ['export', '@made/tuned.safetensors', *ONNX, '--channels', 'Fpz-Cz'],
    'does not stage with these modalities': ['export', '@made/tuned.safetensors', *ONNX, '--modalities', 'EOG'],
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
