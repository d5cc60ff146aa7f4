"""Models against loops in double precision, a second library, counts done by hand, and what must not matter to them."""
import math, subprocess, sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from sleepnb.core import SleepnbError
from sleepnb.montage import POSITIONS
from sleepnb.models.cam import CAM, CohortAlignment, PadChannels, fourier_embedding, sensor_positions
from sleepnb.models.encoder import ENCODERS, compact_encoder
from sleepnb.models.heads import AttentionPool, StageClassifier, make_pool
from sleepnb.models.layers import AttentionBlock, ConvBlock, SelfAttention, SepBlock, count_macs, count_parameters

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def embedding_by_loops(x, y, k=6, m=.2):
    "Cosines, then sines, of the waves at one place, as the paper's formula reads."
    phi = [2*math.pi / (1 + 2*m) * (a*(x + m) + b*(y + m)) for a in range(k) for b in range(k)]
    return [math.cos(p) for p in phi] + [math.sin(p) for p in phi]

def cam_by_loops(x, places, heads, present):
    "Virtual channels of one epoch, number by number; `present` lists the sensors that are there."
    u = []
    for h in heads.tolist():
        scores = {c: sum(e*w for e,w in zip(embedding_by_loops(*places[c].tolist()), h)) for c in present}
        total = sum(math.exp(s) for s in scores.values())
        u.append([sum(math.exp(scores[c]) / total * x[c, t].item() for c in present) for t in range(x.shape[1])])
    return torch.tensor(u, dtype=torch.float64)

def test_embedding_is_the_formula():
    places = torch.rand(7, 2, dtype=torch.float64)*1.2 - .1
    for n,k,m in ((72, 6, .2), (8, 2, .2), (32, 4, 0.), (288, 12, .1)):
        expected = torch.tensor([embedding_by_loops(*p.tolist(), k, m) for p in places], dtype=torch.float64)
        assert_close(fourier_embedding(places, n, m), expected, atol=1e-12, rtol=0)
        assert_close(fourier_embedding(places.float(), n, m), expected.float(), atol=2e-5, rtol=0)

def test_embedding_sizes():
    legal = [n for n in range(1, 300) if math.isqrt(n//2)**2 * 2 == n and n % 4 == 0]
    assert legal == [8, 32, 72, 128, 200, 288]
    for n in range(1, 300):
        if n in legal: assert fourier_embedding(torch.rand(3, 2), n).shape == (3, n)
        else:
            with pytest.raises(SleepnbError, match='no such size'): fourier_embedding(torch.rand(3, 2), n)

@pytest.mark.parametrize('c', [1, 2, 6, 11])
def test_cam_is_the_formula(c):
    cam = CAM().double()
    x,places = torch.randn(3, c, 5, dtype=torch.float64), torch.rand(c, 2, dtype=torch.float64)
    assert_close(cam(x, places), torch.stack([cam_by_loops(o, places, cam.heads, range(c)) for o in x]), atol=1e-12, rtol=0)

def test_cam_with_a_montage_for_each_epoch():
    cam,mask = CAM().double(), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    x,places = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 2, dtype=torch.float64)
    expected = torch.stack([cam_by_loops(x[i], places[i], cam.heads, mask[i].nonzero().flatten().tolist()) for i in range(3)])
    assert_close(cam(x, places, mask), expected, atol=1e-12, rtol=0)

@settings(deadline=None, max_examples=30)
@given(st.integers(1, 24), st.integers(0, 2**31), st.floats(0, 30))
def test_cam_makes_means_whatever_the_order(c, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    places,order = torch.rand(c, 2, generator=generator), torch.randperm(c, generator=generator)
    mask = torch.rand(4, c, generator=generator) < .7
    cam,x = CAM(), torch.randn(4, c, 7, generator=generator)
    cam.heads.data = scale*torch.randn(16, 72, generator=generator)
    a = cam.weights(places, mask)
    assert (a >= 0).all() and not a[~mask[:, None].expand_as(a)].any()
    assert_close(a.sum(-1), mask.any(-1, keepdim=True).float().expand(-1, 16))
    u = cam(x, places, mask)
    assert_close(cam(x[:, order], places[order], mask[:, order]), u, atol=1e-4, rtol=0)
    low,high = (x.masked_fill(~mask[..., None], o).amin(1) if o > 0 else x.masked_fill(~mask[..., None], o).amax(1) for o in (99, -99))
    some = mask.any(-1)
    assert (u[some] >= low[some, None] - 1e-4).all() and (u[some] <= high[some, None] + 1e-4).all()

@pytest.mark.parametrize('junk', [0., 1e30, math.nan, math.inf])
def test_masked_sensors_do_not_matter(junk):
    cam,places = CAM(), torch.rand(6, 2)
    x,mask = torch.randn(5, 6, 9), torch.ones(5, 6, dtype=torch.bool)
    mask[0, 3] = mask[1, :5] = mask[2, ::2] = mask[4] = False
    u = cam(x.masked_fill(~mask[..., None], junk), places, mask)
    for i in range(4): assert_close(u[i:i+1], cam(x[i:i+1, mask[i]], places[mask[i]]), atol=1e-6, rtol=0)
    assert not u[4].any()
    u.sum().backward()
    assert cam.heads.grad.isfinite().all()
    assert_close(cam(x, places, torch.ones_like(mask)), cam(x, places))

def test_cam_gradients():
    places,mask = torch.rand(4, 2, dtype=torch.float64), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    cam = CAM(n_virtual=3, n_dims=8).double()
    def run(x, heads): return torch.func.functional_call(cam, dict(heads=heads), (x, places, mask))
    assert torch.autograd.gradcheck(run, (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), cam.heads))

def test_a_frozen_cam_passes_gradients_but_does_not_learn():
    cam = CAM(drop_radius=.3).requires_grad_(False).eval()
    before,x = cam.heads.clone(), torch.randn(2, 6, 9, requires_grad=True)
    places = torch.rand(6, 2)
    u = cam(x, places)
    u.square().sum().backward()
    assert cam.heads.grad is None and x.grad.any() and torch.equal(cam.heads, before)
    assert all(torch.equal(cam(x, places), u) for _ in range(20))            # no sensor is hidden

@pytest.mark.parametrize('radius', [.05, .2, .5])
def test_sensor_dropout_hides_neighbours_and_always_leaves_one(radius):
    cam,places = CAM(n_virtual=1, drop_radius=radius), sensor_positions(['F3', 'F4', 'C3', 'C4', 'O1', 'O2'])
    mask = torch.rand(400, 6) < .5
    x = torch.eye(6).expand(400, 6, 6)                                       # so that what comes out are the weights
    weights = cam(x, places, mask)[:, 0]
    assert not weights[~mask].any()
    assert_close(weights.sum(-1), mask.any(-1).float())
    hidden = mask & (weights == 0)
    assert hidden.any() or radius == .05
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 201)]*2, indexing='ij'), -1).reshape(-1, 2)
    near = torch.cdist(grid, places) < radius + .005
    far = torch.cdist(grid, places) > radius - .005
    for m,h in zip(mask, hidden): # there is a place that is near to all the hidden and far from all others
        if m.any(): assert (near[:, h].all(-1) & far[:, m & ~h].all(-1)).any()

def test_positions_of_other_choices():
    cz,fpz = (torch.tensor(POSITIONS[s]) for s in ('Cz', 'Fpz'))
    first,middle = sensor_positions(['Fpz-Cz']), sensor_positions(['Fpz-Cz'], of='middle')
    assert_close(first[0], fpz)
    assert torch.dist(middle[0], (cz + fpz)/2) < .01          # along a midline the arc is straight on the map
    boxed = sensor_positions(['F3', 'F4', 'O1'], frame='montage')
    assert boxed.amin(0).tolist() == [0, 0] and boxed.amax(0).tolist() == [1, 1]

def test_cohorts_meet_behind_the_alignment():
    places = {'a.b': torch.rand(2, 2), 'keys': torch.rand(6, 2), 'c': torch.rand(11, 2)} # names that torch would not take
    inputs = {k: torch.randn(n, len(p), 30) for n,(k,p) in zip((3, 0, 4), places.items())}
    for align,n in (('own', 3), ('shared', 1), ('pad', 0)):
        model = CohortAlignment(places, align)
        assert count_parameters(model) == n*1152
        u = model(inputs)
        assert u.shape == (7, 16, 30)
        if align != 'pad': assert_close(u[3:], model.cams[n - 1](inputs['c'], places['c']))
        if align == 'own': assert not torch.equal(u[3:], model.cams[0](inputs['c'], places['c']))
        masks = {'c': torch.tensor([[True]*10 + [False]]*4)}
        assert_close(model(inputs, masks)[:3], u[:3])
        assert not torch.equal(model(inputs, masks)[3:], u[3:])
        again = CohortAlignment(places, align)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(inputs), u)

def test_padding_refuses_what_it_cannot_hold():
    with pytest.raises(SleepnbError, match='at most 16'): PadChannels()(torch.zeros(1, 17, 9))

def attention_by_loops(x, module):
    "Self-attention of one epoch's tokens, number by number."
    n,w = x.shape
    size = w // module.n_heads
    q,k,v = (module.qkv.weight @ x.T + module.qkv.bias[:, None]).T.split(w, dim=1)
    joined = torch.zeros_like(x)
    for h in range(module.n_heads):
        for i in range(n):
            scores = [sum(q[i, h*size + j].item() * k[o, h*size + j].item() for j in range(size)) / math.sqrt(size) for o in range(n)]
            total = sum(map(math.exp, scores))
            for o in range(n): joined[i, h*size:(h + 1)*size] += math.exp(scores[o]) / total * v[o, h*size:(h + 1)*size]
    return joined @ module.out.weight.T + module.out.bias

@torch.no_grad
def test_attention_is_the_formula():
    attention,x = SelfAttention(8, n_heads=2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    assert_close(attention(x), torch.stack([attention_by_loops(o, attention) for o in x]), atol=1e-12, rtol=0)

@torch.no_grad
@pytest.mark.parametrize('width,n_heads', [(16, 4), (128, 8), (6, 1)])
def test_attention_is_torchs(width, n_heads):
    ours,x = SelfAttention(width, n_heads).double(), torch.randn(3, 21, width, dtype=torch.float64)
    theirs = nn.MultiheadAttention(width, n_heads, batch_first=True).double()
    theirs.load_state_dict(dict(in_proj_weight=ours.qkv.weight, in_proj_bias=ours.qkv.bias) |
                           {'out_proj.weight': ours.out.weight, 'out_proj.bias': ours.out.bias})
    assert_close(ours(x), theirs(x, x, x)[0], atol=1e-12, rtol=0)

@torch.no_grad
def test_the_block_is_torchs_with_normalisation_first():
    ours,x = AttentionBlock(16, 4, 32).double(), torch.randn(3, 21, 16, dtype=torch.float64)
    for p in ours.parameters(): p.copy_(torch.randn_like(p)*.3)
    theirs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0, batch_first=True, norm_first=True).double()
    names = {'attend.0': 'norm1', 'attend.1.out': 'self_attn.out_proj', 'work.0': 'norm2', 'work.1': 'linear1', 'work.3': 'linear2'}
    state = {f'{names[k.rpartition(".")[0]]}.{k.rpartition(".")[2]}': v for k,v in ours.state_dict().items() if 'qkv' not in k}
    qkv = ours.attend[1].qkv
    theirs.load_state_dict(state | {'self_attn.in_proj_weight': qkv.weight, 'self_attn.in_proj_bias': qkv.bias})
    assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)

def filtered_by_loops(x, weight, stride):
    "One channel, one filter: all places where the filter is whole."
    return [sum(x[i + j].item() * weight[j].item() for j in range(len(weight))) for i in range(0, len(x) - len(weight) + 1, stride)]

@torch.no_grad
def test_separable_filters_are_loops():
    block = SepBlock(2, 3, kernel=4, stride=3).double().eval()
    x = torch.randn(1, 2, 20, dtype=torch.float64)
    each = torch.tensor([filtered_by_loops(x[0, c], block[0].weight[c, 0], 3) for c in range(2)], dtype=torch.float64)
    expected = (block[1].weight[..., 0] @ each / math.sqrt(1 + 1e-5)).clamp(min=0)       # statistics as they start: 0 and 1
    assert_close(block(x)[0], expected, atol=1e-12, rtol=0)

@torch.no_grad
@pytest.mark.parametrize('kernel,before', [(8, 3), (6, 2), (5, 2), (1, 0)])
def test_padding_is_torchs_same(kernel, before):
    x,block = torch.randn(2, 3, 50), ConvBlock(3, 4, kernel)
    conv = block[0] if kernel == 1 else block[0][1]
    padded = nn.functional.pad(x, (before, kernel - 1 - before))
    assert_close(block[0](x), nn.functional.conv1d(padded, conv.weight))
    assert block(x).shape == (2, 4, 50)

def sep(c, w, k): return c*k + c*w + 2*w      # separable layer: filters, mix, normalisation
def conv(c, w, k): return c*w*k + 2*w
def attention(w, hidden): return 2*2*w + 4*(w*w + w) + w*hidden + hidden + hidden*w + w

COUNTS = { # small, large, places, attention: as in the table, and by hand
    'compact': {'small': (2336, sep(16, 16, 50) + 3*sep(16, 16, 8)), 'large': (2912, 64 + sep(4, 16, 400) + 3*sep(16, 16, 6)),
                'attention.0': (336, 21*16), 'attention.1': (2224, attention(16, 32)), '': (7808, None)},
    'full': {'small': (379_776, conv(16, 64, 50) + conv(64, 128, 8) + 2*conv(128, 128, 8)),
             'large': (656_256, conv(16, 64, 400) + conv(64, 128, 6) + 2*conv(128, 128, 6)),
             'attention.0': (2688, 21*128), 'attention.1': (132_480, attention(128, 256)), '': (1_171_200, None)}}

@pytest.mark.parametrize('name', COUNTS)
def test_parameters_part_by_part(name):
    encoder = ENCODERS[name]()
    for part,(printed,by_hand) in COUNTS[name].items():
        assert count_parameters(encoder.get_submodule(part)) == printed and by_hand in (printed, None), part

def test_the_system_has_the_parameters_of_the_paper():
    assert count_parameters(StageClassifier()) == 997 and count_parameters(CAM()) == 1152
    assert count_parameters(CAM(), compact_encoder(), StageClassifier()) == 9957

def macs_by_hooks(model, *inputs):
    "Multiply-accumulates of the layers from the shapes that pass through them, and of attention between tokens."
    total = 0
    def count(module, args, out):
        nonlocal total
        if isinstance(module, nn.Conv1d): total += out.numel() * module.weight[0].numel()
        if isinstance(module, nn.Linear): total += out.numel() * module.in_features
        if isinstance(module, SelfAttention): total += 2 * args[0].shape[1]**2 * args[0].shape[2]
    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad(): model.eval()(*inputs)
    for h in hooks: h.remove()
    return total

@pytest.mark.parametrize('name,expected,unused', [('compact', 940_864, 4*(60 - 53)*400), ('full', 72_947_968, 0)])
def test_multiply_accumulates(name, expected, unused):
    "The compact encoder multiplies 60 frames by its longest filters, and 53 places come of it."
    encoder,x = ENCODERS[name](), torch.zeros(1, 16, 3000)
    assert macs_by_hooks(encoder, x) == expected
    assert count_macs(encoder, x) == expected + unused
    assert encoder(x).shape == (1, 21, encoder.width)

def test_multiply_accumulates_of_a_cam():
    assert count_macs(CAM(), torch.zeros(1, 6, 3000), torch.rand(6, 2)) == 16*6*3000 + 16*72*6

@torch.no_grad
def test_tokens_of_short_waves_come_first():
    encoder,x = compact_encoder().eval(), torch.randn(2, 16, 3000)
    for p in encoder.attention[1].parameters(): p.zero_()
    encoder.attention[0].weight[:, 0] = torch.arange(21.)
    expected = torch.cat([encoder.small(x), encoder.large(x)], 1)
    assert encoder.small(x).shape[1] == 15
    expected[..., 0] += torch.arange(21.)
    assert_close(encoder(x), expected)

@pytest.mark.parametrize('n_samples', [750, 2000, 3000, 6001])
@pytest.mark.parametrize('n_chans', [1, 2, 16])
@pytest.mark.parametrize('name', ENCODERS)
def test_encoders_of_every_size(name, n_chans, n_samples):
    encoder = ENCODERS[name](n_chans=n_chans, n_samples=n_samples)
    for b in (1, 3):
        tokens = encoder(torch.randn(b, n_chans, n_samples))
        assert tokens.shape == (b, encoder.n_tokens, encoder.width) and tokens.isfinite().all()
    assert StageClassifier(encoder.width)(tokens).shape == (3, 5)
    for wrong in ((2, n_chans + 1, n_samples), (2, n_chans, n_samples - 1), (n_chans, n_samples)):
        with pytest.raises(SleepnbError, match='do not fit the encoder'): encoder(torch.zeros(wrong))

def test_an_epoch_that_is_too_short():
    for make in ENCODERS.values():
        with pytest.raises(SleepnbError, match='too short'): make(n_samples=749)

class System(nn.Module):
    "Channel alignment, encoder and classifier."
    def __init__(self, name):
        super().__init__()
        self.cam,self.encoder = CAM(), ENCODERS[name]()
        self.classifier = StageClassifier(self.encoder.width)
    def forward(self, x, positions): return self.classifier(self.encoder(self.cam(x, positions)))

@pytest.fixture(params=ENCODERS)
def system(request): return System(request.param)

def test_batching_does_not_change_an_epoch(system):
    x,places = torch.randn(9, 6, 3000), torch.rand(6, 2)
    with torch.no_grad(): whole,alone = system.eval()(x, places), [system(x[i:i+1], places) for i in range(9)]
    assert_close(whole, torch.cat(alone), atol=1e-5, rtol=1e-5)

def test_every_weight_learns(system):
    logits = system(torch.randn(8, 6, 3000), torch.rand(6, 2))
    nn.functional.cross_entropy(logits, torch.arange(8) % 5).backward()
    assert [n for n,p in system.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []

@torch.no_grad
@pytest.mark.parametrize('training', [True, False])
def test_extreme_signals_stay_finite(system, training):
    system.train(training)
    x = torch.randn(6, 4, 3000)
    x[0], x[1], x[2] = 0, 1e6, -1e6
    x[3] *= 1e6
    x[4, :, 1500] = 1e6
    assert system(x, torch.rand(4, 2)).isfinite().all()

@torch.no_grad
def test_bfloat16_is_near_enough(system):
    x,places = torch.randn(4, 6, 3000), torch.rand(6, 2)
    expected = system.eval()(x, places).softmax(-1)
    with torch.autocast('cpu', torch.bfloat16): found = system(x, places).float().softmax(-1)
    assert_close(found, expected, atol=.03, rtol=0)

def test_bfloat16_trains(system):
    with torch.autocast('cpu', torch.bfloat16):
        mask = torch.tensor([[True]*5 + [False], [False]*6])
        u = system.cam(torch.randn(2, 6, 3000), torch.rand(6, 2), mask)
        loss = nn.functional.cross_entropy(system.classifier(system.encoder(u)), torch.tensor([0, 4]))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in system.parameters())

@torch.no_grad
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')
def test_a_gpu_gives_what_the_cpu_gives(system):
    x,places = torch.randn(4, 6, 3000), torch.rand(6, 2)
    expected = system.eval()(x, places)
    assert_close(system.cuda()(x.cuda(), places.cuda()).cpu(), expected, atol=1e-2, rtol=1e-2)

def test_parts_hold_every_parameter_once(system):
    encoder = system.encoder
    names = {id(p): n for n,p in encoder.named_parameters()}
    parts = {part: [names.pop(id(p)) for m in modules for p in m.parameters()] for part,modules in encoder.parts.items()}
    assert not names and list(parts) == ['stem', 'body', 'attention']
    assert {n.split('.')[1] for n in parts['body']} == {'body'} and {n.split('.')[1] for n in parts['stem']} == {'stem'}
    assert {n.split('.')[0] for n in parts['attention']} == {'attention'}

def test_models_can_be_exported(system):
    args = (torch.randn(2, 6, 3000), torch.rand(6, 2))
    exported = torch.export.export(system.eval(), args, dynamic_shapes=({0: torch.export.Dim('b')}, None))
    x = torch.randn(5, 6, 3000)
    with torch.no_grad(): assert_close(exported.module()(x, args[1]), system(x, args[1]), atol=1e-5, rtol=1e-5)

@torch.no_grad
def test_attention_pooling_is_the_formula():
    pool,x = AttentionPool(4).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    first,_,last = pool.score
    for tokens,found in zip(x, pool(x)):
        scores = [sum(last.weight[0, i].item() * math.tanh(sum(first.weight[i, j].item() * t[j].item() for j in range(4)) + first.bias[i].item())
                      for i in range(4)) for t in tokens]
        total = sum(map(math.exp, scores))
        assert_close(found, sum(math.exp(s) / total * t for s,t in zip(scores, tokens)), atol=1e-12, rtol=0)

@pytest.mark.parametrize('name,size', [('mean', 16), ('flatten', 336), ('attention', 16)])
def test_pools(name, size):
    pool = make_pool(name)
    assert pool(torch.randn(3, 21, 16)).shape == (3, size) and pool.n_out == size
    assert_close(pool(torch.ones(3, 21, 16)), torch.ones(3, size))

def test_models_load_no_fastai():
    command = ('import sys, sleepnb.models.cam, sleepnb.models.encoder, sleepnb.models.heads; '
               'print(sorted({"fastai", "matplotlib.pyplot", "mne"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', command], check=True, capture_output=True, text=True).stdout.strip() == '[]'
