"""Package metadata: every value comes from settings.ini."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
suffix = '_requirements'
extras = {key.removesuffix(suffix): shlex.split(cfg[key]) for key in cfg if key.endswith(suffix)}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', keywords=cfg['keywords'],
    url=cfg['git_url'], python_requires='>=' + cfg['min_python'],
    classifiers=[
        'Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3', 'Typing :: Typed'
    ],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['py.typed', 'paper_tables/*', 'tuned.json', 'gpu_cards.csv', 'report/static/*']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
