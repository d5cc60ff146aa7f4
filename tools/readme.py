"""Writes README.md from the front page, nbs/index.ipynb, so that the two cannot differ."""
import re
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).parent.parent

def texts(cell):
    "The Markdown of a cell: its source, or what its code has made."
    if cell.cell_type == 'markdown': return [cell.source]
    return [''.join(o['data']['text/markdown']) for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]

def readme():
    "The text of the front page, with links as they work in the repository."
    text = '\n\n'.join(text for cell in read_nb(ROOT/'nbs'/'index.ipynb').cells for text in texts(cell))
    return re.sub(r'\]\((images/[^)]+|[\w.]+\.ipynb)\)', r'](nbs/\1)', text) + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
