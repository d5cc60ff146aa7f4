"""What an ONNX file computes is what the stager computes, and it is written whole or not at all."""
import json, sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from sleepnb.core import MontageError, SleepnbError
from sleepnb.data.psg import Night
from sleepnb.export import export_onnx
from sleepnb.models.network import Backbone, StageNetwork
from sleepnb.montage import parse_channel
from sleepnb.multimodal.sleepsmc import SleepSMC
from sleepnb.stager import Stager, _prepare, open_source
from sleepnb.synth import synth_night
from sleepnb.weights import save_weights

HOME,LAB = ['Fpz-Cz', 'Pz-Oz', 'HEOG'], ['C3-M2', 'C4-M1', 'E1-E2']
BOTH,TWO = dict(home=HOME, lab=LAB), ('EEG', 'EOG')

def lively(network):
    "Random weights that tell epochs apart."
    g = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_(0, .2, generator=g)
            layer.running_var.uniform_(.05, .3, generator=g)
    heads = [network.classifier] if isinstance(network, StageNetwork) else [*network.classifiers.values(), *filter(None, [network.head])]
    with torch.no_grad():
        for head in heads: head[-1].weight *= 3 if isinstance(network, StageNetwork) else 10
    return network

def night(channels):
    "Fourteen epochs; the first EEG channel comes off for four, all EEG for three more, and everything for the last two."
    made = synth_night(channels, n_epochs=14, subject='a')
    x = np.array(made.x, np.float32).reshape(len(channels), 14, 3000)
    x[0, 3:10] = x[1, 7:10] = x[:, 12:] = 0
    return Night([*x.reshape(len(channels), -1)], [100]*len(channels), [parse_channel(c) for c in channels], made.stages)

def inputs_of(stager, recording, channels):
    found,_ = stager.choose(channels)
    names = [d.got.name for d in found.derivations]
    p,_ = _prepare(open_source(recording, None)[0], found, stager.recipe, (0., len(recording.stages)))
    return names, dict(x=np.stack(p.x, 1), median=p.median.astype(np.float32), scale=p.scale.astype(np.float32), there=p.quality == 'good')

NETWORKS = {
    'one modality': lambda: (SleepSMC(BOTH, TWO, 'EOG'), LAB),
    'fused where nothing is missing': lambda: (SleepSMC(BOTH, TWO, None, 'shared'), LAB),
    'any montage': lambda: (SleepSMC(BOTH, TWO, None, 'cam', hide=.3), ['O2-M1', 'Fz', 'HEOG']),
    'full encoder': lambda: (StageNetwork(Backbone(dict(home=HOME), 'full', 'shared', drop=.1)), ['C3-M2', 'C4-M1'])}

@pytest.mark.parametrize('name', NETWORKS)
def test_the_file_stages_as_the_stager_does(name, tmp_path):
    torch.manual_seed(0)
    network,channels = NETWORKS[name]()
    stager = Stager(lively(network))
    names,inputs = inputs_of(stager, recording := night(channels), channels)
    path = export_onnx(stager, tmp_path/'x.onnx', names)
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map['channels']) == names
    wanted = stager.stage(recording, channels=names if stager.any_montage else None).prob
    assert np.nanstd(wanted, 0).max() > .01 and np.isnan(wanted[12:]).all()
    np.testing.assert_allclose(session.run(None, inputs)[0], wanted, rtol=0, atol=1e-5)
    for n in (1, 5):
        some = {k: v[2:2 + n] if k in ('x', 'there') else v for k,v in inputs.items()}
        np.testing.assert_allclose(session.run(None, some)[0], wanted[2:2 + n], rtol=0, atol=1e-5)

@pytest.fixture(scope='module')
def eyes(tmp_path_factory):
    "A weights file, its ONNX file, and what torch made of it."
    folder,made = tmp_path_factory.mktemp('eyes'), []
    recipe = dict(name='mine', eeg=[.5, 35], eog=[.1, None], emg=[10, None], ecg=[.3, 40])
    stager = Stager.load(save_weights(folder/'eyes.safetensors', SleepSMC(dict(home=HOME), TWO, 'EOG'), recipe=recipe))
    before,export = {k: v.clone() for k,v in stager.network.state_dict().items()}, torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, 'export', lambda *args, **kwargs: made.append(export(*args, **kwargs)) or made[0])
        path = export_onnx(stager, folder/'eyes.onnx')
    after = stager.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k,v in before.items())
    return stager, path, made[0]

@pytest.fixture
def stager(eyes): return eyes[0]

@pytest.fixture
def traced(monkeypatch): # tracing takes long, and is not what is tested
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: pytest.fail('it was traced'))

def test_the_file_says_what_its_user_must_know(eyes):
    said = onnxruntime.InferenceSession(eyes[1]).get_modelmeta().custom_metadata_map
    facts = {k: json.loads(v) for k,v in said.items() if v[0] in '[{0123456789' and k != 'sleepnb'}
    assert facts['stages'] == ['W', 'N1', 'N2', 'N3', 'R'] and (facts['channels'], facts['modalities']) == (['HEOG'], dict(EOG=['HEOG']))
    assert facts['filter_hz'] == dict(EOG=[.1, None]) and (facts['sampling_rate_hz'], facts['epoch_sec']) == (100, 30)
    assert said['use'] == 'for research, not a medical device' and said['weights'] == 'eyes.safetensors' and '1.349' in said['normalisation']

def test_without_the_extra(stager, tmp_path, monkeypatch, traced):
    for absent in ('onnx', 'onnxscript', 'onnxruntime'):
        with monkeypatch.context() as patch, pytest.raises(SleepnbError, match=r"no .*onnx.*pip install 'sleepnb\[onnx\]'"):
            patch.setitem(sys.modules, absent, None)
            export_onnx(stager, tmp_path/'x.onnx')

def test_a_file_that_would_stage_otherwise_is_not_written(eyes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: eyes[2])
    (path := tmp_path/'x.onnx').write_text('of yesterday')
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, 'run', lambda self, *args: [run(self, *args)[0] + np.float32(2e-5)])
    with pytest.raises(SleepnbError, match='would stage otherwise than the network .*probabilities differ by 2e-05'): export_onnx(eyes[0], path)
    assert path.read_text() == 'of yesterday' and [*tmp_path.iterdir()] == [path]

def test_a_network_that_torch_cannot_write(stager, tmp_path, monkeypatch):
    def fail(*args, **kwargs): raise RuntimeError('no such operator')
    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(SleepnbError, match='torch cannot write this network as ONNX .*no such operator'): export_onnx(stager, tmp_path/'x.onnx')
    assert not [*tmp_path.iterdir()]

def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Stager, 'load', lambda *args: pytest.fail('weights were loaded'))
    (tmp_path/'file').write_text('')
    (tmp_path/'folder.onnx').mkdir()
    for path,why in ((tmp_path/'file'/'x.onnx', 'file is a file'), (tmp_path/'folder.onnx', 'found a folder')):
        with pytest.raises(SleepnbError, match=why): export_onnx(tmp_path/'none.safetensors', path)
    monkeypatch.setattr('os.access', lambda *args: False)                       # root may write anywhere
    with pytest.raises(SleepnbError, match='is write-protected'): export_onnx(tmp_path/'none.safetensors', tmp_path/'new'/'x.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.onnx']

def test_channels_that_do_not_fit(stager, tmp_path, traced):
    cam = Stager(SleepSMC(dict(home=HOME), TWO, None, 'cam'))
    for s,channels,why in ((stager, ['E1-M2'], 'lack channels'), (cam, ['Fpz-Cz', 'Fpz-Cz'], 'asked for once'), (cam, ['Fpz-Cz', 'ECG'], 'cannot take these'),
                           (cam, ['X9'], 'is not an electrode'), (Stager(SleepSMC(BOTH, TWO, None)), None, 'several montages')):
        with pytest.raises(MontageError, match=why): export_onnx(s, tmp_path/'x.onnx', channels)
    with pytest.raises(SleepnbError, match='does not stage with these modalities'): export_onnx(cam, tmp_path/'x.onnx', modalities=['EMG'])
