"""Trains SleepSMC and its ablations at `small` scale on simulated cohorts, and writes nbs/artifacts/sleepsmc_*.csv.

    python tools/sleepsmc.py --work DIR train [ARM …] [--folds 0 1] [--seeds 0]     the arms of ARMS; by default all
    python tools/sleepsmc.py --work DIR subsets                  all subsets of modalities, by the arms that stage with all
    python tools/sleepsmc.py --work DIR real                     the real night in the folder that SLEEPNB_DATA names
    python tools/sleepsmc.py features --runs RUNS                t-SNE of features, by the runs of `sleepnb run sleepsmc-table3`
    python tools/sleepsmc.py --work DIR tables                   writes the files

Everything is kept in DIR: what is there is not computed again, and what was interrupted goes on."""
import argparse, os
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')   # two trainings side by side on two cores are faster so

import numpy as np
import pandas as pd
import torch
from fastai.torch_core import get_model
from sklearn.manifold import TSNE
from sklearn.metrics import cohen_kappa_score, f1_score, silhouette_score

from mtssrl import merged
from sleepnb.callbacks import Checkpoint, keep_memory
from sleepnb.data.cohorts import sleep_edf
from sleepnb.data.loaders import EpochLoader, Stores, labelled_loaders
from sleepnb.data.psg import Night
from sleepnb.data.simulated import simulate
from sleepnb.data.splits import holdout_split, kfold_splits
from sleepnb.data.store import Cohort, EpochStore, prepare
from sleepnb.learner import extract_features, load_learner, predict_stages, save_learner, score_subsets, sleepsmc_learner
from sleepnb.montage import parse_channel
from sleepnb.recipes import read_settings, table_rows
from sleepnb.runs import read_result
from sleepnb.trainings import KeepEach, open_stores, split_of
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights

OUT = Path(__file__).parent.parent/'nbs'/'artifacts'
SUBJECTS,EPOCHS,BATCH,PASSES,FOLDS = 30, 480, 128, 10, 5      # of a night, four hours; of training: 67 steps each
CHANNELS = ('F3-M2', 'F4-M1', 'C3-M2', 'C4-M1', 'O1-M2', 'O2-M1', 'E1-M2', 'E2-M1', 'Chin')
MODALITIES = ('EEG', 'EOG', 'EMG')
LOST = {1: ('E1-M2', 'E2-M1'), 2: ('Chin',)}                 # of every third night, in the cohort `gaps`
ALONE = dict(uncertainty=False, contrast=False)              # FeatureNet: nothing is compared
C,NEGATIVE,LOSS = dict(uncertainty=False), dict(loss=dict(score='negative')), dict(loss=dict(weight_mode='loss'))
HIDE = dict(model=dict(hide=.3))
ARMS = { # cohort, primary (`None`: all), further arguments of the learner
    'FeatureNet': ('nine', 'EEG', ALONE), 'C': ('nine', 'EEG', C),            # these two learn the same for any primary
    **{f'C+U {m}': ('nine', m, {}) for m in MODALITIES},
    'FeatureNet all': ('nine', None, ALONE), 'C all': ('nine', None, C), 'C+U all': ('nine', None, {}),
    'C+U all, hiding': ('nine', None, HIDE), 'C+U all, gaps': ('gaps', None, HIDE),
    **{f'C+U {m}, loss': ('nine', m, LOSS) for m in MODALITIES}, **{f'C+U {m}, −r': ('nine', m, NEGATIVE) for m in MODALITIES},
    'home all': ('home', None, HIDE)}

def read_synth(row, gaps):
    made = synth_night(CHANNELS, n_epochs=EPOCHS, subject=f'nine{row["subject"]}', population='disordered')
    lost = LOST.get(int(row['subject']) % 3, ()) if gaps else ()
    kept = [i for i,c in enumerate(CHANNELS) if c not in lost]
    return Night([made.x[i] for i in kept], [100]*len(kept), [parse_channel(CHANNELS[i]) for i in kept], made.stages,
                 missing=lost)

def stores_of(work, cohort, whole=False): # is nothing missing of anybody?
    if cohort == 'home':    # written as files and read back, with the envelope that Sleep-EDF has for the chin
        simulate('sleep-edf-20', work/'home files', subjects=20, nights=1, hours=8)
        prepare(sleep_edf(work/'home files', '20', crop_wake_min=30), folder := work/cohort, 'sleepsmc')
    else:
        folder = work/(f'{cohort}, whole' if whole else cohort)
        nights = pd.DataFrame(dict(subject=[f'{i:02}' for i in range(SUBJECTS)], night=1))
        read = partial(read_synth, gaps=cohort == 'gaps' and not whole)
        prepare(Cohort('nine-simulated', nights, CHANNELS, read), folder, 'sleepsmc')     # one name: one split
    return Stores([EpochStore(folder)], in_memory=True)

def own_split(stores, cohort, fold): return holdout_split(stores.nights) if cohort == 'home' else kfold_splits(stores.nights, FOLDS)[fold]

def loaders(stores, cohort, fold, seed):
    return labelled_loaders(stores, own_split(stores, cohort, fold), bs=BATCH, modalities=MODALITIES, seed=seed)

def train(work, arm, fold, seed):
    cohort,primary,kwargs = ARMS[arm]
    out = work/f'trained {arm} {fold} {seed}.csv'
    if out.exists(): return
    stores = stores_of(work, cohort)
    dls = loaders(stores, cohort, fold, seed)
    each = primary is not None and not kwargs.get('uncertainty', True)           # one training for all three
    learn = sleepsmc_learner(dls, primary, seed=seed, cbs=[KeepEach()] if each else [], **kwargs)
    print(arm, fold, seed, len(dls.train), 'steps a pass', flush=True)
    with learn.no_bar(): learn.fit(PASSES, cbs=Checkpoint(out.with_suffix('.checkpoint')))
    rows = []
    for m in MODALITIES if each else [primary or 'all']:
        if each: get_model(learn.model).load_state_dict(learn.keep_each.best[m]['weights'])
        rows.append(predict_stages(learn, using=(m,) if each else None).assign(staged_by=m))
    learn.modality_record.table.assign(arm=arm, fold=fold, seed=seed).to_csv(work/f'record {arm} {fold} {seed}.csv', index=False)
    if not each: save_learner(learn, out.with_suffix('.safetensors'), arm=arm)
    pd.concat(rows).round(5).to_csv(out, index=False)

def staging(work, arm, fold=0, seed=0):
    "All arms are asked about the same epochs: whoever lacked a modality in training, nobody does in the test."
    cohort = ARMS[arm][0]
    stores = stores_of(work, cohort, whole=cohort == 'gaps')
    return load_learner(work/f'trained {arm} {fold} {seed}.safetensors', loaders(stores, cohort, fold, seed))

def subsets(work):
    rows = []
    for arm in ('C+U all', 'C+U all, hiding', 'C+U all, gaps'):
        if not (work/f'trained {arm} 0 0.safetensors').exists(): continue
        found = score_subsets(staging(work, arm))
        found.columns = [f'{metric} {what}' for metric,what in found.columns]
        rows.append(found.reset_index().assign(arm=arm))
        print(rows[-1], flush=True)
    pd.concat(rows).round(4).to_csv(OUT/'sleepsmc_subsets.csv', index=False)

def real(work):
    "SC4001E0 from half an hour before sleep to half an hour after, staged by networks that saw simulated nights only."
    folder = Path(os.environ['SLEEPNB_DATA'])/'sleep-edf'/'sleep-cassette'
    prepare(sleep_edf(folder, '20', crop_wake_min=30), work/'real', 'sleepsmc', progress=False)
    stores,rows = Stores(work/'real', in_memory=True), []
    scored = np.flatnonzero(stores.stages >= 0)
    for file in sorted(work.glob('trained home all *.safetensors')):
        network = load_weights(file)[0].for_montages({s.cohort: s.channels for s in stores.stores})
        for using in [*((m,) for m in MODALITIES), MODALITIES]:
            with torch.inference_mode():
                logits = torch.cat([network.stage(b, using) for b,_ in EpochLoader(stores, scored, bs=256, modalities=MODALITIES)])
            true,pred = stores.stages[scored], logits.argmax(-1).numpy()
            rows.append(dict(arm='home all', seed=int(file.stem.split()[-1]), using='+'.join(using), epochs=len(true),
                             kappa=cohen_kappa_score(true, pred), macro_f1=f1_score(true, pred, average='macro')))
            print(rows[-1], flush=True)
    pd.DataFrame(rows).round(4).to_csv(OUT/'sleepsmc_real.csv', index=False)

def features(runs):
    "Features of the test people in the plane, by FeatureNet and by the network with contrast and uncertainty."
    table = table_rows('sleepsmc-table3').query('dataset == "ISRUC-S3" and modality in @MODALITIES')
    config = table.runs.iloc[0][0].config
    stores,rows = open_stores(config, runs/'stores'), []
    dls = labelled_loaders(stores, split_of(config, stores.nights), bs=BATCH, modalities=MODALITIES)
    for row in table.itertuples():
        said = read_settings(row.setting)
        system = {('no', 'no'): 'FeatureNet', ('yes', 'yes'): '+ C + U'}.get((said['U'], said['C']))
        if system is None: continue
        name = f'weights{" " + row.modality if system == "FeatureNet" else ""}.safetensors'
        epochs,x = extract_features(load_learner(runs/row.runs[0].id/name, dls), row.modality)
        apart = silhouette_score(x, epochs.stage)
        xy = TSNE(init='pca', random_state=0).fit_transform(x[::6])
        rows.append(pd.DataFrame(dict(system=system, modality=row.modality, stage=epochs.stage[::6], x=xy[:, 0], y=xy[:, 1],
                                      silhouette=apart, run=row.runs[0].id, code=read_result(row.runs[0], runs)['made']['code'])))
        print(system, row.modality, apart, flush=True)
    pd.concat(rows).round(3).to_csv(OUT/'sleepsmc_features.csv', index=False)

def digits(codes): return ''.join('?' if c < 0 else str(c) for c in codes)

def tables(work):
    rows,records = [],[]
    for file in sorted(work.glob('trained *.csv')):
        *arm,fold,seed = file.stem.removeprefix('trained ').split()
        key = dict(cohort=ARMS[' '.join(arm)][0], arm=' '.join(arm), fold=int(fold), seed=int(seed))
        for (by,subject),night in pd.read_csv(file, dtype=dict(subject=str)).groupby(['staged_by', 'subject']):
            night = night.sort_values(['night', 'epoch'])
            rows.append(dict(**key, staged_by=by, subject=subject, stages=digits(night.pred)))
            rows.append(dict(**key | dict(arm='scorer', seed=0), staged_by='scorer', subject=subject, stages=digits(night.stage)))
        records.append(pd.read_csv(work/file.name.replace('trained', 'record', 1)))
    if rows:
        keys = ['cohort', 'arm', 'staged_by', 'fold', 'seed', 'subject']
        merged([pd.DataFrame(rows).drop_duplicates(keys)], OUT/'sleepsmc_predictions.csv', keys)
        merged(records, OUT/'sleepsmc_records.csv', ['arm', 'fold', 'seed', 'pass', 'modality'])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, help='folder for all that is computed')
    parser.add_argument('part', choices=['train', 'subsets', 'real', 'features', 'tables'])
    parser.add_argument('arms', nargs='*', help='; '.join(ARMS))
    parser.add_argument('--folds', type=int, nargs='*', default=[0])
    parser.add_argument('--seeds', type=int, nargs='*', default=[0])
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    args = parser.parse_args()
    keep_memory()
    if args.part == 'features': return features(args.runs)
    if args.work is None: parser.error(f'{args.part} needs --work DIR')
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == 'train':
        for seed in args.seeds:
            for fold in args.folds:
                for arm in args.arms or ARMS: train(args.work, arm, fold, seed)
    if args.part == 'subsets': subsets(args.work)
    if args.part == 'real': real(args.work)
    if args.part == 'tables': tables(args.work)

if __name__ == '__main__': main()
