"""Measures how simulated nights compare with real ones, and writes nbs/artifacts/simulator_*.csv.

    python tools/simulator.py cohorts [--seeds 5]     difficulty, crossing, telling apart, quantiles, order of stages
    python tools/simulator.py fresh                   difficulty alone, of five cohorts by which nothing was chosen
    python tools/simulator.py waves                   spindles and slow waves, as YASA finds them
    python tools/simulator.py network                 trained on simulated nights; prints how it does on others
    python tools/simulator.py network --look          the same, and then the real night, which is the unseen one

What is in the files already is not measured again, unless with --again. `cohorts` needs the real band powers in the folder
that SLEEPNB_DATA names, and leaves out subject SC400, whose first night is the unseen one. Only statistics are written."""
import argparse, os, sys, warnings
from itertools import product
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')   # the trees' threads wait for each other where a core is busy

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from sleepnb.core import Stage, rng
from sleepnb.data.preprocess import crop_wake, filter_resample, normalise, robust_stats, to_epochs
from sleepnb.synth import BANDS, band_densities, synth_hypnogram, synth_night

ROOT = Path(__file__).parent.parent
OUT = ROOT/'nbs'/'artifacts'
CHANNELS = ['Fpz-Cz', 'Pz-Oz']
STAGES = [stage.name for stage in Stage]
SUBJECTS,NIGHTS,EVENING = 10, 2, 1200   # of a simulated cohort; epochs from which sleep and half an hour on either side are kept
CLASSIFIERS = {'trees': lambda: HistGradientBoostingClassifier(max_iter=150, random_state=0),
               'logistic regression': lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))}
PAIRS = ['simulated and real', 'real and real', 'misfit and real']   # who is told apart
HOWS = ['by subject', 'by subject, levels removed', 'by row']          # how epochs are divided, and what trees see of them
QUANTILES = [.05, .25, .5, .75, .95]

def is_done(name, **what):
    "Whether a file has rows of this."
    file = OUT/f'simulator_{name}.csv'
    if not file.exists(): return False
    table = pd.read_csv(file, dtype=str)
    return bool(np.logical_and.reduce([table[key] == str(value) for key,value in what.items()]).any())

def write(name, rows, **what):
    "Adds rows to a file, in place of those of the same."
    file = OUT/f'simulator_{name}.csv'
    new = pd.DataFrame([what | row for row in rows]).round(4).astype(str)
    if file.exists():
        old = pd.read_csv(file, dtype=str)
        new = pd.concat([old[~np.logical_and.reduce([old[key] == str(value) for key,value in what.items()])], new])
    new.sort_values(list(what), kind='stable').to_csv(file, index=False)

# ---- the nine features per channel, and the stages

def features(density, variance, mobility):
    "Of each channel: ln of five densities, of theta/alpha, alpha/delta and the variance, and Hjorth's mobility."
    ln = np.log(density)                                                          # e c 5
    theta_alpha,alpha_delta = ln[..., 1] - ln[..., 2], ln[..., 2] - ln[..., 0]
    rest = np.stack([theta_alpha, alpha_delta, np.log(variance), mobility], -1)
    return np.concatenate([ln, rest], -1).reshape(len(ln), -1)                    # e 18

def of_signals(x):
    "The features of `(channels, samples)` in µV at 100 Hz."
    epochs = to_epochs(x).astype(float)                                           # e c t
    variance = epochs.var(-1)
    return features(band_densities(epochs), variance, np.sqrt(np.diff(epochs, axis=-1).var(-1) / variance))

def simulated_stages(seed, subject, night):
    stages = synth_hypnogram(EVENING, seed, subject, night)
    return stages[crop_wake(stages)]

def simulated(seed, subjects=SUBJECTS, nights=NIGHTS, progress=True):
    "Features, stages, subject and night of each epoch of a cohort."
    parts = []
    for subject,night in tqdm(list(product(range(subjects), range(nights))), f'seed {seed}', disable=not progress, unit='night'):
        made = synth_night(CHANNELS, seed=seed, subject=subject, night=night, stages=simulated_stages(seed, subject, night))
        parts.append((of_signals(made.x), made.stages, np.full(len(made.stages), subject), np.full(len(made.stages), night)))
    return [np.concatenate(part) for part in zip(*parts)]

def real(folder):
    "The same of SC401 to SC407."
    parts,data = [], np.load(Path(folder)/'sleep-edf-bandpower'/'bandpower.npz')
    for name in np.unique(data['recording']):
        if name.startswith('SC400'): continue
        rows = np.flatnonzero(data['recording'] == name)
        rows = rows[crop_wake(data['stage'][rows])]
        density,variance,mobility = (data[key][rows].astype(float) for key in ('power', 'variance', 'mobility'))
        subject,night = (np.full(len(rows), int(part)) for part in (name[3:5], name[5]))
        parts.append((features(density, variance, mobility), data['stage'][rows], subject, night))
    return [np.concatenate(part) for part in zip(*parts)]

# ---- how hard

def difficulty(x, y, subject):
    "Each subject staged by classifiers that have seen the others."
    for name,make in CLASSIFIERS.items():
        found,kappas = np.zeros_like(y), []
        for s in np.unique(subject):
            test = subject == s
            found[test] = make().fit(x[~test], y[~test]).predict(x[test])
            kappas.append(cohen_kappa_score(y[test], found[test]))
        f1 = f1_score(y, found, average=None, labels=range(5), zero_division=0)
        yield dict(classifier=name, epochs=len(y), kappa=cohen_kappa_score(y, found), macro_f1=f1.mean(),
                   **dict(zip(STAGES, f1)), sd_subjects=np.std(kappas))

def crossing(made, measured):
    "Trained on simulated nights, tested on real ones, and the other way round."
    for name,make in CLASSIFIERS.items():
        for way,(train,test) in {'simulated to real': (made, measured), 'real to simulated': (measured, made)}.items():
            yield dict(classifier=name, way=way, kappa=cohen_kappa_score(test[1], make().fit(train[0], train[1]).predict(test[0])))

def levelled(x, y, subject):
    "Each feature less its median over that subject's epochs of that stage."
    x = x.copy()
    for s,stage in product(np.unique(subject), Stage):
        rows = (subject == s) & (y == stage)
        if rows.any(): x[rows] -= np.median(x[rows], axis=0)
    return x

def apart(a, b, how, seed=0):
    "How well trees tell rows of `a` from rows of `b` of the same stage: the area under the curve; .5 is guessing."
    draw = rng('apart', seed)
    folds = []
    for _,y,subject,_ in (a, b):   # subjects of both sides are in every fold
        order = draw.permutation(np.unique(subject))
        folds.append(np.array([list(order).index(s) % 3 for s in subject]))
    fold,is_b = np.concatenate(folds), np.repeat([0, 1], [len(a[1]), len(b[1])])
    x,y = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
    if how == 'by subject, levels removed': x = np.concatenate([levelled(*o[:3]) for o in (a, b)])
    for stage in Stage:
        rows = np.flatnonzero(y == stage)
        if how != 'by row': tests = [fold[rows] == k for k in range(3)]
        else: tests = [np.isin(np.arange(len(rows)), t) for _,t in KFold(3, shuffle=True, random_state=seed).split(rows)]
        areas = []
        for test in tests:
            trees = CLASSIFIERS['trees']().fit(x[rows[~test]], is_b[rows[~test]])
            areas.append(roc_auc_score(is_b[rows[test]], trees.predict_proba(x[rows[test]])[:, 1]))
        yield dict(how=how, stage=stage.name, auc=np.mean(areas))

def halves(cohort, seed):
    "Two halves of the subjects."
    subjects = rng('halves', seed).permutation(np.unique(cohort[2]))
    first = np.isin(cohort[2], subjects[:len(subjects) // 2])
    return [[part[which] for part in cohort] for which in (first, ~first)]

def misfit(cohort, seed):
    "The same, but each epoch's Pz-Oz is from another epoch of that subject and stage: a flaw that trees should notice."
    x,y,subject,night = cohort
    x,half,draw = x.copy(), cohort[0].shape[1] // 2, rng('misfit', seed)
    for s,stage in product(np.unique(subject), Stage):
        rows = np.flatnonzero((subject == s) & (y == stage))
        x[rows, half:] = x[draw.permutation(rows), half:]
    return x, y, subject, night

# ---- what the nights are made of

def quantiles(x, y):
    "Of each band's density and of the variance, in decibels, in each stage."
    decibels = 10 / np.log(10) * x.reshape(len(x), 2, -1)[..., [0, 1, 2, 3, 4, 7]]    # e c 6
    for stage,(c,channel),(b,band) in product(Stage, enumerate(CHANNELS), enumerate([*BANDS, 'variance'])):
        yield dict(stage=stage.name, channel=channel, band=band) | {f'q{100*q:02.0f}': v for q,v in
                   zip(QUANTILES, np.quantile(decibels[y == stage, c, b], QUANTILES))}

def of_nights(y, subject, night):
    "The stages, night by night."
    cuts = np.flatnonzero((np.diff(subject) != 0) | (np.diff(night) != 0)) + 1
    return np.split(y, cuts)

def transitions(nights):
    "How many epochs of each stage are followed by each, from falling asleep to the last epoch of sleep."
    counts = np.zeros((5, 5), int)
    for y in nights:
        asleep = np.flatnonzero(y)
        y = y[asleep[0]:asleep[-1] + 1]
        np.add.at(counts, (y[:-1], y[1:]), 1)
    return [dict(before=STAGES[i], after=STAGES[j], epochs=counts[i, j]) for i,j in product(range(5), range(5))]

def runs(nights):
    "How long stages last, in epochs, from falling asleep to the last epoch of sleep."
    lengths = {stage: [] for stage in Stage}
    for y in nights:
        asleep = np.flatnonzero(y)
        for run in np.split(y[asleep[0]:asleep[-1] + 1], np.flatnonzero(np.diff(y[asleep[0]:asleep[-1] + 1])) + 1):
            lengths[run[0]].append(len(run))
    for stage,found in lengths.items():
        yield dict(stage=stage.name, runs_per_night=len(found) / len(nights), minutes_per_night=sum(found) / 2 / len(nights)) | {
            f'q{100*q:02.0f}': v for q,v in zip(QUANTILES, np.quantile(found, QUANTILES))}

def describe(cohort, **what):
    x,y,subject,night = cohort
    write('difficulty', difficulty(x, y, subject), **what)
    write('quantiles', quantiles(x, y), **what)
    write('transitions', transitions(of_nights(y, subject, night)), **what)
    write('runs', runs(of_nights(y, subject, night)), **what)

def measure_cohorts(seeds, again):
    if not os.environ.get('SLEEPNB_DATA'): sys.exit('SLEEPNB_DATA names no folder with the real band powers')
    measured = real(os.environ['SLEEPNB_DATA'])
    if again or not is_done('runs', nights='real', seed=0): describe(measured, nights='real', seed=0)
    for seed in range(seeds):
        if not again and is_done('apart', what=PAIRS[-1], seed=seed): continue
        made = simulated(seed)
        describe(made, nights='simulated', seed=seed)
        write('crossing', crossing(made, measured), seed=seed)
        for what,pair in zip(PAIRS, ((made, measured), halves(measured, seed), (misfit(made, seed), measured))):
            write('apart', [row for how in HOWS for row in apart(*pair, how, seed)], what=what, seed=seed)
        print(pd.read_csv(OUT/'simulator_difficulty.csv').query('nights == "simulated"').tail(2).to_string(index=False), flush=True)

def measure_fresh(again):
    for seed in range(10, 15):
        if again or not is_done('fresh', seed=seed): write('fresh', list(difficulty(*simulated(seed)[:3])), seed=seed)

# ---- what a detector finds

def measure_waves(nights, again):
    "Spindles and slow waves per minute of each stage."
    import yasa
    for subject in range(nights):
        if not again and is_done('waves', subject=subject): continue
        found = synth_night(['C3-M2', 'F3-M2', 'Fpz-Cz'], seed=100, subject=subject, stages=simulated_stages(100, subject, 0))
        write('waves', detected(yasa, found), subject=subject)

def detected(yasa, night):
    "Rows of what YASA finds in a night of C3-M2, F3-M2 and Fpz-Cz."
    stages = np.repeat(night.stages, 3000).astype(int)
    rows = []
    for what,detect,c in (('spindles', yasa.spindles_detect, 0), ('slow waves', yasa.sw_detect, 1), ('slow waves', yasa.sw_detect, 2)):
        results = detect(night.x[c].astype(float), night.fs, hypno=stages, include=(0, 1, 2, 3, 4), verbose='error')
        table = results.summary() if results is not None else pd.DataFrame(dict(Stage=[]))
        rows += [dict(what=what, channel=night.channels[c], stage=stage.name, minutes=np.sum(night.stages == stage) / 2,
                      found=int(np.sum(table['Stage'] == stage))) for stage in Stage]
    return rows

# ---- a network that has only seen simulated nights

TRAINED,HELD_OUT,SEQUENCE,BATCH,PASSES = 40, 8, 20, 16, 8   # subjects; epochs of a sequence; sequences of a batch

def network(context):
    "A few filters per epoch, and two convolutions over neighbouring epochs if `context`."
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = lambda i, o, k, s=1: nn.Sequential(nn.Conv1d(i, o, k, s, bias=False), nn.BatchNorm1d(o), nn.ReLU())
            self.epoch = nn.Sequential(layer(2, 16, 50, 6), nn.MaxPool1d(4), layer(16, 32, 8), nn.MaxPool1d(4), layer(32, 32, 8))
            self.near = nn.Sequential(nn.Conv1d(64, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 5, 5, padding=2)) if context else None
            self.alone = nn.Linear(64, 5)
        def forward(self, x):                                                             # b e c t
            h = self.epoch(x.flatten(0, 1))                                               # (b e) w t'
            h = torch.cat([h.mean(-1), h.amax(-1)], -1).unflatten(0, x.shape[:2])         # b e w
            h = nn.functional.dropout(h, .2, self.training)
            return self.alone(h) + (self.near(h.mT).mT if self.near else 0)               # b e s
    return Net()

def prepared(x):
    "Filtered, cut into epochs and scaled: `(epochs, channels, samples)` from µV at 100 Hz."
    x = filter_resample(x, 100)
    return np.moveaxis(normalise(x, *robust_stats(x)).reshape(len(x), -1, 3000), 1, 0)

def simulated_signals(seed, subjects):
    "Of one night per subject: epochs and stages, for each."
    for subject in tqdm(range(subjects), f'seed {seed}', unit='night'):
        night = synth_night(CHANNELS, seed=seed, subject=subject, stages=simulated_stages(seed, subject, 0))
        yield prepared(night.x).astype(np.float16), night.stages

def staged(net, x):
    "Stages of one night."
    import torch
    net.eval()
    with torch.no_grad(): return net(torch.from_numpy(x.astype(np.float32))[None])[0].argmax(-1).numpy()

def score(net, nights):
    "Agreement on nights, pooled, and how often each stage was taken for each."
    true,found = np.concatenate([y for _,y in nights]), np.concatenate([staged(net, x) for x,_ in nights])
    f1 = f1_score(true, found, average=None, labels=range(5), zero_division=0)
    return (dict(epochs=len(true), kappa=cohen_kappa_score(true, found), macro_f1=f1.mean(), **dict(zip(STAGES, f1))),
            confusion_matrix(true, found, labels=range(5)))

def trained(nights, held_out, seed, context=True, passes=PASSES):
    "A network, as it was after the pass that was best on held-out simulated nights."
    import torch
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    draw,net,best = rng('network', seed), network(context), (-1, None)
    starts = [(n, e) for n,(x,_) in enumerate(nights) for e in range(0, len(x) - SEQUENCE + 1, SEQUENCE)]
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=passes * (len(starts) // BATCH))
    for i in range(passes):
        net.train()
        order,shift = draw.permutation(len(starts)), draw.integers(0, SEQUENCE)
        for rows in np.split(order[:len(order) // BATCH * BATCH], len(order) // BATCH):
            picked = [(n, min(e + shift, len(nights[n][0]) - SEQUENCE)) for n,e in (starts[r] for r in rows)]
            x = np.stack([nights[n][0][e:e+SEQUENCE] for n,e in picked]).astype(np.float32)
            x *= np.exp(draw.uniform(-.25, .25, (BATCH, 1, 2, 1))).astype(np.float32)     # amplifiers differ
            y = np.stack([nights[n][1][e:e+SEQUENCE] for n,e in picked]).astype(int)
            loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y).flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            pace.step()
        kappa = score(net, held_out)[0]['kappa']
        print(f'seed {seed}, pass {i + 1}: loss {loss:.3f}, κ {kappa:.3f} on simulated nights', flush=True)
        if kappa > best[0]: best = kappa, {name: value.clone() for name,value in net.state_dict().items()}
    net.load_state_dict(best[1])
    return net

def the_real_night():
    "The unseen night: epochs and stages."
    from sleepnb.data.psg import read_night, sample_files
    night = read_night(*sample_files(), wanted=CHANNELS)
    return prepared(np.stack(night.x)), night.stages

def measure_network(look):
    "Trains twice; the real night is read only to `look`."
    nights,held_out = list(simulated_signals(200, TRAINED)), list(simulated_signals(201, HELD_OUT))
    tests = {'simulated': held_out} | ({'real': [the_real_night()]} if look else {})
    for seed in range(2):
        net = trained(nights, held_out, seed)
        for where,test in tests.items():
            figures,confusion = score(net, test)
            print(where, figures, confusion, sep='\n', flush=True)
            if not look: continue
            write('network', [figures], seed=seed, nights=where)
            write('confusion', [dict(scorer=STAGES[i], network=STAGES[j], epochs=confusion[i, j])
                                for i,j in product(range(5), range(5))], seed=seed, nights=where)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('part', choices=['cohorts', 'fresh', 'waves', 'network'])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--nights', type=int, default=6, help='that YASA sees')
    parser.add_argument('--again', action='store_true', help='also what was measured before')
    parser.add_argument('--look', action='store_true', help='tests the network on the real night, and writes how it did')
    args = parser.parse_args()
    warnings.simplefilter('ignore', FutureWarning)
    if args.part == 'cohorts': measure_cohorts(args.seeds, args.again)
    elif args.part == 'fresh': measure_fresh(args.again)
    elif args.part == 'waves': measure_waves(args.nights, args.again)
    else: measure_network(args.look)

if __name__ == '__main__': main()
