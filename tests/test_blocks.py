"Blocks of a page: the same text in HTML and in Markdown, whatever the words are; figures that are the same again."
import re

import pytest

from robust_dml.report import blocks, pages

WORDS = ('a|b', '*x*', '_y_', '`z`', '<b>', '[l](http://x)', '$5 and $6', '~~no~~', 'a\\b', 'two\nlines', '● HM')


@pytest.mark.parametrize('word', WORDS)
def test_markdown_shows_words_as_they_are(word):
    "In a paragraph and in a cell; a table keeps its columns."
    text = blocks.as_markdown([blocks.para(word), blocks.plain_table(['A', word], [[word, blocks.code(word)]])])
    plain = re.sub(r'\\(\W|_)', r'\1', text)
    assert plain.startswith(word.replace('\n', ' ') + '\n')
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in lines} == {3}


def test_both_forms_say_the_same():
    "Every word of the HTML stands in the Markdown."
    page = [
        blocks.opening('Title', 'sub', ['First.', 'Second.'], ['doubt']), blocks.heading('Part'),
        blocks.bullets(['one', ['two ', blocks.code('three')]]), blocks.terms([('name', 'meaning')]),
        blocks.fold('summary', blocks.para('inside')), blocks.warning('careful'),
        blocks.plain_table(['Head', 'Number'], [['row', blocks.number_cell('1.5 ± 0.2', True)]])
    ]
    html = re.sub(r'<[^>]+>', ' ', blocks.as_html(page))
    text = blocks.as_markdown(page)
    assert [word for word in html.split() if word not in text] == []


def test_links_to_pages_lead_to_what_git_keeps():
    link = blocks.link('x', '../table1/index.html')
    assert 'href="../table1/index.html"' in link.html() and link.markdown() == '[x](../table1/README.md)'
    assert blocks.link('x', '#setup').markdown() == 'x' and blocks.link('x', 'index.html').markdown() == '[x](README.md)'


def figure():
    fig = pages.new_figure(3, 2)
    ax = fig.subplots()
    ax.plot([0, 1, 2], [.1, .7, .2], marker='o', label='a')
    ax.legend()
    return fig


def test_figures_are_the_same_again(tmp_path):
    "No date, no random names; the kept ones lie below each other in one file and are numbered."
    for name in ('a', 'b'):
        page = [blocks.tag('h1', 'T'), *(blocks.chart(figure(), f'Caption {k}.', kept=k < 2) for k in range(3))]
        blocks.publish(tmp_path/name, dict(title='T'), page)
    first, second = ((tmp_path/name/'figures.svg').read_bytes() for name in ('a', 'b'))
    assert first == second and first.count(b'<svg ') == 3 and b'<metadata' not in first
    text = (tmp_path/'a'/'README.md').read_text()
    assert text.count('](figures.svg)') == 1
    assert [line for line in text.splitlines() if line.startswith('*Figure')] == [
        '*Figure 1 from the top:* Caption 0.', '*Figure 2 from the top:* Caption 1.', '*Figure on the page:* Caption 2.'
    ]


def test_results_hold_what_the_page_says(tmp_path):
    from robust_dml.runs.store import read_results
    said = ['The head line.', 'And more.']
    blocks.publish(tmp_path/'a', dict(title='T'), blocks.opening('T', 'sub', said))
    assert read_results(tmp_path/'a')['said'] == said
