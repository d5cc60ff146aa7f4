"""Trains MTSSRL-MD at `small` scale on three simulated cohorts, and writes nbs/artifacts/mtssrl_*.csv.

    python tools/mtssrl.py --work DIR pretrain [ARM …]      the arms of ARMS; by default all
    python tools/mtssrl.py --work DIR finetune [ARM …]      each on its target cohorts, and SCRATCH, from random weights
    python tools/mtssrl.py --work DIR probe                 linear probes of frozen features
    python tools/mtssrl.py --work DIR real                  the same on the real night in the folder that SLEEPNB_DATA names
    python tools/mtssrl.py --work DIR triplets              whether temporal shuffling can be learned, from real band powers
    python tools/mtssrl.py --work DIR alignment --runs RUNS  what virtual channels take from sensors, by `sleepnb run mtssrl-table1`
    python tools/mtssrl.py --work DIR tables                 writes the files

Everything is kept in DIR: what is there is not computed again, and what was interrupted goes on."""
import argparse, os
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')   # two trainings side by side on two cores are faster so

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sleepnb.callbacks import Checkpoint, keep_memory
from sleepnb.core import UNSCORED
from sleepnb.data.loaders import EpochLoader, Neighbours, Stores, draw_triplets, labelled_loaders, pretraining_loaders, rows_of
from sleepnb.data.psg import Night, read_night
from sleepnb.data.splits import holdout_split
from sleepnb.data.store import Cohort, EpochStore, prepare
from sleepnb.learner import finetune_learner, mtssrl_learner, predict_stages, save_learner, supervised_learner
from sleepnb.metrics import score_difference, score_table
from sleepnb.models.network import Backbone, move_to
from sleepnb.montage import parse_channel
from sleepnb.recipes import runs_of
from sleepnb.runs import read_result
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights

OUT = Path(__file__).parent.parent/'nbs'/'artifacts'
SUBJECTS,EPOCHS,BATCH = 30, 480, 100                 # of a cohort; of a night, four hours; epochs
STEPS,PASS_STEPS,PASSES = 520, 100, 8                # of pretraining; of a pass of fine-tuning; at most
UNFREEZE,PATIENCE = (1, 2, 3), 4                     # passes
COHORTS = { # channels and population, after the datasets of the paper
    'S': (('Fpz-Cz', 'Pz-Oz'), 'adult'),
    'I': (('F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1'), 'disordered'),
    'A': (('F3', 'F4', 'C3', 'C4', 'O1', 'O2', 'Fpz', 'Fz', 'Cz', 'Pz', 'Oz'), 'adult')}
NAMES = {k: f'{k}-simulated' for k in COHORTS}
TASKS = ('AUG', 'TS', 'FBM')
DEFAULTS = dict(lr=1e-3, backbone=dict(drop=0.))     # of pretraining, as the arms that stand first decided
ARMS = { # cohorts, arguments of the learner, targets
    'all': ('SIA', {}, 'SIA'),
    'all, lr 3e-3': ('SIA', dict(lr=3e-3), ''),
    'all, dropout, lr 3e-3': ('SIA', dict(lr=3e-3, backbone=dict(drop=.5)), ''),
    'equal': ('SIA', dict(weighting='equal'), 'SIA'),
    **{f'{t} only': ('SIA', dict(tasks=(t,), weighting='equal'), 'I') for t in TASKS},
    'TS only, far': ('SIA', dict(tasks=('TS',), weighting='equal', far=120), ''),
    **{f'{c} alone': (c, {}, c) for c in COHORTS},
    'shared': ('SIA', dict(align='shared'), 'A'),
    'shared without A': ('SI', dict(align='shared'), 'A')}
SCRATCH = {'scratch': dict(drop=0.), 'scratch, dropout': dict(drop=.5)}  # baselines: arguments of the backbone
RATES = (1e-3, 3e-3)                                 # of fine-tuning and from scratch; the validation part chooses

def read_synth(row, cohort):
    channels,population = COHORTS[cohort]
    made = synth_night(channels, n_epochs=EPOCHS, subject=f'{cohort}{row["subject"]}', population=population)
    return Night(list(made.x), [100]*len(channels), [parse_channel(c) for c in channels], made.stages)

def stores_of(work, cohorts):
    nights = pd.DataFrame(dict(subject=[f'{i:02}' for i in range(SUBJECTS)], night=1))
    for c in cohorts: prepare(Cohort(NAMES[c], nights, COHORTS[c][0], partial(read_synth, cohort=c)), work/c, 'mtssrl')
    return Stores([EpochStore(work/c) for c in cohorts], in_memory=True)

def pretrain(work, arm):
    out = work/f'pretrained {arm}.safetensors'
    if out.exists(): return
    cohorts,kwargs,_ = ARMS[arm]
    stores = stores_of(work, cohorts)
    draw = partial(draw_triplets, far=kwargs.get('far', 30))
    dls = pretraining_loaders(stores, holdout_split(stores.nights), draw, bs=BATCH)
    learn = mtssrl_learner(dls, **DEFAULTS | {k: v for k,v in kwargs.items() if k != 'far'})
    print(arm, len(dls.train), 'steps a pass', flush=True)
    with learn.no_bar(): learn.fit(round(STEPS / len(dls.train)), cbs=Checkpoint(work/f'pretraining {arm}.safetensors'))
    table = learn.task_record.table.assign(arm=arm)
    valid = pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1])
    table = table.merge(valid.add_prefix('valid ').assign(**{'pass': range(len(valid))}), on='pass')
    table.to_csv(out.with_suffix('.csv'), index=False)
    save_learner(learn, out, arm=arm)

def finetune(work, arm, target, labels, lr, seed=0):
    out = work/f'tuned {arm} {target} {labels:g} {lr:g} {seed}.csv'
    if out.exists(): return
    stores = stores_of(work, target)
    dls = labelled_loaders(stores, holdout_split(stores.nights), labels=labels, bs=BATCH, min_steps=PASS_STEPS, seed=seed)
    if arm in SCRATCH: learn = supervised_learner(dls, lr=lr, patience=PATIENCE, seed=seed, backbone=SCRATCH[arm])
    else:
        heads_of = {NAMES[target]: NAMES[target]} if target in ARMS[arm][0] else None
        learn = finetune_learner(dls, work/f'pretrained {arm}.safetensors', lr=lr, unfreeze=UNFREEZE, patience=PATIENCE,
                                 heads_of=heads_of, seed=seed)
    print(arm, target, labels, lr, len(dls.train.rows), 'labels', flush=True)
    with learn.no_bar(): learn.fit(PASSES, cbs=Checkpoint(out.with_suffix('.safetensors')))
    best = pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1])
    rows = {p: predict_stages(learn, p).assign(part=p) for p in ('valid', 'test')}
    pd.concat(rows.values()).round(5).assign(passes=len(best)).to_csv(out, index=False)

def tokens(backbone, stores, rows, bs=500):
    "Mean and spread of the tokens of each epoch, `(epochs, 2·width)`."
    backbone.eval()
    with torch.inference_mode():
        made = [backbone(parts) for (_,parts),_ in EpochLoader(stores, rows, bs=bs, labelled=False)]
    return torch.cat([torch.cat([h.mean(1), h.std(1)], -1) for h in made]).numpy()

def classifier(): return make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))

def probe(work, arms):
    """Trained on every third epoch of the training subjects of a cohort, tested on its test subjects; before pretraining and after.
    What is gained comes with an interval over the test subjects: of each cohort, and of all that the arm was pretrained on."""
    asked = {}                                       # (random or arm, cohort) → the test epochs with what was said of them
    for c in COHORTS:
        stores = stores_of(work, c)
        parts = [rows_of(stores, holdout_split(stores.nights), p).iloc[::n] for p,n in (('train', 3), ('test', 1))]
        for arm in arms or ARMS:
            if c not in ARMS[arm][0] or not (work/f'pretrained {arm}.safetensors').exists(): continue
            trained = load_weights(work/f'pretrained {arm}.safetensors')[0].backbone
            draws = {as_random(arm): 0} | ({f'random, draw {k}': k for k in range(1, 5)} if arm == 'all' else {})
            backbones = {name: partial(drawn, trained.config, seed) for name,seed in draws.items()} | {arm: lambda: trained}
            for name,backbone in backbones.items():
                if (name, c) in asked: continue
                moved = move_to(backbone(), {NAMES[c]: COHORTS[c][0]})
                x = [tokens(moved, stores, p.index) for p in parts]
                asked[name, c] = parts[1].assign(pred=classifier().fit(x[0], parts[0].stage).predict(x[1]))
                print(name, c, cohen_kappa_score(parts[1].stage, asked[name, c].pred), flush=True)
    found = []
    for name in dict.fromkeys(name for name,_ in asked):
        of = [c for c in COHORTS if (name, c) in asked]
        for cohorts in dict.fromkeys([*of, ''.join(of)]):
            epochs,before = (pd.concat([asked[n, c] for c in cohorts]) for n in (name, as_random(name) if name in ARMS else name))
            row = dict(arm=name, cohort=cohorts, kappa=cohen_kappa_score(epochs.stage, epochs.pred), epochs=len(epochs))
            apart = score_difference(epochs, before).loc['kappa'] if name in ARMS else dict.fromkeys(('value', 'low', 'high'))
            found.append(row | dict(gain=apart['value'], low=apart['low'], high=apart['high']))
    pd.DataFrame(found).round(4).to_csv(work/'probe.csv', index=False)

def drawn(config, seed):
    torch.manual_seed(seed)
    return Backbone(**config)

def as_random(arm): # other heads are drawn where other cohorts take part, or heads are shared
    return 'random' if len(ARMS[arm][0]) == 3 and 'align' not in ARMS[arm][1] else f'random, as {arm}'

def real_night(work):
    "The 22 hours of SC4001E0 as a store, and the rows from half an hour before sleep to half an hour after."
    folder = Path(os.environ['SLEEPNB_DATA'])/'sleep-edf'/'sleep-cassette'
    nights = pd.DataFrame(dict(subject=['SC400'], night=1))
    prepare(Cohort('real', nights, COHORTS['S'][0], partial(read_real, folder=folder)), work/'real', 'mtssrl', progress=False)
    stores = Stores(work/'real', in_memory=True)
    asleep = np.flatnonzero(stores.stages > 0)
    return stores, np.arange(asleep[0] - 60, asleep[-1] + 61)

def read_real(row, folder): return read_night(folder/'SC4001E0-PSG.edf', folder/'SC4001EC-Hypnogram.edf', list(COHORTS['S'][0]))

def within(x, y):
    "κ of a linear probe within one night: five folds of interleaved blocks of 29 epochs."
    fold,pred = np.arange(len(y)) // 29 % 5, np.empty_like(y)
    for k in range(5): pred[fold == k] = classifier().fit(x[fold != k], y[fold != k]).predict(x[fold == k])
    return cohen_kappa_score(y, pred)

REAL_ARMS = { # arguments of the learner, and seeds
    'all': ({}, (0, 1)), 'all, dropout': (dict(backbone=dict(drop=.5)), (0,)), 'equal': (dict(weighting='equal'), (0, 1)),
    **{f'{t} only': (dict(tasks=(t,), weighting='equal'), (0,)) for t in TASKS}}

def probe_real(work):
    "Ten passes over the real night without its labels; a probe within the night; and one that comes from simulated subjects."
    stores,rows = real_night(work)
    y,everything = stores.stages[rows], np.arange(len(stores))
    found = []
    for arm,(kwargs,seeds) in REAL_ARMS.items():
        for seed in seeds:
            of = dict(bs=BATCH, labelled=False, draw=draw_triplets, seed=seed)
            dls = DataLoaders(*(EpochLoader(stores, r, shuffle=s, **of) for r,s in ((everything, True), (everything[::10], False))), device='cpu')
            learn = mtssrl_learner(dls, seed=seed, **DEFAULTS | kwargs)
            before = within(tokens(learn.model.backbone, stores, rows), y)
            with learn.no_bar(): learn.fit(10, cbs=Checkpoint(work/f'real {arm} {seed}.safetensors'))
            after = within(tokens(learn.model.backbone, stores, rows), y)
            last = learn.task_record.table.groupby('task').last()
            found.append(dict(probe='within the night', arm=arm, seed=seed, random=before, pretrained=after,
                              **{f'{t} loss': last.loss.get(t) for t in TASKS}))
            print(found[-1], flush=True)
    for seed in range(2, 7):                         # how much random weights are good for is a matter of luck
        backbone = drawn(dict(montages={'real': list(COHORTS['S'][0])}) | DEFAULTS['backbone'], seed)
        found.append(dict(probe='within the night', arm='random', seed=seed, random=within(tokens(backbone, stores, rows), y)))
        print(found[-1], flush=True)
    made = stores_of(work, 'S')
    train = rows_of(made, holdout_split(made.nights), 'train')
    for arm in ARMS:
        if 'S' not in ARMS[arm][0] or not (file := work/f'pretrained {arm}.safetensors').exists(): continue
        trained = load_weights(file)[0].backbone
        torch.manual_seed(0)
        kappas = []
        for backbone in (Backbone(**trained.config), trained):
            x,z = (tokens(move_to(backbone, {name: COHORTS['S'][0]}, {name: NAMES['S']}), of, at)
                   for name,of,at in ((NAMES['S'], made, train.index), ('real', stores, rows)))
            kappas.append(cohen_kappa_score(y, classifier().fit(x, train.stage).predict(z)))
        found.append(dict(probe='from simulated subjects', arm=arm, seed=0, random=kappas[0], pretrained=kappas[1]))
        print(found[-1], flush=True)
    merged([pd.DataFrame(found)], OUT/'mtssrl_probe_real.csv', ['probe', 'arm', 'seed'])

def triplets():
    "How far band powers of real nights tell where a third epoch lies: SC401–404 teach, SC405–407 are asked; nobody is SC400."
    data = np.load(Path(os.environ['SLEEPNB_DATA'])/'sleep-edf-bandpower'/'bandpower.npz')
    keep = np.char.find(data['recording'], 'SC400') != 0
    recording,stage = data['recording'][keep], data['stage'][keep]
    x = np.log(np.concatenate([data['power'][keep].reshape(keep.sum(), -1), data['variance'][keep]], axis=1) + 1e-3)
    nights = [np.flatnonzero(recording == r) for r in np.unique(recording)]
    nights = [n[max(0, (s := np.flatnonzero(stage[n] > 0))[0] - 60):s[-1] + 61] for n in nights]
    rows,night = np.concatenate(nights), np.repeat(range(len(nights)), [len(n) for n in nights])
    neighbours = Neighbours(night, np.concatenate([np.arange(len(n)) for n in nights]))
    asked = np.isin(np.char.ljust(recording[rows], 5).astype('U5'), ['SC405', 'SC406', 'SC407'])
    found = []
    for near,far in ((6, 30), (6, 60), (6, 120), (20, 120)):
        parts = []
        for seed in range(3):
            others,order = draw_triplets(neighbours, np.arange(len(rows)), np.random.default_rng(seed), near=near, far=far)
            a,b,c = x[rows], x[rows][others[:, 0]], x[rows][others[:, 1]]
            parts.append((np.concatenate([abs(a - b), abs(b - c)], axis=1)[order != 0], order[order != 0], asked[order != 0]))
        z,order,who = (np.concatenate(p) for p in zip(*parts))
        trees = HistGradientBoostingClassifier(max_iter=150, random_state=0)
        for name,model in (('the head of the task', classifier()), ('trees', trees)):
            prob = model.fit(z[~who], order[~who]).predict_proba(z[who])[:, 1]
            right = np.where(order[who] > 0, prob, 1 - prob)
            found.append(dict(near=near, far=far, classifier=name, accuracy=(right > .5).mean(), loss=-np.log(right).mean(),
                              triplets=len(right)))
            print(found[-1], flush=True)
    pd.DataFrame(found).round(4).to_csv(OUT/'mtssrl_triplets.csv', index=False)

def alignment(work, runs):
    "What the virtual channels of each cohort take from its sensors, before the pretraining on all three and after it."
    run = next(r for r in runs_of('mtssrl-table1') if r.task == 'pretrain')
    assert run.data == '+'.join(NAMES.values())
    stores = stores_of(work, 'SIA')
    dls = pretraining_loaders(stores, holdout_split(stores.nights), draw_triplets, bs=BATCH)
    when = dict(before=mtssrl_learner(dls, **DEFAULTS).model, after=load_weights(runs/run.id/'weights.safetensors')[0])
    rows = []
    for name,(channels,_) in zip(NAMES.values(), COHORTS.values()):
        cams = {k: (o.backbone.alignment.cam(name), o.backbone.alignment.positions(name)) for k,o in when.items()}
        with torch.no_grad(): shares = {k: cam.weights(places).numpy().ravel() for k,(cam,places) in cams.items()}
        at = pd.MultiIndex.from_product([[name], range(16), channels], names=['cohort', 'virtual', 'channel'])
        rows.append(pd.DataFrame(shares, at).reset_index())
    made = dict(run=run.id, code=read_result(run, runs)['made']['code'])
    pd.concat(rows).assign(**made).round(4).to_csv(OUT/'mtssrl_alignment.csv', index=False)

def merged(rows, file, keys):
    "Adds rows to a file of an earlier computation; those of the same keys are replaced."
    made = pd.concat(rows).round(4)
    if file.exists():
        before = pd.read_csv(file, dtype=dict(subject=str, stages=str))
        made = pd.concat([before, made]).drop_duplicates(keys, keep='last')
    made.sort_values(keys).to_csv(file, index=False)

def tables(work):
    scores,predictions = [],[]
    for file in sorted(work.glob('tuned *.csv')):
        *arm,target,labels,lr,seed = file.stem.removeprefix('tuned ').split()
        table = pd.read_csv(file, dtype=dict(subject=str))
        key = dict(target=target, labels=float(labels), arm=' '.join(arm), lr=float(lr), seed=int(seed))
        for part,rows in table.groupby('part'):
            found = score_table(rows).loc['pooled', 'value'].to_frame().T
            scores.append(found.assign(**key, part=part, subjects=rows.subject.nunique(), epochs=len(rows), passes=rows.passes.iloc[0]))
        for subject,rows in table[table.part == 'test'].sort_values('epoch').groupby('subject'):
            digits = lambda column: ''.join(map(str, rows[column]))
            for who,column in ((key, 'pred'), (dict(target=target, labels=1., arm='scorer', lr=0., seed=0), 'stage')):
                predictions.append(pd.DataFrame([dict(**who, subject=subject, stages=digits(column))]))
    keys = ['target', 'labels', 'arm', 'lr', 'seed']
    if scores:
        merged(scores, OUT/'mtssrl_scores.csv', [*keys, 'part'])
        merged([pd.concat(predictions).drop_duplicates([*keys, 'subject'])], OUT/'mtssrl_predictions.csv', [*keys, 'subject'])
    if logs := [pd.read_csv(f) for f in sorted(work.glob('pretrained *.csv'))]: merged(logs, OUT/'mtssrl_pretraining.csv', ['arm', 'pass', 'task'])
    if (work/'probe.csv').exists(): pd.read_csv(work/'probe.csv').to_csv(OUT/'mtssrl_probe.csv', index=False)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder for all that is computed')
    parser.add_argument('part', choices=['pretrain', 'finetune', 'probe', 'real', 'triplets', 'alignment', 'tables'])
    parser.add_argument('arms', nargs='*', help='; '.join([*SCRATCH, *ARMS]))
    parser.add_argument('--targets', default='SIA')
    parser.add_argument('--labels', type=float, default=.05, help='share of the training epochs')
    parser.add_argument('--runs', type=Path, default='runs', help='where sleepnb run keeps its runs')
    args = parser.parse_args()
    keep_memory()
    if args.part == 'pretrain':
        for arm in args.arms or ARMS: pretrain(args.work, arm)
    if args.part == 'finetune':
        for arm in args.arms or [*SCRATCH, *ARMS]:
            for target in ('SIA' if arm in SCRATCH else ARMS[arm][2]):
                if target in args.targets:
                    for lr in RATES: finetune(args.work, arm, target, args.labels, lr)
    if args.part == 'probe': probe(args.work, args.arms)
    if args.part == 'real': probe_real(args.work)
    if args.part == 'triplets': triplets()
    if args.part == 'alignment': alignment(args.work, args.runs)
    if args.part == 'tables': tables(args.work)

if __name__ == '__main__': main()
