"""Splits, budgets and their files over thousands of generated cohorts, against rules written down a second time."""
import json, math, os, subprocess, sys
from collections import Counter
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sleepnb.core import SplitError
from sleepnb.data import splits
from sleepnb.data.psg import sample_files
from sleepnb.data.splits import PARTS, Split, check_no_leak, check_unseen, holdout_split, kfold_splits, label_budget

many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# ---- generated cohorts

ODD = ['0', '00', '007', '7', '-1', 'a b', 'a/b', 'Ö', 'ö', 'ß', 'ss', '睡', '😴', 'None', 'nan', 'NaN', 'null', 'true', '1e3', '1.0',
       '"', "'", '\\', '{}', '[0]', ',', ';', '#', '%s', 'train', 'test', 'subject', 'x'*200]
seeds = st.integers(0, 2**31)
plain = st.text(st.characters(exclude_categories=('C', 'Z')), min_size=1, max_size=5)
ids = st.one_of(st.sampled_from(ODD), st.integers(-9, 999), plain)

@st.composite
def night_tables(draw, least=3, most=15, cohorts=3):
    "Some cohorts of at least `least` subjects, each with one to three nights, in any order of rows."
    rows = []
    for cohort in draw(st.lists(plain | st.sampled_from(ODD), min_size=1, max_size=cohorts, unique=True)):
        for subject in draw(st.lists(ids, min_size=least, max_size=most, unique_by=lambda s: splits._bare(str(s)))):
            rows += [(cohort, subject, night) for night in range(draw(st.integers(1, 3)))]
    order = np.random.default_rng(draw(seeds)).permutation(len(rows))
    return pd.DataFrame([rows[i] for i in order], columns=['cohort', 'subject', 'night'])

shares = st.sampled_from([.1, .15, .2, .25, .3, .5])

def subjects(table): return set(zip(table.cohort.map(str), table.subject.map(str)))
def half_up(share, n): return max(1, int((Decimal(str(share)) * n).quantize(Decimal(1), ROUND_HALF_UP)))

def assert_sound(split, nights):
    "Everybody is in one part, no part is empty, and both nights of a subject go together."
    for a,b in combinations(PARTS, 2): assert not set(getattr(split, a)) & set(getattr(split, b))
    assert {*split.train, *split.valid, *split.test} == subjects(nights)
    assert all(getattr(split, p) for p in PARTS)
    of,parts = {},{p: set(getattr(split, p)) for p in PARTS}
    for row,part in zip(nights.itertuples(), split.part_of(nights)):
        assert (str(row.cohort), str(row.subject)) in parts[part]
        assert of.setdefault((row.cohort, str(row.subject)), part) == part
    selected = [split.select(nights, p) for p in PARTS]
    assert sum(map(len, selected)) == len(nights)
    check_no_leak(split, *selected)

# ---- hold-out and folds

@many
@given(night_tables(), seeds, shares, shares, st.randoms())
def test_holdout(nights, seed, test, valid, random):
    try: split = holdout_split(nights, seed, test, valid)
    except SplitError:
        sizes = Counter(c for c,_ in subjects(nights)).values()
        assert any(n - half_up(test, n) - half_up(valid, n - half_up(test, n)) < 1 for n in sizes)
        return
    assert_sound(split, nights)
    for cohort,n in Counter(c for c,_ in subjects(nights)).items():
        tested = half_up(test, n)
        validated = half_up(valid, n - tested)
        assert split.counts.loc[cohort].tolist() == [n - tested - validated, validated, tested]
        alone = holdout_split(nights[nights.cohort == cohort], seed, test, valid)      # whoever else is in the table
        assert all(getattr(alone, p) == tuple(s for s in getattr(split, p) if s[0] == cohort) for p in PARTS)
    shuffled = nights.sample(frac=1, random_state=random.randrange(2**32))
    assert holdout_split(shuffled, seed, test, valid) == split == holdout_split(nights.drop_duplicates(['cohort', 'subject']), seed, test, valid)

@many
@given(night_tables(), st.integers(2, 5), seeds, shares, st.randoms())
def test_folds(nights, k, seed, valid, random):
    sizes = Counter(c for c,_ in subjects(nights))
    try: folds = kfold_splits(nights, k, seed, valid)
    except SplitError:
        left = lambda n: n - math.ceil(n/k)
        assert any(n < k or left(n) - half_up(valid, left(n)) < 1 for n in sizes.values())
        return
    assert [f.fold for f in folds] == list(range(k)) and {f.k for f in folds} == {k}
    for f in folds: assert_sound(f, nights)
    assert Counter(s for f in folds for s in f.test) == Counter(subjects(nights))        # tests partition the subjects
    for cohort,n in sizes.items():
        tested = [f.counts.test[cohort] for f in folds]
        assert max(tested) - min(tested) <= 1 and sum(tested) == n
        assert all(f.counts.valid[cohort] == half_up(valid, n - t) for f,t in zip(folds, tested))
        if valid == .2 and k == 5:
            times = Counter(s for f in folds for s in f.valid if s[0] == cohort)
            assert max(times.values()) <= 2
    assert kfold_splits(nights.sample(frac=1, random_state=random.randrange(2**32)), k, seed, valid) == folds

def test_printed_sizes():
    for n,sizes in {20: [13, 3, 4], 100: [64, 16, 20], 29: [18, 5, 6]}.items():
        nights = pd.DataFrame(dict(cohort='x', subject=range(n), night=1))
        for seed in range(20): assert holdout_split(nights, seed).counts.loc['x'].tolist() == sizes

def test_the_shuffling_stays_what_it_is():
    "Noted when it was written: a change here changes every published split."
    split = holdout_split(pd.DataFrame(dict(cohort='x', subject=range(10), night=1)), seed=0)
    assert (split.test, split.valid, split.id) == ((('x', '3'), ('x', '4')), (('x', '0'), ('x', '1')), '8f86aaa2cf8b')

def test_seeds_shuffle_evenly():
    "Over many seeds everybody is tested about equally often."
    nights = pd.DataFrame(dict(cohort='x', subject=range(10), night=1))
    times = Counter(s for seed in range(500) for s in holdout_split(nights, seed).test)
    assert len(times) == 10 and all(65 < n < 140 for n in times.values())  # 100 ± 4 standard deviations

# ---- budgets

@st.composite
def epoch_tables(draw):
    "Epochs of generated nights, with every share of stages, unscored ones and gaps, in any order of rows."
    nights = draw(night_tables(least=1, most=4, cohorts=2))
    generator = np.random.default_rng(draw(seeds))
    length = draw(st.integers(1, 40))
    epochs = nights.loc[nights.index.repeat(length)].assign(epoch=np.tile(np.arange(length), len(nights)))
    epochs['stage'] = generator.choice(range(-1, 5), len(epochs), p=generator.dirichlet([.6]*6))
    return epochs.sample(frac=.9, random_state=generator.integers(2**32))  # its index repeats

fractions = st.one_of(st.sampled_from([.05, .1, .5, 1]), st.floats(.001, 1))

@many
@given(epoch_tables(), seeds, fractions, fractions, st.sampled_from(['epoch', 'subject']), st.randoms())
def test_budgets(epochs, seed, a, b, by, random):
    epochs = epochs.rename(index=str)
    if (epochs.stage == -1).all():
        with pytest.raises(SplitError, match='no epoch is scored'): label_budget(epochs, a, seed, by)
        return
    small,large = (label_budget(epochs, p, seed, by) for p in sorted([a, b]))
    assert small.index.equals(epochs.index) and small.dtype == bool
    assert not (small & ~large).any()                                                   # nested
    assert not (epochs.stage[large.to_numpy()] == -1).any()
    assert label_budget(epochs, 1, seed, by).tolist() == (epochs.stage != -1).tolist()
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(epochs))
    assert label_budget(epochs.iloc[order], min(a, b), seed, by).tolist() == small.to_numpy()[order].tolist()
    scored = [(str(r.cohort), str(r.subject), r.stage, used) for r,used in zip(epochs.itertuples(), small) if r.stage != -1]
    for cohort in {c for c,*_ in scored}:
        rows = [r for r in scored if r[0] == cohort]
        if by == 'epoch':
            for stage,n in Counter(r[2] for r in rows).items():
                assert sum(r[3] for r in rows if r[2] == stage) == half_up_float(min(a, b), n)
        else:
            chosen = {r[1] for r in rows if r[3]}
            assert len(chosen) == half_up_float(min(a, b), len({r[1] for r in rows}))
            assert all(r[3] == (r[1] in chosen) for r in rows)

def half_up_float(share, n): return max(1, math.floor(round(share*n, 9) + .5))

def test_budget_ignores_other_cohorts_and_types():
    epochs = pd.DataFrame(dict(cohort='x', subject=7, night=1, epoch=np.arange(200), stage=np.arange(200) % 5))
    used = label_budget(epochs, .1)
    both = pd.concat([epochs.assign(cohort='w'), epochs])
    assert label_budget(both, .1)[200:].tolist() == used.tolist()
    for other in (epochs.astype({'subject': str}), epochs.astype({'subject': object, 'cohort': 'category'}),
                  epochs.astype({'stage': 'int8', 'epoch': 'uint16'}), epochs.astype({'stage': 'Int64', 'cohort': object})):
        assert label_budget(other, .1).tolist() == used.tolist()

def test_budgets_of_a_large_cohort_take_seconds():
    "As many epochs as Sleep-EDF Expanded has, without cropping."
    import time
    n = 153*2700
    epochs = pd.DataFrame(dict(cohort='x', subject=np.arange(n) // 5400, night=np.arange(n) // 2700 % 2, epoch=np.arange(n) % 2700,
                               stage=np.random.default_rng(0).integers(-1, 5, n)))
    start = time.process_time()
    for by in ('epoch', 'subject'): label_budget(epochs, .05, by=by)
    assert time.process_time() - start < 20

# ---- files

@many
@given(nights=night_tables(), seed=seeds, k=st.integers(2, 5))
def test_round_trip(tmp_path_factory, nights, seed, k):
    path = FOLDER.setdefault('path', tmp_path_factory.mktemp('splits'))/'split.json'
    try: made = [holdout_split(nights, seed), *kfold_splits(nights, k, seed)]
    except SplitError: return
    for split in made[:2]:
        loaded = Split.load(split.save(path))
        assert loaded == split and loaded.id == split.id and repr(loaded) == repr(split) and hash(loaded) == hash(split)
        assert json.loads(path.read_text())['id'] == split.id
    assert os.listdir(path.parent) == ['split.json']
    assert len({s.id for s in made}) == len(made)

FOLDER = {}

@pytest.fixture
def saved(tmp_path):
    nights = pd.DataFrame([(c, s, 1) for c in ('sleep-edf', 'Ö') for s in ('00', '01', '2', 'ä')], columns=['cohort', 'subject', 'night'])
    split = holdout_split(nights)
    return split,split.save(tmp_path/'a split.json')

def load_or_refuse(path, split):
    "Loads the same split or names the file and what to do; returns whether it loaded."
    try: loaded = Split.load(path)
    except SplitError as e:
        assert e.where == path and str(path) in str(e) and e.remedy and e.found and e.expected
        return False
    assert loaded == split
    return True

def test_truncated_at_every_length(saved):
    split,path = saved
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert load_or_refuse(path, split) == (n == len(whole) - 1), n                   # only the last newline is spare

def test_every_byte_changed(saved):
    split,path = saved
    whole,loaded = path.read_bytes(), 0
    for i in range(len(whole)):
        for byte in {whole[i] ^ 1, whole[i] ^ 32, whole[i] ^ 128, 0, 32, 48, 255} - {whole[i]}:
            path.write_bytes(whole[:i] + bytes([byte]) + whole[i+1:])
            loaded += load_or_refuse(path, split)
    assert loaded < len(whole) / 2                                                       # white space

@many
@given(data=st.data())
def test_damaged_anyhow(tmp_path_factory, data):
    folder = FOLDER.setdefault('damaged', tmp_path_factory.mktemp('damaged'))
    split = holdout_split(pd.DataFrame([('x', s, 1) for s in 'abcdef'], columns=['cohort', 'subject', 'night']))
    whole = split.save(folder/'a.json').read_bytes()
    start,stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))]*2)))
    (folder/'a.json').write_bytes(whole[:start] + data.draw(st.binary(max_size=12)) + whole[stop:])
    load_or_refuse(folder/'a.json', split)

@many
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                          lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)),
       key=st.sampled_from(['train', 'valid', 'test', 'name', 'seed', 'fold', 'k', 'version', 'format', 'id', 'more', None]))
def test_forged(tmp_path_factory, key, value):
    "Even with a matching id, what loads is a sound split."
    path = FOLDER.setdefault('forged', tmp_path_factory.mktemp('forged'))/'a.json'
    split = holdout_split(pd.DataFrame([('x', s, 1) for s in 'abcdef'], columns=['cohort', 'subject', 'night']))
    content = {k: v for k,v in json.loads(split.save(path).read_text()).items() if k not in ('format', 'version', 'id')}
    if key is not None: content[key] = value
    header = dict(format='sleepnb split', version=1, id=splits._digest(content))
    path.write_text(json.dumps(header | content if key not in header else header | {key: value}))
    try: loaded = Split.load(path)
    except SplitError as e: assert str(path) in str(e)
    else: assert all(getattr(loaded, p) for p in PARTS) and not set(loaded.train) & set(loaded.test) and repr(loaded)

def test_moved_subject_newer_file_and_other_files(saved, tmp_path):
    split,path = saved
    content = json.loads(path.read_text())
    def refused(text, *words):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(SplitError) as e: Split.load(path)
        assert str(e.value).startswith(f'{path}: ') and all(w in str(e.value) for w in words), str(e.value)
    moved = json.loads(path.read_text())
    moved['train']['sleep-edf'].append(moved['test']['sleep-edf'].pop())
    refused(moved, 'changed after it was saved', split.id)
    refused(content | {'version': 2}, 'version 2', 'Update sleepnb')
    refused(content | {'seed': 1}, 'changed after it was saved')
    refused({'format': 'something'}, 'not a split')
    refused([], 'not a split')
    refused('['*100_000, 'cannot be read')
    refused('9'*10_000, 'cannot be read')
    refused('', 'cannot be read (expected a file that Split.save wrote; found a damaged file, or one of another kind). Name another file')
    path.write_bytes(sample_files()[0].read_bytes()[:5000])
    with pytest.raises(SplitError, match='found a damaged file, or one of another kind'): Split.load(path)
    forged = dict(content, test=content['train'])
    forged['id'] = splits._digest({k: v for k,v in forged.items() if k not in ('format', 'version', 'id')})
    refused(forged, 'more than one part')
    path.write_text(json.dumps(dict(reversed(content.items())), indent=4))              # laid out anew by an editor
    assert Split.load(path) == split
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    assert Split.load(path) == split
    for other in (tmp_path, tmp_path/'none.json'):
        with pytest.raises(SplitError, match='cannot be read'): Split.load(other)

def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    split,path = saved
    before = path.read_bytes()
    def fail(*args): raise OSError('disk full')
    monkeypatch.setattr(splits.os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'): replace(split, seed=9).save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]

def test_save_makes_the_folder_and_keeps_the_usual_rights(tmp_path):
    split = Split([('x', 1)], [('x', 2)], [('x', 3)], seed=np.int64(3))
    path = split.save(str(tmp_path/'a'/'b'/'c.json'))
    (tmp_path/'plain').write_text('')
    assert path.stat().st_mode == (tmp_path/'plain').stat().st_mode
    assert Split.load(str(path)) == split

# ---- what is refused

NIGHTS = pd.DataFrame([('x', s, n) for s in 'abcdef' for n in (1, 2)], columns=['cohort', 'subject', 'night'])

@pytest.mark.parametrize('bad', [None, np.nan, pd.NA, pd.NaT, '', ' ', 'a ', ' a', 'a\n', 'a\0', 'a\u200b', 'a\u00a0', '\ud800', 1., b'a', (1,)])
@pytest.mark.parametrize('column', ['cohort', 'subject', 'night'])
def test_impossible_ids(column, bad):
    table = NIGHTS.astype(object)
    table.at[3, column] = bad
    for make in (holdout_split, kfold_splits):
        with pytest.raises(SplitError, match=f'row 3 of the table: {column} has no usable id'): make(table)

@pytest.mark.parametrize('column', ['cohort', 'subject', 'night'])
def test_missing_columns(column):
    with pytest.raises(SplitError, match=f'no column {column}'): holdout_split(NIGHTS.drop(columns=column))

def test_bad_tables_and_numbers():
    for table,words in {'twice': (pd.concat([NIGHTS, NIGHTS.loc[[4]]]), 'row 4 of the table: the same row occurs twice'),
                        'empty': (NIGHTS[:0], 'nobody to split'), 'few': (NIGHTS[:4], 'cohort x: too few subjects')}.values():
        for make in (holdout_split, kfold_splits):
            with pytest.raises(SplitError, match=words) as e: make(table)
            assert e.value.found
    for share in (0, 1, -.1, 20, float('nan')):
        for call in (lambda: holdout_split(NIGHTS, test=share), lambda: holdout_split(NIGHTS, valid=share), lambda: kfold_splits(NIGHTS, 3, valid=share)):
            with pytest.raises(SplitError, match='share of the subjects'): call()
    epochs = NIGHTS.assign(epoch=0, stage=0)
    for fraction in (0, -1, 1.01, 5, float('nan')):
        with pytest.raises(SplitError, match='share of the labels'): label_budget(epochs, fraction)
    for stage in (-2, 5, 9):
        with pytest.raises(SplitError, match=f'row 0 of the table: stage has an impossible value.*found {stage}'):
            label_budget(epochs.replace({'stage': 0}, stage), .5)
    for column,dtype in {('stage', float), ('epoch', float), ('epoch', str), ('stage', bool)}:
        with pytest.raises(SplitError): label_budget(epochs.astype({column: dtype}), .5)
    with pytest.raises(SplitError, match='the same row occurs twice'): label_budget(pd.concat([epochs, epochs]), .5)

def test_one_subject_under_two_spellings():
    "Among ids that are two texts and one person, no way to make a split lets both in."
    for a,b in (('1', '01'), (1, '01'), ('007', '7'), ('S1', 's1'), ('sub-1', 'sub-01'), ('é', 'e\u0301'), ('Ａ', 'a')):
        table = pd.DataFrame(dict(cohort='x', subject=['p', 'q', a, 'r', b, 't'], night=1))
        for make in (lambda: holdout_split(table), lambda: kfold_splits(table, 3), lambda: Split([('x', a)], [('x', 'p')], [('x', b)]),
                     lambda: Split([('x', a), ('x', b)], [('x', 'p')], [('x', 'q')])):
            with pytest.raises(SplitError, match=f'cohort x: two ids look like one subject .*({a} and {b}|{b} and {a})'): make()
    Split([('x', '1'), ('x', '10'), ('x', '100')], [('y', '01')], [('x', '0'), ('x', 'S1'), ('x', '11')])

def test_what_is_no_table():
    from types import SimpleNamespace
    split = holdout_split(NIGHTS)
    assert holdout_split(SimpleNamespace(nights=NIGHTS)) == split
    assert kfold_splits(SimpleNamespace(nights=NIGHTS), 3) == kfold_splits(NIGHTS, 3)
    for wrong in (None, 3, 'store', [1], {'a': 1}, NIGHTS.subject, SimpleNamespace(nights=3)):
        for call in (lambda: holdout_split(wrong), lambda: kfold_splits(wrong), lambda: split.part_of(wrong), lambda: split.select(wrong, 'test'),
                     lambda: label_budget(wrong, .5)):
            with pytest.raises(SplitError, match='this is no table'): call()
    with pytest.raises(SplitError, match='names no subjects'): Split(None, [('x', 1)], [('x', 2)])
    with pytest.raises(SplitError, match="does not name a subject.*found 'x'"): Split({'x': ['1']}, [('x', 1)], [('x', 2)])

def test_leaks_are_named():
    split = Split([('x', s) for s in 'abc'], [('x', 'd')], [('x', 'e'), ('x', 'f')])
    with pytest.raises(SplitError, match='train table.*found x/d, x/e, x/f .2 test and 1 valid'): check_no_leak(split, train=NIGHTS)
    with pytest.raises(SplitError, match='test table.*x/a'): check_no_leak(split, test=NIGHTS[NIGHTS.subject == 'a'])
    with pytest.raises(SplitError, match='does not know.*y/a'): check_no_leak(split, train=NIGHTS.assign(cohort='y'))
    check_unseen(split, split.train)
    check_unseen(split, [list(p) for p in split.train], 'valid')                          # as JSON has pairs
    check_unseen(split, [])
    with pytest.raises(SplitError, match='seen 1 of 2 test subjects.*found x/e'): check_unseen(split, [('x', 'a'), ('x', 'e')])
    with pytest.raises(SplitError, match='x/d'): check_unseen(split, NIGHTS, 'valid')
    for seen in (['ef'], 'ef', {'x': ['e']}, [('x', None)], [('x', 'e', 1)]):
        with pytest.raises(SplitError, match='does not name a subject'): check_unseen(split, seen)

def test_splits_load_no_heavy_library():
    command = "import sys, sleepnb.data.splits; print(sorted({'torch', 'fastai', 'mne', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', command], check=True, capture_output=True, text=True).stdout.strip() == '[]'
