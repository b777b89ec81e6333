"""Evaluations of a trained model: independent of the batch size, repeatable, and what the threat model promises."""
import math

import pytest
import torch

from robust_dml.data import sets
from robust_dml.metrics import evaluate as module
from robust_dml.attacks.suite import FIXED, SUITE
from robust_dml.triplets.collapse import indicators
from robust_dml.core import generator
from robust_dml.triplets.distances import normalise
from robust_dml.metrics.evaluate import evaluate
from robust_dml.metrics.retrieval import nmi
from robust_dml.models.networks import build
from robust_dml.runs.store import Run, StoreError, append_line, read_lines
from robust_dml.defenses.train import train
from robust_dml.defenses.base import make_defense as make


@pytest.fixture(scope='module')
def images(): return sets.glyphs(train_classes=20, test_classes=12, per_class=12)


@pytest.fixture(scope='module')
def model(images):
    "A net trained for a few epochs, so that embeddings have structure."
    net = build('small', dim=32, size=28, channels=1, seed=0)
    train(net, images.train, make('natural', margin=.2, miner='semihard'), epochs=25, pairs=24, lr=2e-3, show=False)
    return net


ATTACK = dict(eps=16/255, step_size=4/255, steps=6, show=False, backend='torch')


def test_trained_net_falls(model, images):
    "Retrieval that works without attack and does not under LTM and ES."
    result = evaluate(model, images.test, **ATTACK | dict(eps=32/255, step_size=8/255, steps=10))
    assert result.benign['R@1'] > 60 and result.after['LTM'] < 10 and result.after['ES:R'] < 10
    assert result.before['GTT'] == 100 and result.before['ES:D'] == pytest.approx(0, abs=1e-5)
    assert result.before['LTM'] == pytest.approx(result.benign['R@1'], abs=1e-4)
    assert not result.collapsed and result.queries == len(images.test) and result.image_steps == 10*11*len(images.test)


def test_batch_size_changes_nothing_in_float64(images):
    net = build('small', dim=32, size=28, channels=1, seed=0).double()
    train(net, images.train, make('natural', margin=.2), epochs=1, pairs=24, lr=2e-3, show=False)
    whole, parts = (evaluate(net, images.test, batch_size=n, **ATTACK) for n in (144, 7))
    for heading in whole.after:
        assert parts.after[heading] == pytest.approx(whole.after[heading], abs=1e-9) and parts.before[
            heading
        ] == pytest.approx(whole.before[heading], abs=1e-9)


def test_batch_size_in_float32(model, images):
    "At most half a point (or .005 of cosine and distance) from rounding."
    whole, parts = (evaluate(model, images.test, batch_size=n, **ATTACK) for n in (144, 7))
    for heading in whole.after:
        tolerance = .005 if heading in ('TMA', 'ES:D') else .5
        assert parts.after[heading] == pytest.approx(whole.after[heading], abs=tolerance), heading


def test_same_seed_same_numbers(model, images):
    first, second = (evaluate(model, images.test, limit=40, **ATTACK) for _ in range(2))
    assert first.after == second.after and first.queries == 40
    other = evaluate(model, images.test, limit=40, seed=1, **ATTACK)
    assert other.before != first.before


def test_no_budget_no_effect(model, images):
    result = evaluate(model, images.test, **ATTACK | dict(eps=0.))
    for heading in result.after:
        assert result.after[heading] == pytest.approx(result.before[heading], abs=1e-4), heading
    assert result.ars == pytest.approx(100, abs=.01)


def test_model_is_left_alone(model, images):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, images.test, limit=20, **ATTACK)
    assert model.training and all(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items(): assert torch.equal(value, before[key])


def test_lone_query_is_left_out(model, images):
    "A class with one image: reported, and in no mean of R@1."
    kept = torch.cat([torch.tensor([0]), torch.arange(12, 144)])
    few = sets.ImageSet(images.test.images[kept], images.test.labels[kept], images.test.classes)
    result = evaluate(model, few, **ATTACK)
    rest = sets.ImageSet(images.test.images[12:], images.test.labels[12:]-1, images.test.classes[1:])
    assert result.excluded == 1 and not math.isnan(result.after['ES:R'])
    assert result.before['ES:R'] <= evaluate(model, rest, **ATTACK).before['ES:R'] + 1e-6 # one more distractor


@pytest.mark.parametrize(
    'broken, message',
    [
        (lambda x: (x.flatten(1),), 'must return a tensor'), (lambda x: x.flatten(1) * torch.nan, 'must be finite'),
        (lambda x: x, 'must return a tensor')
    ],
    ids=('tuple', 'nan', 'shape'),
)
def test_broken_models_are_named(images, broken, message):
    class Broken(torch.nn.Module):
        def forward(self, x): return broken(x)
    with pytest.raises(ValueError, match=message): evaluate(Broken(), images.test, limit=5, **ATTACK)


def test_double_and_plain_models(images):
    "A model that is no EmbeddingNet gets its images in its own dtype."
    from torch import nn
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16))
    result, exact = (evaluate(m, images.test, limit=12, **ATTACK) for m in (net, net.double()))
    for heading in exact.before: assert exact.before[heading] == pytest.approx(result.before[heading], abs=.5)


def test_mean_of_batch_means(model, images):
    "The reference code's aggregation differs only through the last, smaller batch."
    whole = {how: evaluate(model, images.test, batch_size=100, aggregation=how, **ATTACK) for how in ('query', 'batch')}
    halves = [evaluate(model, images.test, batch_size=100, **ATTACK)]
    assert whole['query'].after == halves[0].after and whole['batch'].after != whole['query'].after
    with pytest.raises(ValueError, match="'query', 'batch'"): evaluate(model, images.test, aggregation='mean', **ATTACK)


@pytest.mark.parametrize('scale', [1e-3, 1e-4])
def test_collapsed_embedding_keeps_its_ranks(images, scale):
    """In float64 a model that maps everything into a tiny ball is ranked exactly: before the attacks R@1 and GTT are
    the benign values."""
    from torch import nn
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build('small', dim=16, size=28, channels=1, seed=0).double()
        def forward(self, x): return scale*self.net(x) + torch.ones(16, dtype=torch.float64)
    result = evaluate(Tiny(), images.test, limit=30, **ATTACK)
    assert result.collapsed and result.before['GTT'] == 100
    all_queries = evaluate(Tiny(), images.test, attacks={'ES': SUITE['ES']}, **ATTACK)
    assert all_queries.before['ES:R'] == pytest.approx(all_queries.benign['R@1'], abs=1e-9)


def test_parts_add_up_over_a_kill(model, images, tmp_path):
    "Seconds of every part; those of the attacks are the sums of the stored records, also after a kill."
    attacks = {name: SUITE[name] for name in ('ES', 'CA+')}
    run, few = Run(tmp_path), dict(ATTACK, attacks=attacks, batch_size=60)
    first = evaluate(model, images.test, run=run, **few)
    assert list(first.parts) == ['gallery', 'metrics', 'indicators', 'checks', 'ES', 'CA+'] and all(
        v > 0 for v in first.parts.values()
    )
    records = read_lines(run, 'queries.jsonl')
    assert [(r['attack'], r['start']) for r in records] == [(a, i) for a in attacks for i in (0, 60, 120)]
    for r, seconds in zip(records, (1., 2., 4., 8., 16., 32.)): r['seconds'] = seconds
    (tmp_path/'queries.jsonl').unlink()
    for r in records[:5]: append_line(run, 'queries.jsonl', r)  # the last batch is lost
    again = evaluate(model, images.test, run=run, **few)
    assert again.parts['ES'] == 7 and 24 < again.parts['CA+'] < 56
    assert again.seconds == pytest.approx(again.parts['ES'] + again.parts['CA+']) and again.after == first.after


@pytest.mark.slow
def test_folding_changes_no_number_of_a_deep_network(images, monkeypatch):
    net = build('resnet18', dim=16, size=28, channels=1, seed=0)
    train(net, images.train, make('natural', margin=.2), epochs=1, pairs=40, lr=1e-3, show=False)
    options = dict(ATTACK, steps=2, limit=6)
    few = sets.ImageSet(images.test.images[:60], images.test.labels[:60], images.test.classes[:5])
    fast = evaluate(net.double(), few, **options)
    monkeypatch.setattr(module, 'faster', lambda model, dataset, device: model)
    plain = evaluate(net, few, **options)
    for part in ('benign', 'before', 'after', 'indicators'):
        assert getattr(fast, part) == pytest.approx(getattr(plain, part), abs=1e-7)


def test_half_precision_is_part_of_the_protocol_and_changes_only_the_search(model, images):
    full, half = (evaluate(model, images.test, precision=p, **ATTACK) for p in ('float32', 'bfloat16'))
    assert (
        half.protocol['precision'] == 'bfloat16'
        and half.benign == full.benign
        and half.before == full.before
        and half.after != full.after
    )
    for key in ('QA+', 'QA-', 'CA+', 'CA-'): assert half.after[key] == pytest.approx(full.after[key], abs=3.)


# queries and gallery apart

QUERIES = 18


@pytest.fixture(scope='module')
def apart():
    """Eighteen queries and a gallery of 212 images in classes of unequal size, without the last two classes of the
    queries; its row i is close to query i."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.cat(
        [torch.arange(9).repeat(2), torch.arange(9).repeat(2) % 7, torch.randint(7, (194,), generator=gen)]
    )
    pixels = torch.randint(256, (9, 1, 4, 4), generator=gen)[labels] + 60*torch.randn(230, 1, 4, 4, generator=gen)
    pixels[18:36] = pixels[:18] + 20*torch.randn(18, 1, 4, 4, generator=gen)
    return sets.ImageSet(pixels.round().clamp(0, 255).to(torch.uint8), labels, tuple('abcdefghi'))


@pytest.fixture(scope='module')
def linear():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6, dtype=torch.float64))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return net


class Plain:
    """The attacks on one query from outside the gallery, by their definitions: every ranking sorted, every sum written
    out."""
    def __init__(self, name, q0, label, id, X, y):
        self.name, self.q0, self.label, self.X, self.y, self.N = name, q0, label, X, y.tolist(), len(X)
        dist, gen = self.far(q0).tolist(), generator(0, name, id)
        order = sorted(range(self.N), key=lambda k: (dist[k], k))
        self.mates, self.strangers = (
            [k for k in range(self.N) if (self.y[k] == label) == same] for same in (True, False)
        )
        near, differing = order[:self.N//100], [k for k in range(self.N) if self.y[k] != self.y[order[0]]]
        other = min(differing, key=lambda k: dist[k])
        self.row = {
            'CA-': lambda: near[torch.randint(len(near), (1,), generator=gen).item()],
            'QA-': lambda: near[torch.randperm(len(near), generator=gen)[0].item()], 'GTM fixed': lambda: other,
            'GTM': lambda: differing.index(other), 'GTT': lambda: order[0]
        }.get(name, lambda: torch.randint(self.N, (1,), generator=gen).item())()
        self.between = self.far(X[self.row])

    def far(self, q): return torch.linalg.vector_norm(self.X - q, dim=1)

    def objective(self, q):
        d, c, base = self.far(q), self.row, self.name.split()[0]
        if base == 'LTM':
            return -(d[self.strangers].max() - d[self.mates].min()).clamp(min=0) if self.mates else 0*d.sum()
        return {
            'CA+': lambda: -(d[c] - self.between).clamp(min=0).mean(),
            'CA-': lambda: -(self.between - d[c]).clamp(min=0).mean(), 'QA+': lambda: -(d[c] - d).clamp(min=0).mean(),
            'QA-': lambda: -(d - d[c]).clamp(min=0).mean(), 'GTT': lambda: -(d - d[c]).clamp(min=0).mean(),
            'TMA': lambda: q @ self.X[c], 'ES': lambda: torch.linalg.vector_norm(q - self.q0 + 1e-6),
            'GTM': lambda: -d[c]
        }[base]()

    def outcome(self, q):
        d, c = self.far(q).tolist(), self.row
        place = sum((d[k], k) < (d[c], c) for k in range(self.N))
        first = 100.*(self.y[min(range(self.N), key=lambda k: (d[k], k))] == self.label) if self.mates else None
        closer = sum(d[c] > between for between in self.between.tolist())
        return {
            'CA+': {'CA+': 100 * closer / self.N}, 'CA-': {'CA-': 100 * closer / self.N},
            'QA+': {'QA+': 100 * place / self.N}, 'QA-': {'QA-': 100 * place / self.N},
            'TMA': {'TMA': (q @ self.X[c]).item()}, 'ES': {'ES:D': (q - self.q0).norm().item(), 'ES:R': first},
            'GTT': {'GTT': 100.0 * (place < 4)}
        }.get(self.name, {self.name: first})

    def attacked(self, net, x, eps, step_size, steps):
        moved = x.clone()
        for _ in range(steps):
            moved.requires_grad_()
            slope, = torch.autograd.grad(self.objective(normalise(net(moved[None]))[0]), moved)
            moved = (moved.detach() + step_size*slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        return normalise(net(moved[None]))[0].detach()


@pytest.mark.parametrize('name', [*SUITE, *FIXED])
def test_queries_from_outside_against_loops(apart, linear, name, tmp_path):
    "Targets, search and outcome of every attack with nothing left out of the gallery."
    budget, attack = dict(eps=32/255, step_size=8/255, steps=6), {**SUITE, **FIXED}[name]
    run = Run(tmp_path)
    result = evaluate(
        linear, apart, queries=QUERIES, attacks={name: attack}, batch_size=7, run=run, show=False, backend='torch',
        **budget
    )
    records = read_lines(run, 'queries.jsonl')
    x = apart.batch(torch.arange(230), dtype=torch.float64)
    with torch.no_grad(): emb = normalise(linear(x))
    for i in range(QUERIES):
        plain = Plain(name, emb[i], apart.labels[i].item(), i, emb[QUERIES:], apart.labels[QUERIES:])
        moved = plain.attacked(linear, x[i], **budget)
        for moment, q in (('before', emb[i]), ('after', moved)):
            for heading, value in plain.outcome(q).items():
                found = [v for r in records for v in r[moment][heading]][i]
                assert found == (value if value is None else pytest.approx(value, abs=1e-7)), (i, moment, heading)
    assert result.excluded == 4 and result.queries == QUERIES and result.after != result.before


def test_benign_numbers_and_indicators_of_queries_from_outside(apart, linear):
    "R@1 of the queries in the whole gallery, NMI of the gallery, indicators of all test images."
    few = {'ES': SUITE['ES']}
    result = evaluate(linear, apart, queries=QUERIES, attacks=few, **ATTACK)
    with torch.no_grad(): emb = normalise(linear(apart.batch(torch.arange(230), dtype=torch.float64)))
    gallery, labels = emb[QUERIES:], apart.labels[QUERIES:]
    hits = [
        labels[(gallery - q).norm(dim=1).argmin()] == y
        for q, y in zip(emb[:QUERIES], apart.labels[:QUERIES])
        if y in labels
    ]
    assert result.benign['R@1'] == result.before['ES:R'] == pytest.approx(100*sum(hits).item()/len(hits))
    assert result.benign['NMI'] == 100*nmi(gallery, labels, backend='torch')
    assert result.indicators == indicators(emb, apart.labels, gen=generator(0, 'indicators'))


def test_apart_in_batches_by_kill_and_limit(apart, linear, tmp_path):
    "Batch size and a kill change nothing; a limit attacks fewer queries on the whole gallery."
    few = dict(ATTACK, steps=3, queries=QUERIES)
    whole, parts = (evaluate(linear, apart, batch_size=n, **few) for n in (230, 7))
    run = Run(tmp_path)
    once = evaluate(linear, apart, batch_size=7, run=run, **few)
    lines = (tmp_path/'queries.jsonl').read_bytes()
    (tmp_path/'queries.jsonl').write_bytes(lines[:len(lines)//2])
    again = evaluate(linear, apart, batch_size=7, run=run, **few)
    assert (again.after, again.before, again.ers) == (once.after, once.before, once.ers) and once.after == parts.after
    for heading in whole.after:
        assert parts.after[heading] == pytest.approx(whole.after[heading], abs=1e-9) and parts.before[
            heading
        ] == pytest.approx(whole.before[heading], abs=1e-9)
    some = evaluate(linear, apart, limit=6, **few)
    assert some.queries == 6 and some.benign == whole.benign and some.image_steps*3 == whole.image_steps


def test_examples_of_a_gallery_of_its_own(apart, linear):
    "Results are images of the gallery, the nearest first; a small gallery is shown whole."
    protocol = module.Protocol(eps=32/255, step_size=8/255, steps=4)
    found = module.examples(linear, apart, protocol=protocol, count=3, queries=QUERIES)
    rows = module.query_rows(QUERIES, limit=3, seed=0)
    with torch.no_grad(): emb = normalise(linear(apart.batch(torch.arange(230), dtype=torch.float64)))
    nearest = QUERIES + (emb[rows][:, None] - emb[QUERIES:]).norm(dim=2).argsort(1)[:, :5]
    assert torch.equal(found['before'], apart.images[nearest]) and torch.equal(
        found['label_before'], apart.labels[nearest]
    )
    assert torch.equal(found['clean'], apart.batch(rows, dtype=torch.float64)) and torch.equal(
        found['label'], apart.labels[rows]
    )
    assert module.examples(linear, apart, protocol=protocol, queries=227)['after'].shape[:2] == (4, 3)


@pytest.mark.parametrize(
    'queries, message',
    [(-1, r'queries must lie in \[0, 229\], found -1'), (230, 'queries must lie in'), (229, 'at least two classes')]
)
def test_parts_that_cannot_be_searched(apart, linear, queries, message):
    with pytest.raises(ValueError, match=message): evaluate(linear, apart, queries=queries, **ATTACK)


def test_a_gallery_without_any_class_of_the_queries(apart, linear):
    strangers = sets.ImageSet(apart.images[16:], torch.cat([torch.tensor([7, 8]), apart.labels[18:]]), apart.classes)
    with pytest.raises(ValueError, match='the class of at least one query, found none of those of 2 queries'):
        evaluate(linear, strangers, queries=2, **ATTACK)


def test_records_of_another_version_are_refused(model, images, tmp_path):
    "Valid lines, hashes included, with another name for one thing."
    few, run, options = (
        sets.ImageSet(images.test.images[:24], images.test.labels[:24], images.test.classes[:2]), Run(tmp_path),
        ATTACK | dict(attacks={'ES': SUITE['ES']}, batch_size=12)
    )
    evaluate(model, few, run=run, **options)
    first, *rest = read_lines(run, 'queries.jsonl')
    (tmp_path/'queries.jsonl').unlink()
    for record in ({('after_2' if k == 'after' else k): v for k, v in first.items()}, *rest):
        append_line(run, 'queries.jsonl', record)
    with pytest.raises(StoreError, match='expected after in every line of .*queries.jsonl, found a line without'):
        evaluate(model, few, run=run, **options)


def test_a_batch_that_has_no_room_is_halved(model, images, monkeypatch):
    "The outcomes are those of the whole batch, and a warning says so."
    few = sets.ImageSet(images.test.images[:48], images.test.labels[:48], images.test.classes[:4])
    options = ATTACK | dict(attacks={name: SUITE[name] for name in ('ES', 'QA+')}, batch_size=48)
    whole, real = evaluate(model, few, **options), module.run_attack
    def small(net, attack, x, *args, **kw):
        if len(x) > 10: raise torch.OutOfMemoryError('full')
        return real(net, attack, x, *args, **kw)
    monkeypatch.setattr(module, 'run_attack', small)
    with pytest.warns(
        UserWarning,
        match='expected room for 48 images to be attacked on cpu, found too little; they are attacked in halves'
    ):
        halved = evaluate(model, few, **options)
    assert halved.queries == whole.queries and all(
        halved.after[h] == pytest.approx(whole.after[h], abs=0.5) for h in whole.after
    )
    monkeypatch.setattr(module, 'run_attack', lambda *args, **kw: (_ for _ in ()).throw(torch.OutOfMemoryError('full')))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError): evaluate(model, few, **options)
