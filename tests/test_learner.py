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
from safetensors.torch import save
from torch.testing import assert_close

from sleepnb.callbacks import Checkpoint, Unfreeze, stage_metrics
from sleepnb.core import UNSCORED, SleepnbError, SplitError, WeightsError, seed_of
from sleepnb.data.loaders import Stores, labelled_loaders, pretraining_loaders
from sleepnb.data.psg import Night
from sleepnb.data.splits import Split
from sleepnb.data.store import Cohort, prepare
from sleepnb.learner import finetune_learner, mtssrl_learner, predict_stages, save_learner, supervised_learner
from sleepnb.models.cam import sensor_positions
from sleepnb.models.network import Backbone, StageNetwork, move_to
from sleepnb.montage import parse_channel
from sleepnb.ssrl.mtssrl import MTSSRL
from sleepnb.synth import synth_night
from sleepnb.weights import load_weights, read_description, save_weights

MONTAGES = dict(home=('Fpz-Cz', 'Pz-Oz'), clinic=('F4-M1', 'C4-M1', 'O2-M1'))
PEOPLE = [(cohort, s) for cohort in MONTAGES for s in 'abcde']
EXACT = dict(rtol=0, atol=0)

def read_synth(row, cohort):
    made = synth_night(MONTAGES[cohort], n_epochs=6, subject=f'{cohort} {row["subject"]}')
    return Night(list(made.x), [100]*len(made.x), [parse_channel(c) for c in MONTAGES[cohort]], made.stages)

def among(train, valid, test): return Split(*([p for p in PEOPLE if p[1] in part] for part in (train, valid, test)))

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    for name in MONTAGES:
        nights = pd.DataFrame(dict(subject=list('abcde'), night=1))
        prepare(Cohort(name, nights, MONTAGES[name], partial(read_synth, cohort=name)), folder/name, 'mtssrl', progress=False)
    return [folder/name for name in MONTAGES]

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

MAKERS = ('mtssrl', 'finetune', 'supervised')

@pytest.fixture(params=MAKERS)
def make(request, stores, split):
    "Makes one of the three learners."
    labelled,pretraining = labelled_loaders(stores, split, bs=8), pretraining_loaders(stores, split, bs=8)
    torch.manual_seed(7)
    backbone = Backbone(MONTAGES)
    return dict(mtssrl=partial(mtssrl_learner, pretraining),
                finetune=partial(finetune_learner, labelled, backbone, unfreeze=(1, 2, 3)),
                supervised=partial(supervised_learner, labelled))[request.param]

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
    if isinstance(learn.model, StageNetwork):
        pred,true = quietly(learn, lambda l: l.get_preds())
        assert pred.shape == (len(learn.dls.valid.rows), 5)
        assert 'Total params: ' in quietly(learn, lambda l: l.summary())
        assert_close(pred.sum(1), torch.ones(len(pred)))
        assert_close(F.nll_loss(pred.log(), true).item(), first[0], atol=1e-4, rtol=1e-4)
    assert quietly(learn, lambda l: list(l.validate())) == first
    assert_close(weights(learn.model), before, **EXACT)

def test_looking_leaves_what_a_training_wrote(make, tmp_path):
    learn = fitted(make(cbs=Checkpoint(file := tmp_path/'c.safetensors')), 1)
    kept = [getattr(learn, n).state() for n in ('task_record', 'keep_best') if hasattr(learn, n)]
    rows,written = [len(k.get('rows', ())) for k in kept], file.read_bytes()
    quietly(learn, lambda l: l.validate())
    if isinstance(learn.model, StageNetwork): predict_stages(learn)
    after = [getattr(learn, n).state() for n in ('task_record', 'keep_best') if hasattr(learn, n)]
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

def loop(dls, network, groups, passes, lr, loss, after=lambda: None):
    "Plain PyTorch; the weights after each pass."
    opt,made = torch.optim.AdamW([dict(params=list(p), weight_decay=wd) for p,wd in groups], lr=lr), []
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
    network = MTSSRL(Backbone(MONTAGES))
    rest = [p for n,p in network.named_parameters() if n != 'weighting.raw']
    made = loop(dls, network, [(rest, .01), ([network.weighting.raw], 0)], 2, 1e-3, lambda pred,_: pred['loss'], network.weighting.project)
    assert_close(weights(learn.model), made[-1], **EXACT)

def test_supervised_training_is_the_loop(stores, split):
    dls = labelled_loaders(stores, split, bs=8)
    learn = fitted(supervised_learner(dls, lr=3e-3, patience=None), 3)
    torch.manual_seed(0)
    network = StageNetwork(Backbone(MONTAGES))
    made = loop(dls, network, [(network.parameters(), .01)], 3, 3e-3, F.cross_entropy)
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

def test_what_is_frozen_stays(stores, split):
    torch.manual_seed(7)
    backbone = Backbone(MONTAGES)
    before = weights(backbone.alignment)
    learn = finetune_learner(labelled_loaders(stores, split, bs=8), backbone, lr=1e-2, unfreeze=(1, 2, 3), patience=None, cbs=Watch())
    fitted(learn, 4)
    names = list(learn.model.parts)
    for pass_,(modes,grads,changed,statistics,moved) in enumerate(learn.watch.seen):
        free = {*names[len(names) - 1 - pass_:]}
        assert modes == grads == changed == free
        assert statistics and moved == statistics & free
    assert learn.watch.seen[-1][-1] == statistics and 'alignment' not in free
    assert_close(weights(learn.model.backbone.alignment), before, **EXACT)

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
from sleepnb.learner import finetune_learner, mtssrl_learner, save_learner
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
    else:
        torch.manual_seed(7)
        learn = finetune_learner(labelled, Backbone(montages), lr=3e-3, unfreeze=(1, 2, 3), cbs=cbs)
    learn.recorder.add_time = False
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3 if phase == 'mtssrl' else 5)
    recorder = learn.recorder
    save_learner(learn, os.path.join(folder, name), values=[list(v) for v in recorder.values], losses=[float(v) for v in recorder.losses],
                 lrs=recorder.lrs, table=learn.task_record.rows if phase == 'mtssrl' else learn.keep_best.kept['pass_'])

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
print(json.dumps(dict(places=places, how=how, rounds=rounds)))
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork on this system')
@pytest.mark.parametrize('phase', ['mtssrl', 'finetune'])
def test_twenty_kills_change_nothing(phase, folders, tmp_path):
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    command = [sys.executable, '-c', KILLER, phase, tmp_path, '20', *folders]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert len(seen['places']) >= 20 and {*seen['how']} == {'moment', 'rename', 'write'} and seen['rounds'] >= 1
    assert seen['places'][0] is None                            # killed before anything was written
    assert len({tuple(p) for p in seen['places'] if p and p[1]}) >= 6, seen['places'] # within a pass
    network,described = load_weights(tmp_path/'whole.safetensors')
    assert len(described['notes']['losses']) > 20
    for i in range(seen['rounds']):
        again,told = load_weights(tmp_path/f'round{i}.safetensors')
        assert_close(weights(again), weights(network), **EXACT)
        assert told['notes'] == described['notes']
