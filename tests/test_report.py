"Reports from made-up records: means and spreads, what may be bold, and a page that needs nothing from outside."
import base64, copy, csv, io, json, math, subprocess, sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from robust_dml.report import blocks, tables as report
from robust_dml.runs.store import read_results
from robust_dml.metrics.scores import ARS_HEADINGS, HEADINGS, ars, ars_cells, constant_before, ers, ers_cells
from robust_dml.metrics.scores import paper_table

LABELS = {'natural': 'Natural', 'act': 'ACT', 'colo_tride': 'COLO-TRIDE (official)'}


def record(defense, seed, shift=0., setting='A', collapsed=False):
    rng = np.random.default_rng([seed, len(defense)])
    r1 = 50 + 5*len(defense) % 40 + rng.normal()
    after = {h: float(10 + 3 * i + shift + rng.normal()) for i, h in enumerate(HEADINGS)} | {
        'TMA': 0.5 + 0.01 * float(rng.normal()), 'ES:D': 0.4
    }
    before = {**constant_before(r1), 'CA-': 2.2, 'QA-': .5}
    log = [
        dict(epoch=e, loss=1 / (e + 1), dist_ap=0.5, dist_an=0.9, separability=0.6, collapseness=-0.4, assisted=0.5)
        for e in range(3)
    ]
    return dict(
        setting=setting, defense=defense, profile='', label=LABELS[defense], seed=seed,
        train=dict(
            address=f'train-{defense}', config={'options': {'steps': 8}}, log=log, seconds=10.0, image_steps=500,
            updates=20, device='cpu', provenance=dict(python='3.11', commit='abc')
        ),
        eval=dict(
            address=f'eval-{defense}', config={}, benign={'R@1': r1, 'R@2': r1 + 5, 'mAP': 30.0, 'NMI': 60.0},
            before=before, after={**after, 'LTM fixed': 1.0, 'GTM fixed': 2.0}, ers=ers(after),
            ers_cells=ers_cells(after), ars=ars(before, after), ars_cells=ars_cells(before, after),
            ars_constant=ars(constant_before(r1), after), ars_cells_constant=ars_cells(constant_before(r1), after),
            indicators=dict(mean_distance=1.0, separability=0.5, same_distance=0.5, other_distance=1.0),
            collapsed=collapsed, queries=100, excluded=0, backend='torch', seconds=5.0, image_steps=900, device='cpu',
            example_attack='ES'
        ),
    )


def made_up(experiment='table1', seeds=(0, 1, 2), **more):
    records = [record(d, seed, shift=5*i) for i, d in enumerate(LABELS) for seed in seeds]
    return (
        dict(
            experiment=experiment, title='Made-up', dataset='glyphs', preset='smoke', parameters=dict(dataset='glyphs'),
            overrides=['fewer epochs'], data=dict(name='glyphs', checksum='00'),
            settings={'A': dict(name='A', eps=32 / 255, step_size=16 / 255, steps=4, warm_epochs=0)},
            attack=dict(step_size=3 / 255, steps=32), records=records, published=[]
        )
        | more
    )


def pictures(k=2):
    gen = torch.Generator().manual_seed(0)
    def images(*shape): return torch.rand(*shape, 1, 8, 8, generator=gen)
    label = torch.arange(k)
    after = label[:, None].repeat(1, 5)
    after[0, 0], after[1, 3] = 1, 0
    clean = images(k)
    return dict(
        clean=clean, adv=(clean + 8 / 255).clamp(0, 1), before=(images(k, 5) * 255).byte(),
        after=(images(k, 5) * 255).byte(), label=label, label_before=label[:, None].repeat(1, 5), label_after=after
    )


class Page(HTMLParser):
    "Tags, addresses and nesting of a page."
    VOID = {'meta', 'img', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            (name, value)
            for name, value in attrs
            if name in ('src', 'href', 'srcset', 'action', 'data') or name.startswith('on')
        ]
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


@pytest.mark.parametrize('make, experiment', [(report.table1, 'table1'), (report.table2, 'table2')])
def test_table_is_mean_and_sample_spread(make, experiment):
    results = made_up(experiment)
    table = make(results)
    assert list(table['Defense']) == list(LABELS.values()) and list(table['PGD steps']) == ['-', 8, 8]
    for row, defense in enumerate(LABELS):
        runs = [r['eval'] for r in results['records'] if r['defense'] == defense]
        cells = [run['after' if experiment == 'table1' else 'ars_cells'] for run in runs]
        for heading in HEADINGS if experiment == 'table1' else ARS_HEADINGS:
            values = [c[heading] for c in cells]
            assert table[heading][row] == pytest.approx(np.mean(values), abs=1e-9)
            assert table[heading + ' sd'][row] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
        score, key = ('ERS', 'ers') if experiment == 'table1' else ('Averaged ARS', 'ars')
        assert table[score][row] == pytest.approx(np.mean([run[key] for run in runs]), abs=1e-9)


def test_csv_depends_on_numbers_only():
    results = made_up()
    other = copy.deepcopy(results)
    for r in other['records']:
        r['train'] |= dict(seconds=99., provenance={}, address='train-x', device='cuda')
        r['eval'] |= dict(seconds=77., image_steps=1, address='eval-x')
    first, second = (report.to_csv(report.table1(x), 'table1') for x in (results, other))
    assert first == second
    rows = list(csv.DictReader(io.StringIO(first.decode())))
    assert float(rows[1]['ERS']) == pytest.approx(report.table1(results)['ERS'][1], abs=.0051)
    assert not [name for name in rows[0] if '(s)' in name or 'second' in name.lower()]
    other['records'][0]['eval']['ers'] += 1
    assert report.to_csv(report.table1(other), 'table1') != first


def test_one_seed_has_no_spread():
    results = made_up(seeds=[4])
    table = report.table1(results)
    assert table.filter(like=' sd').isna().all(axis=None) and '±' not in report.to_markdown(table, 'table1')
    assert report.leaders(table, report.COLUMNS['table1']) == set() and '**' not in report.to_markdown(table, 'table1')
    assert 'no order of the defences is claimed' in report.summary(results)[0]
    assert next(csv.DictReader(io.StringIO(report.to_csv(table, 'table1').decode())))['ERS sd'] == ''


@pytest.mark.parametrize('values, spreads, collapsed, best', [
    ((10, 20, 30), (1, 1, 1), (0, 0, 0), 2),       # 29 > 21
    ((10, 20, 21), (1, 1, 1), (0, 0, 0), None),    # 20 < 21
    ((10, 20, 30), (9, 1, 1), (0, 0, 0), 2),       # a wide row far behind does no harm
    ((10, 20, 30), (25, 1, 1), (0, 0, 0), None),   # a wide row that reaches the best does
    ((10, 20, 30), (1, 1, 1), (0, 0, 3), None),    # a collapsed model cannot win
    ((10, 20, 30), (1, math.nan, 1), (0, 0, 0), None)])
def test_bold_needs_disjoint_intervals(values, spreads, collapsed, best):
    table = report.table1(made_up()).assign(**{'ERS': values, 'ERS sd': spreads, 'Collapsed': collapsed})
    column = [c for c in report.COLUMNS['table1'] if c.name == 'ERS']
    assert report.leaders(table, column) == ({(best, 'ERS')} if best is not None else set())
    lower = table.assign(**{'CA-': values, 'CA- sd': spreads, 'Collapsed': 0})
    column = [c for c in report.COLUMNS['table1'] if c.name == 'CA-']
    first = all(values[0] + spreads[0] < v - sd for v, sd in zip(values[1:], spreads[1:]))
    assert report.leaders(lower, column) == ({(0, 'CA-')} if first else set())  # here lower is better


def test_order_is_claimed_only_beyond_the_spread():
    results = made_up()
    for r in results['records']:
        r['eval']['ers'] = {'natural': 5., 'act': 30., 'colo_tride': 40.}[r['defense']] + r['seed']
    assert 'COLO-TRIDE (official) (41.0\xa0±\xa01.0) is ahead of ACT' in report.summary(results)[0]
    for r in results['records']: r['eval']['ers'] = 30. + r['seed'] + (r['defense'] == 'act')
    assert 'no order is claimed' in report.summary(results)[0]


def test_head_line_names_a_leader_only_beyond_the_spread():
    results = made_up()
    for r in results['records']:
        r['eval']['ers'] = {'natural': 5., 'act': 30., 'colo_tride': 40.}[r['defense']] + r['seed']
    assert (
        report.headline(results)
        == 'At ε = 32/255 COLO-TRIDE (official) leads in ERS with 41.0\xa0±\xa01.0 (without defence 6.0). Leads exceed'
        ' the spread of the seeds.'
    )
    for r in results['records']: r['eval']['ers'] = 30. + r['seed'] + (r['defense'] == 'act')
    assert (
        report.headline(results)
        == 'At ε = 32/255 the defences have ERS 31.0 to 32.0, none leads by more than the spread of the seeds (without'
        ' defence 31.0).'
    )
    one = made_up(seeds=[0])
    assert 'one seed allows no order' in report.headline(one) and 'leads' not in report.headline(one)
    for r in results['records']: r['eval']['collapsed'] = r['defense'] != 'natural'
    assert report.headline(results) == ''  # a collapsed model cannot lead


def test_undefined_cell_is_shown_and_left_out(tmp_path):
    results = made_up('table2', seeds=(0, 1))
    results['records'][0]['eval']['ars_cells']['CA-'] = None
    kept = results['records'][1]['eval']['ars_cells']['CA-']
    assert report.table2(results)['CA-'][0] == pytest.approx(kept)  # the defined seed alone
    results['records'][1]['eval']['ars_cells']['CA-'] = math.nan
    assert report.as_text(report.table2(results), 'table2')['CA-'][0] == '0/0'
    page = Page(report.write_report(tmp_path, results).read_text(encoding='utf-8'))
    assert '0/0: undefined' in page.text


def test_published_numbers_beside_ours():
    printed = [dict(c, table=n) for n in (1, 2) for c in paper_table(n) if c['dataset'] == 'CUB']
    results = made_up('table2', published=printed)
    table, beside = report.table2(results), report.compare(results)
    def cell(defense, metric): return beside[(beside['Defense'] == defense) & (beside['Metric'] == metric)]
    assert len(cell('ACT', 'R@1')) == 1 and len(cell('HM', 'R@1')) == 0
    assert cell('ACT', 'CA+')['Difference'].item() == pytest.approx(table['CA+'][1] - 31.0)
    assert cell('Natural', 'CA-')['Printed'].item() == '0/0' and math.isnan(cell('Natural', 'CA-')['Difference'].item())


def test_page_needs_nothing_from_outside(tmp_path):
    hostile = '<img src=http://x onerror=alert(1)>"\'&|'
    results = made_up(
        title=hostile, dataset=hostile, parameters={hostile: hostile}, overrides=[hostile], data={hostile: [hostile]},
        published=[dict(c, value='<i>1') for c in paper_table(1) if c['dataset'] == 'CUB']
    )
    for r in results['records']: r['label'] += hostile
    original = copy.deepcopy(results)
    path = report.write_report(tmp_path/'deep'/'report', results, {'A ' + results['records'][0]['label']: pictures()})
    page = Page(path.read_text(encoding='utf-8'))
    assert page.open == [] and hostile in page.text and results == original
    assert set(page.tags) <= {
        'html', 'head', 'meta', 'title', 'style', 'script', 'body', 'main', 'h1', 'h2', 'h3', 'p', 'a', 'div', 'span',
        'i', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'b', 'br', 'dl', 'dt', 'dd', 'ul', 'li', 'code', 'figure',
        'figcaption', 'img'
    }
    assert page.tags.count('script') == 1 and all(
        value.startswith('data:image/png;base64,') if name == 'src' else (name, value) == ('href', '#setup')
        for name, value in page.links
    )
    assert 'url(' not in page.text and '@import' not in page.text
    images = [base64.b64decode(value.partition(',')[2]) for name, value in page.links if name == 'src']
    charts = sorted(p for p in (path.parent/'figures').iterdir() if not p.name.startswith('queries'))
    assert sorted(images) == sorted(p.read_bytes() for p in charts) and len(images) == 2
    for data in images: Image.open(io.BytesIO(data)).verify()


def sheet(html):
    "The picture of a viewer, as pixels."
    return np.asarray(
        Image.open(
            io.BytesIO(base64.b64decode(html.partition('--sheet:url(data:image/png;base64,')[2].partition(')')[0]))
        )
    )


def test_viewer_shows_the_pictures_of_the_strip():
    tensors = pictures(3)
    html = blocks.as_html(report.viewer(tensors, 'made up'))
    page = Page(html)
    shown = sheet(html)
    assert (
        shown.shape == (3 * 8, 13 * 8)
        and page.open == []
        and 'black −8/255, grey 0, white +8/255' in page.text
        and 'difference × 15.9' in page.text
    )
    for row in range(3):
        def at(place): return shown[8*row:8*row + 8, 8*place:8*place + 8]/255
        change = (tensors['adv'] - tensors['clean'])[row, 0]
        for place, image in enumerate((tensors['clean'][row, 0], tensors['adv'][row, 0], .5 + change*255/16)):
            np.testing.assert_allclose(at(place), image, atol=.51/255)
        for k in range(5):
            np.testing.assert_array_equal(at(3 + k)*255, tensors['before'][row, k, 0])
            np.testing.assert_array_equal(at(8 + k)*255, tensors['after'][row, k, 0])
    hits = int(
        (tensors['label_after'] == tensors['label'][:, None]).sum()
        + (tensors['label_before'] == tensors['label'][:, None]).sum()
    )
    assert (
        html.count('tile hit'), html.count('tile miss'), html.count('class="moving"'), html.count('class="query"')
    ) == (hits, 30 - hits, 6, 3) and 0 < hits < 30


def test_viewer_of_colours_and_few_results():
    tensors = pictures()
    colour = {k: v.expand(*v.shape[:-3], 3, 8, 8) if v.ndim > 2 else v for k, v in tensors.items()}
    colour |= {k: v[:, :2] for k, v in colour.items() if k.endswith(('before', 'after'))}
    html = blocks.as_html(report.viewer(colour, '<b>'))
    assert sheet(html).shape == (16, 104, 3) and html.count('role="img"') == 2*(3 + 4) and '<b>' not in html


def test_files_of_a_report(tmp_path):
    results = made_up()
    results['records'][0] |= dict(examples=pictures())
    results['records'][0]['train']['log'][1]['assisted'] = math.nan
    for _ in range(2): report.write_report(tmp_path, results)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'README.md', 'figures', 'figures.svg', 'index.html', 'results.json', 'table.csv'
    ]
    def refuse(name): raise AssertionError(name)
    read = json.loads((tmp_path/'results.json').read_text(encoding='utf-8'), parse_constant=refuse)
    assert (
        read['records'][1]['eval']['ers'] == results['records'][1]['eval']['ers']
        and 'examples' not in read['records'][0]
    )
    again = report.write_report(tmp_path/'again', read_results(tmp_path)).parent  # a report can be made from its own results
    assert (again/'table.csv').read_bytes() == (tmp_path/'table.csv').read_bytes()


def test_defences_keep_colour_and_marker():
    from matplotlib.colors import to_hex
    records = made_up(seeds=[0])['records']
    looks = [report.look(r) for r in records] + [report.look(dict(records[-1], profile='paper'))]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4
    red, green, blue = (int(looks[0][0][i:i+2], 16) for i in (1, 3, 5))
    assert red == green == blue  # natural is grey
    loss = report.curves(records).axes[0]
    assert [(to_hex(line.get_color()), line.get_marker()) for line in loss.lines] == looks[:3]
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3]]*3


def test_robustness_figure_shows_the_means():
    results = made_up(seeds=(0, 1))
    table, ax = report.table1(results), report.robustness(results, 'A')
    names = [label.get_text() for label in ax.get_yticklabels()]
    drawn = {(round(float(y)), round(float(x), 6)) for c in ax.collections for x, y in c.get_offsets()}
    for heading in ('R@1', 'LTM', 'ERS'):
        line = next(i for i, name in enumerate(names) if name.split(',')[0] == heading)
        assert {(line, round(v, 6)) for v in table[heading]} <= drawn


def test_strip_frames_misses_differently():
    tensors = pictures()
    ax, = report.strip(tensors).axes
    frames = sorted(ax.patches, key=lambda f: (f.get_y(), f.get_x()))  # two rows of five before and five after
    assert len(frames) == 20 and len({(f.get_x(), f.get_y()) for f in frames}) == 20
    def style(k): return frames[k].get_edgecolor(), frames[k].get_linestyle()
    assert {style(10*row + k) for row in range(2) for k in range(5)} == {style(0)}  # all hits before
    for row in range(2):
        for k in range(5):
            hit = bool(tensors['label_after'][row, k] == tensors['label'][row])
            same = [a == b for a, b in zip(style(10*row + 5 + k), style(0))]
            assert same == [hit, hit]  # colour and line style both


def test_strip_shows_every_picture_in_its_frame():
    tensors = pictures(3)
    ax, = report.strip(tensors).axes
    canvas = np.asarray(ax.images[0].get_array())
    def at(x, y): return canvas[int(y):int(y) + 8, int(x):int(x) + 8]
    frames = sorted(ax.patches, key=lambda f: (f.get_y(), f.get_x()))
    for row in range(3):
        for k, (when, place) in enumerate((when, place) for when in ('before', 'after') for place in range(5)):
            np.testing.assert_allclose(at(*frames[10*row + k].get_xy()), tensors[when][row, place, 0]/255, atol=1e-6)
        y = frames[10*row].get_y()
        clean, adv, change = (at(x, y) for x in (0, 9, 18))
        np.testing.assert_allclose(clean, tensors['clean'][row, 0], atol=1e-6)
        np.testing.assert_allclose(adv, tensors['adv'][row, 0], atol=1e-6)
        largest = (tensors['adv'] - tensors['clean']).abs().max()
        # grey is no change, white the largest
        np.testing.assert_allclose(change, .5 + .5*(tensors['adv'] - tensors['clean'])[row, 0]/largest, atol=1e-5)
    assert (canvas[8] == 1).all()  # white between the rows
    lefts = [f.get_x() for f in frames[:10]]
    # before and after are set apart
    assert len({b - a for a, b in zip(lefts[:5], lefts[1:5])}) == 1 and lefts[5] - lefts[4] > lefts[4] - lefts[3]


def test_strip_of_colours_and_few_results():
    tensors = pictures()
    colour = {k: v.expand(*v.shape[:-3], 3, 8, 8) if v.ndim > 2 else v for k, v in tensors.items()}
    colour |= {k: v[:, :2] for k, v in colour.items() if k.endswith(('before', 'after'))}
    ax, = report.strip(colour).axes
    assert np.asarray(ax.images[0].get_array()).shape[2] == 3 and len(ax.patches) == 8
    whole, few = (Image.open(io.BytesIO(report.png(report.strip(colour), colours=count))) for count in (0, 16))
    assert (
        (whole.size, len(whole.convert('RGB').getcolors(2**24)) > 16) == (few.size, True)
        and few.mode == 'P'
        and len(few.getcolors()) <= 16
    )


def timed(results):
    "The same records with seconds of their parts, different for each seed."
    for r in results['records']:
        r['train']['parts'] = dict(data=1., defence=10. + r['seed'], update=4., checkpoint=.5)
        r['eval']['parts'] = {
            'gallery': 1.0, 'LTM fixed': 3.0, 'QA+': 6.0 + r['seed'], 'CA+': 5.0, 'ES': 2.0, 'GTM fixed': 1.0,
            'LTM': 4.0, 'metrics': 2.0, 'indicators': 0.5, 'my own': 7.0
        }
    return results


def test_parts_are_means_over_seeds():
    results = timed(made_up(seeds=(0, 1, 5)))
    table, attacks = report.parts(results), report.attack_seconds(results)
    assert list(table) == [
        'Setting', 'Defense', 'data', 'defence', 'update', 'checkpoint', 'gallery', 'attacks', 'metrics'
    ]
    assert list(table['Defense']) == list(LABELS.values()) and table['defence'].tolist() == [12.]*3
    assert table['attacks'].tolist() == [30.]*3 and table['metrics'].tolist() == [2.5]*3
    assert (
        list(attacks)[2:] == ['CA+', 'QA+', 'ES', 'LTM', 'LTM fixed', 'GTM fixed', 'my own']
        and attacks['QA+'].tolist() == [8.0] * 3
    )
    # of an older version: the other seeds remain
    del results['records'][0]['train']['parts'], results['records'][0]['eval']['parts']
    assert report.parts(results)['defence'].tolist() == [13., 12., 12.]


def test_time_bars_are_the_parts(tmp_path):
    from matplotlib.colors import to_hex
    results = timed(made_up(seeds=(0, 1)))
    table, ax = report.parts(results), report.time_bars(results)
    names = list(table)[2:]
    assert [c.get_label() for c in ax.containers] == names and [t.get_text() for t in ax.get_yticklabels()] == list(
        LABELS.values()
    )
    assert len({to_hex(c.patches[0].get_facecolor()) for c in ax.containers}) == len(names)
    for row in range(3):
        end = 0.
        for bars, name in zip(ax.containers, names):
            assert bars.patches[row].get_x() == pytest.approx(end) and bars.patches[row].get_width() == pytest.approx(
                table[name][row]
            )
            end += table[name][row]
    page = Page(report.write_report(tmp_path, results).read_text(encoding='utf-8'))
    assert (
        (tmp_path / 'figures' / 'time.png').is_file()
        and 'Where the time went' in page.text
        and 'Seconds of each attack' in page.text
    )
    total = sum(table[names].sum())
    assert (
        f'The largest part: attacks of the evaluation, {table["attacks"].sum():.0f} s of {total:.0f} s'
        f' ({100*table["attacks"].sum()/total:.0f} %).'
        in page.text
    )


def test_the_largest_part_is_named():
    results = timed(made_up())
    for r in results['records']: r['train']['parts']['update'] = 700.
    assert report._largest(report.parts(results)).startswith('The largest part: updates of the weights, 35 min of ')


def test_times_are_in_no_table_and_older_records_have_none(tmp_path):
    results = made_up()
    plain, full = (
        report.write_report(tmp_path / name, r).parent
        for name, r in (('plain', results), ('full', timed(copy.deepcopy(results))))
    )
    assert (plain/'table.csv').read_bytes() == (full/'table.csv').read_bytes()
    assert 'Where the time went' not in (plain/'index.html').read_text() and not (plain/'figures'/'time.png').exists()
    assert len(report.parts(results)) == len(report.attack_seconds(results)) == 0
    again = report.write_report(tmp_path/'full', results).parent  # a stale figure goes
    assert not (again/'figures'/'time.png').exists()


def test_parts_of_the_training_alone(tmp_path):
    results = timed(made_up())
    for r in results['records']: del r['eval']['parts']
    page = report.write_report(tmp_path, results).read_text(encoding='utf-8')
    assert 'Where the time went' in page and 'Seconds of each attack' not in page and 'steps of the defence' in page


def test_cost_counts_all_seeds():
    results = made_up(seeds=(0, 1))
    results['records'][0]['train']['image_steps'] = 0
    results['records'][1]['train'].pop('image_steps')
    table = report.cost(results)
    assert math.isnan(table['Training, image steps/s'][0]) and table['Training, image steps/s'][1] == pytest.approx(50)
    assert table['Attacks, image steps/s'][0] == pytest.approx(180)


def test_show_prints_the_table(capsys):
    report.show(made_up())
    text = capsys.readouterr().out
    assert text.startswith('Setting A, ε = 32/255') and all(
        name in text for name in (*LABELS.values(), 'ES:R ↑', 'CA- ↓', 'ERS ↑')
    )


def test_bad_input():
    with pytest.raises(ValueError, match='at least one record'): report.table1(made_up(records=[]))
    with pytest.raises(ValueError, match='every seed once, found seeds'): report.table1(made_up(seeds=(0, 0)))
    broken = made_up()
    del broken['records'][0]['eval']['after']['LTM fixed']
    with pytest.raises(
        ValueError, match="expected eval/after/LTM fixed in the record of Natural, found no 'LTM fixed'"
    ):
        report.table1(broken)


def test_import_is_light():
    code = (
        "import sys, robust_dml.report.tables; print([m for m in ('pandas', 'matplotlib', 'seaborn',"
        " 'robust_dml.metrics.evaluate', 'robust_dml.defenses.train', 'robust_dml.models.networks') if m in"
        " sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )
