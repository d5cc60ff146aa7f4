"""Pretraining tasks against loops in double precision, finite differences, and many draws."""
import math
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from sleepnb.core import SleepnbError, rng
from sleepnb.data.loaders import Neighbours, draw_triplets
from sleepnb.models.cam import CAM
from sleepnb.models.encoder import compact_encoder
from sleepnb.models.heads import MeanPool
from sleepnb.models.layers import count_parameters
from sleepnb.ssrl.augment import RANGES, Augment, add_noise, mask_run, scale_amplitude, shift_level, shift_time, stop_band
from sleepnb.ssrl.contrastive import ContrastiveTask, Predictor, Projector, collapse_sd, simsiam_loss
from sleepnb.ssrl.masking import BANDS, MaskingTask, band_bins, mask_band
from sleepnb.ssrl.shuffling import PieceOrderTask, ShufflingTask, order_loss, shuffle_pieces

NOTHING = dict(amplitude=(1, 1), time=(0, 0), level=(0, 0), zeros=(0, 0), noise=(0, 0), band=(99, 99)) # beyond Nyquist

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(1)

def double(*shape): return torch.randn(*shape, dtype=torch.float64)

def each(x, p, f):
    "`f(signal, number)` for every signal, with numbers by window or by window and channel."
    p = p.tolist()
    return torch.tensor(np.array([[f(x[i, c].double().numpy(), p[i][c] if isinstance(p[i], list) else p[i])
                                   for c in range(x.shape[1])] for i in range(len(x))]))

def without(signal, fs, hidden):
    "A signal without the frequencies that `hidden` names, by sums of sines and cosines."
    n = len(signal)
    t,made = np.arange(n), np.zeros(n)
    for k in range(n//2 + 1):
        if hidden(Fraction(k)*Fraction(fs)/n): continue
        c,s = np.cos(2*np.pi*k*t/n), np.sin(2*np.pi*k*t/n)
        made += ((signal @ c)*c + (signal @ s)*s) / n * (1 if 2*k in (0, n) else 2)
    return made

def per_window_and_channel(draw): return [draw(4), draw(4, 3)]

def test_amplitude_level_and_time_are_the_loops():
    x = double(4, 3, 11)
    for p in per_window_and_channel(double):
        assert_close(scale_amplitude(x, p), each(x, p, lambda s,v: [o*v for o in s]))
        assert_close(shift_level(x, p), each(x, p, lambda s,v: [o + v for o in s]))
    for p in per_window_and_channel(lambda *shape: torch.randint(-25, 25, shape)):
        def moved(s, v):
            out = [0.]*len(s)
            for i,o in enumerate(s): out[(i + v) % len(s)] = o
            return out
        assert_close(shift_time(x, p), each(x, p, moved))

def test_zeros_are_the_loops():
    x = double(4, 3, 11)
    for start in per_window_and_channel(lambda *shape: torch.randint(0, 11, shape)):
        for length in (torch.zeros_like(start), torch.full_like(start, 4), torch.full_like(start, 99)):
            both = start*100 + length
            made = each(x, both, lambda s,v: [0 if v//100 <= i < v//100 + v % 100 else o for i,o in enumerate(s)])
            assert_close(mask_run(x, start, length), made)

def test_noise_is_the_loops():
    x,sigma,unit = double(4, 3, 50), torch.rand(4, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    for s in (sigma, torch.rand(4, 3, dtype=torch.float64)):
        for u in (None, unit):
            torch.manual_seed(5)
            made = add_noise(x, s, u)
            torch.manual_seed(5)
            noise = torch.randn_like(x).numpy()
            for i in range(4):
                for c in range(3):
                    signal = x[i, c].numpy()
                    mean = sum(signal)/50
                    sd = math.sqrt(sum((o - mean)**2 for o in signal)/50) if u is None else u[i, c].item()
                    size = (s[i, c] if s.ndim > 1 else s[i]).item()
                    assert_close(made[i, c], torch.tensor(signal + size*sd*noise[i, c]))

@pytest.mark.parametrize('t,fs', [(60, 100), (61, 100), (50, 64)])
def test_stopped_band_is_the_sums(t, fs):
    x = double(4, 3, t)
    for p in per_window_and_channel(lambda *shape: 2.8 + 30*torch.rand(shape, dtype=torch.float64)):
        made = each(x, p, lambda s,v: without(s, fs, lambda f: abs(float(f) - v) <= 2.5))
        assert_close(stop_band(x, p, width_hz=5., fs=fs), made)

def test_stopped_band_ends_are_stopped():
    x = double(1, 1, 400)                                                       # a coefficient at every quarter of a hertz
    left = torch.fft.rfft(stop_band(x, torch.tensor([10.]))).abs()[0, 0] > 1e-9
    assert (~left).nonzero().flatten().tolist() == list(range(35, 46))          # 8.75 to 11.25 Hz

@pytest.mark.parametrize('n', [1, 2, 6])
def test_views_are_different_distortions_in_any_order(n):
    "Each distortion writes its number as a digit, so that a window shows what it went through."
    class Written(Augment):
        def _distort(self, name, x, unit): return 10*x + 1 + list(RANGES).index(name)
    windows = 30_000
    digits = Written(n)(torch.zeros(windows, 1, 1)).flatten().int().tolist()
    found = Counter(tuple(map(int, str(o))) for o in digits)
    possible = list(permutations(range(1, 7), n))
    assert set(found) == set(possible)
    assert chisquare([found[o] for o in possible]).pvalue > 1e-3

def drawn(name, x, n=4000, per_channel=False, **kw):
    return Augment(6, per_channel=per_channel, ranges=NOTHING | {name: RANGES[name]}, **kw)(x.expand(n, -1, -1))

def assert_uniform(values, low, high):
    values = np.asarray(values, dtype=float).ravel()
    assert values.min() >= low - 1e-3 and values.max() <= high + 1e-3
    assert kstest(values, 'uniform', (low, high - low)).pvalue > 1e-3

def assert_uniform_integers(values, low, high):
    counts = Counter(np.asarray(values).ravel().tolist())
    assert set(counts) == set(range(low, high + 1))
    assert chisquare(list(counts.values())).pvalue > 1e-3

@pytest.mark.parametrize('per_channel', [False, True])
def test_parameters_cover_their_ranges(per_channel):
    def alike(v): return (v[:, 0] == v[:, 1]).float().mean() < .1 if per_channel else torch.equal(v[:, 0], v[:, 1])
    one = torch.ones(2, 300)

    factor = drawn('amplitude', one, per_channel=per_channel).mean(-1)
    level = drawn('level', one, per_channel=per_channel).mean(-1) - 1
    impulse = torch.zeros(2, 300)
    impulse[:, 150] = 1e6
    later = drawn('time', impulse, per_channel=per_channel).argmax(-1) - 150
    masked = drawn('zeros', one, per_channel=per_channel) < .5
    length,first = masked.sum(-1), masked.int().argmax(-1)
    assert_uniform(factor[:, 0], .5, 2)
    assert_uniform(level[:, 0], -10, 10)
    assert_uniform_integers(later[:, 0], -100, 100)
    assert_uniform_integers(length[:, 0], 0, 100)
    at = torch.arange(300)
    expected = (at >= first[..., None]) & (at < (first + length)[..., None])
    assert torch.equal(masked, expected)                                        # one run each
    some = length[:, 0] > 0
    assert_uniform(((first + torch.rand(first.shape)) / (301 - length))[some, 0], 0, 1)   # anywhere that it fits

    white = torch.randn(1, 3000).expand(2, -1)
    gone = torch.fft.rfft(drawn('band', white, 500, per_channel)).abs() < .05
    f = torch.arange(1501)/30
    centre = (gone*f).sum(-1)/gone.sum(-1)
    assert_uniform(centre[:, 0], 2.8 - 1/30, 47.5 + 1/30)
    assert ((gone.sum(-1) - 75).abs() <= 2).all()                               # 2.5 Hz, and now and then an accidental zero

    sines = torch.sin(torch.arange(3000.)).expand(2, -1)
    sd = (drawn('noise', sines, 500, per_channel) - sines).std(-1) / sines.std(-1)
    assert sd.max() < .21 and kstest(sd.numpy()[:, 0], 'uniform', (0, .2)).pvalue > 1e-3

    for v in (factor, level, later): assert alike(v)
    assert alike(length) and alike(centre)

def test_a_run_of_zeros_lies_anywhere():
    x = torch.ones(3000, 1, 4)
    pairs = Augment(6, ranges=NOTHING | dict(zeros=(2, 2)))(x)[:, 0].round().int().tolist()
    found = Counter(map(tuple, pairs))
    assert set(found) == {(0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 0, 0)} and chisquare(list(found.values())).pvalue > 1e-3
    assert not Augment(6, ranges=NOTHING | dict(zeros=(4, 4)))(x).round().any()

def test_noise_of_given_size_reaches_its_window():
    x,scale = torch.zeros(200, 2, 3000), 1 + torch.rand(200, 2)*99
    augment = Augment(6, noise='scaled', ranges=NOTHING | dict(noise=(.5, .5)))
    assert_close(augment(x, scale).std(-1) / scale, torch.full((200, 2), .5), atol=.04, rtol=0)

@pytest.mark.parametrize('kw', [{}, dict(n_transforms=1), dict(per_channel=True), dict(noise='scaled')])
def test_a_seed_makes_a_view(kw):
    x,scale,augment = torch.randn(40, 3, 3000), torch.ones(40, 3), Augment(**kw)
    before,views = x.clone(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(augment(x, scale))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert torch.equal(x, before)
    assert (views[0] != x).any(-1).any(-1).float().mean() > .9                  # nearly every window was changed
    augment.eval()
    torch.manual_seed(1)
    assert torch.equal(augment(x, scale), views[0])                             # validation has views, too

def test_a_sensor_that_is_not_there_gets_no_noise():
    x = torch.randn(300, 3, 3000)
    x[:, 1] = 0
    view = Augment()(x)
    assert view.isfinite().all()
    flat = view[:, 1]
    assert ((flat.abs() < 1e-3) | ((flat - flat.median(-1, keepdim=True).values).abs() < 1e-3)).all()   # a level, and zeros
    only = Augment(6, ranges=NOTHING | dict(noise=(1, 1)))(x)
    assert_close(only[:, 1], x[:, 1])
    assert (only[:, 0] - x[:, 0]).std() > .9

def test_batches_of_few():
    assert Augment()(torch.zeros(0, 2, 3000)).shape == (0, 2, 3000)
    assert Augment()(torch.randn(1, 2, 3000)).isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_has_its_transforms(dtype, autocast):
    x,band = 30*torch.randn(60, 2, 3000).to(dtype), torch.arange(60) % 6
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        view,masked,stopped = Augment()(x), mask_band(x, band), stop_band(x, torch.full((60,), 10.))
    for o in (view, masked, stopped): assert o.dtype == torch.float32 and o.isfinite().all()
    assert_close(masked, mask_band(x.float(), band))
    assert_close(stopped, stop_band(x.float(), torch.full((60,), 10.)))

def cosines(a, b):
    return [sum(p*q for p,q in zip(u, v)) / math.sqrt(sum(p*p for p in u)*sum(q*q for q in v))
            for u,v in zip(a.tolist(), b.tolist())]

def test_simsiam_is_the_loops():
    p1,z1,p2,z2 = double(4, 5, 7)
    expected = -.5*sum(cosines(p1, z2))/5 - .5*sum(cosines(p2, z1))/5
    for stop in (True, False): assert_close(simsiam_loss(p1, z1, p2, z2, stop).item(), expected)
    assert_close(simsiam_loss(p2, z2, p1, z1).item(), expected)
    assert_close(simsiam_loss(p1, p2, p2, p1).item(), -1.)
    assert_close(simsiam_loss(p1, -p2, p2, -p1).item(), 1.)

def test_simsiam_gradients():
    p1,z1,p2,z2 = (o.requires_grad_() for o in double(4, 3, 4))
    assert gradcheck(lambda p1,p2: simsiam_loss(p1, z1, p2, z2), (p1, p2))
    assert gradcheck(lambda *o: simsiam_loss(*o, stop_gradient=False), (p1, z1, p2, z2))
    simsiam_loss(p1, z1, p2, z2).backward()
    assert z1.grad is None and z2.grad is None and p1.grad.any() and p2.grad.any()

def normalised_by_loops(x, norm):
    out = np.empty_like(x)
    for j in range(x.shape[1]):
        mean = sum(x[:, j])/len(x)
        var = sum((o - mean)**2 for o in x[:, j])/len(x)
        out[:, j] = (x[:, j] - mean)/math.sqrt(var + norm.eps)
        if norm.affine: out[:, j] = out[:, j]*norm.weight[j].item() + norm.bias[j].item()
    return out

def through(module, x):
    "A stack of layers in training, in numpy."
    for layer in module:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().numpy().T + (0 if layer.bias is None else layer.bias.detach().numpy())
        elif isinstance(layer, nn.BatchNorm1d): x = normalised_by_loops(x, layer)
        else: x = np.maximum(x, 0)
    return x

def test_the_contrastive_task_is_its_parts():
    task = ContrastiveTask(width=5, hidden=6, n_out=8, bottleneck=3).double()
    for o in task.parameters(): nn.init.normal_(o)
    h1,h2 = double(9, 5), double(9, 5)
    z1,z2 = (through(task.projector, h.numpy()) for h in (h1, h2))              # each view by its own statistics
    p1,p2 = (through(task.predictor, z) for z in (z1, z2))
    loss,shown = task(h1, h2)
    assert_close(loss.item(), -.5*sum(cosines(p1, z2))/9 - .5*sum(cosines(p2, z1))/9)
    unit = z1 / np.sqrt((z1**2).sum(1, keepdims=True))
    sd = [math.sqrt(sum((o - sum(c)/9)**2 for o in c)/9) for c in unit.T]
    assert_close(shown['collapse_sd'].item(), sum(sd)/8)
    assert not shown['collapse_sd'].requires_grad

def test_heads_have_their_layers():
    def kinds(m): return [type(o).__name__ for o in m]
    assert kinds(Projector()) == ['Linear', 'BatchNorm1d', 'ReLU']*2 + ['Linear', 'BatchNorm1d']
    assert kinds(Predictor()) == ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    assert [o.bias is None for o in Projector() if isinstance(o, nn.Linear)] == [True]*3
    assert [o.affine for o in Projector() if isinstance(o, nn.BatchNorm1d)] == [True, True, False]
    assert [(o.in_features, o.out_features) for m in (Projector(), Predictor()) for o in m if isinstance(o, nn.Linear)] \
        == [(16, 64), (64, 64), (64, 64), (64, 16), (16, 64)]
    assert count_parameters(ContrastiveTask()) == 9472 + 2144

def test_the_target_branch_gets_no_gradient():
    "A view's gradient is that of its own guess alone, as if the other vector were a constant."
    task = ContrastiveTask(4, 6, 8, 3).double().eval()
    h1,h2 = (double(5, 4).requires_grad_() for _ in range(2))
    found = torch.autograd.grad(task(h1, h2)[0], (h1, h2))
    for own,other,grad in ((h1, h2, found[0]), (h2, h1, found[1])):
        target = torch.tensor(task.projector(other).tolist(), dtype=torch.float64)
        half = -.5*nn.functional.cosine_similarity(task.predictor(task.projector(own)), target).mean()
        assert_close(grad, torch.autograd.grad(half, own)[0])

def test_collapse_is_seen():
    assert_close(collapse_sd(torch.randn(4000, 64)).item(), .125, atol=1e-3, rtol=0)
    assert_close(collapse_sd(torch.randn(4000, 16)).item(), .25, atol=2e-3, rtol=0)
    assert collapse_sd(torch.ones(7, 64)) < 1e-6 and collapse_sd(torch.zeros(7, 64)) == 0
    assert collapse_sd(torch.randn(1, 64)) == 0

def softplus_by_loops(scores, order):
    losses = [math.log1p(math.exp(-y*s)) for s,y in zip(scores, order) if y]
    right = [(s > 0) == (y > 0) for s,y in zip(scores, order) if y]
    return sum(losses)/len(losses), sum(right)/len(right)

def test_shuffling_is_the_loops():
    h,order = double(3, 12, 4), torch.tensor([1, -1, 0, 1, -1, -1, 1, 0, 1, -1, 1, 1])
    task = ShufflingTask(4).double().eval()
    w,b = task.head[1].weight[0].tolist(), task.head[1].bias.item()
    a0,a1,a2 = h.tolist()
    scores = [sum(w[j]*abs(p[j] - q[j]) + w[4 + j]*abs(q[j] - r[j]) for j in range(4)) + b for p,q,r in zip(a0, a1, a2)]
    loss,shown = task(*h, order)
    assert_close((loss.item(), shown['accuracy'].item()), softplus_by_loops(scores, order.tolist()), atol=1e-7, rtol=0)

def test_piece_order_is_the_loops():
    h,order = double(12, 4), torch.tensor([1, -1, 0, 1, -1, -1, 1, 0, 1, -1, 1, 1])
    task = PieceOrderTask(4).double().eval()
    w,b = task.head[1].weight[0].tolist(), task.head[1].bias.item()
    scores = [sum(map(math.prod, zip(w, row))) + b for row in h.tolist()]
    loss,shown = task(h, order)
    assert_close((loss.item(), shown['accuracy'].item()), softplus_by_loops(scores, order.tolist()), atol=1e-7, rtol=0)

def test_order_gradients():
    order = torch.tensor([1, -1, 0, 1])
    assert gradcheck(lambda s: order_loss(s, order)[0], (double(4).requires_grad_(),))
    task = ShufflingTask(3).double().eval()
    assert gradcheck(lambda *h: task(*h, order)[0], tuple(o.requires_grad_() for o in double(3, 4, 3)))
    pieces = PieceOrderTask(3).double().eval()
    assert gradcheck(lambda h: pieces(h, order)[0], (double(4, 3).requires_grad_(),))
    h = double(3, 4, 3).requires_grad_()
    task(*h, order)[0].backward()
    assert not h.grad[:, 2].any() and h.grad[:, [0, 1, 3]].any(-1).all()        # what is left out learns nothing

def test_no_legal_triplet_still_trains():
    task,h = ShufflingTask(), torch.randn(3, 5, 16, requires_grad=True)
    loss,shown = task(*h, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss == 0 and shown['accuracy'].isnan()
    for o in (h, *task.parameters()): assert o.grad is not None and not o.grad.any()

def test_left_out_triplets_do_not_count():
    task,h,order = ShufflingTask().eval(), torch.randn(3, 8, 16), torch.tensor([1, 0, -1, 0, 0, 1, 1, 0])
    known = order != 0
    for a,b in zip(task(*h, order), task(*h[:, known], order[known])): assert_close(a, b)

def test_scores_of_any_size_are_finite():
    score = torch.tensor([1e30, -1e30, 1e4, -1e4], requires_grad=True)
    loss,_ = order_loss(score, torch.tensor([1, -1, -1, 1]))
    loss.backward()
    assert_close(loss.item(), 5e3)
    assert_close(score.grad, torch.tensor([0, 0, .25, -.25]))
    assert_close(order_loss(torch.zeros(6), torch.tensor([1, -1]*3))[0].item(), math.log(2))

def test_dropout_is_for_training():
    for task,h in ((ShufflingTask(drop=.5), torch.randn(3, 50, 16)), (PieceOrderTask(drop=.5), torch.randn(1, 50, 16))):
        order = torch.ones(50, dtype=torch.long)
        assert task(*h, order)[0] != task(*h, order)[0]
        task.eval()
        assert task(*h, order)[0] == task(*h, order)[0]
    still = ShufflingTask(drop=0.)
    assert still(*torch.ones(3, 4, 16), order[:4])[0] == still(*torch.ones(3, 4, 16), order[:4])[0]

def test_triplets_come_in_the_order_of_the_loaders():
    "With the number of an epoch as its vector, those in between are never far from both anchors."
    rows = np.arange(100, 200)
    others,y = draw_triplets(Neighbours(np.zeros(300), np.arange(300)), rows, rng('triplets'))
    task = ShufflingTask(1).eval().requires_grad_(False)
    task.head[1].weight.fill_(-1)
    task.head[1].bias.fill_(6.5)                                                # above 0: both distances together are at most 6
    h,y = torch.tensor(np.c_[rows, others].T[..., None], dtype=torch.float32), torch.tensor(y)
    inside = torch.where(y == 1, y, 0)
    assert task(*h, inside)[1]['accuracy'] == 1 and task(*h, y)[1]['accuracy'] > .8
    assert task(h[0], h[2], h[1], inside)[1]['accuracy'] < 1                    # another order of the three

@pytest.mark.parametrize('n', [2, 3, 4, 5])
def test_pieces_are_shuffled_in_every_way(n):
    b,size = 4000, 2
    x = torch.arange(n*size).repeat(b, 3, 1) + 100*torch.arange(3)[:, None] + 1000*torch.arange(b)[:, None, None]
    made,order = shuffle_pieces(x, n)
    assert made.shape == x.shape and made.dtype == x.dtype and order.sum() == 0
    found = Counter()
    for window,(row,y) in enumerate(zip(made.tolist(), order.tolist())):
        pieces = [v - 1000*window for v in row[0]]
        places = tuple(v // size for v in pieces[::size])
        assert pieces == [p*size + i for p in places for i in range(size)]      # whole pieces of this very window
        assert all(row[c] == [v + 100*c for v in row[0]] for c in range(3))     # the same in all channels
        assert (places == tuple(range(n))) == (y == 1)
        if y < 0: found[places] += 1
    assert len(found) == math.factorial(n) - 1
    if n > 2: assert chisquare(list(found.values())).pvalue > 1e-3

def test_pieces_of_odd_batches():
    sums = Counter(shuffle_pieces(torch.zeros(5, 1, 3))[1].sum().item() for _ in range(200))
    assert set(sums) == {1, -1} and min(sums.values()) > 60
    for n,t in ((1, 6), (7, 7), (4, 6)):
        with pytest.raises(SleepnbError, match='cannot be cut'): shuffle_pieces(torch.zeros(2, 1, t), n)

def in_band(f, name):
    low,high = map(Fraction, BANDS[name])
    return low <= f < high or (name == 'gamma' and f == high)

@pytest.mark.parametrize('t,fs', [(3000, 100), (300, 100), (301, 100), (256, 128), (320, 80), (6000, 200)])
def test_bins_are_the_frequencies(t, fs):
    bins = band_bins(t, fs).tolist()
    for name,(a,b) in zip(BANDS, bins, strict=True):
        assert list(range(a, b)) == [k for k in range(t//2 + 1) if in_band(Fraction(k*fs, t), name)]

def test_bins_of_an_epoch():
    assert band_bins().tolist() == [[15, 120], [120, 240], [240, 360], [360, 480], [480, 900], [900, 1501]]
    with pytest.raises(SleepnbError, match='found gamma, in 3000 samples at 50 Hz'): band_bins(3000, 50)
    with pytest.raises(SleepnbError, match='found delta'): band_bins(10, 100)

@pytest.mark.parametrize('t,fs', [(300, 100), (301, 100), (256, 128)])
def test_masks_are_the_sums(t, fs):
    x,names = double(6, 2, t), list(BANDS)
    expected = each(x, torch.arange(6), lambda s,i: without(s, fs, lambda f: in_band(f, names[i])))
    assert_close(mask_band(x, torch.arange(6), fs), expected)

def test_masks_take_and_leave_everything_else():
    x = double(1, 2, 3000).expand(6, -1, -1)
    once = mask_band(x, torch.arange(6))
    assert_close(mask_band(once, torch.arange(6)), once)
    low = without(x[0, 0].numpy(), 100, lambda f: f >= Fraction(1, 2))
    assert_close((x - once).sum(0)[0] + torch.tensor(low), x[0, 0])             # six bands, and what is below
    assert_close(mask_band(x + 7, torch.arange(6)), once + 7)                   # a level is below, too
    order = torch.tensor([3, 1, 0, 5, 5, 2])
    assert_close(mask_band(x, order), once[order])

@torch.no_grad
def test_masks_and_alignment_change_places_but_for_the_clip():
    cam,x,band = CAM().double(), double(12, 4, 3000), torch.arange(12) % 6
    places,scale = torch.rand(4, 2, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64) + 1
    def after(x, clip): return mask_band(cam(((x - 3)/scale).clamp(-clip, clip), places), band)
    def before(x, clip): return cam(((mask_band(x, band) - 3)/scale).clamp(-clip, clip), places)
    assert_close(after(x, 20), before(x, 20))
    x[:, :, 1000:1100] += 200                                                   # an artefact of a second
    assert_close(after(x, math.inf), before(x, math.inf))
    assert ((after(x, 20) - before(x, 20)).abs().amax((1, 2)) > .1).all()

def test_masking_is_the_loops():
    task,h,band = MaskingTask(4).double(), double(9, 4), torch.randint(6, (9,))
    w,b = task.head.weight.tolist(), task.head.bias.tolist()
    losses,right = [], []
    for row,k in zip(h.tolist(), band.tolist()):
        logits = [sum(map(math.prod, zip(w[i], row))) + b[i] for i in range(6)]
        losses.append(math.log(sum(map(math.exp, logits))) - logits[k])
        right.append(logits[k] == max(logits))
    loss,shown = task(h, band)
    assert_close((loss.item(), shown['accuracy'].item()), (sum(losses)/9, sum(right)/9), atol=1e-7, rtol=0)
    assert gradcheck(lambda h: task(h, band)[0], (h.requires_grad_(),))
    nn.init.zeros_(task.head.weight), nn.init.zeros_(task.head.bias)
    assert_close(task(h, band)[0].item(), math.log(6))
    assert count_parameters(MaskingTask()) == 102

@pytest.fixture
def system():
    return nn.ModuleDict(dict(cam=CAM(), encoder=compact_encoder(), pool=MeanPool(),
                              a=ContrastiveTask(), t=ShufflingTask(), f=MaskingTask()))

def loss_of(task, system, x, places):
    def h(x): return system['pool'](system['encoder'](system['cam'](x, places)))
    number,augment = torch.arange(len(x), device=x.device), Augment()
    if task == 'a': return system[task](h(augment(x)), h(augment(x)))[0]
    if task == 't': return system[task](h(x), h(x.roll(1, 0)), h(x.roll(2, 0)), number % 3 - 1)[0]
    return system[task](h(mask_band(x, number % 6)), number % 6)[0]

@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('task', ['a', 't', 'f'])
def test_every_task_teaches_the_whole_encoder(system, task, autocast):
    x,places = torch.randn(24, 4, 3000), torch.rand(4, 2)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): loss = loss_of(task, system, x, places)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    for m in (system['cam'], system['encoder'], system[task]):
        for name,o in m.named_parameters(): assert o.grad is not None and o.grad.isfinite().all() and o.grad.any(), name

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')
def test_a_gpu_runs_every_task(system):
    x,places,band = torch.randn(24, 4, 3000), torch.rand(4, 2), torch.arange(24) % 6
    assert_close(mask_band(x.cuda(), band.cuda()).cpu(), mask_band(x, band), atol=1e-4, rtol=0)
    for task in 'atf':
        loss = loss_of(task, system.cuda(), x.cuda(), places.cuda())
        assert loss.is_cuda and loss.isfinite()
    views = []
    for _ in range(2):
        torch.manual_seed(3)
        views.append(Augment()(x.cuda()))
    assert views[0].is_cuda and torch.equal(*views)
