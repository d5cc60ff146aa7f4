"""Sleep statistics against YASA, smoothing against every path there is, and files against those who read them."""
import datetime, itertools, json, os, subprocess, sys, warnings
from zoneinfo import ZoneInfo

import mne
import numpy as np
import pandas as pd
import pytest
from edfio import read_edf
from hypothesis import given, settings, strategies as st

from sleepnb.core import HypnogramError, SleepnbError, Stage
from sleepnb.data.psg import align, find_hypnogram, is_staging, read_hypnogram, read_night, sample_files
from sleepnb.hypnogram import TRANSITIONS, bouts, sleep_statistics, smooth_stages, stage_annotations, stage_table, transition_matrix, write_stages

START = datetime.datetime(2021, 3, 4, 22, 59, 30)

def random_hypnograms(n=500):
    "Stages of any set, in bouts of any length, from one epoch to a day, some epochs unscored; and the epoch's length."
    rng = np.random.default_rng(0)
    fixed = [[0]*9, [2], [0], [-1], [-1]*5, [4, 4], [0, 0, 4], [1]*10, [2]*9 + [-1] + [2]*10, [-1, 0, 1, -1]]
    for i in range(n):
        codes = rng.choice([-1, 0, 1, 2, 3, 4], rng.integers(1, 7), replace=False)
        stages = np.repeat(rng.choice(codes, 200), rng.integers(1, rng.choice([2, 5, 40]), 200))[:rng.choice([2, 30, 900, 2880])]
        yield (fixed[i] if i < len(fixed) else stages), [30, 20, 10, 60, 15, 5][i % 6]

def yasa_hypnogram(stages, epoch_sec):
    import yasa
    return yasa.Hypnogram.from_integers(stages, {-1: 'UNS', 0: 'WAKE', 1: 'N1', 2: 'N2', 3: 'N3', 4: 'REM'}, freq=f'{epoch_sec}s')

def test_statistics_are_those_of_yasa():
    import yasa
    seen = set()
    for stages,epoch_sec in random_hypnograms():
        ours = sleep_statistics(stages, epoch_sec)
        theirs = yasa_hypnogram(stages, epoch_sec).sleep_statistics()
        theirs.setdefault('UNS', 0)
        np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), atol=5.1e-5, err_msg=str(stages)) # it rounds
        seen |= {k for k in theirs if np.isnan(theirs[k])} | ({'sleepless'} if theirs['TST'] == 0 else set())
        if len(stages) > 1:                                       # the older function has more latencies, and NREM
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                older = yasa.sleep_statistics(np.where(np.equal(stages, -1), -2, stages), 1/epoch_sec)
            np.testing.assert_allclose([ours[k] for k in older], list(older.values()), atol=1e-9)
            assert set(ours) == set(theirs) | set(older)
    assert {'sleepless', 'WASO', 'SOL', 'SOL_5min', 'SME', 'SFI', 'Lat_REM', '%N1'} <= seen

def test_statistics_are_plain_numbers_and_need_stages():
    assert {type(v) for v in sleep_statistics([Stage.W, Stage.N2, Stage.REM]).values()} == {float}    # as JSON holds them
    for wrong in ([], np.zeros((2, 2), int), [0.5], ['W'], [7]):
        with pytest.raises(HypnogramError): sleep_statistics(wrong)

def test_transitions_are_those_of_yasa():
    names = dict(zip(['WAKE', 'N1', 'N2', 'N3', 'REM'], ['W', 'N1', 'N2', 'N3', 'R']))
    for stages,_ in random_hypnograms(100):
        counts,prob = transition_matrix(stages)
        theirs = yasa_hypnogram(stages, 30).transition_matrix()[0].rename(index=names, columns=names)
        theirs = theirs.reindex(index=counts.index, columns=counts.columns, fill_value=0)
        assert (counts.to_numpy() == theirs.to_numpy()).all()
        if -1 not in stages:
            share = yasa_hypnogram(stages, 30).transition_matrix()[1].rename(index=names, columns=names)
            np.testing.assert_allclose(prob.loc[share.index, share.columns], share)
        np.testing.assert_array_equal(prob.isna().all(axis=1), counts.sum(axis=1) == 0)

@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60))
def test_bouts_are_the_hypnogram(stages):
    table = bouts(stages, 20, onset=7)
    words = [w for w,n in zip(table.stage, table.duration / 20) for _ in range(int(n))]
    assert words == [{-1: '?', 4: 'R'}.get(s, Stage(max(s, 0)).name) for s in stages]
    assert (table.stage != table.stage.shift()).all() and table.onset[0] == 7
    np.testing.assert_allclose(table.onset[1:], (table.onset + table.duration)[:-1])

# ---- smoothing

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_the_path_is_the_likeliest_of_all(n, seed, own, gap):
    rng = np.random.default_rng(seed)
    prob,step = rng.dirichlet(np.full(5, .4), n), rng.dirichlet(np.full(5, .5), 5) if own else TRANSITIONS
    if gap: prob[rng.integers(n)] = np.nan
    with np.errstate(divide='ignore'): emitted = np.where(np.isnan(prob), 0, np.log(np.maximum(prob, 1e-10)))
    log_step = np.log(np.maximum(step, 1e-10))
    score = lambda path: sum(emitted[e, s] for e,s in enumerate(path)) + sum(log_step[a, b] for a,b in itertools.pairwise(path))
    best = max(itertools.product(range(5), repeat=n), key=score)
    found = smooth_stages(prob, step)
    there = ~np.isnan(prob[:, 0])
    assert (found[~there] == -1).all() and found.dtype == np.int8
    filled = [best[e] if not there[e] else found[e] for e in range(n)]
    assert score(filled) == pytest.approx(score(best), abs=1e-9)

def test_smoothing_refuses_what_is_no_probability():
    for prob,step in ((np.ones((3, 5)), TRANSITIONS), (np.full((3, 4), .25), TRANSITIONS), (np.full((3, 5), .2), np.ones((5, 5))),
                      (np.full((3, 5), .2), np.full((4, 5), .2)), ([[.5, .5, np.nan, 0, 0]], TRANSITIONS)):
        with pytest.raises(SleepnbError): smooth_stages(prob, step)
    assert smooth_stages(np.full((2, 5), np.nan)).tolist() == [-1, -1] and len(smooth_stages(np.zeros((0, 5)))) == 0

def test_transitions_are_probabilities():
    np.testing.assert_allclose(TRANSITIONS.sum(axis=1), 1)
    assert (TRANSITIONS > 0).all() and (TRANSITIONS.argmax(axis=1) == range(5)).all()

# ---- files

NAMES = ['night_stages.csv', 'night_stages.tsv', 'sub-01_events.tsv', 'night.edf', 'NIGHT.EDF']
STAGES = np.array([-1, 0, 0, 1, 2, 2, 2, -1, 3, 3, 4, 4, 0, -1], np.int8)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('epoch_sec,onset', [(30, 0), (30, 12.5), (20, 0)])
def test_files_are_read_back(tmp_path, name, epoch_sec, onset):
    path = write_stages(tmp_path/name, STAGES, start=START, epoch_sec=epoch_sec, onset=onset)
    h,expected = read_hypnogram(path), stage_table(STAGES, epoch_sec=epoch_sec, onset=onset)
    codes = np.repeat(h.stage, np.round(h.duration / epoch_sec).astype(int))
    assert (codes == STAGES).all() and h.onset[0] == onset and h.onset[-1] + h.duration[-1] == onset + epoch_sec * len(STAGES)
    assert h.start == (START if path.suffix.casefold() == '.edf' else None)
    if path.suffix.casefold() != '.edf':
        table = pd.read_csv(path, sep=None, engine='python')
        assert table.iloc[:, 2].tolist() == expected.stage.tolist() and table.onset.tolist() == expected.onset.tolist()
    assert not [p for p in tmp_path.iterdir() if p.suffix == '.tmp']

def test_tables_hold_what_they_are_given(tmp_path):
    prob = np.random.default_rng(0).dirichlet(np.ones(5), len(STAGES)).astype(np.float32)
    prob[STAGES < 0] = np.nan
    quality = ['flat' if s < 0 else 'good' for s in STAGES]
    for name in NAMES[:2]:
        path = write_stages(tmp_path/name, STAGES, prob, quality)
        header = path.read_text().splitlines()[0].replace('\t', ',')
        assert header == 'onset,duration,stage,p_W,p_N1,p_N2,p_N3,p_R,quality'
        table = pd.read_csv(path, sep=None, engine='python')
        pd.testing.assert_frame_equal(table, stage_table(STAGES, prob, quality), check_dtype=False)
        np.testing.assert_allclose(table.filter(like='p_'), prob, atol=5.1e-7)
        assert [Stage[s] if s != '?' else -1 for s in table.stage] == STAGES.tolist()

def test_bids_events_have_a_sidecar_that_explains_all_of_them(tmp_path):
    path = write_stages(tmp_path/'eeg'/'sub-01_task-sleep_events.tsv', STAGES)
    table,sidecar = pd.read_csv(path, sep='\t'), json.loads(path.with_suffix('.json').read_text())
    assert list(table) == ['onset', 'duration', 'trial_type'] == [k for k in sidecar if k != 'GeneratedBy']
    assert set(table.trial_type) == set(sidecar['trial_type']['Levels'])

def test_a_sidecar_of_somebody_else_stays_and_a_scorers_events_are_a_hypnogram(tmp_path):
    for _ in range(2): write_stages(own := tmp_path/'own_events.tsv', STAGES)
    (theirs := tmp_path/'night_desc-stages_events.tsv').write_text('onset\tduration\ttrial_type\n0\t30\tW\n')
    assert is_staging(own) and is_staging(own.with_suffix('.json')) and not is_staging(theirs)
    (sidecar := theirs.with_suffix('.json')).write_text('{"trial_type": {"Description": "by Anna"}}')
    assert not is_staging(theirs) and not is_staging(sidecar) and find_hypnogram(tmp_path/'night.edf') == theirs
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SleepnbError, match='not written by sleepnb'): write_stages(theirs, STAGES)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before

def test_edf_is_what_mne_and_viewers_read(tmp_path):
    path = write_stages(tmp_path/'a.edf', STAGES, start=START, onset=15)
    found = mne.read_annotations(path)
    assert found.onset.tolist() == bouts(STAGES, onset=15).onset.tolist() and found.duration.sum() == 30 * len(STAGES)
    assert found.description.tolist() == [f'Sleep stage {s}' for s in '? W N1 N2 ? N3 R W ?'.split()]
    raw = path.read_bytes()
    assert raw[:8] == b'0       ' and raw[192:197] == b'EDF+C' and raw[168:184] == b'04.03.2122.59.30' and raw[236:244].strip() == b'1'
    assert raw[88:].startswith(b'Startdate 04-MAR-2021') and raw[256:272] == b'EDF Annotations '
    assert b'+0\x14\x14\x00' in raw[512:] and b'+15\x1530\x14Sleep stage ?\x14' in raw[512:]

def test_the_record_of_a_busy_day_keeps_to_the_size_that_edf_recommends(tmp_path):
    stages = np.tile([2, 1, 2, 0], 24*120//8)                        # twelve hours in which no two epochs are alike
    path = write_stages(tmp_path/'a.edf', stages)
    assert int(path.read_bytes()[256 + 216:256 + 224]) * 2 <= 61440 and len(read_edf(path).annotations) == len(stages)

@pytest.mark.parametrize('start', [None, START, START.replace(microsecond=250000), START.replace(tzinfo=datetime.timezone.utc),
                                   datetime.datetime(1985, 1, 1, 3), datetime.datetime(2084, 12, 31, 23, 59, 59)])
def test_start_times_of_edf(tmp_path, start):
    path = write_stages(tmp_path/'a.edf', STAGES, start=start)
    h = read_hypnogram(path)
    assert h.onset[0] == 0 and (start is None or h.start == start.replace(tzinfo=None))

def test_edf_files_fit_their_recording_by_time(tmp_path):
    night = read_night(*sample_files(), wanted=['Fpz-Cz'])
    path = write_stages(tmp_path/'a.edf', night.stages[40:], start=night.start, onset=1200)
    assert (read_night(sample_files()[0], path, wanted=['Fpz-Cz']).stages[40:] == night.stages[40:]).all()

def test_annotations_sit_where_they_should_on_a_raw_that_was_cropped():
    raw = mne.io.RawArray(np.random.default_rng(0).normal(size=(1, 14*300)) * 3e-5, mne.create_info(['C3'], 10, 'eeg'), verbose='error')
    raw.set_meas_date(START.replace(tzinfo=datetime.timezone.utc))
    raw.crop(60)
    for start in (raw.info['meas_date'], START):
        raw.set_annotations(stage_annotations(STAGES, start), verbose='error')
        assert (read_night(raw).stages == STAGES[2:]).all()
    raw.set_annotations(stage_annotations(STAGES[2:]))                  # without a date, from the first sample that is left
    assert (read_night(raw).stages == STAGES[2:]).all()

def test_alone_a_hypnogram_gives_its_epochs_back(tmp_path):
    h = read_hypnogram(write_stages(tmp_path/'a.csv', STAGES))
    assert (align(h, 30 * len(STAGES))[0] == STAGES).all()

def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path/'file').write_text('x')
    (tmp_path/'folder.csv').mkdir()
    for path,words in ((tmp_path/'file'/'a.csv', 'cannot be written'), (tmp_path/'folder.csv', 'cannot be written'),
                       (tmp_path/'a.xlsx', 'ending'), (tmp_path/'a', 'ending')):
        with pytest.raises(SleepnbError, match=words): write_stages(path, [0, 1])
    with pytest.raises(HypnogramError, match='no epoch'): write_stages(tmp_path/'a.csv', [])
    with pytest.raises(SleepnbError, match=r'expected 1 epoch; found quality of 2'): stage_table([0], quality=['good']*2)
    with pytest.raises(SleepnbError, match='prob of 3'): write_stages(tmp_path/'a.csv', [0, 1], np.full((3, 5), .2))
    with pytest.raises(SleepnbError, match='no probabilities'): write_stages(tmp_path/'a.csv', [0, 1], np.ones((2, 5)))
    with pytest.raises(SleepnbError, match='no such year.*1985 to 2084; found 1970'):
        write_stages(tmp_path/'a.edf', [0, 1], start=datetime.datetime(1970, 1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.csv']

def test_a_file_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = write_stages(tmp_path/'a.csv', [0, 1])
    before = path.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SleepnbError, match='No space left'): write_stages(path, [2, 3])
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1
    monkeypatch.undo()
    assert read_hypnogram(write_stages(path, [2, 3])).stage.tolist() == [2, 3]

def test_statistics_and_files_load_neither_torch_nor_mne():
    heavy = {'torch', 'fastai', 'mne', 'matplotlib', 'sklearn', 'seaborn'}
    command = f'import sys, sleepnb.hypnogram; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)'
    subprocess.run([sys.executable, '-c', command], check=True)

@pytest.mark.parametrize('name', ['night_stages.csv', 'night_stages.tsv', 'night_stages.edf', 'night_desc-stages_events.tsv'])
def test_what_was_staged_is_no_hypnogram_of_a_scorer(tmp_path, name):
    (tmp_path/'night.edf').write_bytes(b'')
    write_stages(tmp_path/name, [0, 2, 4], np.eye(5)[[0, 2, 4]])
    assert find_hypnogram(tmp_path/'night.edf') is None
    (tmp_path/'night_mine.csv').write_text('onset,duration,stage\n0,30,W\n')
    assert find_hypnogram(tmp_path/'night.edf').name == 'night_mine.csv'

@pytest.mark.parametrize('zone,hours', [('Europe/Berlin', 21), ('America/New_York', 27), ('UTC', 22)])
def test_annotations_take_a_start_with_a_zone(zone, hours):
    "22 o'clock of 2 January 2020 in Berlin is 21 o'clock in UTC, in New York 3 o'clock of the next day."
    start,day = datetime.datetime(2020, 1, 2, 22, tzinfo=ZoneInfo(zone)), datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc)
    made = stage_annotations([0, 1], start)
    assert made.orig_time == day + datetime.timedelta(hours=hours) and list(made.description) == ['Sleep stage W', 'Sleep stage N1']
    raw = mne.io.RawArray(np.zeros((1, 6000)), mne.create_info(['C3'], 100, 'eeg'), verbose='error')
    raw.set_meas_date(day + datetime.timedelta(hours=hours)).set_annotations(made)
    assert list(raw.annotations.onset) == [0, 30]
