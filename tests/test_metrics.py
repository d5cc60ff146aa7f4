"""Metrics against scikit-learn, on generated hypnograms in which stages may be missing; intervals against known truths."""
import subprocess, sys, warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from hypothesis import assume, given, settings, strategies as st
from scipy import stats

from sleepnb.core import HypnogramError, SleepnbError, rng
from sleepnb.metrics import agreement, auroc, calibration_error, confusion, score_difference, score_nights, score_table

many = settings(max_examples=150, deadline=None)
FIVE = list(range(5))

# ---- generated nights

@st.composite
def pairs(draw, least=1, scored=False):
    "Two hypnograms of a night, each of a few stages only, with unscored epochs unless `scored`; probabilities with many ties."
    n = draw(st.integers(least, 60))
    few = lambda: draw(st.lists(st.sampled_from(FIVE), min_size=1, max_size=5, unique=True)) + ([] if scored else [-1])
    true,pred = (np.array(draw(st.lists(st.sampled_from(few()), min_size=n, max_size=n))) for _ in range(2))
    weights = np.random.default_rng(draw(st.integers(0, 2**31))).integers(0, draw(st.sampled_from([2, 4, 1000])), (n, 5)) + .01
    return true, pred, weights / weights.sum(axis=1, keepdims=True)

nights = st.lists(pairs(), min_size=1, max_size=8)

def assert_same(a, b, **kwargs): np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1e-9, **kwargs)
def compared(true, pred): return (true >= 0) & (pred >= 0)

# ---- scikit-learn says the same

@many
@given(pairs())
def test_agreement_is_that_of_scikit_learn(pair):
    true,pred,_ = pair
    conf,both = confusion(true, pred), compared(true, pred)
    assume(both.any())
    scores,t,p = agreement(conf), true[both], pred[both]
    known = dict(labels=FIVE, zero_division=0)
    assert (conf == sk.confusion_matrix(t, p, labels=FIVE)).all()
    assert_same(scores['accuracy'], sk.accuracy_score(t, p))
    assert_same(scores['balanced_accuracy'], sk.recall_score(t, p, average='macro', **known))
    assert_same(scores['macro_f1'], sk.f1_score(t, p, average='macro', **known))
    assert_same([scores[f'f1_{s}'] for s in ('W', 'N1', 'N2', 'N3', 'R')], sk.f1_score(t, p, average=None, **known))
    if len({*t, *p}) > 1: assert_same(scores['kappa'], sk.cohen_kappa_score(t, p))
    else: assert np.isnan(scores['kappa'])

@many
@given(pairs())
def test_balanced_accuracy_is_scikit_learns_when_all_stages_occur(pair):
    true,pred,_ = pair
    true,pred = np.concatenate([true, FIVE]), np.concatenate([pred, FIVE])
    both = compared(true, pred)
    assert_same(agreement(confusion(true, pred))['balanced_accuracy'], sk.balanced_accuracy_score(true[both], pred[both]))

@many
@given(pairs())
def test_auroc_is_that_of_scikit_learn(pair):
    true,_,prob = pair
    areas,scored = auroc(true, prob), true >= 0
    for s,area in enumerate(areas):
        own = true[scored] == s
        if own.any() and not own.all(): assert_same(area, sk.roc_auc_score(own, prob[scored, s]))
        else: assert np.isnan(area)

@many
@given(pairs())
def test_calibration_error_follows_its_definition(pair):
    true,_,prob = pair
    assume((true >= 0).any())
    kept = [(p.max(), p.argmax() == t) for t,p in zip(true, prob) if t >= 0]
    error = 0
    for b in range(15):
        inside = [(sure, right) for sure,right in kept if b/15 < sure <= (b+1)/15]
        if inside: error += len(inside) / len(kept) * abs(np.mean([r for _,r in inside]) - np.mean([s for s,_ in inside]))
    assert_same(calibration_error(true, prob), error)

def test_calibration_error_of_known_probabilities():
    "Stages drawn from the probabilities themselves are calibrated; from flatter ones they are not."
    draw = rng('test calibration')
    prob = draw.dirichlet(np.ones(5), 50_000)
    true = (draw.random((len(prob), 1)) > prob.cumsum(axis=1)[:, :4]).sum(axis=1)
    sharper = prob**2 / (prob**2).sum(axis=1, keepdims=True)
    assert calibration_error(true, prob) < .01 < .1 < calibration_error(true, sharper)

# ---- unscored epochs, order, stacks

@many
@given(pairs(), st.randoms())
def test_unscored_epochs_change_nothing(pair, random):
    "Whatever stands where one of the two has −1, every metric is that of the other epochs."
    true,pred,prob = pair
    both = compared(true, pred)
    assume(both.any())
    prob[~both] = random.choice([np.nan, 7., -1.])
    ours = score_nights([true], [pred], [prob], n_boot=2)
    theirs = score_nights([true[both]], [pred[both]], [prob[both]], n_boot=2)
    pd.testing.assert_frame_equal(ours, theirs)
    assert ours.loc[('pooled', 'accuracy'), 'n'] == both.sum()
    assert_same(auroc(np.where(both, true, -1), prob), auroc(true[both], prob[both]))
    assert_same(calibration_error(np.where(both, true, -1), prob), calibration_error(true[both], prob[both]))

@many
@given(nights)
def test_a_stack_is_scored_like_its_matrices(drawn):
    stack = np.stack([confusion(t, p) for t,p,_ in drawn])
    assume(stack.any())
    scores = agreement(stack)
    for i,conf in enumerate(stack):
        for name,values in scores.items():
            assert_same(values[i], agreement(conf)[name] if conf.any() else np.nan)

@settings(max_examples=60, deadline=None)
@given(nights, st.randoms(), st.booleans(), st.integers(1, 4))
def test_order_of_nights_and_epochs_does_not_matter(drawn, random, with_prob, people):
    assume(any(compared(t, p).any() for t,p,_ in drawn))
    def score(nights, who):
        true,pred,prob = zip(*nights)
        return score_nights(true, pred, prob if with_prob else None, who, n_boot=50)
    who = [i % people for i in range(len(drawn))]
    order = random.sample(range(len(drawn)), len(drawn))
    mixed = []
    for i in order:
        epochs = random.sample(range(len(drawn[i][0])), len(drawn[i][0]))
        mixed.append([o[epochs] for o in drawn[i]])
    pd.testing.assert_frame_equal(score(drawn, who), score(mixed, [who[i] for i in order]))

# ---- the table

@settings(max_examples=60, deadline=None)
@given(nights)
def test_pooled_and_nights_are_what_they_say(drawn):
    drawn = [(t, p, q) for t,p,q in drawn if compared(t, p).any()]
    assume(drawn)
    true,pred,prob = zip(*drawn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        table = score_nights(true, pred, prob, n_boot=20)
    pooled,alone = agreement(confusion(np.concatenate(true), np.concatenate(pred))), [agreement(confusion(t, p)) for t,p in zip(true, pred)]
    for metric,value in pooled.items():
        each = pd.Series([float(a[metric]) for a in alone])
        row = table.loc[('nights', metric)]
        assert_same(table.loc[('pooled', metric), 'value'], value)
        assert_same(row[['value', 'sd', 'n']], [each.mean(), each.std(), each.count()])
        assert not row.low > row.high
    kept = [np.where(p < 0, -1, t) for t,p in zip(true, pred)]
    areas = auroc(np.concatenate(kept), np.concatenate(prob))
    assert_same(table.loc[('pooled', 'auroc'), 'value'], pd.Series(areas).mean())
    assert_same(table.loc[('nights', 'auroc'), 'value'], pd.Series([pd.Series(auroc(t, q)).mean() for t,q in zip(kept, prob)]).mean())
    assert_same(table.loc[('pooled', 'ece'), 'value'], calibration_error(np.concatenate(kept), np.concatenate(prob)))
    assert_same(table.loc[('nights', 'ece'), 'value'], np.mean([calibration_error(t, q) for t,q in zip(kept, prob)]))

def test_resamples_are_those_of_whole_subjects():
    "With a right and a wrong subject of two nights each, a resample is right in 0, 1/2 or all of its epochs."
    true = [np.zeros(10, int)]*4
    pred = [np.zeros(10, int), np.ones(10, int)]*2
    table = score_nights(true, pred, subjects=['a', 'b', 'a', 'b'])
    for over in ('pooled', 'nights'): assert table.loc[(over, 'accuracy'), ['value', 'low', 'high']].tolist() == [.5, 0, 1]
    narrow = score_nights(true, pred, subjects=['a', 'b', 'a', 'b'], level=.2)
    assert narrow.loc[('pooled', 'accuracy'), ['low', 'high']].tolist() == [.5, .5]

def test_intervals_are_seeded_and_the_same_people_are_drawn_for_every_model():
    draw = rng('test seeds')
    true = draw.integers(0, 5, (12, 100))
    pred = np.where(draw.random((12, 100)) < .8, true, 2)
    one = score_nights(true, pred)
    pd.testing.assert_frame_equal(one, score_nights(true, pred))
    assert (one.low != score_nights(true, pred, seed=1).low).any()
    wrong = np.where(true == pred, (true + 1) % 5, true)               # right where the other is wrong
    a,b = (t.loc[('pooled', 'accuracy')] for t in (one, score_nights(true, wrong)))
    assert_same([b.low, b.high], [1 - a.high, 1 - a.low])

@pytest.mark.parametrize('over', ['pooled', 'nights'])
@pytest.mark.parametrize('people', [6, 30])
def test_intervals_hold_the_truth_about_as_often_as_they_say(over, people):
    "People differ: accuracy is drawn per subject, around .8. Of 300 studies, 95 % should have .8 inside."
    inside = 0
    for study in range(300):
        draw = rng('test coverage', study)
        skill = np.repeat(draw.beta(8, 2, people), 2)
        true = [draw.integers(0, 5, 60) for _ in skill]
        pred = [np.where(draw.random(60) < s, t, (t + 1) % 5) for s,t in zip(skill, true)]
        row = score_nights(true, pred, subjects=np.repeat(range(people), 2), n_boot=1000, seed=study).loc[(over, 'accuracy')]
        inside += row.low <= .8 <= row.high
    assert .92 < inside/300 < .98

@pytest.mark.parametrize('n,level,least', [(6, .95, .9), (18, .95, .97), (30, .8, .98)])
def test_intervals_of_means_are_student_s(n, level, least):
    "Accuracies are normal draws around a half. Mere percentiles would be .69, .90 and .96 times as wide as Student's interval."
    draw = rng('test width', n)
    widths = []
    for study in range(40):
        right = draw.normal(500, 50, n).round().astype(int)               # of a thousand epochs; equal weights
        pred = [np.repeat([0, 1], [k, 1000 - k]) for k in right]
        row = score_nights([np.zeros(1000, int)]*n, pred, level=level, seed=study).loc[('pooled', 'accuracy')]
        low,high = stats.t.interval(level, n - 1, loc=right.mean()/1000, scale=stats.sem(right)/1000)
        widths.append((row.high - row.low)/(high - low))
    assert least < np.mean(widths) < 1.05

def test_resamples_leave_out_nights_that_lack_a_metric():
    "κ is 1 for two nights and undefined for one of a single stage."
    hypnograms = [[0, 1], [2, 3], [2, 2]]
    row = score_nights(hypnograms, hypnograms).loc[('nights', 'kappa')]
    assert row[['value', 'low', 'high', 'sd', 'n']].tolist() == [1, 1, 1, 0, 2]

def test_a_night_without_scored_epochs_is_left_out():
    true,pred = [[0, 1, 2], [-1, -1], [2, 2]], [[0, 1, 1], [0, 1], [2, 3]]
    table = score_nights(true, pred, subjects='abc')
    pd.testing.assert_frame_equal(table, score_nights(true[::2], pred[::2], subjects='ac'))
    assert table.loc[('nights', 'accuracy'), 'n'] == 2

def test_tables_are_scored_like_lists():
    draw = rng('test table')
    who = [('a', '1', 1), ('a', '1', 2), ('a', '2', 1), ('b', '1', 1)]    # the subjects called 1 are two people
    true,prob = draw.integers(-1, 5, (4, 50)), draw.dirichlet(np.ones(5), (4, 50))
    pred = prob.argmax(axis=2)
    columns = [f'p_{s}' for s in ('W', 'N1', 'N2', 'N3', 'R')]
    rows = [pd.DataFrame(dict(cohort=c, subject=s, night=n, stage=t, pred=p)).join(pd.DataFrame(q, columns=columns))
            for (c, s, n),t,p,q in zip(who, true, pred, prob)]
    table = pd.concat(rows).sample(frac=1, random_state=1)
    named = [f'{s} of {c}' for c,s,_ in who]
    pd.testing.assert_frame_equal(score_table(table), score_nights(true, pred, prob, named))
    pd.testing.assert_frame_equal(score_table(table.drop(columns=columns)), score_nights(true, pred, subjects=named))
    together = score_nights(true, pred, prob, ['1', '1', '2', '1'])
    assert (score_table(table).low != together.low).any()

# ---- errors

half = np.full((2, 5), .2)
def test_a_difference_is_between_scores_of_the_same_people():
    "Naively: draw people, put their nights together, ask scikit-learn about both models."
    g = np.random.default_rng(0)
    epochs = pd.DataFrame(dict(cohort='c', subject=np.repeat(list('abcdefgh'), 100), night=1, stage=g.integers(0, 5, 800)))
    wrong = lambda share: np.where(g.random(800) < share, g.integers(0, 5, 800), epochs.stage)
    skill = np.repeat(g.uniform(.2, .8, 8), 100)                   # people differ, models err on the same ones
    a,b = (epochs.assign(pred=wrong(skill + more)) for more in (0, .05))
    found = score_difference(a, b, level=.8)
    tail = stats.norm.cdf(-np.sqrt(8/7)*stats.t.ppf(.9, 7))
    naive = {'macro_f1': lambda o: sk.f1_score(o.stage, o.pred, average='macro'), 'kappa': lambda o: sk.cohen_kappa_score(o.stage, o.pred)}
    people = [(a[a.subject == s], b[b.subject == s]) for s in 'abcdefgh']
    drawn = [[pd.concat(o) for o in zip(*(people[i] for i in g.integers(0, 8, 8)))] for _ in range(600)]
    for metric,score in naive.items():
        apart = [score(x) - score(y) for x,y in drawn]
        np.testing.assert_allclose(found.loc[metric, 'value'], score(a) - score(b), atol=1e-9)
        np.testing.assert_allclose(found.loc[metric, ['low', 'high']].astype(float), np.quantile(apart, [tail, 1 - tail]), atol=.01)
    assert_same(score_difference(b, a).value, -found.value)

@pytest.mark.parametrize('call,kind,message', [
    (lambda: confusion([0, 1, 2], [0, 1]), HypnogramError, 'differ in length (expected 3 epochs; found 2)'),
    (lambda: confusion([0, 5], [0, 1]), HypnogramError, 'true has an impossible stage (expected whole numbers from -1 to 4, one per epoch; found 5 at epoch 1)'),
    (lambda: confusion([0, 1], [-2, 1]), HypnogramError, 'pred has an impossible stage'),
    (lambda: confusion(np.array([255, 1], np.uint8), [0, 1]), HypnogramError, 'found 255 at epoch 0'),
    (lambda: confusion([0, 1], [0., np.nan]), HypnogramError, 'found float64 of shape (2,)'),
    (lambda: confusion([[0, 1]], [[0, 1]]), HypnogramError, 'shape (1, 2)'),
    (lambda: confusion(['W', 'N1'], [0, 1]), HypnogramError, 'true is no hypnogram'),
    (lambda: agreement(confusion([-1], [0])), HypnogramError, 'no epoch was scored'),
    (lambda: agreement(confusion([], [])), HypnogramError, 'no epoch was scored'),
    (lambda: calibration_error([-1, -1], half), HypnogramError, 'no epoch was scored'),
    (lambda: auroc([0, 1], half[:1]), SleepnbError, 'expected (2, 5); found (1, 5)'),
    (lambda: auroc([0, 1], half[:, :4]), SleepnbError, 'expected (2, 5); found (2, 4)'),
    (lambda: auroc([-1, 1], half * [[1], [2]]), SleepnbError, 'found [0.4, 0.4, 0.4, 0.4, 0.4] at epoch 1'),
    (lambda: auroc([0, 1], [[2, -1, 0, 0, 0]]*2), SleepnbError, 'five of 0 or more that sum to 1'),
    (lambda: auroc([0, 1], half * np.nan), SleepnbError, 'nan'),
    (lambda: score_nights([], []), HypnogramError, 'found 0 nights'),
    (lambda: score_nights([[-1], [0]], [[0], [-1]]), HypnogramError, 'found 2 nights'),
    (lambda: score_nights([[0]], [[0], [1]]), SleepnbError, '1 true, 2 pred'),
    (lambda: score_nights([[0]]*2, [[0], [7]], subjects='ab'), HypnogramError, 'night 1 (subject b): pred has'),
    (lambda: score_nights([[0, 1]], [[0, 1]], [half * 3]), SleepnbError, 'night 0 (subject 0): these are no probabilities'),
    (lambda: score_table(pd.DataFrame(dict(stage=[0], pred=[0]))), SleepnbError, 'no column cohort, subject, night'),
    (lambda: score_table(pd.DataFrame(dict(cohort='a', subject=['1', None], night=1, stage=0, pred=0))), SleepnbError, 'row 1 of the table'),
])
def test_errors_say_what_is_wrong(call, kind, message):
    with pytest.raises(kind) as caught: call()
    assert message in str(caught.value)

def test_importing_metrics_loads_nothing_heavy():
    heavy = "{'torch', 'fastai', 'mne', 'matplotlib', 'sklearn', 'scipy', 'seaborn'}"
    command = f'import sys, sleepnb.metrics; print(*sorted({heavy} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', command], check=True, capture_output=True, text=True).stdout.strip() == ''
