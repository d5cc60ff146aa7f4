"""SleepSMC's blocks against loops in double precision, numbers worked out by hand, and many draws."""
import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import kstest, ks_2samp
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from sleepnb.core import SleepnbError
from sleepnb.models.featurenet import FeatureClassifier, FeatureCNN, FeatureNet
from sleepnb.models.layers import ConvBlock, count_macs, count_parameters
from sleepnb.multimodal.contrast import WEIGHT_MODES, supcon_loss
from sleepnb.multimodal.reliability import hide_runs, in_mode, mask_starts, reliability, reliability_weights

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
