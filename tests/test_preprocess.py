"""No rate drifts: after a day, a signal is still where it was, to within a fraction of a sample."""
import numpy as np
import pytest

from sleepnb.data.preprocess import FS, filter_resample, hold

DAY = 24 * 3600

@pytest.mark.parametrize('fs', [100.004, 99.9999, 100.00001, 128.0007, 200])
def test_a_day_without_drift(fs):
    f = .5                                                            # Hz; a sample of delay is a phase of 1.8 degrees
    x = np.sin(2*np.pi*f * (np.arange(int(DAY * fs)) / fs)).astype(np.float32)
    y = filter_resample(x, fs)
    assert abs(len(y) - DAY * FS) <= 1
    minute = np.exp(-2j*np.pi*f * np.arange(60 * FS) / FS)
    for at in (60, DAY//2, DAY - 120):                                # seconds, all whole periods
        phase = np.angle(1j * (y[at*FS:(at+60)*FS] * minute).sum())
        assert abs(phase) / (2*np.pi*f) * FS < .3                     # samples

@pytest.mark.parametrize('fs', [100.004, 200.01])
def test_blocks_that_begin_between_samples_leave_no_seams(fs):
    "The same noise, filtered in blocks and resampled by evaluating its sines at the new times."
    rng = np.random.default_rng(0)
    n = int(1200 * fs)
    f,phase = rng.uniform(1, 30, 40), rng.uniform(0, 2*np.pi, 40)
    waves = lambda t: sum(np.sin(2*np.pi*a*t + b) for a,b in zip(f, phase))
    y = filter_resample(waves(np.arange(n)/fs), fs)
    inner = slice(2000, -2000)
    np.testing.assert_allclose(y[inner], waves(np.arange(len(y))/FS)[inner], atol=.1)

@pytest.mark.parametrize('fs', [1, 8, 16.7, 19.9])
def test_held_values_change_where_they_should(fs):
    x = np.arange(int(DAY * fs))
    y = hold(x, fs)
    k = np.arange(len(y))
    right = k * round(fs*10) // (10 * FS)                             # in whole numbers
    assert (y == np.minimum(right, len(x) - 1)).all()

def test_what_is_not_changed_is_a_copy():
    x = np.ones(3000, np.float32)
    y = filter_resample(x, FS, None, None)
    y -= 1
    assert (x == 1).all()
