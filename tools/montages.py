"""Draws the picture of the front page: which electrodes are found in four recordings that name their channels in four ways.

    python tools/montages.py [FILE]        by default nbs/images/montages.png"""
import sys
from pathlib import Path

from matplotlib.figure import Figure

from sleepnb.montage import ALIASES, plot_montage, resolve_montage

RECORDINGS = { # dataset → channel names as stored
    'Sleep-EDF': 'EEG Fpz-Cz, EEG Pz-Oz, EOG horizontal, Resp oro-nasal, EMG submental, Temp rectal',
    'ISRUC, subject 40': 'ROC, A1, LOC, A2, C4, O2, C3, O1, F4, F3, X1, X2, X3, DC3, DC8, SaO2',
    'MASS-SS3': 'EEG C3-CLE, EEG C4-CLE, EEG Cz-CLE, EEG F3-CLE, EEG F4-CLE, EEG O1-CLE, EEG O2-CLE, '
                'EOG Left Horiz, EOG Right Horiz, EMG Chin1, EMG Chin2, EMG Chin3, ECG I',
    'PhysioNet 2018': 'F3-M2, F4-M1, C3-M2, C4-M1, O1-M2, O2-M1, E1-M2, Chin1-Chin2, ABD, AIRFLOW, SaO2, ECG'}
WANTED = ['F3', 'F4', 'C3', 'C4', 'O1', 'O2', 'Fpz', 'Pz', 'E1', 'E2', 'HEOG', 'Chin']
PICTURE = Path(__file__).parent.parent/'nbs'/'images'/'montages.png'

def find(dataset):
    return resolve_montage(RECORDINGS[dataset].split(', '), WANTED, ALIASES['isruc'] if 'ISRUC' in dataset else None)

def draw_montage(ax, dataset):
    "The electrodes on a head, and below it where each channel comes from."
    found = find(dataset)
    there = found.table[found.mask]
    plot_montage(there.got, ax, dataset)
    scalp,rest = there[there.modality == 'EEG'], there[there.modality != 'EEG']
    lines = [f'{r.got}  from  {r.details}' for r in [*scalp.head(2).itertuples(), *rest.itertuples()]]
    ax.text(.5, -.1, '\n'.join(lines), transform=ax.transAxes, ha='center', va='top', fontsize=8)

def main(file=PICTURE):
    axes = Figure(figsize=(11, 4)).subplots(1, len(RECORDINGS))
    for ax,dataset in zip(axes, RECORDINGS): draw_montage(ax, dataset)
    axes[0].figure.savefig(file, dpi=120, bbox_inches='tight')

if __name__ == '__main__': main(*sys.argv[1:])
