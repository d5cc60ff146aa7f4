"""SleepSMC against loops in double precision, numbers worked out by hand, and many draws."""
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import kstest, ks_2samp
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from sleepnb.core import MontageError, SleepnbError
from sleepnb.models.cam import sensor_positions
from sleepnb.models.featurenet import FeatureClassifier, FeatureCNN, FeatureNet
from sleepnb.models.layers import ConvBlock, count_macs, count_parameters
from sleepnb.montage import parse_channel
from sleepnb.multimodal.contrast import WEIGHT_MODES, supcon_loss
from sleepnb.multimodal.reliability import hide_runs, in_mode, mask_starts, reliability, reliability_weights
from sleepnb.multimodal.sleepsmc import ModalityInput, SleepSMC, SleepSMCLoss

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(1)

def double(*shape): return torch.randn(*shape, dtype=torch.float64)

def arrays(state, prefix): return {k.removeprefix(prefix): v.numpy() for k,v in state.items() if k.startswith(prefix)}

def convolve(x, weight, bias, stride):
    "`(c, t)` → `(w, t')`, whole filters only."
    windows = sliding_window_view(x, weight.shape[-1], axis=-1)[:, ::stride]        # c t' k
    return np.einsum('ctk,wck->wt', windows, weight) + bias[:, None]

def layer(x, p, stride=1):
    "Convolution, normalisation by running statistics, rectifier; the length is kept where the stride is 1."
    weight,bias = (next(v for k,v in p.items() if k.startswith('0.') and k.endswith(name)) for name in ('weight', 'bias'))
    k = weight.shape[-1]
    if stride == 1: x = np.pad(x, ((0, 0), ((k - 1)//2, k//2)))
    z = convolve(x, weight, bias, stride)
    z = (z - p['1.running_mean'][:, None]) / np.sqrt(p['1.running_var'][:, None] + 1e-5)
    return np.maximum(z*p['1.weight'][:, None] + p['1.bias'][:, None], 0)

def pool(x, n): return np.stack([x[:, i*n:(i + 1)*n].max(-1) for i in range(x.shape[1]//n)], axis=-1)

def cnn_by_hand(x, state):
    "Features of one epoch, `(c, 3000)` → `(256,)`, as the table of the public code reads."
    features = []
    for name,stride,pools in (('small', 6, (16, 8)), ('large', 50, (8, 4))):
        z = pool(layer(x, arrays(state, f'{name}.stem.0.'), stride), pools[0])
        for i in range(3): z = layer(z, arrays(state, f'{name}.body.{i}.'))
        features.append(pool(z, pools[1]).flatten())                                # features, then places
    return np.concatenate(features)

def lived(model):
    "A model in double precision whose normalisation has statistics and weights of its own."
    for o in model.modules():
        if isinstance(o, nn.BatchNorm1d):
            o.running_mean.normal_()
            o.running_var.uniform_(.5, 2)
            nn.init.uniform_(o.weight, .5, 2)
            nn.init.normal_(o.bias)
    return model.double().eval()

@pytest.mark.parametrize('c', [1, 2, 6])
def test_featurenet_is_the_loops(c):
    x = double(2, c, 3000)
    joint,shared = lived(FeatureNet(c)), lived(FeatureNet(c, 'shared'))
    assert_close(joint(x), torch.tensor(np.stack([cnn_by_hand(o, joint.cnn.state_dict()) for o in x.numpy()])))
    each = np.stack([np.concatenate([cnn_by_hand(o[i:i + 1], shared.cnn.state_dict()) for i in range(c)]) for o in x.numpy()])
    weight,bias = (o.detach().numpy() for o in (shared.join[1].weight, shared.join[1].bias))
    assert_close(shared(x), torch.tensor(each @ weight.T + bias))
    head = shared.classifier().double().eval()
    assert_close(head(shared(x)), shared(x) @ head[0].weight.T + head[0].bias)

@pytest.mark.parametrize('mode, c, features, extractor, classifier', [
    ('joint', 1, 256, 184_288, 16_773), ('joint', 2, 256, 211_488, 16_773), ('joint', 6, 256, 320_288, 16_773),
    ('shared', 1, 64, 184_288, 16_773), ('shared', 2, 64, 184_288, 33_157), ('shared', 6, 64, 184_288, 98_693)])
def test_featurenet_has_the_weights_of_the_public_code(mode, c, features, extractor, classifier):
    net = FeatureNet(c, mode)
    assert net.n_out == features and net(torch.zeros(2, c, 3000)).shape == (2, features)
    assert count_parameters(net.cnn) == extractor
    assert count_parameters(net, net.classifier()) == extractor + classifier
    assert net.classifier()(torch.zeros(2, features)).shape == (2, 5)

def test_featurenet_multiplications():
    assert [round(count_macs(FeatureNet(c), torch.zeros(1, c, 3000))/1e6, 2) for c in (1, 2, 6)] == [5.04, 7.19, 15.76]
    assert count_macs(FeatureNet(6, 'shared'), torch.zeros(1, 6, 3000)) == 6*count_macs(FeatureCNN(), torch.zeros(1, 1, 3000)) + 6*256*64

@pytest.mark.parametrize('mode', ['joint', 'shared'])
def test_featurenet_of_one_channel_is_the_public_network(mode):
    net = FeatureNet(1, mode)
    kinds = [type(o).__name__ for o in nn.Sequential(net, net.classifier()).modules() if not [*o.children()]]
    branch = ['Conv1d', 'BatchNorm1d', 'ReLU', 'MaxPool1d', 'Dropout'] + ['ZeroPad1d', 'Conv1d', 'BatchNorm1d', 'ReLU']*3 + ['MaxPool1d']
    assert kinds == branch*2 + ['Dropout', 'Linear', 'Linear']

def test_featurenet_refuses_other_signals():
    for shape in ((2, 3, 3000), (2, 2, 2999), (2, 3000)):
        with pytest.raises(SleepnbError, match='do not fit'): FeatureNet(2)(torch.zeros(shape))
    with pytest.raises(SleepnbError, match='channel mode'): FeatureNet(2, 'each')
    assert len(FeatureClassifier(64, None)) == 1

def starts_by_rejection(n, g, room=2850, length=150, how='normal'):
    "Triples of starts, each drawn until its runs do not touch."
    made = []
    while len(made) < n:
        drawn = np.clip(np.rint(g.normal(1425, 475, 3)), 0, room) if how == 'normal' else g.integers(0, room + 1, 3)
        drawn = sorted(drawn)
        if all(b - a >= length for a,b in zip(drawn, drawn[1:])): made.append(drawn)
    return np.array(made)

@pytest.mark.parametrize('how', ['normal', 'uniform'])
def test_starts_are_those_of_drawing_again(how):
    made,g = mask_starts(4000, how=how), np.random.default_rng(0)
    assert made.shape == (4000, 3) and made.dtype == torch.int64
    assert made.min() >= 0 and made.max() <= 2850 and (made.diff(dim=-1) >= 150).all()
    expected = starts_by_rejection(4000, g, how=how)
    for i in range(3): assert ks_2samp(made[:, i].numpy(), expected[:, i]).pvalue > 1e-3
    assert ks_2samp(made.diff(dim=-1)[:, 0].numpy(), np.diff(expected)[:, 0]).pvalue > 1e-3

def test_one_run_is_normal_or_uniform():
    made = mask_starts(4000, n_runs=1, length=450).flatten() + torch.rand(4000) - .5
    assert kstest(made.numpy(), 'norm', (1275, 425)).pvalue > 1e-3
    made = mask_starts(4000, n_runs=1, length=450, how='uniform').flatten() + torch.rand(4000)
    assert kstest(made.numpy(), 'uniform', (0, 2551)).pvalue > 1e-3
    ends = mask_starts(20_000, n_runs=1).flatten()                                  # ±3 SD: clipped, not drawn again
    assert 10 < (ends == 0).sum() < 50 and 10 < (ends == 2850).sum() < 50

@pytest.mark.parametrize('n_runs, length', [(3, 150), (1, 450), (9, 50), (6, 500), (20, 150)])
def test_masks_hide_so_many_samples(n_runs, length):
    "Also where no random set fits."
    for how in ('normal', 'uniform'):
        masked = hide_runs(torch.ones(50, 2, 3000), mask_starts(50, 3000, n_runs, length, how), length)
        assert ((masked == 0).sum(-1) == n_runs*length).all() and torch.equal(masked[:, 0], masked[:, 1])

def small_net(c=2):
    return nn.Sequential(ConvBlock(c, 4, 50, 25), nn.Dropout(.5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5))

@pytest.mark.parametrize('confidence', ['probability', 'logit'])
def test_reliability_is_the_loops(confidence):
    net,x,y = lived(small_net()).train(), double(4, 2, 3000), torch.tensor([0, 4, -1, 2], dtype=torch.int8)
    torch.manual_seed(2)
    r = reliability(net, x, y, confidence=confidence)
    torch.manual_seed(2)
    starts = mask_starts(9*4).tolist()                                              # passes, then epochs
    net.eval()
    for i in range(4):
        p = []
        for t in range(9):
            one = x[i].clone()
            for start in starts[t*4 + i]: one[:, start:start + 150] = 0
            logits = net(one[None])[0].detach().numpy()
            p.append(logits[y[i]] if confidence == 'logit' else np.exp(logits[y[i]]) / np.exp(logits).sum())
        expected = sum((o - sum(p)/9)**2 for o in p)/9 if y[i] >= 0 else 0.
        assert_close(r[i].item(), float(expected), atol=1e-15, rtol=1e-9)
    assert r[y >= 0].min() > 0
    assert len({tuple(o) for o in starts}) == 36                                    # each epoch and pass draws its own

def test_reliability_leaves_the_network_as_it_was():
    net,x,y = small_net(), torch.randn(3, 2, 3000), torch.tensor([0, 1, 2])
    net[0].eval()
    before,modes = {k: v.clone() for k,v in net.state_dict().items()}, [o.training for o in net.modules()]
    r = reliability(net, x.requires_grad_(), y)
    assert not r.requires_grad and all(o.grad is None for o in net.parameters())
    assert [o.training for o in net.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    with pytest.raises(RuntimeError): reliability(net, x[:, :1], y)
    assert [o.training for o in net.modules()] == modes and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), in_mode(net): 1/0
    assert [o.training for o in net.modules()] == modes
    reliability(net, x, y, training=True)
    assert not torch.equal(net[0][1].running_mean, before['0.1.running_mean'])
    assert [o.training for o in net.modules()] == modes

def test_reliability_is_no_coarser_in_half_precision():
    class Half(nn.Module):
        def forward(self, x): return torch.stack([x.mean((1, 2)), torch.zeros(len(x))], 1).half()
    r = reliability(Half(), torch.rand(5, 1, 3000), torch.zeros(5, dtype=torch.int64))
    assert r.dtype == torch.float32 and (r <= 20/81).all()

@pytest.mark.parametrize('score, r, expected', [
    ('exp', 20/81, (.202, 1.798)), ('exp', .01, (.950, 1.050)), ('exp', .05, (.761, 1.239)), ('negative', 20/81, (.156, 1.844))])
def test_two_auxiliaries_weigh_as_worked_out(score, r, expected):
    w = reliability_weights(torch.tensor([[r], [.2], [0.]]), primary=1, score=score)
    assert_close(w.flatten(), torch.tensor([expected[0], 1, expected[1]]), atol=5e-4, rtol=0)

@pytest.mark.parametrize('score', ['exp', 'negative'])
@pytest.mark.parametrize('primary', [None, 0, 2])
def test_weights_are_the_loops_over_what_is_there(score, primary):
    r,there = .25*torch.rand(3, 64, dtype=torch.float64), torch.rand(3, 64) < .7
    junk = r.masked_fill(~there, torch.nan).requires_grad_()
    w = reliability_weights(junk, primary, score, there=there)
    assert not w.requires_grad
    for i in range(64):
        z = {m: np.exp((np.exp(-r[m, i].item()) if score == 'exp' else -r[m, i].item()) / .1)
             for m in range(3) if there[m, i] and m != primary}
        expected = [len(z)*z[m]/sum(z.values()) if m in z else float(m == primary and there[m, i].item()) for m in range(3)]
        assert_close(w[:, i], torch.tensor(expected, dtype=torch.float64))
    assert_close(w.sum(0), there.sum(0).double())
    assert_close(reliability_weights(r, primary, score).sum(0), torch.full((64,), 3., dtype=torch.float64))
    assert (reliability_weights(r, primary, score) > .12).all() and (reliability_weights(r, primary, score) < 2.65).all()

def test_epochs_without_a_stage_weigh_alike():
    x,y = torch.randn(4, 2, 3000), torch.full((4,), -1)
    r = torch.stack([reliability(small_net(), x, y) for _ in range(3)])
    for primary in (None, 0): assert_close(reliability_weights(r, primary), torch.ones(3, 4))

def supcon_by_loops(features, labels, weights, mode, temp, there):
    "The loss of the paper, one instance after the other."
    found = []
    for m in range(features.shape[0]):
        for i in range(features.shape[1]):
            if labels[i] < 0 or not there[m][i]: continue
            f,w = features[m, i].tolist(), weights[m, i].item()
            if mode == 'literal': f = [w*o for o in f]
            length = math.sqrt(sum(o*o for o in f))
            f = [o/length for o in f]
            if mode == 'scale_after_norm': f = [w*o for o in f]
            found.append((f, labels[i].item(), w))
    losses,counts = [],[]
    for a,(f,y,w) in enumerate(found):
        terms = [(math.exp(sum(p*q for p,q in zip(f, g))/temp) * (v if mode == 'pair' else 1), z == y)
                 for b,(g,z,v) in enumerate(found) if b != a]
        own = [-math.log(t/sum(t for t,_ in terms)) for t,same in terms if same]
        if not own: continue
        losses.append(sum(own)/len(own))
        counts.append(w if mode == 'loss' else 1.)
    return sum(c*l for c,l in zip(counts, losses)) / sum(counts)

def draw_instances(b=6, d=8):
    return double(3, b, d), torch.tensor([0, 1, 0, 4, 2, 1])[:b], torch.rand(3, b, dtype=torch.float64)*1.8 + .2

@pytest.mark.parametrize('temp', [.1, 1.])
@pytest.mark.parametrize('mode', WEIGHT_MODES)
def test_supcon_is_the_loops(mode, temp):
    features,labels,weights = draw_instances()
    all_there,some = torch.ones(3, 6, dtype=torch.bool), torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0], [0]*5 + [1]]).bool()
    ones = torch.ones_like(weights)
    for y in (labels, torch.tensor([0, -1, 0, 4, 2, 1]), labels.to(torch.int8)):
        for there in (None, all_there, some):
            for w in (None, weights):
                expected = supcon_by_loops(features, y, ones if w is None else w, mode, temp, all_there if there is None else there)
                assert_close(supcon_loss(features, y, w, mode, temp, there).item(), expected, atol=1e-12, rtol=1e-12)

@pytest.mark.parametrize('mode', WEIGHT_MODES)
def test_supcon_does_not_depend_on_the_order(mode):
    features,labels,weights = draw_instances()
    there,loss = torch.rand(3, 6) < .8, lambda *o: supcon_loss(*o[:3], mode, there=o[3])
    for _ in range(5):
        i,m = torch.randperm(6), torch.randperm(3)
        assert_close(loss(features[m][:, i], labels[i], weights[m][:, i], there[m][:, i]), loss(features, labels, weights, there))

@pytest.mark.parametrize('mode', WEIGHT_MODES)
def test_supcon_gradients(mode):
    features,labels,weights = draw_instances(d=4)
    there,labels[3] = torch.ones(3, 6, dtype=torch.bool), -1
    there[1, 2] = there[0, 4] = there[1, 4] = False                                  # the last leaves one alone
    for w in (None, weights):
        assert gradcheck(lambda f: supcon_loss(f, labels, w, mode, temp=.5, there=there), (features.requires_grad_(),))
    weights.requires_grad_()
    supcon_loss(features, labels, weights, mode, there=there).backward()
    assert weights.grad is None
    hidden = ~there | (labels == -1)
    assert not features.grad[hidden].any() and features.grad[:, labels == 0][there[:, labels == 0]].all()

@pytest.mark.parametrize('mode', WEIGHT_MODES)
def test_what_takes_no_part_may_be_anything(mode):
    features,labels,weights = draw_instances()
    there,labels[1] = torch.rand(3, 6) < .7, -1
    hidden = ~there | (labels == -1)
    results = []
    for junk in (0., 1e30, torch.nan, torch.inf):
        f = features.masked_fill(hidden[..., None], junk).requires_grad_()
        w = weights.masked_fill(hidden, junk if junk == 0 else 1.)                    # what `reliability_weights` gives, or 1
        loss = supcon_loss(f, labels, w, mode, there=there)
        loss.backward()
        results.append((loss.detach(), f.grad))
    for loss,grad in results:
        assert_close(loss, results[0][0])
        assert_close(grad, results[0][1])
        assert grad.isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_weights_before_the_normalisation_do_nothing(dtype):
    "Values and gradients: SleepSMC's Eq. 8 as printed."
    features,labels = torch.randn(3, 64, 256, dtype=dtype), torch.randint(5, (64,))
    weights = torch.rand(3, 64, dtype=dtype)*4 + .05
    def run(*how):
        f = features.clone().requires_grad_()
        loss = supcon_loss(f, labels, *how)
        loss.backward()
        return loss.item(), f.grad
    plain = run()
    literal = run(weights, 'literal')
    assert_close(literal[0], plain[0], atol=1e-6, rtol=1e-6)
    assert_close(literal[1], plain[1], atol=1e-6*plain[1].abs().max().item(), rtol=1e-5 if dtype is torch.float32 else 1e-9)
    for mode in ('scale_after_norm', 'loss', 'pair'):
        assert not torch.allclose(run(weights, mode)[1], plain[1], rtol=.05, atol=0)
        assert_close(run(torch.ones_like(weights), mode)[0], plain[0])

def test_supcon_at_chance():
    "Features that know nothing: ln(UI − 1), and half the variance of a logit."
    losses = []
    for _ in range(10):
        y = torch.randint(5, (128,))
        losses.append(supcon_loss(torch.randn(3, 128, 256), y[torch.randperm(128)]).item())
    assert abs(sum(losses)/10 - (math.log(383) + 1/(2*256*.1**2))) < .01

def test_supcon_survives_extremes():
    labels,there = torch.tensor([0, 0, 1]), torch.zeros(3, 3, dtype=torch.bool)
    for mode in WEIGHT_MODES:
        for f in (torch.zeros(3, 3, 4), 1e4*torch.randn(3, 3, 4).half(), torch.ones(3, 3, 4)):
            f = f.requires_grad_()
            loss = supcon_loss(f, labels, torch.full((3, 3), 2.45), mode)
            loss.backward()
            assert loss.dtype == torch.float32 and loss.isfinite() and f.grad.isfinite().all()
        f = torch.randn(3, 3, 4).requires_grad_()
        for y,o in ((torch.full((3,), -1), None), (labels, there)):
            loss = supcon_loss(f, y, torch.zeros(3, 3), mode, there=o)
            loss.backward()
            assert loss.item() == 0 and not f.grad.any()
    with pytest.raises(SleepnbError, match='weight mode'): supcon_loss(f, labels, mode='exp')

# The whole network

MONTAGES = dict(lab=['F3-M2', 'C3-M2', 'O1-M2', 'F4-M1', 'C4-M1', 'O2-M1', 'E1-M2', 'E2-M2', 'Chin'],
                ward=['F3-M2', 'E1-M2', 'C3-M2', 'O1-M2', 'F4-M1', 'C4-M1', 'O2-M1', 'E2-M1', 'EMG1'])
N = dict(EEG=6, EOG=2, EMG=1)

def part_of(c, at, dtype=torch.float32):
    "What a batch says of epochs of some channels; each epoch has its own scale."
    shape = len(at), c
    median,scale = 10*torch.randn(shape, dtype=dtype), 5 + 20*torch.rand(shape, dtype=dtype)
    x = scale[..., None]*torch.randn(*shape, 3000, dtype=dtype) + median[..., None]
    return dict(x=x, median=median, scale=scale, there=torch.ones(shape, dtype=torch.bool), at=torch.tensor(at))

def batch_of(ats=dict(lab=[4, 0, 2], ward=[1, 3]), n=N, dtype=torch.float32):
    return None, {k: {m: part_of(c, at, dtype) for m,c in n.items()} for k,at in ats.items()}

def normal(part):
    z = (part['x'] - part['median'][..., None]) / part['scale'][..., None]
    return z.clamp(-20, 20)

def by_place(inputs, m):
    "Normalised signals of one modality, as the batch is ordered."
    found = {int(a): z for p in inputs[1].values() for a,z in zip(p[m]['at'], normal(p[m]))}
    return torch.stack([found[i] for i in range(len(found))])

def changed(inputs, cohort, m, **values):
    return None, inputs[1] | {cohort: inputs[1][cohort] | {m: inputs[1][cohort][m] | values}}

def gradients(net, loss): return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)))

Y = torch.tensor([0, 1, 0, 4, 2])

@pytest.mark.parametrize('mode, each', [('joint', (320_288, 211_488, 184_288)), ('shared', (184_288,)*3), ('cam', (592_288, 184_288, 184_288))])
@pytest.mark.parametrize('primary', [None, 'EOG'])
def test_sleepsmc_has_the_weights_of_its_table(mode, each, primary):
    net = SleepSMC(MONTAGES, primary=primary, channel_mode=mode)
    assert tuple(count_parameters(o.cnn) for o in net.extractors.values()) == each
    heads = 98_693 + 33_157 + 16_773 if mode == 'shared' else 3*16_773
    fused = 0 if primary else (3*(64 if mode == 'shared' else 256) + 1)*64 + 65*5
    assert count_parameters(net) == sum(each) + heads + fused + (16*72 if mode == 'cam' else 0)
    assert sum(count_parameters(*p) for p in net.parts.values()) == count_parameters(net)

@pytest.mark.parametrize('mode', ['joint', 'shared'])
def test_sleepsmc_is_its_parts_in_the_order_of_the_batch(mode):
    net,inputs = lived(SleepSMC(MONTAGES, channel_mode=mode, primary=None)), batch_of(dtype=torch.float64)
    x = {m: by_place(inputs, m) for m in N}
    f = {m: net.extractors[m](x[m]) for m in N}
    each = {m: net.classifiers[m](f[m]).softmax(-1) for m in N}
    for n in (1, 2, 3):
        for using in combinations(N, n):
            assert_close(net.stage(inputs, using, 'mean').softmax(-1), sum(each[m] for m in using)/n)
            fused = net.head(torch.cat([f[m] if m in using else 0*f[m] for m in N], 1))
            assert_close(net.stage(inputs, using[::-1]), fused)
    assert_close(net(inputs), fused)
    single = SleepSMC(MONTAGES, channel_mode=mode, primary='EOG').double()
    single.load_state_dict({k: v for k,v in net.state_dict().items() if not k.startswith('head.')})
    assert_close(single.eval()(inputs).softmax(-1), each['EOG'])
    made = net.train()(inputs)
    for i,m in enumerate(N): assert_close(made['x'][i], x[m])

def naive_loss(net, pred, y, there, seed, mode, score='exp'):
    "Every sum written out; masks are drawn from the same seed."
    names,probs = [*N], lambda logits: [math.exp(o)/sum(math.exp(v) for v in logits) for o in logits]
    total,epochs = 0., range(len(y))
    for i in range(3):
        known = [e for e in epochs if there[i][e] and y[e] >= 0]
        total += sum(-math.log(probs(pred['logits'][i, e].tolist())[y[e]]) for e in known)/len(known)
    if 'fused' in pred:
        known = [e for e in epochs if y[e] >= 0]
        total += sum(-math.log(probs(pred['fused'][e].tolist())[y[e]]) for e in known)/len(known)
    torch.manual_seed(seed)
    net.eval()
    r = {}
    for i,m in enumerate(names):
        known = [e for e in epochs if there[i][e] and y[e] >= 0]
        if m == net.primary: continue
        starts = mask_starts(9*len(known)).unflatten(0, (9, len(known))).tolist()
        for k,e in enumerate(known):
            p = []
            for t in range(9):
                one = pred['x'][i][e].clone()
                for start in starts[t][k]: one[:, start:start + 150] = 0
                p.append(probs(net.classifiers[m](net.extractors[m](one[None]))[0].tolist())[y[e]])
            r[m, e] = sum((o - sum(p)/9)**2 for o in p)/9
    weights = torch.zeros(3, len(y), dtype=torch.float64)
    for e in epochs:
        z = {m: math.exp((math.exp(-r.get((m, e), 0)) if score == 'exp' else -r.get((m, e), 0))/.1)
             for i,m in enumerate(names) if m != net.primary and there[i][e]}
        for i,m in enumerate(names):
            if there[i][e]: weights[i, e] = 1. if m == net.primary else len(z)*z[m]/sum(z.values())
    return total + supcon_by_loops(pred['features'], y, weights, mode, .1, there), weights

@pytest.mark.parametrize('primary', [None, 'EEG', 'EMG'])
@pytest.mark.parametrize('mode, score', [('scale_after_norm', 'exp'), ('loss', 'negative'), ('literal', 'exp')])
def test_the_loss_is_the_loops(primary, mode, score):
    net = lived(SleepSMC(MONTAGES, primary=primary, drop=0.)).train()
    for m in N: net.classifiers[m][-1].weight.data.mul_(20)                          # sure of itself, so that masks matter
    inputs,y = batch_of(dtype=torch.float64), torch.tensor([0, 1, 0, -1, 1])
    gone = inputs[1]['lab']['EOG']['there'].clone()
    gone[1] = False                                                                 # place 0
    inputs,there = changed(inputs, 'lab', 'EOG', there=gone), torch.tensor([[1]*5, [0, 1, 1, 1, 1], [1]*5]).bool()
    pred,loss = net(inputs), SleepSMCLoss(net, weight_mode=mode, score=score)
    assert torch.equal(pred['there'], there)
    torch.manual_seed(5)
    total = loss(pred, y)
    expected,weights = naive_loss(net, {k: [o.detach() for o in v] if k == 'x' else v.detach() for k,v in pred.items()}, y, there, 5, mode, score)
    assert_close(total.item(), expected, atol=1e-10, rtol=1e-10)
    known = y >= 0
    assert_close(loss.last['weights'][:, known], weights[:, known])
    assert (weights[:, known] - 1).abs().max() > .02
    constant = sum(nn.functional.cross_entropy(l[t], y[t], ignore_index=-1) for l,t in zip(pred['logits'], there))
    if primary is None: constant = constant + nn.functional.cross_entropy(pred['fused'], y, ignore_index=-1)
    constant = constant + supcon_loss(pred['features'], y, loss.last['weights'], mode, there=there)
    ours = torch.autograd.grad(total, [*net.parameters()], retain_graph=True)
    for a,b in zip(ours, torch.autograd.grad(constant, [*net.parameters()])): assert_close(a, b)     # none goes through the weights

def test_a_step_weighed_as_printed_is_not_weighed():
    net,inputs = lived(SleepSMC(MONTAGES, primary=None, drop=0.)).train(), batch_of(dtype=torch.float64)
    for m in N: net.classifiers[m][-1].weight.data.mul_(20)
    plain,literal,ours = (gradients(net, SleepSMCLoss(net, **kwargs)(net(inputs), Y))
                          for kwargs in (dict(uncertainty=False), dict(weight_mode='literal'), dict(weight_mode='loss')))
    for k,g in plain.items(): assert_close(literal[k], g, atol=1e-10, rtol=1e-7)
    assert max(float((ours[k] - g).abs().max() / g.abs().max()) for k,g in plain.items() if g.any()) > 1e-3

def test_masked_passes_leave_the_network_as_it_was():
    net = SleepSMC(MONTAGES)
    pred = net(batch_of())
    net.extractors['EMG'].eval()                                                    # frozen by someone
    before,modes = {k: v.clone() for k,v in net.state_dict().items()}, [o.training for o in net.modules()]
    loss = SleepSMCLoss(net)
    weights,r = loss.weigh(pred, Y)
    assert not weights.requires_grad and not r[0].any() and (r[1:] > 0).all()
    assert [o.training for o in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('how', ['there', 'flat', 'nan', 'inf'])
def test_an_epoch_without_a_modality_is_as_if_it_were_not_in_its_batch(how):
    "Exactly so for the networks of other modalities; the missing one's has the batch of the others, statistics included."
    inputs,y = batch_of(dict(lab=[0, 1, 2, 3, 4])), Y
    lost = dict(there=torch.arange(5)[:, None].expand(5, 2) != 2) if how == 'there' else \
        dict(x=inputs[1]['lab']['EOG']['x'].index_fill(0, torch.tensor(2), dict(flat=7., nan=torch.nan, inf=torch.inf)[how]))
    without = changed(inputs, 'lab', 'EOG', **lost)
    y_left,others = y[[0, 1, 3, 4]], torch.tensor([0, 1, 3, 4])
    left = None, dict(lab={m: {k: v[others] if k != 'at' else torch.arange(4) for k,v in p.items()} for m,p in inputs[1]['lab'].items()})
    def run(inputs, y):
        torch.manual_seed(3)
        net = SleepSMC(MONTAGES, drop=0.)
        return gradients(net, SleepSMCLoss(net, contrast=False)(net(inputs), y)), net.state_dict()
    (full,_),(some,stats),(less,fewer) = run(inputs, y), run(without, y), run(left, y_left)
    for k in full:
        if 'EOG' in k: assert_close(some[k], less[k], atol=1e-7, rtol=1e-5)
        else: assert_close(some[k], full[k], atol=0, rtol=0)
    assert some['extractors.EOG.cnn.small.stem.0.0.weight'].any()
    for k in stats:
        if 'EOG' in k: assert_close(stats[k], fewer[k])

def test_a_modality_that_nobody_has_learns_nothing():
    inputs = batch_of(dict(lab=[0, 1, 2, 3, 4]))
    inputs = changed(inputs, 'lab', 'EMG', there=torch.zeros(5, 1, dtype=torch.bool))
    net = SleepSMC(MONTAGES, primary=None)
    before = {k: v.clone() for k,v in net.state_dict().items() if 'EMG' in k}
    total = SleepSMCLoss(net)(net(inputs), Y)
    assert total.isfinite()
    for k,g in gradients(net, total).items():
        if 'EMG' in k: assert g is None or not g.any()
    for k,v in before.items(): assert torch.equal(net.state_dict()[k], v)
    for primary in ('EMG', None):                                                   # nothing to stage with
        net = SleepSMC(MONTAGES, primary=primary).eval()
        empty = None, dict(lab={m: p | dict(there=torch.zeros_like(p['there'])) for m,p in inputs[1]['lab'].items()})
        assert torch.equal(net(empty), torch.zeros(5, 5)) and SleepSMCLoss(net.train())(net(empty), Y).item() == 0

def test_hidden_modalities():
    net,inputs = SleepSMC(MONTAGES, primary=None, hide=.4), batch_of()
    there = torch.rand(3, 4000) < .8
    kept = net._kept(there)
    assert not (kept & ~there).any() and torch.equal(kept.any(0), there.any(0))
    alone = there.sum(0) == 3
    share = kept[:, alone].float().mean().item()                                    # all hidden, .4³: then all are seen
    assert abs(share - (.6 + .4**3)) < .03
    one = there.sum(0) == 1
    assert kept[:, one].sum() == one.sum()
    net.hide = 0.
    assert net._kept(there) is there

def test_masks_are_drawn_last():
    "A step with them has the dropout of one without."
    net,inputs,made = SleepSMC(MONTAGES), batch_of(), []
    state = {k: v.clone() for k,v in net.state_dict().items()}
    for loss in (SleepSMCLoss(net), SleepSMCLoss(net, uncertainty=False)):
        net.load_state_dict(state)
        torch.manual_seed(4)
        loss(net(inputs), Y)
        made.append({k: float(v) for k,v in loss.last['losses'].items() if k != 'contrast'})
    assert made[0] == made[1]

def test_any_montage_is_mixed_by_its_places():
    net = lived(SleepSMC(MONTAGES, primary=None, channel_mode='cam'))
    names = ['P4-M1', 'E2-M1', 'C3-M2', 'E1-M2', 'F8-M1', 'Chin', 'EMG2']
    moved = net.for_montages(dict(home=names))
    inputs = batch_of(dict(home=[2, 0, 1]), dict(EEG=3, EOG=2, EMG=2), torch.float64)
    there = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
    inputs = changed(changed(inputs, 'home', 'EEG', there=there), 'home', 'EMG', there=torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())
    places = sensor_positions(['P4-M1', 'C3-M2', 'F8-M1']).double()
    phi = torch.stack([2*torch.pi/1.4 * (a*(places[:, 0] + .2) + b*(places[:, 1] + .2)) for a in range(6) for b in range(6)], 1)
    scores = torch.cat([phi.cos(), phi.sin()], 1) @ net.alignment.cam('lab').heads.detach().T      # c v
    z = normal(inputs[1]['home']['EEG'])
    expected = torch.stack([torch.einsum('ct,cv->vt', z[i, there[i]], scores[there[i]].softmax(0)) for i in range(3)])
    assert_close(moved.signals(inputs[1], 'EEG')[0], expected[[1, 2, 0]], atol=1e-5, rtol=1e-5)
    z = normal(inputs[1]['home']['EMG'])
    x,has = moved.signals(inputs[1], 'EMG')
    assert_close(x, torch.stack([z[1, :1], torch.zeros(1, 3000), z[0].mean(0, keepdim=True)]))
    assert has.tolist() == [True, False, True]
    turned = net.for_montages(dict(home=names[::-1]))
    backwards = None, dict(home={m: {k: v if k == 'at' else v.flip(1) for k,v in p.items()} for m,p in inputs[1]['home'].items()})
    assert_close(turned(backwards), moved(inputs))
    eeg_only = net.for_montages(dict(home=['Cz-M2']))
    assert eeg_only(batch_of(dict(home=[0, 1]), dict(EEG=1, EOG=0, EMG=0), torch.float64)).isfinite().all()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    for p in moved.parameters(): p.data.add_(1)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_sleepsmc_takes_other_modalities():
    montages = dict(icu=['C4-M1', 'ECG', 'EMG3', 'EMG4'])
    net = SleepSMC(montages, ('ECG', 'EEG', 'EMG'), primary='ECG')
    inputs = batch_of(dict(icu=[0, 1, 2, 3, 4]), dict(ECG=1, EEG=1, EMG=2))
    assert SleepSMCLoss(net)(net(inputs), Y).isfinite() and net.eval()(inputs).shape == (5, 5)
    pair = SleepSMC(montages, ('EEG', 'ECG'))
    loss = SleepSMCLoss(pair)
    loss(pair(inputs), Y)
    assert_close(loss.last['weights'], torch.ones(2, 5))                            # one auxiliary is compared with nobody

def test_sleepsmc_refuses():
    with pytest.raises(MontageError, match='EOG.*expected 2 in each; found 2 in lab, 2 in ward, 1 in home'): SleepSMC(MONTAGES | dict(home=[*MONTAGES['lab'][:6], 'E1-M2']))
    with pytest.raises(MontageError, match='no cohort has this modality'): SleepSMC(MONTAGES, ('EEG', 'ECG'))
    with pytest.raises(MontageError, match='cam'): SleepSMC(MONTAGES).for_montages(dict(home=['C3-M2']))
    for kwargs in (dict(primary='ECG'), dict(modalities=('EEG', 'EEG')), dict(channel_mode='own'), dict(hide=.3)):
        with pytest.raises(SleepnbError): SleepSMC(MONTAGES, **kwargs)
    net = SleepSMC(MONTAGES).eval()
    for using in ((), ('ECG',), 'ECG'):
        with pytest.raises(SleepnbError, match='no modalities of the network'): net.stage(batch_of(), using)
    with pytest.raises(SleepnbError, match='cannot fuse'): net.stage(batch_of(), fuse='head')
    with pytest.raises(SleepnbError, match='does not know this cohort'): net(batch_of(dict(home=[0])))
    with pytest.raises(SleepnbError, match='expected 6: F3-M2'): net(batch_of(n=dict(EEG=5, EOG=2, EMG=1)))
    for kwargs in (dict(weight_mode='none'), dict(score='none')):
        with pytest.raises(SleepnbError, match='no such mode'): SleepSMCLoss(net, **kwargs)
    with pytest.raises(SleepnbError, match='no such argument.*scor'): SleepSMCLoss(net, scor='negative')
    batch = batch_of()
    assert_close(net.stage(batch, 'EEG'), net.stage(batch, ('EEG',)))

@pytest.mark.parametrize('names,signs', [
    (['E1-M2', 'E2-M1'], [1, -1]), (['LOC', 'ROC'], [1, -1]), (['HEOG'], [1]), (['E1-E2'], [1]), (['E2-M1'], [-1]), (['Chin'], [1])])
def test_right_eyes_enter_a_mean_upside_down(names, signs):
    modality = parse_channel(names[0]).modality
    inputs,x = ModalityInput(modality, dict(here=names), 'cam'), torch.randn(2, len(names), 3000)
    b,c = x.shape[:2]
    part = dict(x=x, median=torch.zeros(b, c), scale=torch.ones(b, c), there=torch.ones(b, c, dtype=torch.bool))
    made,_ = inputs(dict(here=part))
    assert_close(made[:, 0], sum(s*x[:, i] for i,s in enumerate(signs)) / len(names))
