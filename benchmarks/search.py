"""Retrieval measures, neighbours and NMI at the sizes of the papers' test sets, about 5.3 images of each class as in
SOP."""
import os, subprocess, sys, tempfile
from functools import cache
from pathlib import Path

import torch
from common import Item
from robust_dml.triplets.distances import normalise
from robust_dml.metrics.retrieval import nmi, retrieval
from robust_dml.neighbors import knn, resolve_backend

NITER, SEED = 25, 123 # of k-means, as in `metrics.retrieval.nmi`


@cache
def embeddings(rows:int, classes:int, dim:int=512)->tuple[torch.Tensor, torch.Tensor]:
    """Class centres plus noise at unit length, and labels in random order; every class has two images or more where
    there is room for that."""
    gen = torch.Generator().manual_seed(0)
    more = torch.randint(classes, (max(0, rows - 2*classes),), generator=gen)
    label = torch.cat([torch.arange(classes).repeat(2), more])[torch.randperm(rows, generator=gen)]
    emb = normalise(torch.randn(classes, dim, generator=gen))[label]
    return normalise(emb.add_(torch.randn(rows, dim, generator=gen), alpha=1.8/dim**.5)), label


def measures(emb, label)->tuple[float, float, float]:
    "R@1, R@2 and mAP."
    found = retrieval(emb, label)
    defined = found.rank >= 0
    return tuple(v[defined].double().mean().item() for v in (found.rank < 1, found.rank < 2, found.ap))


def product_and_topk(emb, k:int):
    "Blocks of 1024 queries into one buffer, and the `k` nearest of each."
    out = emb.new_empty(min(1024, len(emb)), len(emb))
    for query in emb.split(len(out)): torch.mm(query, emb.T, out=out[:len(query)]).topk(k, dim=1)


def peak_memory(emb, label)->dict:
    "Peak extra memory of `measures` in a process of its own, MiB."
    with tempfile.TemporaryDirectory() as folder:
        torch.save((emb, label), path := Path(folder)/'embeddings.pt')
        env = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
        shown = subprocess.run(
            [sys.executable, __file__, str(path), str(torch.get_num_threads())], env=env, capture_output=True,
            text=True, check=True
        ).stdout
    return dict(extra_mib=float(shown))


def resident(name:str)->float:
    """Memory of this process in MiB, now ('VmRSS') or at most so far ('VmHWM'): Linux's own account, since that of
    getrusage begins with the parent's peak."""
    return int(Path('/proc/self/status').read_text().split(f'{name}:')[1].split()[0])/1024


def child(path:str, threads:str)->float:
    "Memory at its peak minus memory before the call, everything loaded and a small call made."
    torch.set_num_threads(int(threads))
    emb, label = torch.load(path)
    measures(emb[:2000], label[:2000] % 300)
    before = resident('VmRSS')
    measures(emb, label)
    return resident('VmHWM') - before


def ranking(rows:int, classes:int, *, full:bool)->Item:
    "One pass for the three ranking measures."
    emb, label = embeddings(rows, classes)
    return Item(
        'search', 'R@1, R@2, mAP', f'{rows:,} x 512, {classes:,} classes', ours=lambda: measures(emb, label),
        bound=lambda: product_and_topk(emb, 3),
        bound_is='one matrix product of the embeddings in blocks of 1024 rows, and the 3 largest of each row',
        target=2.0, pairs=3 if rows > 20_000 else 7,
        extra=lambda: (
            peak_memory(emb, label)
            if Path('/proc/self/status').exists() and rows >= (60_000 if full else 10_000)
            else {}
        ),
    )


def neighbours(rows:int, classes:int)->Item:
    "Lists of neighbours by PyTorch."
    emb, _ = embeddings(rows, classes)
    own = torch.arange(rows)
    return Item(
        'search', 'kNN, k=10', f'{rows:,} x 512', ours=lambda: knn(emb, emb, k=10, rows=own),
        bound=lambda: product_and_topk(emb, 11),
        bound_is='one matrix product of the embeddings in blocks of 1024 rows, and the 11 largest of each row',
        target=2.0, pairs=3 if rows > 20_000 else 7
    )


def clusters(rows:int, classes:int, pairs:int)->Item:
    "k-means of NMI by faiss against the assignments of as many rounds as it makes."
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    emb, label = embeddings(rows, classes)
    x, start = emb.numpy(), emb[torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:classes]].numpy()
    @cache
    def rounds()->int:
        trial = faiss.Kmeans(x.shape[1], classes, niter=NITER, seed=SEED, min_points_per_centroid=1)
        trial.train(x)
        return len(trial.iteration_stats) # fewer than NITER where it converged
    def assign():
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(start)
        for _ in range(rounds() + 1): index.search(x, 1)
    return Item(
        'search', 'NMI', f'{rows:,} x 512, {classes:,} clusters', bound=assign, target=1.3, pairs=pairs,
        ours=lambda: nmi(emb, label, k=classes, seed=SEED, backend='faiss'),
        bound_is='the nearest centroid of every row by faiss, once for each round that its k-means makes and once more'
    )


def items(*, full:bool):
    for rows,classes in ((2_000, 377), (10_000, 1_887)) + ((60_000, 11_316),)*full:
        yield ranking(rows, classes, full=full)
    yield neighbours(10_000, 1_887)
    if resolve_backend('auto') == 'faiss': yield clusters(60_000, 11_316, 2) if full else clusters(10_000, 1_000, 3)


if __name__ == '__main__': print(child(*sys.argv[1:]))
