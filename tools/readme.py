"""Writes README.md from the front page, nbs/index.ipynb, so that the two cannot differ."""
import re
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).parent.parent

def readme():
    "The text of the front page, with links as they work in the repository."
    text = '\n\n'.join(c.source for c in read_nb(ROOT/'nbs'/'index.ipynb').cells if c.cell_type == 'markdown')
    return re.sub(r'\]\((images/[^)]+|[\w.]+\.ipynb)\)', r'](nbs/\1)', text) + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
