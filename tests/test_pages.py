"""Pages, modules, README and navigation agree with each other and keep the house rules."""
import ast, filecmp, importlib.util, json, re, shutil, subprocess, sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from execnb.nbio import read_nb

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT/'nbs').glob('*.ipynb'))
FASTAI = {'sleepnb.data.loaders', 'sleepnb.callbacks', 'sleepnb.learner'} # the only modules that may import it

def tool(name):
    "One of the project's tools, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def code(path): return [c.source for c in read_nb(path).cells if c.cell_type == 'code']

def exported(path):
    "The module that a page makes, or `None`."
    return next((f'sleepnb.{m[1]}' for source in code(path) if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source))), None)

def page_number(path): return int(m[0]) if (m := re.match(r'\d+', path.name)) else None

NUMBERS = {module: page_number(page) for page in PAGES if (module := exported(page))}

def imports(module):
    "Every module that a module imports, however it does so."
    tree = ast.parse(ROOT.joinpath(*module.split('.')).with_suffix('.py').read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((a.name, a.name) for a in node.names)
        if isinstance(node, ast.ImportFrom):
            name = '.'*node.level + (node.module or '')
            base = resolve_name(name, module.rpartition('.')[0]) if node.level else name
            yield from ((base, a.name) for a in node.names)
            yield from ((f'{base}.{a.name}', a.name) for a in node.names if f'{base}.{a.name}' in NUMBERS)

@pytest.mark.parametrize('module', NUMBERS)
def test_imports_point_down(module):
    for base,_ in imports(module):
        if base in NUMBERS: assert NUMBERS[base] < NUMBERS[module], f'{module} imports {base}, which comes later'

@pytest.mark.parametrize('module', NUMBERS)
def test_imports_keep_the_rooms_apart(module):
    names = {base for base,_ in imports(module)}
    rooms = {'data': 'sleepnb.models', 'models': 'sleepnb.data'}
    forbidden = rooms.get(module.split('.')[1])
    assert not forbidden or not any(n.startswith(forbidden) for n in names), f'{module} imports from {forbidden}'
    assert module in FASTAI or not any(n.partition('.')[0] == 'fastai' for n in names), f'{module} imports fastai'
    assert not any(n.partition('.')[0] in ('pickle', 'torchvision', 'torchaudio') or n.startswith('fastai.vision') for n in names)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_no_star_imports(page):
    for source in code(page): assert not re.search(r'^\s*from\s+\S+\s+import\s+\*', source, re.M), source

def test_numbers_are_given_once():
    numbers = [n for page in PAGES if (n := page_number(page)) is not None]
    twice = {n for n in numbers if numbers.count(n) > 1}
    assert not twice, f'give another number to one of {[p.name for p in PAGES if page_number(p) in twice]}'

def test_names_are_given_once():
    "The site has one file for each page, named without its number."
    names = [tool('build_docs').slug(p.stem) for p in PAGES]
    assert len({*names}) == len(names), f'give another name to one of {sorted(n for n in names if names.count(n) > 1)}'

def test_every_module_has_one_page():
    modules = [m for page in PAGES if (m := exported(page))]
    assert len(set(modules)) == len(modules), 'two pages have the same #| default_exp'

@pytest.mark.parametrize('module', ['sleepnb', *NUMBERS])
def test_every_module_imports_by_itself(module):
    run = subprocess.run([sys.executable, '-c', f'import {module}'], capture_output=True, text=True)
    assert run.returncode == 0, f'{run.stderr}\ndoes a cell of imports lack #| exports?'

@pytest.mark.parametrize('page', [p for p in PAGES if page_number(p) is not None], ids=lambda p: p.name)
def test_pages_have_their_parts(page):
    cells = read_nb(page).cells
    text = [c.source for c in cells if c.cell_type == 'markdown']
    assert re.match(r'# \S', text[0]) and '\n> ' in text[0], 'the first text is a heading, and one sentence as a quotation'
    if page_number(page) < 700:
        assert cells[0].source.startswith('#| default_exp '), 'the first cell names the module: #| default_exp data.splits'
        assert any(re.match(r'#\|\s*exports\n\s*(@|class|def|[A-Z_])', c) for c in code(page)), 'nothing is exported: #| exports'
        assert 'nbdev_export()' in cells[-1].source, 'the last cell exports the page: import nbdev; nbdev.nbdev_export()'
    assert any(re.search(r'^(test_\w+\(|\s*assert\b)', c, re.M) for c in code(page)), 'the page checks nothing'

def test_modules_are_in_step_and_pages_clean(tmp_path):
    "Exporting and cleaning a copy of the project, from its pages alone, changes nothing in it."
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    for name in ('nbs', 'sleepnb'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__'))
    for module in (tmp_path/'sleepnb').rglob('*.py'): module.unlink()
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    differ = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file() and p.suffix in ('.py', '.ipynb', '.toml')
              and not ((there := ROOT/p.relative_to(tmp_path)).exists() and filecmp.cmp(p, there, shallow=False))]
    assert not differ, f'run nbdev_export and nbdev_clean: {differ}'
    made = {p.relative_to(tmp_path) for p in (tmp_path/'sleepnb').rglob('*.py')}
    kept = {p.relative_to(ROOT) for p in (ROOT/'sleepnb').rglob('*.py')}
    assert kept == made, f'no page makes {sorted(map(str, kept - made))}: delete them'

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_pages_were_run_since_their_code_changed_and_take_seconds(page):
    "`tools/run_nbs.py` notes what it ran and how long that took."
    nb = read_nb(page)
    noted = nb.metadata.get('sleepnb', {})
    assert noted.get('code') == tool('run_nbs').code_hash(nb), f'make its checks pass, then run python tools/run_nbs.py nbs/{page.name}'
    assert noted['seconds'] <= 10, f'{page.name} takes {noted["seconds"]} s beyond its imports'

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_stored_outputs_name_no_place_of_a_machine(page):
    said = [''.join(o.get('text', o.get('data', {}).get('text/plain', []))) for c in read_nb(page).cells if c.cell_type == 'code' for o in c.outputs]
    assert not [s for s in said if re.search(r'(?<!\w)/(tmp|root|home|work|Users|var/folders)/', s)]

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_import_cells_hold_nothing_else(page):
    "They also run when the site is built."
    run_nbs = tool('run_nbs')
    for source in code(page):
        if source.startswith('%%sh'): continue # a shell reads it
        own_imports = any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body)
        assert not own_imports or run_nbs.is_import(source) or 'nbdev_export()' in source, f'move the imports to their own cell:\n{source}'

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_code_fits_the_site(page):
    wide = [l for source in code(page) for l in source.splitlines() if len(l) > 128 and not l.startswith('#|')]
    assert not wide, 'wider than a laptop shows: ' + '\n'.join(wide)

def test_every_page_is_in_the_navigation_once():
    def pages(contents): return [p for o in contents for p in ([o] if isinstance(o, str) else pages(o['contents']))]
    assert (ROOT/'nbs'/'_quarto.yml').resolve() == ROOT/'_quarto.yml'
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']
    listed,names = pages(site['sidebar']['contents']), [p.name for p in PAGES]
    assert not set(names) - set(listed), f'add to _quarto.yml: {sorted(set(names) - set(listed))}'
    assert sorted(listed) == names, 'a page is in _quarto.yml twice, or does not exist'

def test_readme_is_the_front_page():
    assert (ROOT/'README.md').read_text() == tool('readme').readme(), 'run python tools/readme.py'

def test_reading_names_loads_no_heavy_library():
    "Commands and readers start quickly because what they import does not load these."
    heavy = {'torch', 'fastai', 'mne', 'matplotlib', 'sklearn', 'seaborn'}
    command = f'import sys, json, sleepnb.montage, sleepnb.cli; print(json.dumps(sorted({heavy} & set(sys.modules))))'
    assert json.loads(subprocess.run([sys.executable, '-c', command], check=True, capture_output=True, text=True).stdout) == []
