"""How Sphinx renders the site: offline, without a request to another host."""
from importlib.metadata import distribution

from nbdev.config import get_config

cfg = get_config()
project,author,release,copyright = cfg.title, cfg.author, cfg.version, cfg.copyright
extensions = ['myst_nb', 'sphinx.ext.mathjax']
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
numfig = True
suppress_warnings = ['myst.header'] # the name of a definition may skip a level

html_theme = 'sphinx_book_theme'
html_title = cfg.title
html_static_path = ['static', str(distribution('sphinx-mathjax-offline').locate_file('sphinx-mathjax-offline/static/mathjax/tex-svg.js'))]
html_css_files = ['site.css']
html_context = dict(default_mode='auto')
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False            # it would be fetched, which a browser refuses for pages opened as files
html_theme_options = dict(
    repository_url=cfg.git_url, use_repository_button=True, use_download_button=False, use_fullscreen_button=False,
    show_toc_level=2, navbar_persistent=[]) # or a second search field appears
mathjax_path = 'tex-svg.js'                 # equations need no other file
