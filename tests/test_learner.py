"""Learners against plain PyTorch loops, kills at any moment, and people who must not be seen twice."""
import json, os, random, subprocess, sys
from dataclasses import replace
from functools import partial
from itertools import chain
from types import SimpleNamespace

import fastai.callback.all
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from safetensors import safe_open
from safetensors.torch import save
from torch.testing import assert_close

from sleepnb.callbacks import Checkpoint, KeepBest, Unfreeze, stage_metrics
from sleepnb.core import UNSCORED, SleepnbError, SplitError, WeightsError, seed_of
from sleepnb.data.loaders import Stores, draw_triplets, labelled_loaders, pretraining_loaders, scoring_loaders
from sleepnb.data.psg import Night
from sleepnb.data.splits import Split
from sleepnb.data.store import Cohort, prepare
from sleepnb.learner import (extract_features, finetune_learner, load_learner, mtssrl_learner, predict_stages, save_learner,
                             score_subsets, sleepsmc_learner, supervised_learner)
from sleepnb.models.cam import sensor_positions
from sleepnb.models.network import Backbone, StageNetwork, move_to
from sleepnb.montage import parse_channel
from sleepnb.multimodal.sleepsmc import SleepSMC, SleepSMCLoss
from sleepnb.ssrl.mtssrl import MTSSRL
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights, read_description, save_weights

MONTAGES = dict(home=('Fpz-Cz', 'Pz-Oz'), clinic=('F4-M1', 'C4-M1', 'O2-M1'))
WARDS = dict(ward=('C4-M1', 'E1-M2', 'Chin'), eyes=('C3-M2', 'E1-M2'))          # the second has no EMG
MODALITIES = ('EEG', 'EOG', 'EMG')
PEOPLE = [(cohort, s) for cohort in MONTAGES for s in 'abcde']
EXACT = dict(rtol=0, atol=0)

def read_synth(row, cohort):
    channels = (MONTAGES | WARDS)[cohort]
    made = synth_night(channels, n_epochs=6, subject=f'{cohort} {row["subject"]}')
    return Night(list(made.x), [100]*len(made.x), [parse_channel(c) for c in channels], made.stages)

def among(train, valid, test, cohorts=tuple(MONTAGES)):
    return Split(*([(c, s) for c in cohorts for s in 'abcde' if s in part] for part in (train, valid, test)))

def prepared(folder, montages, recipe):
    for name in montages:
        nights = pd.DataFrame(dict(subject=list('abcde'), night=1))
        prepare(Cohort(name, nights, montages[name], partial(read_synth, cohort=name)), folder/name, recipe, progress=False)
    return [folder/name for name in montages]

@pytest.fixture(scope='module')
def folders(tmp_path_factory): return prepared(tmp_path_factory.mktemp('stores'), MONTAGES, 'mtssrl')

@pytest.fixture(scope='module')
def wards(tmp_path_factory): return prepared(tmp_path_factory.mktemp('wards'), WARDS, 'sleepsmc')

@pytest.fixture(scope='module')
def ward_loaders(wards):
    stores = Stores(wards)
    def make(bs=8, **kwargs): return labelled_loaders(stores, among('abc', 'd', 'e', WARDS), bs=bs, modalities=MODALITIES, **kwargs)
    return make

@pytest.fixture(scope='module')
def stores(folders): return Stores(folders)

@pytest.fixture(scope='module')
def split(): return among('abc', 'd', 'e')

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def quietly(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def fitted(learn, *args, **kwargs):
    quietly(learn, lambda l: l.fit(*args, **kwargs))
    return learn

def weights(network): return {k: v.clone() for k,v in network.state_dict().items()}

MAKERS = ('mtssrl', 'finetune', 'supervised', 'sleepsmc')

@pytest.fixture(params=MAKERS)
def make(request, stores, split, ward_loaders):
    "Makes one of the four learners."
    labelled,pretraining = labelled_loaders(stores, split, bs=8), pretraining_loaders(stores, split, bs=8)
    torch.manual_seed(7)
    backbone = Backbone(MONTAGES)
    return dict(mtssrl=partial(mtssrl_learner, pretraining),
                finetune=partial(finetune_learner, labelled, backbone, unfreeze=(1, 2, 3)),
                supervised=partial(supervised_learner, labelled), sleepsmc=partial(sleepsmc_learner, ward_loaders()))[request.param]

# What fastai's learners can do

@pytest.mark.parametrize('how', ['fit', 'slice', 'one cycle', 'flat'])
def test_every_schedule_trains(make, how):
    learn = make()
    before = weights(learn.model)
    quietly(learn, {'fit': lambda l: l.fit(1), 'slice': lambda l: l.fit(1, slice(1e-4, 1e-2)),
                    'one cycle': lambda l: l.fit_one_cycle(1, 1e-2), 'flat': lambda l: l.fit_flat_cos(1, 1e-2)}[how])
    lrs = learn.opt.hypers[0]['lr'], learn.opt.hypers[-1]['lr']
    assert (lrs[0] < lrs[1]) == (how == 'slice')
    assert any(not torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert np.isfinite(learn.recorder.values).all()

def test_looking_trains_nothing_and_needs_no_training(make, capsys):
    learn = make()
    before = weights(learn.model)
    first = quietly(learn, lambda l: list(l.validate()))
    quietly(learn, lambda l: l.show_training_loop())
    assert 'Start Fit' in capsys.readouterr().out
    if isinstance(learn.model, (StageNetwork, SleepSMC)):
        pred,true = quietly(learn, lambda l: l.get_preds())
        assert pred.shape == (len(learn.dls.valid.rows), 5)
        assert 'Total params: ' in quietly(learn, lambda l: l.summary())
        assert_close(pred.sum(1), torch.ones(len(pred)))
        assert_close(F.nll_loss(pred.log(), true).item(), first[0], atol=1e-4, rtol=1e-4)
    assert quietly(learn, lambda l: list(l.validate())) == first
    assert_close(weights(learn.model), before, **EXACT)

def test_looking_leaves_what_a_training_wrote(make, tmp_path):
    learn = fitted(make(cbs=Checkpoint(file := tmp_path/'c.safetensors')), 1)
    kept = [getattr(learn, n).state() for n in ('task_record', 'keep_best', 'modality_record') if hasattr(learn, n)]
    rows,written = [len(k.get('rows', ())) for k in kept], file.read_bytes()
    quietly(learn, lambda l: l.validate())
    if isinstance(learn.model, (StageNetwork, SleepSMC)): predict_stages(learn)
    after = [getattr(learn, n).state() for n in ('task_record', 'keep_best', 'modality_record') if hasattr(learn, n)]
    assert [len(k.get('rows', ())) for k in after] == rows and [k.get('pass_') for k in after] == [k.get('pass_') for k in kept]
    assert file.read_bytes() == written

def test_lr_find_leaves_no_trace(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make(cbs=[Checkpoint(tmp_path/'c.safetensors')])
    before = weights(learn.model)
    found = quietly(learn, lambda l: l.lr_find(num_it=8, show_plot=False))
    assert 1e-7 < found.valley < 10 and not (tmp_path/'c.safetensors').exists()
    assert_close(weights(learn.model), before, **EXACT)
    assert_close(weights(fitted(learn, 1).model), weights(fitted(make(), 1).model), **EXACT)

def test_fastais_own_ways_are_not_hidden(make):
    learn = make()
    learn.create_opt()
    learn.freeze()
    assert learn.opt.frozen_idx == len(learn.opt.param_lists) - 1
    learn.unfreeze()
    assert learn.opt.frozen_idx == 0

# A Learner does what a loop does

def adamw(groups, lr): return torch.optim.AdamW([dict(params=list(p), weight_decay=wd) for p,wd in groups], lr=lr)

def loop(dls, network, opt, passes, loss, after=lambda: None):
    "Plain PyTorch; the weights after each pass."
    made = []
    for p in range(passes):
        dls.train.set_pass(p)
        network.train()
        for i,(inputs,y) in enumerate(dls.train):
            torch.manual_seed(seed_of('step', 0, 'train', p, i, 0))
            loss(network(inputs), y).backward()
            opt.step()
            opt.zero_grad()
            after()
        made.append(weights(network))
    return made

def test_pretraining_is_the_loop(stores, split):
    dls = pretraining_loaders(stores, split, bs=8)
    learn = fitted(mtssrl_learner(dls), 2)
    torch.manual_seed(0)
    network = MTSSRL(Backbone(MONTAGES, drop=0.))
    rest = [p for n,p in network.named_parameters() if n != 'weighting.raw']
    opt = adamw([(rest, .01), ([network.weighting.raw], 0)], 1e-3)
    made = loop(dls, network, opt, 2, lambda pred,_: pred['loss'], network.weighting.project)
    assert_close(weights(learn.model), made[-1], **EXACT)

def test_supervised_training_is_the_loop(stores, split):
    dls = labelled_loaders(stores, split, bs=8)
    learn = fitted(supervised_learner(dls, lr=3e-3, patience=None), 3)
    torch.manual_seed(0)
    network = StageNetwork(Backbone(MONTAGES))
    made = loop(dls, network, adamw([(network.parameters(), .01)], 3e-3), 3, F.cross_entropy)
    assert_close(weights(learn.model), made[learn.keep_best.kept['pass_']], **EXACT)
    f1 = [v[learn.recorder.metric_names[1:].index('macro_f1')] for v in learn.recorder.values]
    assert learn.keep_best.kept['pass_'] == int(np.argmax(f1))

def test_variances_do_not_decay(stores, split):
    ends = []
    for wd in (0., .5):
        learn = mtssrl_learner(pretraining_loaders(stores, split, bs=30), wd=wd)
        learn.model.weighting.raw.data.fill_(.01)
        ends.append(weights(fitted(learn, 1).model))
    assert len(learn.dls.train) == 1                            # one step, before which the losses are the same
    assert_close(ends[0]['weighting.raw'], ends[1]['weighting.raw'], **EXACT)
    assert (ends[0]['weighting.raw'] != .01).all()
    assert not torch.equal(ends[0]['backbone.alignment.cams.0.heads'], ends[1]['backbone.alignment.cams.0.heads'])

def test_batches_without_an_answer_leave_the_monitors_of_others(stores, split):
    learn = mtssrl_learner(dls := pretraining_loaders(stores, split, bs=11))
    assert len(dls.valid.rows) % 11 == 1                        # the last epoch of a night: no triplet, and no direction
    fitted(learn, 1)
    assert np.isfinite(learn.recorder.values[-1]).all()
    class Unanswered(Callback):
        def before_batch(self):
            if self.training and self.iter == 1: self.learn.xb = ((self.x[0], {k: p | dict(order=0*p['order']) for k,p in self.x[1].items()}),)
    learn = fitted(mtssrl_learner(dls, cbs=Unanswered()), 1)
    assert len(dls.train) > 1 and .2 < learn.task_record.table.set_index('task').loc['TS', 'TS accuracy'] < .8

class Watch(Callback):
    "For each pass: which parts were in training mode, which ask for gradients, and whose weights and statistics changed."
    order = 50
    def state(self, part): return [v.clone() for m in part for v in m.state_dict().values()]
    def before_fit(self): self.seen = []
    def before_train(self): self.before = {k: self.state(p) for k,p in self.model.parts.items()}
    def before_batch(self):
        if not self.training: return
        parts = self.model.parts.items()
        self.modes = {k for k,p in parts if any(m.training for module in p for m in module.modules())}
        self.grads = {k for k,p in parts if any(q.requires_grad for m in p for q in m.parameters())}
    def after_train(self):
        now = {k: self.state(p) for k,p in self.model.parts.items()}
        changed = {k for k in now if any(not torch.equal(a, b) for a,b in zip(now[k], self.before[k]))}
        statistics = {k for k,p in self.model.parts.items() if any('running' in n for m in p for n in m.state_dict())}
        moved = {k for k in statistics if any(not torch.equal(a, b) for a,b,n in zip(
            now[k], self.before[k], chain.from_iterable(m.state_dict() for m in self.model.parts[k])) if 'running' in n)}
        self.seen.append((self.modes, self.grads, changed, statistics, moved))

@pytest.mark.parametrize('unfreeze', [(1, 2, 3), (1, 2, 3, 4)])
def test_what_is_frozen_stays(stores, split, unfreeze):
    torch.manual_seed(7)
    backbone = Backbone(MONTAGES)
    before = weights(backbone.alignment)
    labelled = labelled_loaders(stores, split, bs=8)
    learn = finetune_learner(labelled, backbone, lr=1e-2, unfreeze=unfreeze, patience=None, cbs=Watch())
    fitted(learn, len(unfreeze) + 1)
    names = list(learn.model.parts)
    for pass_,(modes,grads,changed,statistics,moved) in enumerate(learn.watch.seen):
        free = {*names[len(names) - 1 - pass_:]}
        assert modes == grads == changed == free
        assert statistics and moved == statistics & free
    assert learn.watch.seen[-1][-1] == statistics
    if len(unfreeze) == 3:
        assert 'alignment' not in free
        assert_close(weights(learn.model.backbone.alignment), before, **EXACT)

def test_a_training_begins_with_everything_free(stores, split):
    class See(Callback):
        "What torch's DistributedDataParallel would find: it never exchanges what is frozen when a training begins."
        order = 11
        def before_fit(self): self.free = all(p.requires_grad for p in self.model.parameters())
    learn = finetune_learner(labelled_loaders(stores, split, bs=8), Backbone(MONTAGES), cbs=See())
    for _ in range(2): assert fitted(learn, 1).see.free and not all(p.requires_grad for p in learn.model.parameters())

def test_the_best_loss_is_the_lowest(stores, split):
    class ByHand(Callback):
        order = 55
        def after_epoch(self): self.recorder.values[-1][1] = [3., 1., 2.][self.epoch]
    learn = supervised_learner(labelled_loaders(stores, split, bs=8))
    learn.remove_cb(learn.keep_best)
    assert fitted(learn, 3, cbs=[ByHand(), keep := KeepBest('valid_loss')]) and keep.kept['pass_'] == 1

def test_equal_passes_are_decided_by_the_loss(stores, split):
    class ByHand(Callback):
        order = 55
        def after_epoch(self):
            names = self.recorder.metric_names[1:]
            for name,v in dict(accuracy=[.5, .7, .7, .7, .6], valid_loss=[1., 3., 2., 2., .1]).items():
                self.recorder.values[-1][names.index(name)] = v[self.epoch]
    for tie,best in ((None, 1), ('valid_loss', 2)):
        learn = supervised_learner(labelled_loaders(stores, split, bs=8))
        learn.remove_cb(learn.keep_best)
        assert fitted(learn, 5, cbs=[ByHand(), keep := KeepBest('accuracy', tie=tie)]) and keep.kept['pass_'] == best

# Several modalities

def test_sleepsmc_training_is_the_loop(ward_loaders):
    dls = ward_loaders()
    learn = fitted(sleepsmc_learner(dls, primary=None), 2)
    torch.manual_seed(0)
    network = SleepSMC(WARDS, primary=None)
    made = loop(dls, network, torch.optim.Adam(network.parameters(), 1e-3), 2, SleepSMCLoss(network))
    assert_close(weights(learn.model), made[learn.keep_best.kept['pass_']], **EXACT)
    values = [dict(zip(learn.recorder.metric_names[1:], v)) for v in learn.recorder.values]
    assert learn.keep_best.kept['pass_'] == max(range(2), key=lambda i: (values[i]['accuracy'], -values[i]['valid_loss']))

def ends(dls, **kwargs):
    learn = sleepsmc_learner(dls, **kwargs)
    learn.remove_cb(learn.keep_best)
    return weights(fitted(learn, 1).model)

@pytest.mark.parametrize('contrast', [False, True])
def test_without_weights_one_training_serves_all_primaries(ward_loaders, contrast):
    made = [ends(ward_loaders(), primary=m, uncertainty=False, contrast=contrast) for m in MODALITIES]
    for other in made[1:]: assert_close(other, made[0], **EXACT)
    if contrast: assert any(not torch.equal(v, made[0][k]) for k,v in ends(ward_loaders(), primary='EEG').items())
    else: assert_close(ends(ward_loaders(), contrast=False), made[0], **EXACT)     # weights of what?

def test_the_record_is_what_the_loss_weighed(ward_loaders):
    class Note(Callback):
        order = 45
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append({k: v for k,v in self.loss_func.last.items()})
    learn = fitted(sleepsmc_learner(ward_loaders(), primary='EOG', cbs=Note()), 1)
    table = learn.modality_record.table.set_index('modality')
    for i,m in enumerate(MODALITIES):
        known = torch.cat([s['known'][i] for s in learn.note.seen])
        w,r = (torch.cat([s[k][i] for s in learn.note.seen])[known] for k in ('weights', 'variances'))
        assert len(w) == known.sum() < len(known) if m == 'EMG' else known.all()   # one cohort has none
        assert table.loc[m, ['weight', 'low', 'high', 'variance']].tolist() == pytest.approx(
            [w.mean().item(), *np.quantile(w.numpy(), [.05, .95]), r.mean().item()], rel=1e-4)
        assert table.loss[m] == pytest.approx(np.mean([s['losses'][m].item() for s in learn.note.seen]), rel=1e-5)
    assert table.loc['EOG', ['weight', 'low', 'high', 'variance']].tolist() == [1, 1, 1, 0]
    assert {*table.index} == {*MODALITIES, 'contrast'} and np.isnan(table.weight['contrast'])
    plain = fitted(sleepsmc_learner(ward_loaders(), contrast=False), 1).modality_record
    assert 'weight' not in plain.table and plain.table.modality.tolist() == [*MODALITIES]
    plain.plot()

@pytest.mark.parametrize('primary, channel_mode', [('EOG', 'joint'), (None, 'shared'), (None, 'cam')])
def test_sleepsmc_weights_go_through_a_file(ward_loaders, tmp_path, primary, channel_mode):
    dls = ward_loaders()
    learn = fitted(sleepsmc_learner(dls, primary, channel_mode, loss=dict(score='negative', n_passes=3)), 1)
    path = save_learner(learn, tmp_path/'w.safetensors')
    described = read_description(path)
    assert described['network'] == 'SleepSMC' and described['modalities'] == [*MODALITIES] and described['fitted']['ward'] == ['a', 'b', 'c']
    places = {k: [[v[0], *sensor_positions([v[0]])[0].tolist()]] for k,v in WARDS.items()}
    assert described['sensors'] == (places if channel_mode == 'cam' else {})
    network,_ = load_weights(path)
    assert_close(weights(network), weights(learn.model), **EXACT)
    again = load_learner(path, dls)
    assert again.loss_func.config == learn.loss_func.config and again.loss_func.passes['n_passes'] == 3
    for using in (None, ('EMG',), ('EEG', 'EOG')): assert predict_stages(again, 'valid', using).equals(predict_stages(learn, 'valid', using))
    stores = dls.train.stores
    with pytest.raises(SplitError, match='already seen'):
        load_learner(path, labelled_loaders(stores, among('bcd', 'e', 'a', WARDS), bs=8, modalities=MODALITIES))
    load_weights(path, into=SleepSMC(**learn.model.config))
    with pytest.raises(WeightsError, match='built otherwise'): load_weights(path, into=SleepSMC(**learn.model.config | dict(clip=9.)))
    with pytest.raises(WeightsError, match='no backbone'): finetune_learner(labelled_loaders(stores, among('abc', 'd', 'e', WARDS)), path)

def test_people_of_another_cohort_are_all_tested(wards, ward_loaders, tmp_path):
    "Any montage will do for a CAM, also one without a modality; and the same people under another name come out the same."
    learn = sleepsmc_learner(ward_loaders(), None, 'cam')
    path = save_learner(learn, tmp_path/'w.safetensors')
    nights = pd.DataFrame(dict(subject=list('vwx'), night=1))
    for name,channels in dict(bare=('Fz-M1', 'C3-M2'), same=WARDS['ward']).items():
        read = lambda row: read_synth(row | dict(subject='abc'['vwx'.index(row['subject'])]), 'ward')
        if name == 'bare':
            def read(row):
                made = synth_night(channels, n_epochs=6, subject=row['subject'])
                return Night(list(made.x), [100]*2, [parse_channel(c) for c in channels], made.stages)
        prepare(Cohort(name, nights, channels, read), tmp_path/name, 'sleepsmc', progress=False)
    bare = predict_stages(load_learner(path, scoring_loaders(tmp_path/'bare', modalities=('EEG',))))
    assert bare.subject.value_counts().to_dict() == dict(v=6, w=6, x=6) and np.isfinite(bare.p_W).all() and bare.p_W.nunique() > 1
    same = predict_stages(load_learner(path, scoring_loaders(tmp_path/'same', modalities=MODALITIES)))
    known = predict_stages(learn, 'train').query("cohort == 'ward'")
    assert np.allclose(same.p_W, known.p_W, atol=1e-5) and same.stage.tolist() == known.stage.tolist()
    with pytest.raises(SplitError, match='seen some of these people .found eyes/a, eyes/b, eyes/c, eyes/d'):
        load_learner(path, scoring_loaders(wards[1], modalities=('EEG', 'EOG')))

def test_every_subset_stages(ward_loaders):
    learn = fitted(sleepsmc_learner(ward_loaders(), primary=None), 1)
    table = score_subsets(learn, 'train', n_boot=20)
    assert [*table.index] == ['EEG+EOG+EMG', 'EEG+EOG', 'EEG+EMG', 'EOG+EMG', 'EEG', 'EOG', 'EMG']
    for name in table.index:
        found = predict_stages(learn, 'train', tuple(name.split('+')))
        assert table.loc[name, ('accuracy', 'value')] == pytest.approx((found.pred == found.stage).mean())
    eyes = predict_stages(learn, 'train', ('EMG',)).query("cohort == 'eyes'")
    assert np.allclose(eyes[[f'p_{s}' for s in ('W', 'N1', 'N2', 'N3', 'R')]], .2)  # nothing is known
    assert learn.model.using is None
    with pytest.raises(SleepnbError, match='no modalities of the network'): predict_stages(learn, 'train', ('ECG',))
    assert learn.model.using is None
    epochs,features = extract_features(learn, 'EMG', 'train')
    assert features.shape == (18, 256) and {*epochs.cohort} == {'ward'}
    x = predict_stages(learn, 'train', ('EMG',)).query("cohort == 'ward'")
    assert (epochs.index == x.index).all()

def test_a_checkpoint_knows_its_loss(ward_loaders, tmp_path):
    def train(**kwargs): return fitted(sleepsmc_learner(ward_loaders(), cbs=Checkpoint(tmp_path/'c.safetensors'), **kwargs), 1)
    train()
    train()
    for kwargs in (dict(uncertainty=False), dict(contrast=False), dict(loss=dict(score='negative')), dict(model=dict(drop=.1)), dict(primary='EOG')):
        with pytest.raises(WeightsError, match='of another training'): train(**kwargs)

# Whom the weights have seen

def test_people_go_on_from_file_to_file(folders, stores, tmp_path):
    first = fitted(mtssrl_learner(pretraining_loaders(stores, among('a', 'b', 'cde'), bs=4)), 1)
    save_learner(first, tmp_path/'first.safetensors')
    second = finetune_learner(labelled_loaders(stores, among('ac', 'b', 'de'), bs=4), tmp_path/'first.safetensors')
    save_learner(fitted(second, 1), tmp_path/'second.safetensors', why='a test')
    described = read_description(tmp_path/'second.safetensors')
    assert described['fitted'] == {c: ['a', 'c'] for c in sorted(MONTAGES)} and described['notes'] == dict(why='a test')
    assert described['judged'] == {c: ['b'] for c in sorted(MONTAGES)} and described['split']['id'] == second.dls.split.id
    for origin in (tmp_path/'second.safetensors', second):
        at_clinic = Split(*([('clinic', s) for s in part] for part in ('ac', 'bd', 'e')))
        third = finetune_learner(labelled_loaders(folders[1], at_clinic, bs=4), origin)
        described = read_description(save_learner(third, tmp_path/'third.safetensors'))
        assert described['fitted'] == dict(clinic=['a', 'c'], home=['a', 'c'])
        assert described['judged'] == dict(clinic=['b', 'd'], home=['b'])

@pytest.mark.parametrize('train,valid,test,who', [('cd', 'e', 'ab', 'test'), ('acd', 'e', 'b', 'test'), ('abd', 'e', 'c', 'test'),
                                                  ('bcd', 'a', 'e', 'valid'), ('abc', 'd', 'e', None), ('acd', 'b', 'e', None)])
def test_who_was_seen_is_not_tested(stores, tmp_path, train, valid, test, who):
    learn = mtssrl_learner(pretraining_loaders(stores, among('ac', 'b', 'de'), bs=4))
    save_learner(learn, path := tmp_path/'w.safetensors')
    dls = labelled_loaders(stores, among(train, valid, test), bs=4)
    for origin in (path, str(path), learn):
        if who is None: finetune_learner(dls, origin)
        else:
            with pytest.raises(SplitError, match=f'already seen .* {who} subjects'): finetune_learner(dls, origin)

def test_one_cohort_is_enough_to_be_refused(folders, stores, tmp_path):
    learn = mtssrl_learner(pretraining_loaders(folders[0], Split([('home', 'a')], [('home', 'b')], [('home', s) for s in 'cde']), bs=4), align='shared')
    with pytest.raises(SplitError, match='home/a'): finetune_learner(labelled_loaders(stores, among('bc', 'd', 'ae'), bs=4), learn)
    finetune_learner(labelled_loaders(stores, among('abc', 'd', 'e'), bs=4), learn)

def test_unscored_epochs_do_not_count(stores, split):
    dls = labelled_loaders(stores, split, bs=100)
    learn = supervised_learner(dls)
    logits,y = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 1])
    keep = y != UNSCORED
    assert_close(learn.loss_func(logits, y), F.cross_entropy(logits[keep], y[keep]))
    rows,stages = dls.valid.rows, stores.stages.copy()
    try:
        stores.stages[rows[::3]] = UNSCORED
        assert (dls.valid.one_batch()[1] == UNSCORED).sum() == len(rows[::3])
        with_them = quietly(learn, lambda l: list(l.validate()))
        without = quietly(learn, lambda l: list(l.validate(dl=dls.valid.new(np.delete(rows, slice(None, None, 3))))))
        assert_close(with_them, without, atol=1e-6, rtol=1e-6)
    finally: stores.stages[:] = stages

# Weights files

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp('weights')/'whole.safetensors'
    save_weights(path, network := StageNetwork(Backbone(MONTAGES)), fitted=PEOPLE[:3])
    return SimpleNamespace(bytes=path.read_bytes(), weights=weights(network), description=read_description(path))

def test_a_damaged_file_says_so(whole, tmp_path):
    g,header = random.Random(0), 8 + int.from_bytes(whole.bytes[:8], 'little')
    def damage(i):
        made = bytearray(whole.bytes)
        if i % 3 == 0: return made[:g.randrange(len(made))]
        for _ in range(g.choice([1, 1, 2, 50])): made[g.randrange(*((0, header) if i % 3 == 1 else (header, len(made))))] ^= 1 << g.randrange(8)
        return made
    for i in range(300):
        if (made := damage(i)) == whole.bytes: continue
        (tmp_path/'w.safetensors').write_bytes(made)
        with pytest.raises(WeightsError): load_weights(tmp_path/'w.safetensors')

def test_other_versions_and_other_files(whole, tmp_path, monkeypatch):
    monkeypatch.setattr('sleepnb.weights.FORMAT', 2)
    network = StageNetwork(Backbone(MONTAGES))
    save_weights(tmp_path/'later.safetensors', network)
    monkeypatch.setattr('sleepnb.weights.FORMAT', 1)
    with pytest.raises(WeightsError, match='format 2.*Update sleepnb'): load_weights(tmp_path/'later.safetensors')
    for text in ('[]', '{}', 'null', '{"kind": "weights"}', '{"kind": "weights", "format": "1"}', '{"kind": 7, "format": 1}', 'nonsense'):
        (tmp_path/'odd.safetensors').write_bytes(save(whole.weights, metadata=dict(sleepnb=text)))
        with pytest.raises(WeightsError): load_weights(tmp_path/'odd.safetensors')
    (tmp_path/'folder').mkdir()
    with pytest.raises(WeightsError): load_weights(tmp_path/'folder')

def test_loading_unpickles_nothing(whole, tmp_path, monkeypatch):
    (tmp_path/'w.safetensors').write_bytes(whole.bytes)
    def never(*args, **kwargs): raise AssertionError('something was unpickled')
    for name in ('pickle.load', 'pickle.loads', 'pickle.Unpickler', 'torch.load', 'builtins.exec', 'builtins.eval'):
        monkeypatch.setattr(name, never)
    network,described = load_weights(tmp_path/'w.safetensors')
    monkeypatch.undo()
    assert_close(weights(network), whole.weights, **EXACT)
    assert described == whole.description and not network.training

# Other montages

def part_of(names, b=3):
    shape = b, len(names)
    return dict(x=torch.randn(*shape, 3000), median=torch.zeros(shape), scale=torch.ones(shape), there=torch.ones(shape, dtype=torch.bool),
                at=torch.arange(b))

@pytest.mark.parametrize('align', ['own', 'shared'])
def test_sensors_never_seen_are_aligned_by_their_places(align):
    torch.manual_seed(1)
    backbone = Backbone(MONTAGES, align=align).eval()
    for cam in backbone.alignment.cams: torch.nn.init.normal_(cam.heads)
    names = ['C3-M2', 'P4-M1', 'E1-M2', 'F8-M1']
    moved = move_to(backbone, dict(lab=names, clinic=MONTAGES['clinic']), heads_of=dict(lab='clinic') if align == 'own' else None).eval()
    part,eeg = part_of(names), [0, 1, 3]
    places = sensor_positions([names[i] for i in eeg]).double()
    phi = torch.stack([2*torch.pi/1.4 * (a*(places[:, 0] + .2) + b*(places[:, 1] + .2)) for a in range(6) for b in range(6)], 1)
    heads = backbone.alignment.cam('clinic').heads.detach().double()
    shares = (torch.cat([phi.cos(), phi.sin()], 1) @ heads.T).softmax(0)        # c v
    expected = torch.einsum('bct,cv->bvt', part['x'][:, eeg].double(), shares).float()
    assert_close(moved.virtual('lab', part, part['x']), expected, atol=1e-4, rtol=1e-4)
    known = part_of(MONTAGES['clinic'])
    assert_close(moved(dict(clinic=known)), backbone(dict(clinic=known)), **EXACT)
    if align == 'own':
        with pytest.raises(SleepnbError, match='no trained CAM'): move_to(backbone, dict(lab=names))

def test_a_moved_backbone_is_a_copy():
    backbone = Backbone(MONTAGES)
    before = weights(backbone)
    moved = move_to(backbone, dict(a=MONTAGES['home'], b=MONTAGES['home']), heads_of=dict(a='home', b='home'))
    for p in moved.parameters(): p.data.add_(1)
    assert_close(weights(backbone), before, **EXACT)
    assert moved.alignment.cam('a') is not moved.alignment.cam('b') and list(backbone.config['montages']) == [*MONTAGES]
    moved.alignment.cam('a').heads.data.zero_()
    assert (moved.alignment.cam('b').heads != 0).any()

# Kills

KILLER = '''
import json, os, random, signal, sys, time
import torch
from fastai.callback.core import Callback
from sleepnb.callbacks import Checkpoint
from sleepnb.data.loaders import Stores, labelled_loaders, pretraining_loaders
from sleepnb.data.splits import Split
from sleepnb.learner import finetune_learner, mtssrl_learner, save_learner, sleepsmc_learner
from sleepnb.models.network import Backbone
from sleepnb.weights import read_description

phase,folder,kills,*stores = sys.argv[1:]
file = os.path.join(folder, 'training.safetensors')
stores = Stores(stores)
split = Split(*([(c, s) for c in stores.cohorts for s in part] for part in ('abc', 'd', 'e')))
pretraining,labelled = (f(stores, split, bs=4) for f in (pretraining_loaders, labelled_loaders))
montages = {s.cohort: list(s.channels) for s in stores.stores}

class Tell(Callback):
    def __init__(self, to): self.to = to
    def before_batch(self):
        if self.training: os.write(self.to, b'.')

def train(name, cbs=()):
    if phase == 'mtssrl': learn = mtssrl_learner(pretraining, cbs=cbs)
    elif phase == 'sleepsmc':
        dls = labelled_loaders(stores, split, bs=4, modalities=('EEG', 'EOG', 'EMG'))
        learn = sleepsmc_learner(dls, primary=None, model=dict(hide=.3), cbs=cbs)
    else:
        torch.manual_seed(7)
        learn = finetune_learner(labelled, Backbone(montages), lr=3e-3, unfreeze=(1, 2, 3), cbs=cbs)
    learn.recorder.add_time = False
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5 if phase == 'finetune' else 3)
    recorder = learn.recorder
    told = dict(mtssrl=lambda: learn.task_record.rows, finetune=lambda: learn.keep_best.kept['pass_'],
                sleepsmc=lambda: [learn.keep_best.kept['pass_'], learn.modality_record.rows])[phase]()
    save_learner(learn, os.path.join(folder, name), values=[list(v) for v in recorder.values], losses=[float(v) for v in recorder.losses],
                 lrs=recorder.lrs, table=told)

def start(name, within):
    ours,theirs = os.pipe()
    if not (pid := os.fork()):
        try:
            if within == 'rename': os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            if within == 'write':
                def half(fd):
                    os.ftruncate(fd, os.fstat(fd).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                os.fsync = half
            train(name, [Checkpoint(file, every_sec=0), Tell(theirs)])
            os._exit(0)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(theirs)
    return pid, ours

def place():
    if not os.path.exists(file): return None
    state = dict(read_description(file)['state']['dict'])
    return [state['pass'], state['step']]

began = time.monotonic()
train('whole.safetensors')
second = (time.monotonic() - began) / 30 # about one step
g,places,how,rounds = random.Random(0), [], [], 0
while len(places) < int(kills) or os.path.exists(file):
    within = 'enough' if len(places) >= int(kills) else ('moment', 'moment', 'rename', 'moment', 'write')[len(places) % 5]
    pid,pipe = start(f'round{rounds}.safetensors', within)
    if within == 'moment':
        for _ in range(g.randint(0, 5) if places else 0): os.read(pipe, 1)
        time.sleep(g.uniform(0, second) if places else 0)
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    _,status = os.waitpid(pid, 0)
    os.close(pipe)
    if os.WIFSIGNALED(status):
        places.append(place())
        how.append(within)
    elif os.WEXITSTATUS(status): sys.exit('a training failed')
    else:
        rounds += 1
        os.unlink(file)
print(json.dumps(dict(places=places, how=how, rounds=rounds, left=[f for f in os.listdir(folder) if f.endswith('.tmp')])))
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork on this system')
@pytest.mark.parametrize('phase', ['mtssrl', 'finetune', 'sleepsmc'])
def test_twenty_kills_change_nothing(phase, folders, wards, tmp_path):
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    command = [sys.executable, '-c', KILLER, phase, tmp_path, '20', *(wards if phase == 'sleepsmc' else folders)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert len(seen['places']) >= 20 and {*seen['how']} == {'moment', 'rename', 'write'} and seen['rounds'] >= 1
    assert not seen['left']                                     # half-written files
    assert seen['places'][0] is None                            # killed before anything was written
    assert len({tuple(p) for p in seen['places'] if p and p[1]}) >= 6, seen['places'] # within a pass
    network,described = load_weights(tmp_path/'whole.safetensors')
    assert len(described['notes']['losses']) > 20
    for i in range(seen['rounds']):
        again,told = load_weights(tmp_path/f'round{i}.safetensors')
        assert_close(weights(again), weights(network), **EXACT)
        assert told['notes'] == described['notes']

def test_a_checkpoint_is_of_one_training(stores, split, tmp_path):
    loaders = partial(pretraining_loaders, stores, split)
    facts = dict(bs=12, seed=0), dict(seed=0, lr=1e-3, backbone=dict(clip=20.), model=dict(drop=.5)), 1
    def train(loading, learning, passes):
        return fitted(mtssrl_learner(loaders(**loading), **learning, cbs=Checkpoint(tmp_path/'c.safetensors')), passes)
    train(*facts)
    train(*facts)                                               # finished: goes on, to do nothing
    written = (tmp_path/'c.safetensors').read_bytes()
    for i,other in enumerate([dict(bs=11), dict(seed=1), dict(mix='equal'), dict(min_steps=7), dict(seed=1), dict(lr=1e-4), dict(wd=0.),
                              dict(weighting='equal'), dict(backbone=dict(clip=10.)), dict(model=dict(drop=.1))]):
        with pytest.raises(WeightsError, match='of another training'):
            train(facts[0] | (other if i < 4 else {}), facts[1] | (other if i >= 4 else {}), 1)
    with pytest.raises(WeightsError, match='passes 2'): train(*facts[:2], 2)
    with pytest.raises(WeightsError, match='of another training'):
        fitted(mtssrl_learner(pretraining_loaders(stores, among('abd', 'c', 'e'), bs=12), cbs=Checkpoint(tmp_path/'c.safetensors')), 1)
    assert (tmp_path/'c.safetensors').read_bytes() == written

@pytest.mark.parametrize('kwargs', [dict(origin=2), dict(unfreeze=(1, 2, 3)), dict(patience=3), dict(stage=1), dict(schedule='fit_one_cycle')])
def test_a_checkpoint_knows_where_it_came_from_and_how_it_goes(kwargs, stores, split, tmp_path):
    def train(origin=1, stage=None, schedule='fit', **kwargs):
        dls,stages = labelled_loaders(stores, split, bs=8), stores.stages.copy()
        torch.manual_seed(origin)
        learn = finetune_learner(dls, Backbone(MONTAGES), **kwargs)
        if stage is not None: stores.stages[dls.train.rows[0]] = (stages[dls.train.rows[0]] + stage) % 5
        try: quietly(learn, lambda l: getattr(l, schedule)(1, 1e-4, cbs=Checkpoint(tmp_path/'c.safetensors')))
        finally: stores.stages[:] = stages
    train()
    train()
    with pytest.raises(WeightsError, match='of another training'): train(**kwargs)

def test_a_diverged_training_leaves_its_last_good_place(stores, split, tmp_path):
    class Diverge(Callback):
        def after_step(self):
            if self.epoch == 1: self.model.backbone.encoder.small.stem[0][0].weight.data.fill_(np.nan)
    make = lambda *cbs: mtssrl_learner(pretraining_loaders(stores, split, bs=8), cbs=[*cbs])
    good = weights(fitted(make(), 1).model)
    fitted(make(Checkpoint(tmp_path/'c.safetensors', every_sec=0), Diverge()), 2)
    with safe_open(tmp_path/'c.safetensors', 'pt') as f: kept = {k: f.get_tensor(k) for k in f.keys() if '.network.' in k}
    assert_close([kept[f'state.network.{k}'] for k in good], [*good.values()], **EXACT)

def test_a_checkpoint_knows_its_triplets(stores, split, tmp_path):
    def train(draw): fitted(mtssrl_learner(pretraining_loaders(stores, split, draw, bs=12), cbs=Checkpoint(tmp_path/'c.safetensors')), 1)
    train(draw_triplets)
    train(partial(draw_triplets))
    with pytest.raises(WeightsError, match='of another training'): train(partial(draw_triplets, far=4))

@pytest.mark.parametrize('same_learner', [False, True])
@pytest.mark.parametrize('batches', [3, 4, 9])
def test_gradients_that_are_summed_or_left_over_do_not_get_lost(same_learner, batches, stores, split, tmp_path):
    class Stop(Callback):
        def __init__(self, event, left): self.event,self.left = event,left
        order = 99
        def after_backward(self): self.stop('after_backward')
        def after_batch(self): self.stop('after_batch')
        def stop(self, event):
            self.left -= self.training and event == self.event
            if not self.left: raise KeyboardInterrupt
    dls,add = labelled_loaders(stores, split, bs=8), partial(Checkpoint, tmp_path/'c.safetensors', 0)
    def learner(): return supervised_learner(dls, lr=1e-2, patience=None, cbs=GradientAccumulation(16))
    whole,learn = fitted(learner(), 3), learner()
    with pytest.raises(KeyboardInterrupt): fitted(learn, 3, cbs=[add(), Stop('after_backward' if same_learner else 'after_batch', batches)])
    again = fitted(learn if same_learner else learner(), 3, cbs=add())
    assert_close(weights(again.model), weights(whole.model), **EXACT)

# Two processes

TOGETHER = '''
import json, os, socket, sys, traceback
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from fastai.distributed import DistributedDL
from safetensors.torch import save_file
from torch import nn
from sleepnb.callbacks import Checkpoint, TrainingCallback
from sleepnb.data.loaders import Stores, labelled_loaders, pretraining_loaders
from sleepnb.data.splits import Split
from sleepnb.learner import finetune_learner, mtssrl_learner, sleepsmc_learner, supervised_learner
from sleepnb.models.network import Backbone, StageNetwork
from sleepnb.ssrl.masking import BANDS, mask_band
from sleepnb.ssrl.mtssrl import MTSSRL

MISSING = [DistributedDataParallelKwargs(find_unused_parameters=True)] # not every batch has every cohort
folder,*paths = sys.argv[1:]
stores = Stores(paths)
split = Split(*([(c, s) for c in stores.cohorts for s in part] for part in ('abc', 'd', 'e')))
montages = {s.cohort: list(s.channels) for s in stores.stores}

class Roll(nn.Module):
    "Instead of random views, two fixed ones in turn."
    turn = 0
    def forward(self, x, scale):
        self.turn += 1
        return x.roll(100*(self.turn % 2), -1)

class Fixed(MTSSRL):
    "Masks the bands that the batch names."
    def windows(self, part):
        views,asked = super().windows(part)
        return views | dict(FBM=[mask_band(part['x'], part['band'])]), asked | dict(FBM=part['band'])

def share(batch, rank, n):
    "Every n-th epoch of a batch."
    (rows,parts),y = batch
    pick,made = torch.arange(rank, len(rows), n), {}
    for k,p in parts.items():
        mine = p['at'] % n == rank
        if mine.any(): made[k] = {j: v[mine] for j,v in p.items()} | dict(at=p['at'][mine] // n)
    return (rows[pick], made), y[pick]

batches = dict(stages=[*labelled_loaders(stores, split, bs=8).train], tasks=[*pretraining_loaders(stores, split, bs=8).train])
for (_,parts),_ in batches['tasks']:
    for part in parts.values(): part |= dict(band=part['at'] % len(BANDS), order=part['order'].where(part['order'] != 0, 1))
for (_,parts),_ in batches['tasks'] + batches['stages']:
    for part in parts.values(): part |= {k: v.double() for k,v in part.items() if v.is_floating_point()}

def steps(what, rank, n):
    torch.manual_seed(1)
    backbone = Backbone(montages)
    network = StageNetwork(backbone, drop=0) if what == 'stages' else Fixed(backbone, drop=0)
    network.double().augment = Roll()
    loss = nn.CrossEntropyLoss() if what == 'stages' else lambda pred,y: pred['loss']
    opt = torch.optim.AdamW(network.eval().parameters(), lr=1e-3)   # normalisation keeps its statistics
    model = Accelerator(cpu=True, kwargs_handlers=MISSING).prepare(network) if n > 1 else network
    assert isinstance(model, nn.parallel.DistributedDataParallel) == (n > 1)
    gradients = []
    for batch in batches[what]:
        inputs,y = share(batch, rank, n)
        loss(model(inputs), y).backward()
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in network.parameters()]))
        opt.step()
        opt.zero_grad()
    assert len(gradients) >= 3
    return {f'{what} gradients': torch.stack(gradients), f'{what} weights': torch.cat([p.detach().flatten() for p in network.parameters()])}

class Rows(TrainingCallback):
    "Which rows each pass trained on, batch by batch."
    order = 95
    def before_fit(self): self.passes = []
    def before_train(self): self.passes.append([])
    def after_batch(self):
        if self.training: self.passes[-1].append(self.x[0].tolist())

class Stop(TrainingCallback):
    "Interrupts within the second pass."
    order = 99
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1): raise KeyboardInterrupt

def fit(what, cbs=()):
    dls = (pretraining_loaders if what == 'mtssrl' else labelled_loaders)(stores, split, bs=4, mix='homogeneous' if what == 'mtssrl' else 'proportional',
                                                                          modalities=('EEG',) if what == 'sleepsmc' else None)
    torch.manual_seed(1)
    learn = dict(mtssrl=lambda: mtssrl_learner(dls, cbs=Rows()), supervised=lambda: supervised_learner(dls, cbs=Rows()),
                 finetune=lambda: finetune_learner(dls, Backbone(montages), unfreeze=(1, 2, 3), cbs=Rows()),
                 sleepsmc=lambda: sleepsmc_learner(dls, channel_mode='cam', cbs=Rows()))[what]()
    learn.recorder.add_time = False
    with learn.distrib_ctx(sync_bn=False, cpu=True, kwargs_handlers=MISSING), learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=cbs)
    values = [list(v) for v in learn.recorder.values]
    with learn.no_bar(), learn.no_logging(): alone = list(learn.validate()) if what == 'supervised' else None
    facts = dict(passes=learn.rows.passes, order=[dls.train.order(p).reshape(-1, 4).tolist() for p in range(3)],
                 values=values, alone=alone, best=learn.keep_best.kept['pass_'] if alone else None)
    return facts, torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def interrupted(what):
    "The same, in two goes."
    checkpoint = lambda: Checkpoint(f'{folder}/{what}.checkpoint.safetensors', 0)   # after every step
    try: fit(what, [checkpoint(), Stop()])
    except KeyboardInterrupt: return fit(what, checkpoint())
    raise AssertionError('it was not interrupted')

def rest_of_a_pass():
    dl = labelled_loaders(stores, split, bs=4).train
    wrapped = DistributedDL(dl, device='cpu')
    rows = lambda step: dl.set_pass(1, step) or [b[0][0].tolist() for b in wrapped]
    return rows(0)[2:], rows(2)

def broadcast(self, t, rank): # fastai's needs a graphics card
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def work(rank, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    DistributedDL._broadcast = broadcast
    dist.init_process_group('gloo')
    made,facts = steps('stages', rank, 2) | steps('tasks', rank, 2), dict(rest=rest_of_a_pass())
    for what in ('mtssrl', 'supervised', 'finetune', 'sleepsmc'):
        facts[what],made[what] = fit(what)
        facts[f'{what} again'],made[f'{what} again'] = interrupted(what)
    save_file(made, f'{folder}/{rank}.safetensors', metadata=dict(facts=json.dumps(facts)))
    dist.barrier()
    dist.destroy_process_group()

save_file(steps('stages', 0, 1) | steps('tasks', 0, 1), f'{folder}/one.safetensors')
with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
children = []
for rank in range(2):
    if not (pid := os.fork()):
        try:
            work(rank, port)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
'''

@pytest.fixture(scope='module')
def together(folders, tmp_path_factory):
    "What two processes learned together, and one alone from the same batches."
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    if not hasattr(os, 'fork'): pytest.skip('no fork on this system')
    folder = tmp_path_factory.mktemp('together')
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    run = subprocess.run([sys.executable, '-c', TOGETHER, folder, *folders], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    made = {}
    for name in ('one', '0', '1'):
        with safe_open(folder/f'{name}.safetensors', framework='pt') as f:
            facts = json.loads((f.metadata() or {}).get('facts', '{}'))
            made[name] = SimpleNamespace(facts=facts, tensors={k: f.get_tensor(k) for k in f.keys()})
    return made

@pytest.mark.parametrize('what', ['stages', 'tasks'])
def test_two_processes_are_one_of_twice_the_batch(together, what):
    for name in ('gradients', 'weights'):
        one = together['one'].tensors[f'{what} {name}']
        assert one.abs().max() > .01
        for rank in '01': assert_close(together[rank].tensors[f'{what} {name}'], one, atol=1e-6, rtol=0)

@pytest.mark.parametrize('what', ['mtssrl', 'supervised', 'finetune', 'sleepsmc'])
def test_distrib_ctx_divides_batches_and_agrees(together, what):
    a,b = (together[rank] for rank in '01')
    assert_close(a.tensors[what], b.tensors[what], **EXACT)
    a,b = a.facts[what],b.facts[what]
    assert a['values'] == b['values'] and len(a['values']) == 3
    for p,order in enumerate(a['order']):
        steps = list(chain.from_iterable(zip(a['passes'][p], b['passes'][p])))
        assert steps == order + order[:len(order) % 2]          # whole batches, in turn; if one is missing, the first again
    if what == 'supervised': assert len(order) % 2 and a['alone'] == pytest.approx(a['values'][a['best']][1:], abs=1e-6)
    if what == 'mtssrl': assert all(len({row >= 30 for row in batch}) == 1 for batch in order) # of one cohort

@pytest.mark.parametrize('what', ['mtssrl', 'supervised', 'finetune', 'sleepsmc'])
def test_an_interrupted_training_goes_on_together(together, what):
    "Two processes end where they would have ended, and train on what was left of the pass."
    for rank in '01':
        whole,again = (together[rank].facts[o] for o in (what, f'{what} again'))
        assert_close(together[rank].tensors[f'{what} again'], together[rank].tensors[what], **EXACT)
        assert again['values'] == whole['values'] and again['best'] == whole['best']
        assert again['passes'] == [whole['passes'][1][2:], whole['passes'][2]] and again['passes'][0]

def test_going_on_within_a_pass_together(together):
    for rank in '01':
        expected,found = together[rank].facts['rest']
        assert expected == found and len(found) > 1

# A graphics card

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')
@pytest.mark.parametrize('precision', ['to_fp32', 'to_fp16', 'to_bf16'])
def test_a_gpu_trains_in_every_precision_and_goes_on(make, precision, tmp_path):
    class Stop(Callback):
        order = 99
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt
    def learner(*cbs):
        learn = make(cbs=[Checkpoint(tmp_path/'c.safetensors', 0), *cbs])
        return learn if precision == 'to_fp32' else getattr(learn, precision)()
    with pytest.raises(KeyboardInterrupt): fitted(learner(Stop()), 2)
    learn = fitted(learner(), 2)
    assert next(learn.model.parameters()).device.type == 'cuda' and len(learn.recorder.values) == 2
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())
