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

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for what,mixed in (('one rate: 7 channels at 200 Hz', False), ('mixed rates: the same, and 1, 25, 500 Hz', True)):
            files = write_recording(folder/'short.edf', .1, mixed), write_recording(folder/'night.edf', 8, mixed)
            for i in range(repeats):
                for way,code in WAYS.items():
                    run = subprocess.run([sys.executable, '-c', PREAMBLE + code + MEASURE, *files], env=environment, check=True, capture_output=True, text=True)
                    rows.append(dict(what=what, way=way, repeat=i, machine=f'{platform.machine()}, {os.cpu_count()} cores') | json.loads(run.stdout.splitlines()[-1]))
                    print(rows[-1], flush=True)
    with OUT.open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
