"""Batches: the same from any process and after any interruption, of the right people, and food for fastai."""
import random
from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.torch_core import find_bs, to_device
from hypothesis import given, settings, strategies as st
from torch import nn

from sleepnb.core import UNSCORED, SplitError, StoreError, rng
from sleepnb.data.loaders import (MIXES, EpochLoader, Neighbours, Stores, batch_order, draw_pairs, draw_runs, draw_triplets,
                                  labelled_loaders, pretraining_loaders, rows_of)
from sleepnb.data.psg import Night
from sleepnb.data.splits import holdout_split
from sleepnb.data.store import Cohort, Recipe, prepare
from sleepnb.montage import parse_channel

CHANNELS = dict(home=('C3-M2', 'E1-M2', 'Chin'), clinic=('F4-M1', 'C4-M1'), lab=('O1-M2',))

def read(row, cohort):
    "Noise, so that a night is ready at once; how loud it is says the stage."
    there = [c for c in CHANNELS[cohort] if (row['subject'], c) not in (('a', 'Chin'), ('b', 'E1-M2'))]
    g = rng('night', cohort, row['subject'], row['night'])
    stages = g.integers(-1, 5, row['length']).astype(np.int8)
    x = g.normal(scale=(10. + 10*stages.clip(0)).repeat(3000), size=(len(there), len(stages)*3000)).astype(np.float32)
    return Night(list(x), [100]*len(there), [parse_channel(c) for c in there], stages,
                 missing=tuple(sorted({*CHANNELS[cohort]} - {*there})))

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    for name,length in dict(home=40, clinic=15, lab=7).items():
        nights = pd.DataFrame([dict(subject=s, night=n, length=length) for s in 'abcdef' for n in (1, 2)])
        prepare(Cohort(name, nights, CHANNELS[name], partial(read, cohort=name)), folder/name, progress=False)
    return [folder/name for name in CHANNELS]

@pytest.fixture(scope='module')
def stores(folders): return Stores(folders)

@pytest.fixture(scope='module')
def split(stores): return holdout_split(stores.nights)

def flat(o):
    "All tensors of a batch, by their path."
    if isinstance(o, dict): return {(k, *p): v for k,x in o.items() for p,v in flat(x).items()}
    if isinstance(o, (tuple, list)): return {(i, *p): v for i,x in enumerate(o) for p,v in flat(x).items()}
    return {(): o}

def same(a, b):
    a,b = flat(a), flat(b)
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

def all_same(a, b):
    a,b = list(a), list(b)
    return len(a) == len(b) and all(map(same, a, b))

@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('draw', [None, draw_triplets, draw_pairs, draw_runs])
def test_workers_change_nothing(stores, split, mix, draw):
    kwargs = dict(bs=32, mix=mix, draw=draw, modalities=('EEG', 'EMG') if draw is draw_pairs else None)
    here,there = (pretraining_loaders(stores, split, num_workers=n, **kwargs) for n in (0, 2))
    for _ in range(2):                                             # two passes
        assert all_same(here.train, there.train)
        assert all_same(here.valid, there.valid)

def test_neither_do_global_seeds_nor_earlier_draws(stores, split):
    make = lambda: pretraining_loaders(stores, split, bs=32).train
    expected = list(make())
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    other = make()
    other.one_batch()
    for i,_ in zip(range(3), other): pass                          # a pass given up after three batches counts as one
    other.set_pass(0)
    assert all_same(expected, other)
    assert not same(expected[0], pretraining_loaders(stores, split, bs=32, seed=1).train.one_batch())

@settings(max_examples=25, deadline=None)
@given(pass_=st.integers(0, 3), step=st.integers(0, 12), mix=st.sampled_from(MIXES), workers=st.sampled_from([0, 0, 0, 2]))
def test_going_on_anywhere(stores, split, pass_, step, mix, workers):
    make = partial(pretraining_loaders, stores, split, bs=40, mix=mix)
    undisturbed = make().train
    passes = [list(undisturbed) for _ in range(pass_ + 2)]
    resumed = make(num_workers=workers).train
    resumed.set_pass(pass_, step)
    assert len(resumed) == len(passes[0])
    assert all_same(passes[pass_][step:], resumed)
    assert all_same(passes[pass_ + 1], resumed)                    # the next pass is whole

def test_two_iterations_at_once(stores, split):
    dl = pretraining_loaders(stores, split, bs=40).train
    first,second = list(dl), list(dl)
    dl.set_pass(0)
    both = list(zip(dl, dl))
    assert all_same(first, [a for a,_ in both]) and all_same(second, [b for _,b in both])

@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), bs=st.integers(1, 20), steps=st.integers(1, 12),
       mix=st.sampled_from(MIXES), seed=st.integers(0, 99))
def test_composition(sizes, bs, steps, mix, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(groups)) + 1000
    order = batch_order(rows, groups, bs, rng('test', seed), mix, steps)
    batches = order.reshape(-1, bs)
    assert len(batches) >= steps and set(order) <= set(rows)
    if mix != 'homogeneous': assert len(batches) == max(len(rows) // bs, steps)
    counts = Counter(order.tolist())
    of = lambda c: [counts[r] for r in rows[groups == c]]
    if mix == 'proportional': assert max(counts.values()) - min(counts[r] for r in rows) <= 1
    else: assert all(max(of(c)) - min(of(c)) <= 1 for c in range(len(sizes)))
    shares = np.array([np.bincount(groups[b - 1000], minlength=len(sizes)) for b in batches])
    if mix == 'equal': assert np.ptp(shares, axis=1).max() <= 1
    if mix == 'homogeneous': assert ((shares > 0).sum(1) == 1).all()

def test_every_row_once(stores, split):
    train = rows_of(stores, split, 'train', scored=False).index
    dl = pretraining_loaders(stores, split, bs=7, draw=None).train
    for _ in range(2):
        drawn = torch.cat([y for _,y in dl]).tolist()
        assert len({*drawn}) == len(drawn) == len(train) // 7 * 7 and {*drawn} <= {*train}
    valid = pretraining_loaders(stores, split, bs=7, draw=None).valid
    for _ in range(2): assert torch.cat([y for _,y in valid]).tolist() == rows_of(stores, split, 'valid', scored=False).index.tolist()

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), labels=st.sampled_from([.05, .3, 1]), mix=st.sampled_from(MIXES))
def test_nobody_of_another_part_and_nothing_unscored(stores, seed, labels, mix):
    split = holdout_split(stores.nights, seed=seed)
    parts = split.part_of(stores.epochs).to_numpy()
    labelled = labelled_loaders(stores, split, labels, bs=50, mix=mix, min_steps=3)
    pretraining = pretraining_loaders(stores, split, bs=50, mix=mix)
    for dls in (labelled, pretraining):
        for part,dl in zip(('train', 'valid'), dls):
            order = dl.order(seed)
            assert {*parts[order]} == {part}
            if dls is labelled: assert (stores.stages[order] != UNSCORED).all()
    assert len(labelled.valid.rows) == ((parts == 'valid') & (stores.stages != UNSCORED)).sum()
    scored = ((parts == 'train') & (stores.stages != UNSCORED)).sum()
    assert len(labelled.train.rows) == pytest.approx(labels*scored, abs=8)
    (rows,_),_ = pretraining.train.one_batch()
    night = stores.night_of
    others,_ = draw_triplets(pretraining.train.neighbours, rows.numpy(), rng('draw', 0, 0, 0))
    assert (night[others] == night[rows.numpy()][:, None]).all()   # company comes from the same night

def test_what_is_in_a_batch(stores, split):
    dl = pretraining_loaders(stores, split, bs=64).train
    (rows,parts),y = batch = dl.one_batch()
    assert find_bs(batch) == 64 and same(rows, y) and {*parts} == {*CHANNELS}
    others,order = draw_triplets(dl.neighbours, rows.numpy(), rng('draw', 0, 0, 0))
    places = torch.cat([p['at'] for p in parts.values()])
    assert sorted(places.tolist()) == [*range(64)]
    for i,(cohort,part) in enumerate(parts.items()):
        store,at = stores.stores[i], part['at'].numpy()
        local = rows.numpy()[at] - stores.first[i]
        assert store.cohort == cohort
        assert np.array_equal(part['x'], store.read(local))
        for k in (0, 1): assert np.array_equal(part['others'][:, k], store.read(others[at, k] - stores.first[i]))
        assert np.array_equal(part['order'], order[at])
        for k in ('there', 'median', 'scale'): assert np.allclose(part[k], getattr(store, k)[store.night_of[local]])
        assert (part['x'].abs().amax(-1) > 0).equal(part['there'])
        assert [part[k].dtype for k in ('x', 'others', 'there', 'median', 'scale', 'order', 'at')] == \
               [torch.float32, torch.float32, torch.bool, torch.float32, torch.float32, torch.int64, torch.int64]
    (moved,their),target = to_device(batch, 'meta')
    assert {v.device.type for v in flat((moved, their, target)).values()} == {'meta'}

def test_held_in_memory_is_the_same(folders, stores, split):
    held = Stores(folders, in_memory=True)
    assert all_same(pretraining_loaders(stores, split, bs=32).train, pretraining_loaders(held, split, bs=32).train)

@pytest.mark.parametrize('modalities', [('EEG', 'EOG', 'EMG'), ('EMG',)])
def test_modalities(stores, split, modalities):
    (rows,parts),_ = labelled_loaders(stores, split, bs=200, modalities=modalities).train.one_batch()
    (whole_rows,whole),_ = labelled_loaders(stores, split, bs=200).train.one_batch()
    assert torch.equal(rows, whole_rows)
    subjects = stores.epochs.subject.to_numpy()[rows]
    for cohort,part in parts.items():
        kinds = np.array([parse_channel(c).modality for c in CHANNELS[cohort]])
        for m,p in part.items():
            assert torch.equal(p['x'], whole[cohort]['x'][:, kinds == m])
            expected = (kinds == m).any() & ~np.isin(subjects[p['at']], dict(EMG=['a'], EOG=['b']).get(m, []))
            assert np.array_equal(p['there'].any(1), expected)

class Toy(nn.Module):
    "Says from how loud an epoch is which stage it has."
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 5))
    def forward(self, inputs):
        rows,parts = inputs
        loud = torch.empty(len(rows), 1)
        for part in parts.values(): loud[part['at']] = part['x'].std(-1).amax(1, keepdim=True)
        return self.layers(loud)

def test_a_learner_trains(stores, split):
    torch.manual_seed(0)
    dls = labelled_loaders(stores, split, bs=32, device='cpu')
    learn = Learner(dls, Toy(), loss_func=F.cross_entropy, lr=.02)
    with learn.no_logging():
        before = learn.validate()[0]
        learn.fit(1)
        once = learn.recorder.values[-1][0]
        learn.fit(4)
    assert np.isfinite(learn.recorder.values).all() and learn.recorder.values[-1][0] < .8*once
    assert np.isfinite(before)
    for i in (0, 1):
        preds,y = learn.get_preds(ds_idx=i)                        # in order, complete, also of the training part
        assert np.array_equal(y, stores.stages[dls[i].rows]) and len(preds) == len(y)
    assert dls.train._next == (5, 0)                               # a pass for each of fastai's

@settings(max_examples=150, deadline=None)
@given(present=st.lists(st.lists(st.booleans(), min_size=1, max_size=60), min_size=1, max_size=3), first=st.integers(0, 100),
       near=st.integers(2, 8), far=st.integers(1, 40), seed=st.integers(0, 9))
def test_what_is_drawn_is_legal(present, first, near, far, seed):
    "Nights with any gaps: legal draws where there are any, and none otherwise."
    epoch = np.concatenate([np.flatnonzero(p) + first for p in present]).astype(int)
    night = np.concatenate([np.full(sum(p), i) for i,p in enumerate(present)]).astype(int)
    if not len(epoch): return
    nb,t = Neighbours(night, epoch), np.arange(len(epoch))
    others,y = draw_triplets(nb, t, rng('test', seed), near, far)
    assert abs(y.sum()) <= 1
    for r,(mid,last),sign in zip(t, others, y):
        e = set(epoch[night == night[r]].tolist())
        outside = lambda l: [i for i in e if epoch[r] - far <= i < epoch[r] or l < i <= l + far]
        possible = [l for l in e if epoch[r] < l <= epoch[r] + near and any(epoch[r] < i < l for i in e) and outside(l)]
        assert (sign != 0) == bool(possible)
        if sign == 0: assert mid == last == r
        else:
            assert night[mid] == night[last] == night[r] and epoch[last] in possible
            assert epoch[r] < epoch[mid] < epoch[last] if sign == 1 else epoch[mid] in outside(epoch[last])
    others,y = draw_runs(nb, t, n=near)
    for r,following,whole in zip(t, others, y):
        e = {int(epoch[i]): i for i in t if night[i] == night[r]}
        run = [e.get(int(epoch[r]) + k) for k in range(1, near)]
        assert whole == (None not in run)
        assert following.tolist() == (run if whole else [r]*(near - 1))
    partner,y = draw_pairs(nb, t, rng('test', seed), near, far + near)
    assert abs(y.sum()) <= 1
    for r,(o,),sign in zip(t, partner, y):
        apart = {abs(int(i) - int(epoch[r])) for i in epoch[night == night[r]]} - {0}
        assert (sign != 0) == (min(apart, default=99) <= near and max(apart, default=0) >= far + near)
        if sign: assert night[o] == night[r] and o != r
        if sign == 1: assert abs(epoch[o] - epoch[r]) <= near
        if sign == -1: assert abs(epoch[o] - epoch[r]) >= far + near

def test_runs_in_a_batch(stores, split):
    "What a model of the future sees: consecutive epochs of one night, by their numbers in the recording."
    dl = pretraining_loaders(stores, split, draw=partial(draw_runs, n=4), bs=64).train
    (rows,parts),_ = dl.one_batch()
    epochs,whole = stores.epochs, 0
    for i,(cohort,part) in enumerate(parts.items()):
        assert part['others'].shape[1:] == (3, len(CHANNELS[cohort]), 3000)
        for k,row in enumerate(rows[part['at']].tolist()):
            if not part['order'][k]: continue
            whole += 1
            run = epochs.loc[row:row + 3]
            assert run.epoch.tolist() == [*range(run.epoch[row], run.epoch[row] + 4)] and len({*zip(run.subject, run.night)}) == 1
            assert np.array_equal(part['others'][k], stores.stores[i].read(np.arange(row + 1, row + 4) - stores.first[i]))
    assert 0 < whole < 64                                          # some begin where a night ends

def test_what_fastai_asks_of_labelled_batches(stores, split):
    from fastai.interpret import ClassificationInterpretation
    from fastai.losses import CrossEntropyLossFlat
    dls = labelled_loaders(stores, split, bs=32, device='cpu')
    assert [*dls.vocab] == ['W', 'N1', 'N2', 'N3', 'R'] and dls.c == 5 and [*dls.test_dl(dls.valid.rows).vocab] == [*dls.vocab]
    pretraining = pretraining_loaders(stores, split, bs=32)
    assert not hasattr(pretraining, 'vocab') and not hasattr(pretraining, 'c')
    learn = Learner(dls, Toy(), loss_func=CrossEntropyLossFlat())
    confusion = ClassificationInterpretation.from_learner(learn).confusion_matrix()
    preds,y = learn.get_preds()
    assert np.array_equal(confusion, [[((y == s) & (preds.argmax(1) == q)).sum() for q in range(5)] for s in range(5)])

def test_a_drawn_batch_says_whose_it_is(stores, split):
    import matplotlib.pyplot as plt
    for dls in (labelled_loaders(stores, split, bs=8), pretraining_loaders(stores, split, bs=8, modalities=('EEG', 'EMG'))):
        batch = dls.train.one_batch()
        dls.train.show_batch(batch, max_n=8)
        titles = [ax.get_title() for ax in plt.gcf().axes][:8]
        plt.close()
        for title,row in zip(titles, batch[0][0].tolist()):
            of = stores.epochs.loc[row]
            stage = 'not scored' if of.stage == UNSCORED else 'W N1 N2 N3 R'.split()[of.stage]
            assert title == f'{of.cohort} {of.subject}, night {of.night}, epoch {of.epoch}: {stage}'

def test_recipes_are_not_mixed(folders, tmp_path):
    nights = pd.DataFrame([dict(subject='a', night=1, length=7)])
    for name,recipe in (('raw', 'sleepsmc'), ('same', Recipe('my own'))):
        prepare(Cohort(name, nights, CHANNELS['lab'], partial(read, cohort='lab')), tmp_path/name, recipe, progress=False)
    with pytest.raises(StoreError, match=r'different recipes .*lab: stager, eeg \[0.3, 40.0\].*raw: sleepsmc, eeg \[None, None\]'):
        Stores([folders[2], folders[1], tmp_path/'raw'])
    with pytest.raises(StoreError, match='different recipes'): labelled_loaders([tmp_path/'raw', folders[0]])
    assert Stores([folders[2], tmp_path/'same']).cohorts == ['lab', 'same']          # another name for the same

def test_what_cannot_be(stores, folders, split):
    with pytest.raises(StoreError, match='one store'): Stores([])
    with pytest.raises(StoreError, match='named by its folder'): Stores(3)
    for wrong in ([], {}, 0, [split], stores.nights):
        for make in (labelled_loaders, pretraining_loaders):
            with pytest.raises(SplitError, match='this is no split'): make(stores, wrong)
    with pytest.raises(SplitError, match='cannot be read'): labelled_loaders(stores, '')
    with pytest.raises(StoreError, match='one store'): Stores([folders[0]]*2)
    with pytest.raises(StoreError, match="expected proportional or equal or homogeneous; found 'equl'"): labelled_loaders(stores, split, mix='equl')
    with pytest.raises(StoreError, match='found ECG'): labelled_loaders(stores, split, modalities=('EEG', 'ECG'))
    with pytest.raises(StoreError, match="found 'EEG'"): labelled_loaders(stores, split, modalities='EEG')
    with pytest.raises(StoreError, match='no epoch'): EpochLoader(stores, [])
    with pytest.raises(StoreError, match='nobody scored'): EpochLoader(stores, np.flatnonzero(stores.stages == UNSCORED))
    with pytest.raises(SplitError, match='does not know'): labelled_loaders(stores, holdout_split(stores.stores[0].nights))
