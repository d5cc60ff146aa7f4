"""Trains the network that comes with the package on simulated nights, and writes sleepnb/stager.safetensors and nbs/artifacts/stager_*.csv.

    python tools/stager.py --work DIR train [ARM …]     the arms of ARMS; by default all
    python tools/stager.py --work DIR scores            simulated people who were not trained on, and the real night
    python tools/stager.py --work DIR ship ARM          into the package

Everything is kept in DIR: what is there is not computed again, and what was interrupted goes on."""
import argparse, os
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pandas as pd
import torch
from torch.fft import irfft, rfft

from mtssrl import merged
from sleepnb.callbacks import Checkpoint, TrainingCallback, keep_memory
from sleepnb.core import EPOCH_SEC, Modality, Stage
from sleepnb.data.cohorts import sleep_edf
from sleepnb.data.loaders import Stores, labelled_loaders
from sleepnb.data.preprocess import crop_wake
from sleepnb.data.psg import Night, read_night
from sleepnb.data.simulated import simulate
from sleepnb.data.splits import holdout_split
from sleepnb.data.store import Cohort, EpochStore, prepare
from sleepnb.learner import save_learner, saved_split, sleepsmc_learner
from sleepnb.montage import parse_channel
from sleepnb.stager import Stager
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights, save_weights

ROOT = Path(__file__).parent.parent
OUT = ROOT/'nbs'/'artifacts'
SUBJECTS,EPOCHS,BATCH,PASSES,LR = 20, 960, 128, 6, 2e-3     # of a cohort; of a night, eight hours
MODALITIES = ('EEG', 'EOG', 'EMG')
COHORTS = { # channels and population; the first is written as files, with the chin's envelope, and read back
    'sleep-edf': (('Fpz-Cz', 'Pz-Oz', 'HEOG', 'Chin'), 'adult'),
    'mastoids': (('F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1', 'HEOG', 'Chin'), 'disordered'),
    'cap': (('F3', 'F4', 'C3', 'C4', 'O1', 'O2', 'Fpz', 'Fz', 'Cz', 'Pz', 'Oz', 'HEOG', 'Chin'), 'older'),
    'headband': (('AF7-Fpz', 'AF8-Fpz', 'E1-M2'), 'adult')}
NEW = { # never trained on
    'ears': (('T9-T10', 'HEOG', 'Chin'), 'adult'), 'bipolar': (('F4-C4', 'C4-O2', 'HEOG', 'Chin'), 'older'),
    'two eyes': (('C3-M2', 'C4-M1', 'E1-M2', 'E2-M1', 'Chin'), 'disordered')}

def read_synth(row, cohort):
    channels,population = (COHORTS | NEW)[cohort]
    made = synth_night(channels, n_epochs=EPOCHS, subject=f'{cohort}{row["subject"]}', population=population)
    return Night(list(made.x), [100]*len(channels), [parse_channel(c) for c in channels], made.stages)

def store_of(work, cohort, subjects=SUBJECTS):
    if cohort == 'sleep-edf':
        simulate('sleep-edf-20', work/'files', subjects=subjects, nights=1, hours=8)
        made = sleep_edf(work/'files', '20', crop_wake_min=30)
    else:
        nights = pd.DataFrame(dict(subject=[f'{i:02}' for i in range(subjects)], night=1))
        made = Cohort(f'{cohort}-simulated', nights, (COHORTS | NEW)[cohort][0], partial(read_synth, cohort=cohort))
    prepare(made, work/cohort, 'stager')
    return EpochStore(work/cohort)

def loaders(work):
    stores = Stores([store_of(work, c) for c in COHORTS])
    return labelled_loaders(stores, holdout_split(stores.nights), bs=BATCH, modalities=MODALITIES)

NODES = np.log([.3, 1, 3, 8, 15, 30, 50])     # Hz, between which a recorder's response is drawn as a line over log f

class OtherElectrodes(TrainingCallback):
    "Makes channels differ in scale, and hides some of the EEG."
    settings = ('spread', 'lost')
    def __init__(self, spread=.2, lost=.3): self.spread,self.lost = spread, lost
    def before_batch(self):
        if self.training:
            for of in self.xb[0][1].values():
                for modality,part in of.items(): self.change(modality, part)
    def change(self, modality, part):
        part['scale'] = part['scale'] * (self.spread * torch.randn_like(part['scale'])).exp()
        if modality == Modality.EEG:
            kept = part['there'] & (torch.rand(part['there'].shape) >= self.lost)
            part['there'] = torch.where(kept.any(1, keepdim=True), kept, part['there'])

class OtherRecorders(OtherElectrodes):
    "Moreover responses, noise, the shape of muscle envelopes, and what eye electrodes hear of the brain: simulated recorders are all alike."
    settings = ('spread', 'lost', 'decibel', 'noise', 'leak', 'scaled')
    def __init__(self, spread=.3, lost=.3, decibel=3., noise=.3, leak=.3, scaled=False): # scaled: as a recording that is all so
        super().__init__(spread, lost)
        self.decibel,self.noise,self.leak,self.scaled = decibel, noise, leak, scaled
    def before_batch(self):
        if not self.training: return
        for of in self.xb[0][1].values():
            eeg,eog = of[Modality.EEG], of[Modality.EOG]
            if not eog['x'].shape[1]: continue
            n = len(eog['x'])
            share = 2*torch.rand(n, 1) - 1 if self.scaled else self.leak * torch.randn(n, 1)
            eog['x'] = eog['x'] + share[..., None] * eeg['x'][:, :1]
            if self.scaled: eog['scale'] = (eog['scale']**2 + (share * eeg['scale'][:, :1])**2).sqrt()
        super().before_batch()
    def change(self, modality, part):
        super().change(modality, part)
        x,scale = part['x'], part['scale'][..., None]
        if not x.shape[1]: return
        held = (x[..., ::100] == x[..., 50::100]).all(-1).all(-1)               # once a second: an envelope
        level = self.noise * torch.rand(len(x), 1, 1)**2 * ~held[:, None, None]
        heard = irfft(rfft(x) * self.response(len(x)), x.shape[-1]) + scale * level * torch.randn_like(x)
        part['x'] = torch.where(held[:, None, None], x, heard)
        if self.scaled: part['scale'] = part['scale'] * (1 + level[..., 0]**2).sqrt()
        if modality == Modality.EMG:
            part['median'] = part['median'] + .3 * part['scale'] * torch.randn_like(part['median'])
            median,power = part['median'][..., None], (.3 * torch.randn(len(x), 1, 1)).exp()
            z = (x - median) / scale
            part['x'] = torch.where(held[:, None, None], median + scale * z.sign() * z.abs()**power, part['x'])
    def response(self, n): # of `n` recorders, one factor per frequency of an epoch
        at = np.interp(np.log(np.maximum(np.fft.rfftfreq(3000, .01), .3)), NODES, np.arange(len(NODES)))
        low,share = torch.tensor(np.minimum(at.astype(int), len(NODES) - 2)), torch.tensor(at % 1, dtype=torch.float32)
        share = torch.where(torch.tensor(at) == len(NODES) - 1, 1., share)
        gain = self.decibel * torch.randn(n, len(NODES))
        return 10**((gain[:, low] * (1 - share) + gain[:, low + 1] * share) / 20)[:, None]

ARMS = { # what makes recordings differ; further arguments of the learner
    'electrodes': (OtherElectrodes, dict(uncertainty=False)),
    'recorders': (OtherRecorders, dict(uncertainty=False)),
    'recorders, scaled': (partial(OtherRecorders, scaled=True), dict(uncertainty=False))}

def train(work, arm):
    out = work/f'{arm}.safetensors'
    if out.exists(): return
    dls = loaders(work)
    learn = sleepsmc_learner(dls, None, 'cam', model=dict(hide=.3, n_chans=dict(EEG=4)), cbs=ARMS[arm][0](), **ARMS[arm][1])
    print(arm, len(dls.train), 'steps a pass', flush=True)
    with learn.no_bar(): learn.fit_one_cycle(PASSES, LR, cbs=Checkpoint(work/f'{arm}.checkpoint'))
    pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1]).to_csv(out.with_suffix('.csv'), index=False)
    save_learner(learn, out, arm=arm, data='simulated nights only')

def subsets(there): return [s for n in range(1, len(there) + 1) for s in combinations(there, n)]

def agreed(staging, **key):
    found = staging.agreement()
    return key | {k: found[k] for k in ('kappa', 'macro_f1', 'accuracy', *(f'f1_{s.label}' for s in Stage), 'epochs')}

def on_simulated(stager, people, **key):
    "Nights of people whom nobody trained on, staged as a file would be."
    rows = []
    for cohort,subjects in people.items():
        for subject in subjects:
            night = read_synth(dict(subject=subject), cohort)
            for using in subsets([m for m in MODALITIES if m in {c.modality for c in night.channels}]):
                staging = stager.stage(night, using)
                rows.append(agreed(staging, **key, cohort=cohort, subject=subject, using='+'.join(using)))
        print(rows[-1], flush=True)
    return rows

def on_real(stager, **key):
    "SC4001E0, once as its whole 22 hours and once cut out; each compared from half an hour before sleep to half an hour after."
    folder,channels = Path(os.environ['SLEEPNB_DATA'])/'sleep-edf'/'sleep-cassette', list(COHORTS['sleep-edf'][0])
    night = read_night(folder/'SC4001E0-PSG.edf', folder/'SC4001EC-Hypnogram.edf', wanted=channels)
    keep = crop_wake(night.stages, 30)
    part = Night([x[round(keep.start*EPOCH_SEC*fs):round(keep.stop*EPOCH_SEC*fs)] for x,fs in zip(night.x, night.fs)], night.fs, night.channels,
                 night.stages[keep])
    how = {'+'.join(s): dict(modalities=s) for s in subsets(MODALITIES)}
    how |= {f'EEG, {c}': dict(modalities=('EEG',), channels=(c,)) for c in channels[:2]}
    rows = []
    for using,kwargs in how.items():
        made = {'whole': stager.stage(night, **kwargs), 'cut out': stager.stage(part, **kwargs)}
        made['whole'] = replace(made['whole'], **{k: getattr(made['whole'], k)[keep] for k in ('stages', 'prob', 'quality')})
        same = made['cut out'].agreement(made['whole'].stages)['kappa']
        rows += [agreed(replace(o, reference=part.stages), **key, using=using, recording=k, kappa_of_the_two=same) for k,o in made.items()]
        print(rows[-2], flush=True)
    return rows

def scores(work, arms):
    for arm in arms:
        if not (work/f'{arm}.safetensors').exists(): continue
        stager = Stager.load(work/f'{arm}.safetensors')
        split = saved_split(work/f'{arm}.safetensors')
        people = {c: [s for cohort,s in split.test if cohort == f'{c}-simulated'] for c in list(COHORTS)[1:]}
        passes = pd.read_csv(work/f'{arm}.csv').rename_axis('pass').reset_index().assign(arm=arm)
        merged([passes], OUT/'stager_training.csv', ['arm', 'pass'])
        merged([pd.DataFrame(on_real(stager, arm=arm))], OUT/'stager_real.csv', ['arm', 'using', 'recording'])
        rows = on_simulated(stager, people | {c: [f'{i:02}' for i in range(4)] for c in NEW}, arm=arm)
        merged([pd.DataFrame(rows)], OUT/'stager_simulated.csv', ['arm', 'cohort', 'subject', 'using'])

def ship(work, arm):
    "Half of the bits are kept: the file is half as large, and stages the same."
    network,described = load_weights(work/f'{arm}.safetensors')
    people = {p: [(c, s) for c,names in described[p].items() for s in names] for p in ('fitted', 'judged')}
    save_weights(ROOT/'sleepnb'/'stager.safetensors', network.half(), **people, split=described['split'],
                 recipe=described['recipe'], **described['notes'])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder for all that is computed')
    parser.add_argument('part', choices=['prepare', 'train', 'scores', 'ship'])
    parser.add_argument('arms', nargs='*', help='; '.join(ARMS))
    args = parser.parse_args()
    keep_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == 'prepare': loaders(args.work)
    if args.part == 'train':
        for arm in args.arms or ARMS: train(args.work, arm)
    if args.part == 'scores': scores(args.work, args.arms or ARMS)
    if args.part == 'ship': ship(args.work, *args.arms)

if __name__ == '__main__': main()
