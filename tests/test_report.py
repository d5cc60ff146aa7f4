"""A report opens anywhere, alone, and tells the truth of odd nights."""
import re
from dataclasses import replace
from datetime import datetime, timezone
from html.parser import HTMLParser

import mne
import numpy as np
import pandas as pd
import pytest

from sleepnb.core import MontageError, RecordingError, SleepnbError
from sleepnb.data.psg import Night
from sleepnb.hypnogram import sleep_statistics
from sleepnb.montage import parse_channel
from sleepnb.report import write_report
from sleepnb.stager import QUALITIES, Staging
from sleepnb.synth import synth_night

NAMES,STAGES = ['C3-M2', 'E1-E2'], np.tile(np.repeat([0, 2, 3, 4, 1], 4), 2).astype(np.int8) # 40 epochs

def channels(used, unused=()):
    rows = [dict(channel=n, modality=parse_channel(n).modality.value, used=True, details=n) | {f'epochs_{q}': 40*(q == 'good') for q in QUALITIES}
            for n in used]
    rows += [dict(channel=n, modality='other', used=False, details='it measures something else') for n in unused]
    columns = ['channel', 'modality', 'used', 'details', *(f'epochs_{q}' for q in QUALITIES)]
    return pd.DataFrame(rows).reindex(columns=columns).astype({c: 'Int64' for c in columns[4:]})

def make():
    prob = np.full((40, 5), .05)
    prob[range(40), STAGES] = .8
    return Staging('night', STAGES, prob, np.full(40, 'good'), channels(NAMES, ['SaO2']), ('EEG', 'EOG'), datetime(2020, 1, 1, 22), weights='w')

@pytest.fixture
def staging(): return make()

@pytest.fixture(scope='module')
def x(): return synth_night(NAMES, stages=STAGES).x

def night(x, names=NAMES, start=datetime(2020, 1, 1, 22)):
    return Night([*x.astype(np.float32)], [100]*len(x), [parse_channel(n) for n in names], np.full(40, -1, np.int8), start)

class Reader(HTMLParser):
    "Texts outside pictures; rows of tables; tags; what leads elsewhere. Every tag that opens closes."
    def __init__(self, path):
        super().__init__()
        self.texts,self.rows,self.tags,self.links,self.open = [], [], set(), [], []
        self.feed(path.read_text())
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k,v in attrs if k.rpartition(':')[2] in ('src', 'href', 'srcset')]
        if tag not in ('meta', 'link'): self.open.append(tag)
        if tag == 'tr': self.rows.append([])
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ('meta', 'link'): self.open.pop()
    def handle_data(self, text):
        if 'svg' in self.open or 'style' in self.open or not text.strip(): return
        self.texts.append(text.strip())
        if {'td', 'th'} & {*self.open}: self.rows[-1].append(text.strip())

def test_with_and_without_the_recording(staging, x, tmp_path):
    plain,full = write_report(staging, tmp_path/'a.html'), write_report(staging, tmp_path/'new'/'b.html', night(x))
    assert full.stat().st_size > plain.stat().st_size and 'The power of C3-M2' in full.read_text()
    assert 'Spectrogram' not in plain.read_text() and 'Agreement' not in plain.read_text() and 'Notes' not in plain.read_text()
    for path in (plain, full):
        read = Reader(path)
        assert 'SaO2' in read.texts and 'it measures something else' in read.texts and '2020-01-01 22:00:00' in read.texts
        assert 'script' not in read.tags and all(o.startswith(('#', 'data:')) for o in read.links)
    assert write_report(staging, tmp_path/'a.html', night(x)).read_bytes() == full.read_bytes()      # the same night, the same file

def test_every_number(staging, tmp_path):
    gone = replace(staging, stages=np.where(np.arange(40) < 6, -1, STAGES).astype(np.int8), quality=np.where(np.arange(40) < 6, 'flat', 'good'),
                   prob=np.where(np.arange(40)[:, None] < 6, np.nan, staging.prob))
    read,expected = Reader(write_report(gone, tmp_path/'a.html')), sleep_statistics(gone.stages)
    rows = {r[0]: r[1:] for r in read.rows if r}
    for name in ('TIB', 'SPT', 'TST', 'WASO', 'SE', 'SME', 'SFI', 'SOL', 'SOL_5min', 'Lat_REM'):
        assert float(rows[name][0].split()[0]) == pytest.approx(expected[name], abs=.0501)
    for label,name in dict(N1='N1', N2='N2', N3='N3', R='REM').items():
        assert [float(v) for v in rows[label]] == pytest.approx([expected[name], expected[f'%{name}'], expected[f'Lat_{name}']], abs=.0501)
    assert rows['unscored'] == ['3.0', '–', '–'] and rows['W'] == [str(expected['WAKE']), '–', '–']
    assert 'Without a good channel, and without a stage: 6 of 40 epochs (6 flat).' in ' '.join(read.texts)

@pytest.mark.parametrize('change', [dict(start=None), dict(start=datetime(2020, 1, 1, 22, tzinfo=timezone.utc)), dict(onset=12.5),
    dict(reference=np.full(40, -1, np.int8)), dict(reference=np.full(40, 2, np.int8)), dict(smoothed=True), dict(weights='', name=''),
    dict(stages=np.full(40, -1, np.int8), prob=np.full((40, 5), np.nan), quality=np.full(40, 'flat')), dict(notes=('one', 'two')),
    dict(stages=np.zeros(40, np.int8))], ids=lambda c: ' '.join(c))
def test_odd_nights(staging, tmp_path, change):
    read = Reader(write_report(replace(staging, **change), tmp_path/'a.html'))
    assert 'Sleep statistics' in read.texts
    if (reference := change.get('reference')) is not None:
        assert ('No epoch has a stage here and one of the scorer.' in read.texts) == (reference < 0).all()
    for note in change.get('notes', ()): assert note in read.texts

def test_macro_f1_over_stages_that_occur(staging, tmp_path):
    "One stage wrong once, one stage in neither: F1 by hand."
    reference = np.where(STAGES == 3, -1, STAGES).astype(np.int8)                # N3 of the network is compared with nothing
    text = ' '.join(Reader(write_report(replace(staging, reference=reference), tmp_path/'a.html')).texts)
    assert 'macro-F1 0.800' in text and 'Macro-F1 is over five stages; without N3, in neither hypnogram and counted as 0, it is 1.000.' in text
    assert 'neither' not in write_report(replace(staging, reference=STAGES), tmp_path/'b.html').read_text()

def test_the_scorer_is_called_so_and_named(staging, tmp_path):
    full = replace(staging, reference=STAGES[::-1].copy(), scorer='anna & bo.csv')
    page = write_report(full, tmp_path/'a.html')
    read = Reader(page)
    assert read.texts[read.texts.index('Scorer') + 1] == 'anna & bo.csv' and 'over 40 epochs of the scorer (anna & bo.csv).' in ' '.join(read.texts)
    words = re.findall(r'<text[^>]*>([^<]*)</text>', page.read_text())
    assert 'scorer' in words and any(w.startswith('agrees with the scorer in') for w in words)
    assert not {'true', 'predicted'} & {*words} and 'reference' not in page.read_text() and '(true)' not in page.read_text()
    assert 'Scorer' not in Reader(write_report(staging, tmp_path/'b.html')).texts

def test_one_epoch(staging, tmp_path):
    one = replace(staging, stages=STAGES[:1], prob=staging.prob[:1], quality=staging.quality[:1])
    assert '1 epoch of 30 s' in ' '.join(Reader(write_report(one, tmp_path/'a.html')).texts)

EVIL = ['<script src=//x.example></script>', '"><img src=//x.example onerror=alert(1)>', "' onload='x", '&lt;b&gt;', '</style><style>@import "//x"',
        '<!-- ', '$\\frac{1$', 'a\x00b\x1b', '\udcff', '\u202emirror', 'x'*3000]

@pytest.fixture(scope='module')
def usual(tmp_path_factory): return Reader(write_report(make(), tmp_path_factory.mktemp('usual')/'a.html')).tags | {'ul', 'li'}

@pytest.mark.parametrize('evil', EVIL, ids=range(len(EVIL)))
def test_hostile_names_are_shown_and_do_nothing(staging, tmp_path, evil, usual):
    table = staging.channels.assign(channel=evil, details=evil, modality=evil)
    bad = replace(staging, name=evil, weights=evil, channels=table, modalities=(evil,), notes=(evil,), quality=np.full(40, evil))
    read = Reader(write_report(bad, tmp_path/'a.html'))
    assert read.tags == usual and all(o.startswith(('#', 'data:')) for o in read.links)
    shown = evil.replace('\udcff', '?').strip()
    assert sum(shown in o for o in read.texts) >= 7

def test_without_eeg_there_may_be_eyes_or_nothing_to_draw(staging, x, tmp_path):
    eyes,muscle = (replace(staging, channels=channels([n]), modalities=(m,)) for n,m in (('E1-E2', 'EOG'), ('Chin', 'EMG')))
    assert 'The power of E1-E2' in write_report(eyes, tmp_path/'a.html', night(x)).read_text()
    assert 'The power of' not in write_report(muscle, tmp_path/'a.html', night(x[:1], ['Chin'])).read_text()
    assert 'The power of' not in write_report(staging, tmp_path/'a.html', night(0*x)).read_text()      # flat throughout

def test_names_of_its_own_and_a_raw(staging, x, tmp_path):
    raw = mne.io.RawArray(x.astype(float), mne.create_info(['one', 'two'], 100, 'eeg'), verbose='error')
    raw.set_meas_date(datetime(2020, 1, 1, 22, tzinfo=timezone.utc))
    aliases,staging = dict(one='C3-M2', two='E1-E2'), replace(staging, name='recording')     # as a Raw without a file is called
    assert 'The power of C3-M2' in write_report(staging, tmp_path/'a.html', raw, aliases, 'uV').read_text()
    with pytest.raises(MontageError): write_report(staging, tmp_path/'b.html', raw)
    assert not (tmp_path/'b.html').exists()

def test_another_recording_or_place_is_refused(staging, x, tmp_path):
    unknown,same = replace(staging, start=None), night(x, start=None)
    assert write_report(unknown, tmp_path/'a.html', same).read_bytes()
    (tmp_path/'a.html').unlink()
    longer = replace(same, x=[np.tile(o, 2) for o in same.x], stages=np.tile(same.stages, 2))
    for other in (longer, replace(same, where='other.edf')):
        with pytest.raises(RecordingError, match='not the recording that was staged'): write_report(unknown, tmp_path/'a.html', other)
    for other in (night(x, start=datetime(2020, 1, 2, 22)), replace(night(x), stages=np.zeros(30, np.int8)), replace(night(x), where='other.edf')):
        with pytest.raises(RecordingError, match='not the recording that was staged'): write_report(staging, tmp_path/'a.html', other)
    with pytest.raises(SleepnbError, match='a report is HTML'): write_report(staging, tmp_path/'a.pdf')
    (tmp_path/'file').write_text('')
    with pytest.raises(SleepnbError, match='cannot be written'): write_report(staging, tmp_path/'file'/'a.html')
    assert [p.name for p in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_in_a_browser(staging, x, tmp_path, browser, scheme):
    "Nothing is asked of a network, nothing is wider than the window, and words can be told from the ground."
    table = staging.channels.assign(details='a_very_long_name_of_a_channel_without_any_space_in_it ' * 3)
    full = replace(staging, reference=STAGES[::-1].copy(), notes=('x'*300,), name='y'*200, channels=table)
    path = write_report(full, tmp_path/'a.html', replace(night(x), where=full.name))
    for width,shown in ((390, '.narrow'), (1200, '.wide')):
        page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
        asked,said = [], []
        page.on('request', lambda r: asked.append(r.url)); page.on('console', lambda m: said.append(m.text))
        page.goto(path.as_uri())
        assert [o for o in asked if not o.startswith('data:')] == [path.as_uri()] and not said
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.locator('.wide, .narrow').evaluate_all('all => all.filter(o => o.offsetWidth).map(o => "." + o.className)') == [shown]
        colors = page.evaluate('''[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,
                                   ...[...document.querySelectorAll("svg text")].map(o => getComputedStyle(o).fill)]''')
        light = [np.mean([float(v) for v in re.findall(r'[\d.]+', c)[:3]]) for c in colors]
        assert abs(light[0] - light[1]) > 120 and (light[1] < 60) == (scheme == 'dark')
        assert light[2:].count(light[0]) > .6 * len(light[2:])                  # the rest is in the cells of the confusion
        page.close()
