"""Settings of Sphinx; prepare.py puts this file beside the sources that it makes."""
from configparser import ConfigParser
from pathlib import Path

root = next(p for p in Path(__file__).resolve().parents if (p/'settings.ini').exists())
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

project, author, release, copyright = cfg['title'], cfg['author'], cfg['version'], cfg['copyright']
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']
exclude_patterns = ['_extra']
# types in signatures may have the name of two classes; links that pages ask for are tested
suppress_warnings = ['ref.python']

nb_execution_mode = 'off' # outputs are those of the committed notebooks
nb_merge_streams = True
nb_number_source_lines = False
nb_code_prompt_show = 'Imports of the checks'
nb_code_prompt_hide = 'Hide them'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_inline', 'attrs_block']
myst_heading_anchors = 4
myst_dmath_double_inline = True
python_maximum_signature_line_length = 60

mathjax_path = 'mathjax/tex-svg.js' # put there by prepare.py: no page asks the network for anything
copybutton_selector = 'div.highlight:not(.output *) > pre'
html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['_static']
html_extra_path = ['_extra'] # finished reports, as they are
html_css_files = ['site.css']
html_js_files = ['offline.js']
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = dict(top_of_page_buttons=[])
