"""Channel names of many datasets against a table written by hand, and against generated ones."""
import csv
from pathlib import Path

import mne
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from sleepnb.core import Modality, MontageError
from sleepnb.montage import AASM, ALIASES, POSITIONS, SYNONYMS, parse_channel, resolve_montage

ROWS = list(csv.DictReader(Path(__file__).with_name('channel_names.csv').open()))

def head_places():
    "Places on the map computed apart from the library, from the head of the installed mne."
    names = mne.channels.get_builtin_montages()
    head = mne.channels.make_standard_montage('colin27_1005' if 'colin27_1005' in names else 'standard_1005')
    for site,(x,y,z) in head.get_positions()['ch_pos'].items():
        angle,length = np.degrees(np.arccos(z / np.sqrt(x*x + y*y + z*z))), np.hypot(x, y)
        yield site, .5 + np.radians(angle) * x / length / 4.4, .5 + np.radians(angle) * y / length / 4.4

def test_the_table_is_worth_its_name():
    assert len(ROWS) >= 80 and len({(r['cohort'], r['recorded']) for r in ROWS}) == len(ROWS)

@pytest.mark.parametrize('cohort', sorted({r['cohort'] for r in ROWS}))
def test_names_as_stored(cohort):
    places,wrong = {site: (x, y) for site,x,y in head_places()}, []
    for row in (r for r in ROWS if r['cohort'] == cohort):
        c = parse_channel(row['recorded'], ALIASES.get(cohort.partition('-')[0]))
        place = places[row['site']] if row['site'] else None
        right = (c.name, c.modality) == (row['name'], row['modality']) and (c.position is None) == (place is None)
        if not right or (place and not np.allclose(c.position, place, atol=1e-6)): wrong.append((row, c))
    assert not wrong

def test_positions_are_those_of_mne():
    places = {site: (x, y) for site,x,y in head_places() if site not in SYNONYMS}
    assert places.keys() == POSITIONS.keys()
    np.testing.assert_allclose([POSITIONS[s] for s in places], list(places.values()), atol=1e-6)

def test_positions_known_beforehand():
    known = dict(Fpz=(.5005, .8614), Fz=(.5009, .6641), Cz=(.5009, .4793), Pz=(.5007, .3236), Oz=(.5003, .1718), F3=(.3364, .6729),
                 F4=(.6684, .6764), C3=(.3208, .4681), C4=(.6837, .4702), O1=(.4140, .1713), O2=(.5874, .1716))
    for site,place in known.items(): np.testing.assert_allclose(POSITIONS[site], place, atol=5e-5)

# ---- generated names

OLD = {new: old for old,new in SYNONYMS.items()}
SITES = sorted(POSITIONS)
REFERENCES = {None: ['', '-Ref', '-REF'], 'LE': ['-LE', '-CLE', '-A1+A2', '-(M1+M2)/2'], 'AVG': ['-AVG', '-Avg', '-CAR']}

@st.composite
def spelled(draw, site=st.sampled_from(SITES + ['E1', 'E2'])):
    "A pair of electrodes, and one of the ways to write it."
    site,reference = draw(site), draw(st.sampled_from([None, 'LE', 'AVG', *SITES]))
    assume(site != reference)
    name = lambda s: draw(st.sampled_from([s, s.upper(), s.lower(), OLD.get(s, s)] + {'E1': ['LOC'], 'E2': ['ROC']}.get(s, [])))
    sep = draw(st.sampled_from(['-', '_', ':', '/', ' ', ' - ']))
    tail = draw(st.sampled_from(REFERENCES[reference])) if reference in REFERENCES else sep + name(reference)
    prefix = draw(st.sampled_from(['', 'EEG ', 'EEG_', 'eeg ', 'POL ', ' ', 'EEG  ']))
    return f'{site}-{reference}' if reference else site, prefix + name(site) + tail + draw(st.sampled_from(['', ' ']))

@settings(max_examples=5_000, deadline=None)
@given(spelled())
def test_every_spelling_means_its_electrodes(case):
    name,text = case
    assert parse_channel(text).name == name

@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.text(max_size=24), st.text('ACEFMOPTZGLRIHNcefmoz0123456789-_ :+/()', max_size=12)))
def test_any_text_is_a_channel_or_a_montage_error(text):
    try: c = parse_channel(text)
    except MontageError: return
    assert c.recorded == text and isinstance(c.modality, Modality)
    assert (c.position is not None) == (c.modality is Modality.EEG and c.site in POSITIONS)
    again = parse_channel(c.name)                       # a canonical name means itself
    assert (again.name, again.modality, again.position) == (c.name, c.modality, c.position)

recordings = st.lists(st.one_of(spelled().map(lambda case: case[1]), st.text('ACEFMOPTZ012349-_ +', max_size=8),
    st.sampled_from(['EMG', 'Chin1', 'CHIN 2', 'L Chin', 'EOG(L)', 'E3', 'SaO2', 'EKG', 'EEG(sec)'])), max_size=12)

@settings(max_examples=10_000, deadline=None)
@given(recordings, st.lists(st.sampled_from(SITES + AASM + ['ECG', 'E1', 'HEOG']), min_size=1, max_size=6))
def test_no_recorded_channel_disappears(names, wanted):
    try: found = resolve_montage(names, wanted)
    except MontageError: return
    assert sorted([*found.picks, *found.unused]) == list(range(len(names)))      # each one is used or explained
    used = [found.recorded[i].name for i in found.picks]
    assert len(set(used)) == len(used)                                           # two electrodes never become one name
    for i,why in found.unused.items():
        twin = [n for j,n in enumerate(names) if j < i and found.recorded[j].name == found.recorded[i].name]
        if twin and why != 'it has no name' and found.recorded[i].modality != 'other' and 'net' not in why: assert repr(twin[0]) in why
    assert found.mask.any() and all(repr(names[i]) in repr(found) for i in found.unused)

# ---- what a derivation computes

@st.composite
def voltages(draw):
    "Random potentials at electrodes, recorded as random pairs: the truth that any derivation must reproduce."
    electrodes = draw(st.lists(st.sampled_from(['C3', 'C4', 'Cz', 'F3', 'O1', 'M1', 'M2', 'E1', 'Fpz']), min_size=3, max_size=7, unique=True))
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(electrodes + [None])]*2).filter(lambda p: p[0] and p[0] != p[1]), min_size=1, max_size=8, unique=True))
    return electrodes, pairs

@settings(max_examples=2_000, deadline=None)
@given(voltages(), st.integers(0, 2**32 - 1))
def test_derivations_are_differences_of_potentials(case, seed):
    electrodes,pairs = case
    potential = dict(zip([*electrodes, None], np.random.default_rng(seed).normal(size=(len(electrodes) + 1, 16)))) # None: the amplifier's reference
    x = np.array([potential[a] - potential[b] for a,b in pairs])
    try: found = resolve_montage([f'{a}-{b}' if b else a for a,b in pairs], electrodes + [f'{a}-{b}' for a in electrodes for b in electrodes if a != b])
    except MontageError: return
    y = found.matrix @ x[found.picks]
    for row,d in zip(y, found.derivations):
        if d.got: np.testing.assert_allclose(row, potential[d.got.site] - potential[d.got.reference], atol=1e-5)
        else: assert not row.any()

def test_every_channel_of_a_real_recording(data):
    from edfio import read_edf
    edf = read_edf(data/'sleep-edf'/'sleep-cassette'/'SC4001E0-PSG.edf')
    found = resolve_montage([s.label for s in edf.signals], ['Fpz-Cz', 'Pz-Oz', 'HEOG', 'Chin'], where='SC4001E0-PSG.edf')
    assert found.mask.all() and [found.recorded[i].recorded for i in found.unused] == ['Resp oro-nasal', 'Temp rectal', 'Event marker']
