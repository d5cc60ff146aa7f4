"""What the pictures show, read back from what was drawn; odd nights; and errors in words."""
import datetime, subprocess, sys, warnings

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import mne
import numpy as np
import pytest
from matplotlib.colors import to_hex

from sleepnb.core import HypnogramError, SleepnbError, Stage
from sleepnb.metrics import confusion, score_nights
from sleepnb.plots import (STAGE_COLORS, _multitaper, plot_class_bars, plot_confusion, plot_embedding, plot_hypnodensity,
                           plot_hypnogram, plot_spectrogram)

START = datetime.datetime(2021, 3, 4, 22, 59, 30)
TOP = ['W', 'R', 'N1', 'N2', 'N3']
RNG = np.random.default_rng(0)

@pytest.fixture(autouse=True)
def closed():
    "Whatever is drawn is drawn to the end, without a warning."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield
        for number in plt.get_fignums(): plt.figure(number).canvas.draw()
    plt.close('all')

def drawn(ax, codes, per_hour, begin=0., colors=True):
    "Which stage the coloured lines show in the middle of each epoch."
    made = np.full(len(codes), -1)
    for lines in ax.collections:
        stage = next((s for s in Stage if s.label == lines.get_label() and to_hex(lines.get_color()[0]).upper() == STAGE_COLORS[s]), None)
        if stage is None: continue
        for (a,y),(b,_) in lines.get_segments():
            assert ax.get_yticklabels()[round(y)].get_text() == stage.label
            inside = (begin + (np.arange(len(codes)) + .5) / per_hour > a) & (begin + (np.arange(len(codes)) + .5) / per_hour < b)
            assert (made[inside] == -1).all()
            made[inside] = stage
    return made

@pytest.mark.parametrize('n,unit,per', [(1, 'minutes', 2), (119, 'minutes', 2), (120, 'hours', 120), (2880, 'hours', 120)])
def test_a_hypnogram_shows_its_stages_and_gaps(n, unit, per):
    codes = RNG.integers(-1, 5, n)
    ax = plot_hypnogram(codes)
    assert [o.get_text() for o in ax.get_yticklabels()] == TOP and ax.yaxis.get_inverted()
    assert ax.get_xlabel() == unit and ax.get_xlim() == (0, n / per)
    assert (drawn(ax, codes, per) == codes).all()
    values = ax.patches[0].get_data().values
    assert (np.isnan(values) == (codes < 0)).all() and all(TOP[int(v)] == Stage(s).label for v,s in zip(values, codes) if s >= 0)

def test_rem_is_bold():
    ax = plot_hypnogram([0, 1, 2, 3, 4])
    widths = {o.get_label(): o.get_linewidth()[0] for o in ax.collections}
    assert widths['R'] > 1.5 * max(w for s,w in widths.items() if s != 'R')

@pytest.mark.parametrize('zone', [None, datetime.timezone.utc])
def test_clock_time(zone):
    codes = RNG.integers(0, 5, 960)
    ax = plot_hypnogram(codes, start=START.replace(tzinfo=zone))
    first,last = mdates.num2date(ax.get_xlim())
    assert first.replace(tzinfo=None) == START and abs(last - first - datetime.timedelta(hours=8)) < datetime.timedelta(milliseconds=1)
    assert ax.get_xlabel() == 'time of day' and (drawn(ax, codes, 2880, mdates.date2num(START)) == codes).all()
    ax.figure.canvas.draw()
    assert [o.get_text() for o in ax.get_xticklabels()][:3] == ['23:00', '00:00', '01:00']

def test_epochs_of_another_length(): assert plot_hypnogram([0]*180, epoch_sec=20).get_xlim() == (0, 1)

def test_a_reference_and_where_it_differs():
    true,pred = RNG.integers(-1, 5, 200), RNG.integers(-1, 5, 200)
    ax = plot_hypnogram(pred, true)
    both = (true >= 0) & (pred >= 0)
    lines = next(o for o in ax.collections if o.get_label() == 'differs')
    assert [round(s[0][0] * 120) for s in lines.get_segments()] == np.flatnonzero(both & (true != pred)).tolist()
    assert f'{(true == pred)[both].mean():.0%} of {both.sum()} epochs' in ax.get_title('right')
    assert (drawn(ax, pred, 120) == pred).all() and ax.get_yticklabels()[-1].get_text() == 'differs'
    grey = sum(len(o.get_segments()) for o in ax.collections if to_hex(o.get_color()[0] if len(o.get_color()) else 'k') == '#999999')
    assert grey == sum(1 for i,s in enumerate(true) if s >= 0 and (i == 0 or true[i-1] != s))

@pytest.mark.parametrize('stages', [[-1], [-1]*50, [3]])
def test_hypnograms_of_one_kind(stages):
    ax = plot_hypnogram(stages, [2]*len(stages))
    assert (drawn(ax, stages, 2) == stages).all() and bool(ax.get_title('right')) == (stages == [3])

def test_a_hypnodensity_shows_its_probabilities():
    prob = RNG.dirichlet(np.full(5, .4), 300)
    prob[40:50] = np.nan
    ax = plot_hypnodensity(prob)
    for bar in ax.patches:
        height = bar.get_data().values - bar.get_data().baseline
        np.testing.assert_allclose(height, prob[:, Stage[bar.get_label()]], atol=1e-12)
    assert (ax.patches[0].get_data().baseline == 0).all()
    assert [o.get_label() for o in ax.patches] == TOP[::-1] and [o.get_text() for o in ax.get_legend().get_texts()] == TOP
    plot_hypnodensity(prob[:1])
    plot_hypnodensity(np.full((3, 5), np.nan))

def test_a_spectrum_is_the_one_that_mne_estimates():
    x = RNG.normal(size=(6, 3000)) + 5*np.sin(2*np.pi * 9 * np.arange(3000)/100)
    freqs,power = _multitaper(x, 100, 40)
    expected,there = mne.time_frequency.psd_array_multitaper(x, 100, bandwidth=.5, fmin=1/30, fmax=40, normalization='full', verbose='error')
    np.testing.assert_allclose(freqs, there)
    np.testing.assert_allclose(power, expected, rtol=.1)                # mne weighs tapers by their concentration
    assert abs(np.median(power / expected) - 1) < .005

def test_a_spectrogram_shows_tones_where_they_are():
    t = np.arange(60*3000) / 100
    x = np.where(t < 900, np.sin(2*np.pi * 5 * t), np.sin(2*np.pi * 15 * t)) * 20 + RNG.normal(size=len(t))
    axes = plot_spectrogram(x, 100, np.repeat([2, 4], 30), START)
    image = axes[0].images[0]
    left,right,low,high = image.get_extent()
    rows = image.get_array().argmax(axis=0) / (image.get_array().shape[0] - 1) * (high - low) + low
    np.testing.assert_allclose(rows, np.repeat([5, 15], 30), atol=.5)
    assert (left, right) == axes[0].get_xlim() == axes[1].get_xlim() and not axes[0].get_xlabel() and axes[1].get_xlabel()
    limits = image.get_clim()
    assert .02 < (image.get_array() < limits[0]).mean() < .03 and .02 < (image.get_array() > limits[1]).mean() < .03

@pytest.mark.parametrize('x,fs', [(np.zeros(3000), 100), (np.r_[np.zeros(9000), np.ones(9000)], 100), (RNG.normal(size=300), 10), (RNG.normal(size=16000), 256)])
def test_spectrograms_of_odd_signals(x, fs): assert np.isfinite(plot_spectrogram(x, fs).images[0].get_array()).all()

def test_a_confusion_shows_epochs_and_shares():
    true,pred = RNG.integers(-1, 4, 4000), RNG.integers(-1, 5, 4000)   # REM is never true
    conf = confusion(true, pred)
    ax = plot_confusion(conf)
    texts = np.array([t.get_text() for t in ax.texts]).reshape(5, 5)
    assert (texts[4] == '–').all() and texts[1, 2] == f'{conf[1, 2]:,}\n{conf[1, 2] / conf[1].sum():.0%}'
    assert [t.get_position() for t in ax.texts][7] == (2, 1) and ax.get_xlabel() == 'predicted' and ax.get_ylabel() == 'true'
    np.testing.assert_allclose(ax.images[0].get_array().sum(axis=1), [1, 1, 1, 1, 0])
    plot_confusion(np.zeros((5, 5), int))

@pytest.mark.parametrize('over', ['pooled', 'nights'])
def test_bars_show_scores_and_intervals(over):
    true = [RNG.integers(0, 5, 200) for _ in range(6)]
    pred = [np.where(RNG.random(200) < .6, t, RNG.integers(0, 5, 200)) for t in true]
    table = score_nights(true, pred, n_boot=100)
    ax = plot_class_bars(table, over)
    rows = table.loc[over].loc[[f'f1_{s.label}' for s in Stage]]
    np.testing.assert_allclose([b.get_height() for b in ax.patches], rows.value)
    np.testing.assert_allclose([[s[0][1], s[1][1]] for s in ax.collections[0].get_segments()], rows[['low', 'high']])
    assert [to_hex(b.get_facecolor()).upper() for b in ax.patches] == [*STAGE_COLORS.values()]
    assert [t.get_text() for t in ax.texts] == [f'{v:.2f}' for v in rows.value]
    plot_class_bars(score_nights(true[:1], pred[:1]), over)              # a single subject has no interval

@pytest.mark.parametrize('method', ['tsne', 'pca'])
def test_an_embedding_keeps_stages_that_lie_apart_apart(method):
    codes = np.repeat([-1, 0, 2, 4], 15)
    x = RNG.normal(size=(60, 8)) + 30*np.eye(8)[codes]
    ax = plot_embedding(x, codes, method)
    groups = [np.asarray(o.get_offsets()) for o in ax.collections]
    assert [o.get_label() for o in ax.collections] == ['unscored', 'W', 'N2', 'R'] and [len(g) for g in groups] == [15]*4
    centres = np.array([g.mean(axis=0) for g in groups])
    nearest = [np.linalg.norm(p - centres, axis=1).argmin() == i for i,g in enumerate(groups) for p in g]
    assert np.mean(nearest) > .95
    again = plot_embedding(x, codes, method)
    np.testing.assert_allclose(again.collections[1].get_offsets(), groups[1])
    plot_embedding(x[:3], codes[:3], method)

def test_everything_draws_on_axes_that_are_given_and_in_a_dark_style():
    with plt.style.context('dark_background'):
        fig,axes = plt.subplots(3, 2)
        prob = RNG.dirichlet(np.ones(5), 9)
        made = [plot_hypnogram([0, 2], ax=axes[0, 0]), plot_hypnodensity(prob, ax=axes[0, 1]), plot_spectrogram(np.ones(3000), 100, axes=axes[1, 0]),
                plot_confusion(np.eye(5), axes[1, 1]), plot_class_bars(score_nights([[0, 1]], [[0, 1]]), ax=axes[2, 0]),
                plot_embedding(prob, [0]*9, 'pca', ax=axes[2, 1])]
        assert made == [*axes.flat] and plt.get_fignums() == [fig.number]
        assert to_hex(made[0].patches[0].get_edgecolor()) == '#ffffff'

@pytest.mark.parametrize('draw,kind,words', [
    (lambda: plot_hypnogram([]), HypnogramError, 'no epoch to draw'),
    (lambda: plot_hypnogram(['W']), HypnogramError, r'Stage\[s\]'),
    (lambda: plot_hypnogram([0, 9]), HypnogramError, 'found 9 at epoch 1'),
    (lambda: plot_hypnogram([0, 1], [0]), HypnogramError, 'differ in length'),
    (lambda: plot_hypnodensity(np.zeros((0, 5))), HypnogramError, 'no epoch to draw'),
    (lambda: plot_hypnodensity([.2]*5), SleepnbError, r'expected \(epochs, 5\); found \(5,\)'),
    (lambda: plot_hypnodensity(np.ones((4, 5))), SleepnbError, 'no probabilities'),
    (lambda: plot_spectrogram(np.zeros((2, 9000)), 100), SleepnbError, 'no channel to draw'),
    (lambda: plot_confusion(np.eye(4)), SleepnbError, 'no confusion matrix'),
    (lambda: plot_class_bars(score_nights([[0]], [[0]]), 'subjects'), SleepnbError, 'score_nights'),
    (lambda: plot_embedding(np.zeros((2, 9)), [0, 1]), SleepnbError, '3 epochs and 2 features'),
    (lambda: plot_embedding(np.zeros((9, 1)), [0]*9), SleepnbError, '3 epochs and 2 features')])
def test_what_cannot_be_drawn_is_refused(draw, kind, words):
    with pytest.raises(kind, match=words): draw()

def test_pictures_load_neither_torch_nor_mne():
    heavy = {'torch', 'fastai', 'mne', 'sklearn', 'seaborn'}
    command = f'import sys, sleepnb.plots; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)'
    subprocess.run([sys.executable, '-c', command], check=True)
