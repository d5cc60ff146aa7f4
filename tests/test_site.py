"""The site: built without warnings, without a broken link, and as it looks and works in a browser, from files alone."""
import html.parser
import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent

class Page(html.parser.HTMLParser):
    "The links and anchors of a page."
    def __init__(self, path):
        super().__init__()
        self.links,self.loads,self.ids = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get('id') or attrs.get('name'))
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'script', 'iframe', 'source') and attrs.get('src'): self.loads.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') != 'canonical' and attrs.get('href'): self.loads.append(attrs['href'])

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob('*.html') if '_static' not in p.parts}

def test_no_link_is_broken(site, pages):
    broken = []
    for name,page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue                                  # another host: not ours to check
            target = (site/name).parent/unquote(url.path) if url.path else site/name
            if not target.exists(): broken.append(f'{name}: {link}')
            elif url.fragment and target.suffix == '.html' and '#' in link and not url.fragment.startswith('top'):
                if url.fragment not in pages[target.resolve().relative_to(site.resolve()).as_posix()].ids: broken.append(f'{name}: {link}')
    assert not broken

def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [(name, src) for name,page in pages.items() for src in page.loads if urlsplit(src).netloc]

def test_every_page_is_there(site):
    for page in (ROOT/'nbs').glob('*.ipynb'): assert (site/f'{re.sub(r"^[0-9]+_", "", page.stem)}.html').exists()

def test_notation_of_quarto():
    "What pages may write for Quarto arrives in Sphinx."
    spec = importlib.util.spec_from_file_location('build_docs', ROOT/'tools'/'build_docs.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.callouts('::: {.callout-note}\n## Why\nText\n:::') == ':::{admonition} Why\n:class: note\n\nText\n:::'
    assert build.callouts('::: {.callout-tip collapse="true"}\nText\n:::') == ':::{admonition} Tip\n:class: tip dropdown\n\nText\n:::'
    assert build.markdown('see @fig-night, me@fig-tree.org', 'https://x.y/z') == 'see {numref}`fig-night`, me@fig-tree.org'
    assert build.markdown('[`rng`](https://x.y/z/core.html#rng)', 'https://x.y/z') == '<a href="core.html#rng"><code>rng</code></a>'
    assert build.markdown('[page](010_montage.ipynb)', 'https://x.y/z') == '[page](montage.ipynb)'
    assert build.markdown('```\n@fig-a [`b`](https://x.y/z/c.html)\n```', 'https://x.y/z') == '```\n@fig-a `b`\n```'
    assert build.markdown('as in `@fig-a`', 'https://x.y/z') == 'as in `@fig-a`'
    assert build.markdown('- item\n  ```\n  @fig-a\n  ```', 'https://x.y/z') == '- item\n  ```\n  @fig-a\n  ```'
    assert build.options('#|\n#| echo: false\nx') == ({'echo': 'false'}, 'x')
    shell = dict(cell_type='code', source='sleepnb info', metadata=dict(language='sh'), outputs=[])
    assert build.convert(dict(cells=[shell]), 'https://x.y/z')['cells'][0]['source'] == '%%sh\nsleepnb info'
    assert build.options('#| echo: false\n#| fig-cap: "A night"\nplot()') == ({'echo': 'false', 'fig-cap': 'A night'}, 'plot()')

# ---- in a browser

@pytest.fixture
def visit(site, browser):
    "Opens a page from its file, and notes what it asks for and what goes wrong."
    contexts,asked,wrong = [], [], []
    def open_page(name, **kwargs):
        contexts.append(browser.new_context(**dict(viewport=dict(width=1300, height=900)) | kwargs))
        page = contexts[-1].new_page()
        page.on('request', lambda r: asked.append(r.url))
        page.on('requestfailed', lambda r: wrong.append(r.url))
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
        page.goto(f'{site.as_uri()}/{name}')
        page.wait_for_load_state('networkidle')
        return page
    yield open_page
    for context in contexts: context.close()
    assert not wrong
    assert all(url.startswith(('file:', 'data:')) for url in asked), asked

def test_home_page(visit):
    page = visit('index.html')
    assert page.locator('h1').first.inner_text().startswith('sleepnb')
    assert page.locator('article img').first.evaluate('e => e.complete && e.naturalWidth > 0')
    page.click('.bd-sidebar-primary a:has-text("Montage")')
    assert page.url.endswith('montage.html')

def test_library_page(visit):
    page = visit('montage.html')
    page.wait_for_selector('mjx-container svg')                                    # equations are set
    assert page.locator('mjx-merror, [data-mjx-error]').count() == 0
    assert page.locator('.cell_input:has-text("def parse_channel")').count() == 1  # the definition is shown
    assert page.locator('.cell_output img').count() >= 1
    assert page.locator('.cell_input:has-text("nbdev_export")').count() == 0       # what is hidden is not
    page.goto(page.url + '#parse_channel')
    assert page.locator('[id="parse_channel"]').count() == 1

def test_results_page(visit):
    page = visit('printed_tables.html')
    assert page.locator('figure img, .cell_output img').count() == 1 and 'Printed macro-F1' in page.locator('figcaption').inner_text()
    assert page.locator('table tbody tr').count() == 6
    assert page.locator('.cell_input').count() == 0                                # its code is not shown

def test_search(visit):
    page = visit('search.html?q=hypnogram')
    page.wait_for_selector('ul.search li a')
    assert page.locator('ul.search li a[href*="core.html"]').count() >= 1

def brightness(page):
    r,g,b = map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3])
    return (r + g + b) / 3

def test_dark_mode(visit):
    assert brightness(visit('core.html', color_scheme='light')) > 200
    page = visit('core.html', color_scheme='dark')                                 # as the reader's system says
    assert brightness(page) < 60
    page.click('.theme-switch-button:visible')                                     # or as the reader says
    page.click('button[data-bs-theme-value="light"]:visible, .dropdown-item:has-text("Light"):visible')
    assert brightness(page) > 200

def test_on_a_phone(visit):
    for name in ('index.html', 'montage.html', 'printed_tables.html'):
        page = visit(name, viewport=dict(width=390, height=800))
        assert page.evaluate('document.documentElement.scrollWidth') <= 390        # nothing sticks out
        assert not page.locator('.bd-sidebar-primary').is_visible() or page.locator('.bd-sidebar-primary').bounding_box()['x'] < 0
        page.locator('.primary-toggle:visible').click()
        page.wait_for_function('document.querySelector(".bd-sidebar-primary, #pst-primary-sidebar-modal").getBoundingClientRect().x >= 0')
