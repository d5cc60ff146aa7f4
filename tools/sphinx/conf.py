"""How Sphinx renders the site: offline, without a request to another host."""
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from nbdev.config import get_config

cfg = get_config()
project,author,release,copyright = cfg.title, cfg.author, cfg.version, cfg.copyright
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
numfig = True
suppress_warnings = ['myst.header'] # show_doc's headings may skip a level

html_theme = 'sphinx_book_theme'
html_title = cfg.title
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = 'mathml'
html_theme_options = dict(
    repository_url=cfg.git_url, use_repository_button=True, use_download_button=False, use_fullscreen_button=False,
    show_toc_level=2, navbar_persistent=[]) # or a second search field appears

def _inline_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode

def _block_math(self, node):
    self.body.append(f'<div class="math-block">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode

def setup(app): app.add_html_math_renderer('mathml', inline_renderers=(_inline_math, None), block_renderers=(_block_math, None))
