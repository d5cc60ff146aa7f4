"""The demonstration as a shell runs it."""
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from edfio import read_edf
from sklearn.metrics import cohen_kappa_score, f1_score

from sleepnb import cli, demo
from sleepnb.core import SleepnbError
from sleepnb.data.psg import sample_files
from sleepnb.stager import Stager
from sleepnb.weights import read_description

SLEEPNB = Path(sys.executable).with_name('sleepnb')
ONE_THREAD = os.environ | {'OMP_NUM_THREADS': '1'}

def start(out): return subprocess.Popen([SLEEPNB, 'demo', '--out', out, '--scale', 'smoke'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        encoding='utf-8', env=ONE_THREAD)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A folder, what was printed, and what was told meanwhile."
    out = tmp_path_factory.mktemp('demo')/'made'
    process = start(out)
    printed,told = process.communicate()
    assert process.returncode == 0, told
    return out, printed, told

def contents(out):
    "What a demonstration leaves, but for times: results, stages, report, tensors and losses."
    made = {p.name: p.read_bytes() for p in out.glob('*.csv')} | {p.name: p.read_bytes() for p in out.glob('*.json')}
    for p in out.glob('*.safetensors'): # the description has times and versions
        described = read_description(p)
        made[p.name] = p.read_bytes()[-1000:], described['fitted'], described['split'], described['notes']
    return made | {'report.html': (out/'report.html').read_bytes()}

def test_it_leaves_what_it_says(whole):
    out,printed,told = whole
    assert printed.splitlines()[-1] == str(out/'report.html') and (out/'report.html').exists()
    assert {'weights.safetensors', 'encoder.safetensors', 'scratch.safetensors', 'results.csv', 'stages_pretrained.csv',
            'stages_scratch.csv', 'test_stages.csv', 'stores'} <= {p.name for p in out.iterdir()}
    assert not [p.name for p in out.iterdir() if p.name.startswith('.') or 'checkpoint' in p.name]
    assert told.count('steps a pass') == 3 and 'Traceback' not in told

def test_nobody_is_tested_who_was_seen(whole):
    out = whole[0]
    tested = {*pd.read_csv(out/'test_stages.csv', dtype=dict(subject=str)).subject}
    for name in ('encoder', 'weights', 'scratch'):
        described = read_description(out/f'{name}.safetensors')
        seen = {*described['fitted']['S-simulated'], *described['judged']['S-simulated']}
        assert len(tested) == 2 and len(seen) == 3 and not tested & seen

def test_results_are_those_of_another_library(whole):
    out,printed,_ = whole
    results = pd.read_csv(out/'results.csv').set_index(['data', 'network', 'metric']).sort_index()
    epochs = pd.read_csv(out/'test_stages.csv')
    codes = {f'Sleep stage {k}': v for k,v in dict(W=0, R=4).items() | {str(i): min(i, 3) for i in range(1, 5)}.items()}
    scorer = [codes[a.text] for a in read_edf(sample_files()[1]).annotations for _ in range(int(a.duration) // 30)]
    for name in ('pretrained', 'scratch'):
        stages = pd.read_csv(out/f'stages_{name}.csv').stage.map(dict(W=0, N1=1, N2=2, N3=3, R=4))
        for data,true,pred in (('S-simulated', epochs.stage, epochs[name]), ('SC4001E0-PSG', scorer, stages)):
            found = results.loc[data, name].value
            assert found['macro_f1'] == pytest.approx(f1_score(true, pred, labels=range(5), average='macro', zero_division=0), abs=1e-6)
            assert found['kappa'] == pytest.approx(cohen_kappa_score(true, pred, labels=range(5)), abs=1e-6)
            assert f' {found["macro_f1"]:.3f}' in printed and f'{found["macro_f1"]:.3f}' in (out/'report.html').read_text()
    of = results.loc['S-simulated'].value
    assert of['difference', 'kappa'] == pytest.approx(of['pretrained', 'kappa'] - of['scratch', 'kappa'], abs=2e-6)

def test_the_weights_stage_other_recordings(whole):
    staging = Stager.load(whole[0]/'weights.safetensors').stage(sample_files()[0])
    assert [s for s in pd.read_csv(whole[0]/'stages_pretrained.csv').stage] == [*staging.table.stage]

def test_the_report_fetches_nothing_and_says_what_the_data_are(whole, browser, tmp_path):
    report = whole[0]/'report.html'
    text = report.read_text()
    named = re.findall(r'(?:href|src|srcset|action)\s*=\s*["\']?([^"\'>\s]*)|url\(([^)]*)', text)
    assert len(named) == 5 and all(a.startswith('data:image/png;base64,') for a,_ in named)
    assert 'http' not in text.replace('http-equiv', '')
    assert 'are simulated: nobody slept them' in text and 'Open Data Commons Attribution' in text and 'not a medical device' in text
    page = browser.new_page(viewport=dict(width=360, height=800))
    asked,said = [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('console', lambda m: said.append(m.text))
    page.goto(report.as_uri())
    assert [u for u in asked if not u.startswith('data:')] == [report.as_uri()] and not said
    assert page.evaluate('document.documentElement.scrollWidth <= 360')                # no text is cut off on a telephone
    assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 100 && i.alt)')
    results = pd.read_csv(whole[0]/'results.csv')
    wide = results[results.data == results.data.iloc[0]].assign(value=-.123, low=-.234, high=-.012) # a smoke test has no intervals
    (tmp_path/'wide.html').write_text(demo._page('wide', [demo._score_table(wide)]))
    for path in (report, tmp_path/'wide.html'):
        page.goto(path.as_uri())
        assert page.evaluate('[...document.querySelectorAll(".table")].every(o => o.scrollWidth <= o.clientWidth)')
    page.close()

def test_killed_and_given_again_it_ends_as_if_nothing_had_happened(whole, tmp_path):
    for at in ('     1 ', 'Fine-tuning', 'From scratch', 'staging a real night'):
        process = start(tmp_path/'made')
        while at not in (line := process.stderr.readline()): assert line, 'it ended early'
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path/'made'/'report.html').exists()
    process = start(tmp_path/'made')
    printed,told = process.communicate()
    assert process.returncode == 0 and 'steps a pass' not in told, told          # all training was done before
    made,expected = contents(tmp_path/'made'), contents(whole[0])
    assert made.keys() == expected.keys() and [k for k in made if made[k] != expected[k]] == []

def test_given_again_it_trains_nothing(whole):
    before = {p: p.stat().st_mtime_ns for p in whole[0].rglob('*') if p.suffix in ('.safetensors', '.npy')}
    results = demo.run_demo(whole[0], 'smoke')
    assert before == {p: p.stat().st_mtime_ns for p in before}
    pd.testing.assert_frame_equal(results, pd.read_csv(whole[0]/'results.csv'))

def test_a_stager_that_comes_with_sleepnb_is_asked_too(whole, tmp_path, monkeypatch):
    monkeypatch.setattr('sleepnb.stager.OWN_WEIGHTS', whole[0]/'scratch.safetensors')
    shutil.copytree(whole[0], tmp_path/'made')
    of = demo.run_demo(tmp_path/'made', 'smoke').query('data == "SC4001E0-PSG"').pivot(index='metric', columns='network', values='value')
    assert of.shipped.equals(of.scratch) and (tmp_path/'made'/'stages_shipped.csv').exists()
    assert 'The third comes with sleepnb and learned from 2 people of S-simulated.' in (tmp_path/'made'/'report.html').read_text()

def test_a_folder_with_other_things_is_refused(whole, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'letter.txt').write_text('')
    (tmp_path/'file').write_text('')
    for out,scale,why in ((tmp_path/'mine', 'smoke', 'letter.txt'), (tmp_path/'file', 'smoke', 'file'), (tmp_path/'new', 'huge', 'smoke or small'),
                          (whole[0], 'small', 'another demonstration')):
        done = subprocess.run([SLEEPNB, 'demo', '--out', out, '--scale', scale], capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and why in done.stderr and not done.stdout
    assert not (tmp_path/'new').exists() and [p.name for p in (tmp_path/'mine').iterdir()] == ['letter.txt']

@pytest.mark.parametrize('low,high,what', [(.01, .1, ': for these people, pretraining helped.'), (-.1, -.01, 'did harm.'),
                                           (-.1, .1, 'do not decide whether pretraining helped.'),
                                           (np.nan, np.nan, 'do not tell whether pretraining helped.')])
def test_the_sentence_about_pretraining_follows_from_the_interval(low, high, what): assert demo.verdict(low, high).endswith(what)

def test_what_the_report_says_of_training_is_what_was_noted(whole):
    text,last = (whole[0]/'report.html').read_text(), json.loads((whole[0]/'encoder.losses.json').read_text())['passes'][-1]
    assert f'(accuracy {last["TS accuracy"]:.2f}, by chance 0.50)' in text and f'(accuracy {last["FBM accuracy"]:.2f}, by chance 0.17;' in text

def test_what_pretraining_gave_on_the_real_night_is_said():
    def said(macro_f1, kappa):
        rows = [dict(network=n, metric=m, value=v) for m,pair in dict(macro_f1=macro_f1, kappa=kappa, accuracy=(1, 0)).items()
                for n,v in zip(('pretrained', 'scratch'), pair)]
        return demo._gained(pd.DataFrame(rows))
    assert said((.5, .52), (.4, .3)) == ('On this night, macro-F1 after pretraining is 0.020 lower than from scratch, '
                                         'and κ is 0.100 higher than from scratch.')
    assert 'the same as from scratch, and κ is 0.200 lower' in said((.5, .5), (.1, .3))

@pytest.mark.parametrize('n', [2, 3])
def test_no_word_of_the_pictures_is_cut_off_or_covers_a_curve(whole, n):
    stages = np.arange(1000) % 5
    fig = demo._draw_confusions({name: (stages, stages) for name in list(demo.NETWORKS.values())[:n]})
    fig.draw_without_rendering()
    for ax in fig.axes:
        for word in (ax.title, ax.xaxis.label, ax.yaxis.label):
            at = word.get_window_extent()
            assert 0 <= at.x0 and at.x1 <= fig.bbox.x1 and 0 <= at.y0 and at.y1 <= fig.bbox.y1
    fig = demo._draw_courses(whole[0])
    fig.draw_without_rendering()
    for ax in fig.axes:
        assert not ax.texts and 0 <= ax.get_tightbbox().y0 and ax.get_tightbbox().y1 <= fig.bbox.y1
        if ax.get_legend(): assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0
    assert [len(ax.get_legend().texts) for ax in fig.axes[1:]] == [3, 2]

def test_a_terminal_is_told_at_once_that_it_goes_on(tmp_path, monkeypatch):
    "Before libraries are loaded, which takes long."
    said = []
    monkeypatch.setattr(cli, '_say', said.append)
    monkeypatch.setattr(sys, 'stderr', type('Terminal', (), dict(isatty=lambda self: True))())
    monkeypatch.setattr('sleepnb.callbacks.keep_memory', lambda: said.append('loaded'))
    monkeypatch.setattr(demo, 'run_demo', lambda *args: said.append('run'))
    monkeypatch.setattr(demo, 'summary', str)
    cli.demo(tmp_path/'new', 'smoke')
    assert len(said) == 3 and said[0].startswith('libraries are loaded') and said[1:] == ['loaded', 'run']

def test_two_people_make_no_interval(whole):
    assert pd.read_csv(whole[0]/'results.csv')[['low', 'high']].isna().all(axis=None)
    assert 'An interval cannot be computed for so few people' in (text := (whole[0]/'report.html').read_text()) and 'do not decide' not in text
    epochs = [pd.DataFrame(dict(cohort='S', subject=s, night=1, epoch=range(5), stage=range(5), pred=[(i + (i == s)) % 5 for i in range(5)])) for s in range(3)]
    def low(n): return demo._compare(dict.fromkeys(('pretrained', 'scratch'), pd.concat(epochs[:n]))).low
    assert low(2).isna().all() and low(3).notna().all()

def test_the_report_names_all_that_lies_beside_it(whole):
    named = [row[0].replace('…', '*') for row in demo._LEFT]
    assert [p.name for p in whole[0].iterdir() if p.name != 'report.html' and not any(p.match(n) for n in named)] == []
    assert all(any(whole[0].glob(n)) for n in named)

@pytest.mark.parametrize('damage', ['{"scale"', '[]', ''])
def test_a_damaged_marker_is_told(tmp_path, damage):
    (tmp_path/'demo.json').write_text(damage)
    with pytest.raises(SleepnbError, match=r'demo.json: this file is damaged .* Name another folder'): demo.run_demo(tmp_path, 'smoke')
    assert [p.name for p in tmp_path.iterdir()] == ['demo.json']

def test_another_seed_is_another_demonstration(tmp_path, whole):
    other = demo.run_demo(tmp_path/'made', 'smoke', seed=1)
    assert len(other) == len(pd.read_csv(whole[0]/'results.csv'))
    mine,theirs = (pd.read_csv(p/'test_stages.csv').stage for p in (whole[0], tmp_path/'made'))
    assert not np.array_equal(mine, theirs) and json.loads((tmp_path/'made'/'demo.json').read_text())['seed'] == 1
