"""Runs pages in place, so that their stored outputs come from the code beside them.

    python tools/run_nbs.py [PAGE …] [--data]        all pages of nbs/ where none is named

Cells that `nbdev_test` skips keep their outputs; with `--data`, those that need the data of developers run too. A page's metadata records what code ran and its CPU seconds
beyond imports, as a machine of usual speed takes them, which is what `tests/test_pages.py` reads."""
import ast, hashlib, os, sys, time
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

def code_hash(nb):
    "Names the code of a page: it changes when a code cell does."
    code = '\0'.join(c.source for c in nb.cells if c.cell_type == 'code')
    return hashlib.sha256(code.encode()).hexdigest()[:12]

def is_import(source):
    "A cell of imports and directives alone; one of `%%sh` is none."
    return not source.startswith('%%') and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body)

USUAL = .13 # CPU seconds of the work below, on the machine that page times refer to

def slowness():
    "How much longer this machine takes now than a usual one."
    import torch
    x,w = torch.randn(64, 16, 3000), torch.randn(16, 16, 50, requires_grad=True)
    def step(): torch.nn.functional.conv1d(x, w, stride=6).sum().backward()
    step() # the first is slower
    start = time.process_time()
    for _ in range(3): step()
    sum(i % 7 for i in range(10**6))
    return (time.process_time() - start) / USUAL

def run_page(path, skip):
    "Runs one page, writes it back clean, returns its CPU seconds beyond imports."
    directives = {c.id: getattr(c, 'directives_', None) or {} for c in NBProcessor(path, process=True).nb.cells}
    nb, shell, seconds = read_nb(path), CaptureShell(path), 0.
    with working_directory(path.parent):
        for cell in nb.cells:
            flags = directives.get(cell.id, {})
            if (cell.cell_type != 'code' or 'nbdev_export(' in cell.source or skip & flags.keys()
                or flags.get('eval:', [''])[0].lower() == 'false'): continue
            cell.outputs,start = [],time.process_time()
            shell.run_all(type(nb)(cells=[cell]), exc_stop=True)
            if not is_import(cell.source): seconds += time.process_time() - start
            elif 'torch' in sys.modules: import torch._dynamo # optimisers would import it
    seconds /= slowness()
    nb.metadata['kernelspec'] = dict(display_name='python3', language='python', name='python3')
    nb.metadata['sleepnb'] = dict(code=code_hash(nb), seconds=round(seconds, 1))
    clean_nb(nb, allowed_metadata_keys=['sleepnb'])
    write_nb(nb, path)
    return seconds

def main(names):
    cfg = get_config(path=Path(__file__).parent.parent)
    os.environ['IN_TEST'] = '1'
    sys.path.insert(0, str(cfg.config_path))
    skip = set(cfg.tst_flags.split()) - {name[2:] for name in names}
    for path in map(Path, [name for name in names if name != '--data'] or sorted(nbglob(cfg.nbs_path))):
        print(f'{path.name:40} {run_page(path.absolute(), skip):5.1f} s', flush=True)

if __name__ == '__main__': main(sys.argv[1:])
