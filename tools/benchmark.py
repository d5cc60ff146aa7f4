"""Measures sleepnb beside other ways to do the same, and writes nbs/artifacts/benchmark_*.csv.

    python tools/benchmark.py [data|training|staging|models] [--repeats 5]

Each measurement is a process of its own, with one thread, warmed up; the ways alternate. What is written for `data`: CPU
seconds of the work alone, and the peak memory of the process, imports included. For `training`, both ways run in the
same process, by turns first, and CPU seconds of a step are written. For `staging`, all that a command costs, from its
start to its end, and where its seconds go; the recording is that in the folder that SLEEPNB_DATA names. For `models`,
what an epoch costs in a network that is held in memory, in evaluation."""
import argparse, csv, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT/'nbs'/'artifacts'
MACHINE = f'{platform.machine()}, {os.cpu_count()} cores'
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

PREAMBLE = '''
import json, resource, sys, time, warnings
import numpy as np
warnings.simplefilter('ignore')
CHANNELS = ['F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1', 'E1-M2']
'''
WAYS = { # name → code that defines `work(file)`
    'sleepnb': '''
from sleepnb.data.psg import read_night
from sleepnb.data.store import RECIPES, preprocess_night
def work(file): return preprocess_night(read_night(file, wanted=CHANNELS), CHANNELS, RECIPES['stager'])[0]
''',
    'mne: read, resample, filter, epochs': '''
import mne
mne.set_log_level('error')
def work(file):
    raw = mne.io.read_raw_edf(file, preload=True)
    raw.pick(CHANNELS).resample(100).filter(.3, 40)
    return mne.make_fixed_length_epochs(raw, 30, preload=True).get_data()
'''}
MEASURE = '''
short,file = sys.argv[1:]
work(short)
start = time.process_time()
shape = work(file).shape
print(json.dumps(dict(cpu_s=time.process_time() - start, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, shape=shape)))
'''

BATCHES = { # name → code that defines `take(rows)`, a batch of 100 epochs
    'float32 tensor, indexed': '''
tensor = torch.from_numpy(stores.stores[0].read(np.arange(len(stores))))
def take(rows): return tensor[rows]
''',
    'sleepnb, in memory': '''
held = Stores(sys.argv[1], in_memory=True)
def take(rows): return held.signals(0, rows)
''',
    'sleepnb, from disk': '''
def take(rows): return stores.signals(0, rows)
'''}
MEASURE_BATCHES = '''
import torch
from sleepnb.data.loaders import Stores
stores = Stores(sys.argv[1])
rng = np.random.default_rng(0)
exec(sys.argv[2])
for _ in range(20): take(rng.integers(0, len(stores), 100))
start = time.process_time()
for _ in range(100): shape = take(rng.integers(0, len(stores), 100)).shape
print(json.dumps(dict(cpu_s=(time.process_time() - start) / 100, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, shape=list(shape))))
'''

MONTAGES = dict(
    two=('Fpz-Cz', 'Pz-Oz'), six=('F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1'),
    eleven=('Fp1-M2', 'Fp2-M1', 'F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'P3-M2', 'P4-M1', 'O1-M2', 'O2-M1', 'Cz-M1'))
TRAININGS = { # name → code that defines `dls`, `make_learner()` and `loss(pred, y)`
    'pretraining: mtssrl_learner': '''
from sleepnb.data.loaders import pretraining_loaders
from sleepnb.learner import mtssrl_learner
dls = pretraining_loaders(stores, bs=100)
def make_learner(): return mtssrl_learner(dls)
def loss(pred, y): return pred['loss']
''',
    'training with labels: supervised_learner': '''
from sleepnb.data.loaders import labelled_loaders
from sleepnb.learner import supervised_learner
dls = labelled_loaders(stores, bs=100)
def make_learner(): return supervised_learner(dls)
loss = torch.nn.functional.cross_entropy
'''}
MEASURE_TRAINING = '''
import torch
from sleepnb.data.loaders import Stores
first,*paths = sys.argv[2:]
stores,passes = Stores(paths, in_memory=True), 1
exec(sys.argv[1])
def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(passes)
def loop(learn):
    network,opt = learn.model, torch.optim.AdamW(learn.model.parameters(), lr=1e-3)
    for n in range(passes):
        dls.train.set_pass(n)
        network.train()
        for inputs,y in dls.train:
            loss(network(inputs), y).backward()
            opt.step()
            opt.zero_grad()
        network.eval()
        with torch.no_grad():
            for inputs,y in dls.valid: loss(network(inputs), y)
ways = {'plain PyTorch loop': loop, 'Learner': fit}
loop(make_learner())
cpu_s,passes = {}, 2
for way in sorted(ways, reverse=first == 'Learner last'):
    learn = make_learner()
    start = time.process_time()
    ways[way](learn)
    cpu_s[way] = (time.process_time() - start) / (passes*len(dls.train))
print(json.dumps(cpu_s))
'''

def write_store(path, nights, names=None, cohort='noise'):
    "Short nights of noise, 60 epochs each; in seven channels if none are named."
    import numpy as np, pandas as pd
    from sleepnb.data.psg import Night
    from sleepnb.data.store import Cohort, prepare
    from sleepnb.montage import AASM, parse_channel
    names = names or AASM[:7]
    def read(row):
        x = np.random.default_rng(int(row['subject'])).normal(size=(len(names), 60*3000)).astype(np.float32) * 30
        return Night(list(x), [100]*len(names), [parse_channel(n) for n in names], np.arange(60, dtype=np.int8) % 5)
    prepare(Cohort(cohort, pd.DataFrame(dict(subject=range(nights), night=1)), names, read), path, progress=False)
    return str(path)

def write_recording(path, hours, mixed):
    "Seven channels at 200 Hz; a mixed file has others at 1, 25 and 500 Hz too."
    import numpy as np
    from edfio import Edf, EdfSignal
    rng = np.random.default_rng(0)
    def signal(name, fs): return EdfSignal(np.clip(rng.normal(size=int(fs*3600*hours)) * 30, -3000, 3000), fs, label=name,
                                           physical_dimension='uV', physical_range=(-3276.8, 3276.7))
    signals = [signal(n, 200) for n in ('F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1', 'E1-M2')]
    if mixed: signals += [signal('SaO2', 1), signal('Flow', 25), signal('ECG', 500)]
    Edf(signals).write(path)
    return str(path)

def measure(code, *args):
    "Runs the code in a process with one thread, and returns what it prints."
    run = subprocess.run([sys.executable, '-c', code, *args], env=ONE_THREAD, check=True, capture_output=True, text=True)
    print(run.stdout.splitlines()[-1], flush=True)
    return dict(machine=MACHINE) | json.loads(run.stdout.splitlines()[-1])

def benchmark_data(folder, repeats):
    rows = []
    for what,mixed in (('one rate: 7 channels at 200 Hz', False), ('mixed rates: the same, and 1, 25, 500 Hz', True)):
        files = write_recording(folder/'short.edf', .1, mixed), write_recording(folder/'night.edf', 8, mixed)
        for i in range(repeats):
            for way,code in WAYS.items():
                rows.append(dict(what=what, way=way, repeat=i) | measure(PREAMBLE + code + MEASURE, *files))
    for nights in (20, 100):
        store = write_store(folder/f'store-{nights}', nights)
        for i in range(repeats):
            for way,code in BATCHES.items():
                rows.append(dict(what=f'a batch: 100 epochs of 7 channels, of {nights} nights', way=way, repeat=i)
                            | measure(PREAMBLE + MEASURE_BATCHES, store, code))
    return rows

def benchmark_training(folder, repeats):
    rows,stores = [], [write_store(folder/k, 5, v, k) for k,v in MONTAGES.items()]
    for i in range(repeats):
        for what,code in TRAININGS.items():
            made = measure(PREAMBLE + MEASURE_TRAINING, code, ('Learner last', 'Learner first')[i % 2], *stores)
            machine = made.pop('machine')
            rows += [dict(what=what, way=way, repeat=i, machine=machine, cpu_s=round(cpu_s, 5)) for way,cpu_s in made.items()]
    return rows

STAGERS = { # name → code that stages the file and writes its stages as numbers, then says how long which part took
    'sleepnb': '''
from sleepnb.stager import Stager
took('import')
stager = Stager.load()
took('open weights')
staging = stager.stage(file, **(dict(channels=[channel], modalities=['EEG']) if channel else {}))
took('stage')
stages = staging.stages
''',
    'YASA': '''
import mne, yasa
took('import')
raw = mne.io.read_raw_edf(file, preload=True, include=[f'EEG {channel}'], verbose='error')
took('read')
stages = yasa.SleepStaging(raw, eeg_name=f'EEG {channel}').predict()
stages = getattr(stages, 'hypno', stages)
stages = [dict(WAKE=0, W=0, N1=1, N2=2, N3=3, REM=4, R=4)[s] for s in stages]
took('stage')
'''}
STAGE = '''
import json, sys, time, warnings
warnings.simplefilter('ignore')
file,channel = sys.argv[1:]
parts,last = {'start Python': time.process_time()}, time.process_time()
def took(part):
    global last
    parts[part],last = time.process_time() - last, time.process_time()
'''
REPORT = "print(json.dumps(dict(parts=parts, stages=''.join(str(int(s)) for s in stages))))"

def measure_whole(code, *args):
    "Runs the code in a process with one thread; CPU seconds and peak memory of all of it, and what it prints."
    with tempfile.TemporaryFile('w+') as out:
        run = subprocess.Popen([sys.executable, '-c', code, *args], env=ONE_THREAD, stdout=out, stderr=subprocess.DEVNULL)
        _,status,used = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode: raise SystemExit(f'exit {run.returncode}: {code}')
        out.seek(0)
        return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, json.loads(out.read().splitlines()[-1])

def benchmark_staging(folder, repeats):
    "The whole day, and the night that was cut out of it."
    import numpy as np
    from sklearn.metrics import cohen_kappa_score
    from sleepnb.data.preprocess import crop_wake
    from sleepnb.data.psg import align, read_hypnogram, sample_files
    files = Path(os.environ['SLEEPNB_DATA'])/'sleep-edf'/'sleep-cassette'
    true = align(read_hypnogram(files/'SC4001EC-Hypnogram.edf'), 2650*30)[0]
    keep = crop_wake(true, 30)
    recordings = {'22 hours': (files/'SC4001E0-PSG.edf', keep), 'the night': (sample_files()[0], slice(None))}
    rows = []
    for i in range(repeats):
        for recording,(file,at) in recordings.items():
            for way,channel in (('YASA', 'Fpz-Cz'), ('sleepnb', 'Fpz-Cz'), ('sleepnb', '')):
                cpu_s,peak_mb,made = measure_whole(STAGE + STAGERS[way] + REPORT, str(file), channel)
                pred = np.array([int(c) for c in made['stages'].replace('-1', '9')])[at]
                rows.append(dict(recording=recording, way=way, channel=channel or 'EEG, EOG, EMG', repeat=i,
                                 machine=MACHINE, cpu_s=round(cpu_s, 2), peak_mb=round(peak_mb),
                                 kappa=round(cohen_kappa_score(true[keep], pred), 4), epochs=len(pred),
                                 parts='; '.join(f'{k} {v:.2f}' for k,v in made['parts'].items())))
                print(rows[-1], flush=True)
    return rows

TWO = "['Fpz-Cz', 'Pz-Oz']"
MODELS = { # name → code that defines `model` and `give(batch)`
    **{f'MTSSRL-MD, {o}': f"""
from sleepnb.models.network import Backbone, StageNetwork
model = StageNetwork(Backbone(dict(S={TWO}), {o!r}))
def give(b): return ((torch.arange(b), dict(S=part(b, 2))),)
""" for o in ('compact', 'full')},
    'FeatureNet, EEG': """
from sleepnb.models.featurenet import FeatureNet
made = FeatureNet(2)
model = torch.nn.Sequential(made, made.classifier())
def give(b): return (torch.randn(b, 2, 3000),)
""",
    'FeatureNet, EEG, EOG and EMG': """
from sleepnb.multimodal.sleepsmc import SleepSMC
class Staged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.smc = SleepSMC(dict(S=['Fpz-Cz', 'Pz-Oz', 'HEOG', 'Chin']), primary=None)
    def forward(self, *batch): return self.smc.stage(batch)
model = Staged()
def give(b): return torch.arange(b), dict(S=dict(EEG=part(b, 2), EOG=part(b, 1), EMG=part(b, 1)))
"""}
MEASURE_MODEL = """
import torch
from sleepnb.models.layers import count_macs, count_parameters
torch.set_num_threads(1)
torch.manual_seed(0)
def part(b, c):
    return dict(x=torch.randn(b, c, 3000), median=torch.zeros(b, c), scale=torch.ones(b, c), there=torch.ones(b, c, dtype=torch.bool),
                at=torch.arange(b))
exec(sys.argv[1])
model.eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
took = {}
with torch.inference_mode():
    for b,n in ((1, 60), (64, 6)):
        batch = give(b)
        for _ in range(3): model(*batch)
        each = []
        for _ in range(n):
            start = time.process_time()
            model(*batch)
            each.append(time.process_time() - start)
        took[b] = float(np.median(each))
        if b == 1: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
macs = count_macs(model, *give(1))
print(json.dumps(dict(parameters=count_parameters(model), macs=macs, ms=took[1]*1000, epochs_per_s=64 / took[64], mb=(peak - before) / 1024)))
"""

def benchmark_models(folder, repeats):
    "What a network in memory takes for one epoch, and how many it stages in a second."
    rows = []
    for i in range(repeats):
        for model,code in MODELS.items():
            made = measure_whole(PREAMBLE + MEASURE_MODEL, code)[2]
            rows.append(dict(model=model, repeat=i, machine=MACHINE, threads=1, **{k: round(v, 3) for k,v in made.items()}))
            print(rows[-1], flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('what', nargs='?', choices=('data', 'training', 'staging', 'models'), default='data')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    benchmark = dict(data=benchmark_data, training=benchmark_training, staging=benchmark_staging, models=benchmark_models)[args.what]
    with tempfile.TemporaryDirectory() as folder: rows = benchmark(Path(folder), args.repeats)
    with (OUT/f'benchmark_{args.what}.csv').open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
