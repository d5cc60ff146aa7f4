"""SleepSMC's blocks against loops in double precision, numbers worked out by hand, and many draws."""
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.testing import assert_close

from sleepnb.core import SleepnbError
from sleepnb.models.featurenet import FeatureClassifier, FeatureCNN, FeatureNet
from sleepnb.models.layers import count_macs, count_parameters

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
