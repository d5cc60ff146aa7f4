"""Channel names of many datasets against a table written by hand, and against generated ones."""
import csv
from pathlib import Path

import mne
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from sleepnb.core import Modality, MontageError
from sleepnb.montage import ALIASES, POSITIONS, SYNONYMS, parse_channel, resolve_montage

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
OTHERS = { # electrode that is not on the scalp → ways to write it
    'E1': ['E1', 'LOC', 'EOG L', 'EOG Left', 'L-EOG', 'EOG 1'], 'E2': ['E2', 'ROC', 'EOG R', 'EOG(R)', 'REOG', 'EOG2'],
    'Chin1': ['Chin1', 'CHIN 1', 'Chin EMG1', 'ChEMG1', 'EMG Chin1'], 'Chin2': ['Chin2', 'Chin 2', 'ChEMG2'], 'Chin3': ['chin3'],
    'ChinL': ['L Chin', 'LChin', 'Chin L', 'Left Chin'], 'ChinR': ['R Chin', 'Rchin', 'Chin_R'], 'ChinC': ['Cchin'],
    'EMG1': ['EMG1', 'EMG 1'], 'EMG2': ['EMG2', 'EMG 2'], 'ECG1': ['ECG1', 'ECG 1', 'EKG1'], 'ECG2': ['ECG2', 'EKG 2'],
    'LegL': ['L Leg', 'Leg L', 'LLeg', 'LAT'], 'LegR': ['R Leg', 'Right Leg', 'RAT'], 'LegL1': ['LLeg1'], 'LegR2': ['Leg R2'],
    'HEOG': ['HEOG', 'EOG horizontal'], 'VEOG': ['VEOG', 'EOG Vert'], 'Chin': ['Chin', 'EMG', 'EMG submental', 'chin EMG']}
REFERENCES = {None: ['', '-Ref', '-REF'], 'LE': ['-LE', '-CLE', '-A1+A2', '-(M1+M2)/2'], 'AVG': ['-AVG', '-Avg', '-CAR']}

@st.composite
def spelled(draw):
    "The canonical name of one or two electrodes, and one of the ways to write it."
    site = draw(st.sampled_from(SITES + list(OTHERS)))
    pairs = ('HEOG', 'VEOG', 'Chin')                    # recorded as one channel: they have no reference
    family = [o for o in OTHERS if o[:3] == site[:3] and o not in pairs] if site in OTHERS else SITES
    reference = draw(st.sampled_from([None, 'LE', 'AVG', *family, 'M1', 'M2'] if site in SITES + ['E1', 'E2'] else [None, *family]))
    assume(site != reference and not (site in pairs and reference))
    def name(s):
        ways = OTHERS.get(s) or [s, OLD.get(s, s)]
        way = draw(st.sampled_from(ways))
        return draw(st.sampled_from([way, way.upper(), way.lower()]))
    sep = draw(st.sampled_from(['-', ':', '/', ' - '] + ([] if site in OTHERS or reference in OTHERS else ['_', ' '])))
    tail = draw(st.sampled_from(REFERENCES[reference])) if reference in REFERENCES else sep + name(reference)
    prefix = draw(st.sampled_from(['', 'EEG ', 'EEG_', 'eeg ', 'POL ', ' ', 'EEG  ']))
    suffix = draw(st.sampled_from(['', ' ', ' (uV)', ' EEG']))
    return f'{site}-{reference}' if reference else site, prefix + name(site) + tail + suffix

@settings(max_examples=4_000, deadline=None)
@given(spelled())
def test_every_spelling_means_its_electrodes(case):
    name,text = case
    assert parse_channel(text).name == name

@settings(max_examples=4_000, deadline=None)
@given(st.one_of(st.text(max_size=24), st.text('ACEFMOPTZGLRIHNcefmoz0123456789-_ :+/()', max_size=12)))
def test_any_text_is_a_channel_or_a_montage_error(text):
    try: c = parse_channel(text)
    except MontageError: return
    assert c.recorded == text and isinstance(c.modality, Modality) and c.site != c.reference
    assert (c.position is not None) == (c.modality is Modality.EEG and c.site in POSITIONS)
    again = parse_channel(c.name)                       # a canonical name means itself
    assert (again.name, again.modality, again.position) == (c.name, c.modality, c.position)

@settings(max_examples=1_000, deadline=None)
@given(st.lists(spelled(), min_size=1, max_size=12), st.integers(1, 6))
def test_two_electrodes_never_become_one_name_in_silence(cases, n):
    "Different electrodes keep different names; the same electrodes under two names are reported as such."
    truth,names = zip(*cases)
    try: found = resolve_montage(names, sorted(set(truth))[:n])
    except MontageError: return
    assert sorted([*found.picks, *found.unused]) == list(range(len(names)))      # each one is used or explained
    if any('numbered series' in why for why in found.unused.values()): return
    for i,c in enumerate(found.recorded):
        assert c.name == truth[i] and c.recorded == names[i]
        first = truth.index(truth[i])
        if first < i: assert found.unused[i] == f'taken for the same electrodes as {names[first]}'
        else: assert i in found.picks or found.unused[i] == 'not asked for'

def test_numbered_series_are_not_the_scalp():
    biosemi = [f'{a}{i}' for a in 'ABCD' for i in range(1, 33)]
    for names in (biosemi, [f'POL {n}' for n in biosemi], [f'E{i}' for i in range(1, 257)], [f'EEG E{i:03d}-Ref' for i in range(1, 65)],
                  [f'e{i}' for i in range(1, 9)]):
        found = resolve_montage([*names, 'Fpz', 'SaO2'], ['Fpz', 'C3', 'C4', 'E1', 'E2', 'M1'])
        assert found.picks == [len(names)], names[:3]
        assert '001' in names[0] or any('numbered series' in why for why in found.unused.values())
    named = resolve_montage(biosemi, ['C3', 'Cz'], {'D19': 'C3', 'A1': 'Cz'})     # unless their places are given
    assert [biosemi[i] for i in named.picks] == ['A1', 'D19']
    assert resolve_montage([f'F{i}' for i in range(1, 13)] + ['P11', 'P12', 'C3', 'A1'], ['C3']).mask.all() # a dense cap of 10-10

def test_repeated_names():
    "mne numbers names that a file repeats; the numbers are no electrodes."
    found = resolve_montage(['EMG-0', 'EMG-1', 'EMG-2', 'C3-0', 'C3-1', 'P1-0', 'P1-1'], ['Chin', 'C3', 'P1'])
    assert found.picks == [0, 3, 5] and set(found.unused) == {1, 2, 4, 6}
    assert parse_channel('P1-0').name == 'P1'
    assert resolve_montage(['EMG-1', 'EMG-2'], ['Chin']).table.details[0] == 'EMG-1'   # without EMG-0: two muscles, not a pair

@pytest.mark.parametrize('names,wanted,got,details', [
    (['Chin 1-Chin 2', 'Chin 2-Chin 3'], 'Chin1-Chin2', 'Chin1-Chin2', 'Chin 1-Chin 2'),
    (['Chin 1-Chin 2', 'Chin 3-Chin 2'], 'Chin1-Chin3', 'Chin1-Chin3', 'Chin 1-Chin 2 − Chin 3-Chin 2'),
    (['EMG1', 'EMG2'], 'Chin', 'EMG1', 'EMG1'), (['EMG1-EMG2', 'EMG3'], 'Chin', 'EMG1-EMG2', 'EMG1-EMG2'),
    (['Chin2'], 'Chin', 'Chin2', 'Chin2'), (['Chin+', 'Chin-'], 'Chin', 'Chin+-Chin-', 'Chin+ − Chin-'),
    (['EMG Chin1', 'EMG Chin2', 'EMG Chin3'], 'Chin', 'Chin1-Chin2', 'EMG Chin1 − EMG Chin2'),
    (['ECG V1', 'ECG II', 'ECG I'], 'ECG', 'ECG-II', 'ECG II'), (['ECG2', 'ECG1'], 'ECG', 'ECG1-ECG2', 'ECG1 − ECG2'),
    (['ECG L', 'ECG R'], 'ECG', 'ECG-L-ECG-R', 'ECG L − ECG R'), (['ROC-LOC'], 'HEOG', 'E1-E2', '− ROC-LOC'),
    (['E1-M2', 'E2-M2', 'M1-M2'], 'E2', 'E2-M2', 'E2-M2'), (['C3-LE', 'C3-AVG', 'C3-Cz'], 'C3', 'C3-LE', 'C3-LE'),
    (['C3-Cz', 'C3', 'C3-AVG'], 'C3', 'C3-AVG', 'C3-AVG'), (['C3-Cz', 'C3'], 'C3', 'C3', 'C3'), (['O1-Cz'], 'O1', 'O1-Cz', 'O1-Cz'),
    (['C4', 'A1', 'A2'], 'C4', 'C4-M1', 'C4 − A1'), (['Fz', 'A1', 'A2'], 'Fz', 'Fz-M2', 'Fz − A2')])
def test_preferences(names, wanted, got, details):
    found = resolve_montage(names, [wanted])
    assert (found.derivations[0].got.name, found.derivations[0].details) == (got, details)

@pytest.mark.parametrize('names,wanted', [(['Chin', 'M2', 'C3'], 'Chin-M2'), (['HEOG', 'E1', 'M2'], 'E1-HEOG'), (['EMG1', 'EMG2'], 'EMG1-EMG2'),
                                          (['C3-LE', 'M2-AVG'], 'C3-M2'), (['F4-C4', 'C4-P4', 'P4-O2'], 'F4-O2')])
def test_what_must_not_be_derived(names, wanted):
    with pytest.raises(MontageError, match='none of the wanted'): resolve_montage(names, [wanted])

@pytest.mark.parametrize('recorded,wanted,aliases,match', [
    ([3, 'C3'], ['C3'], None, 'must be text'), ([None], ['C3'], None, 'must be text'), ([b'C3'], ['C3'], None, 'must be text'),
    (None, ['C3'], None, 'in a list'), ('C3', ['C3'], None, 'in a list'), (['C3'], 'C3', None, 'in a list'),
    (['C3'], [], None, 'asked for once'), (['C3'], ['T3', 'T7'], None, 'asked for once'), (['C3'], ['C33'], None, 'not an electrode'),
    (['C3'], ['EEG C3-Qz'], None, 'not an electrode'), (['C3'], ['EMG Chn'], None, 'not an electrode'),
    (['X1'], ['Chin'], {'X1': 'Chn'}, 'stands for no electrode'), (['X1'], ['Chin'], {'X1': None}, 'must be text'),
    (['X1'], ['Chin'], 'isruc', 'must be a dict'), ([], ['C3'], None, 'none of the wanted'), (['Pz'], ['C3'], None, 'none of the wanted')])
def test_bad_input_is_a_montage_error(recorded, wanted, aliases, match):
    with pytest.raises(MontageError, match=match): resolve_montage(recorded, wanted, aliases)

def test_reasons_and_report():
    names = ['C3', 'A2', 'Resp', 'EOG gauche', 'EOG oben', '', 'C3-Ref', *(f'X{i}' for i in range(20))]
    found = resolve_montage(iter(names), ('C3-M2', 'E1'))
    assert [found.unused[i] for i in (2, 4, 5, 6)] == ['not EEG, EOG, EMG or ECG by its name', 'its electrode is not known without an alias',
                                                      'it has no name', 'taken for the same electrodes as C3']
    assert found.picks == [0, 1, 3] and 'and 9 more' in repr(found) and len(repr(found).splitlines()) == 8

# ---- what a derivation computes

@st.composite
def voltages(draw):
    "Random potentials at electrodes, recorded as random pairs: the truth that any derivation must reproduce."
    electrodes = draw(st.lists(st.sampled_from(['C3', 'C4', 'Cz', 'F3', 'O1', 'M1', 'M2', 'E1', 'Fpz']), min_size=3, max_size=7, unique=True))
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(electrodes + [None])]*2).filter(lambda p: p[0] and p[0] != p[1]), min_size=1, max_size=8, unique=True))
    return electrodes, pairs

@settings(max_examples=800, deadline=None)
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
