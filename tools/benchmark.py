"""Measures sleepnb beside other ways to do the same, and writes nbs/artifacts/benchmark_data.csv.

    python tools/benchmark.py [--repeats 5]

Each measurement is a process of its own, with one thread, warmed up on a short recording; the ways alternate. What is
written: CPU seconds of the work alone, and the peak memory of the process, imports included."""
import argparse, csv, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT/'nbs'/'artifacts'/'benchmark_data.csv'

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

def write_store(path, nights):
    "Short nights of noise in seven channels, 60 epochs each."
    import numpy as np, pandas as pd
    from sleepnb.data.psg import Night
    from sleepnb.data.store import Cohort, prepare
    from sleepnb.montage import AASM, parse_channel
    names = AASM[:7]
    def read(row):
        x = np.random.default_rng(int(row['subject'])).normal(size=(7, 60*3000)).astype(np.float32) * 30
        return Night(list(x), [100]*7, [parse_channel(n) for n in names], np.zeros(60, np.int8))
    prepare(Cohort('noise', pd.DataFrame(dict(subject=range(nights), night=1)), names, read), path, progress=False)
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
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    run = subprocess.run([sys.executable, '-c', code, *args], env=environment, check=True, capture_output=True, text=True)
    print(run.stdout.splitlines()[-1], flush=True)
    return dict(machine=f'{platform.machine()}, {os.cpu_count()} cores') | json.loads(run.stdout.splitlines()[-1])

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
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
    with OUT.open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
