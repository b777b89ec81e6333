"""The parameters cells of all run notebooks, from one list: `python tests/parameters.py` writes them, a test compares."""
import json
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
PRESETS = 'smoke, quick, small, medium (GPU), photos, photos96, paper'
SETS = (
    'glyphs, omniglot, cub, cars, sop, inshop, grocery, mnist, fashion, the path of a folder of class folders, or'
    ' module:function of your own'
)
BACKBONES = 'small, c2f2, resnet18, resnet34, resnet50, googlenet, convnext_tiny, efficientnet_b0, mobilenet_v2, torchvision:NAME, timm:NAME or module:function'
STUDIES = (
    'switches, paper_switches, hard_triplets, lambda, early_disabling, limits, baselines, locality, stress, compare,'
    ' fairness, timing, all_defenses'
)
TABLE = dict(  # name: default as it is written, what it means; papermill shows no line with a second equals sign
    dataset=("'glyphs'", SETS),
    root=("''", 'folder with the files of omniglot, cub, ...'),
    preset=("'quick'", PRESETS),
    defenses=(
        "''",
        "comma-separated names of defenses, with switches as the README shows them, or module:function of your own;"
        " empty: this table's own"
    ),
    attacks=("''", 'further attacks, each with a plus: +mylab:swap for swap in mylab.py; empty: the ten alone'),
    seeds=("''", "comma-separated; empty: the preset's"),
    profile=(
        "''",
        'versions of COLO-TRIDE, comma-separated: official, paper, paper_range, paper_steps, tuned; empty: the'
        " preset's"
    ),
    device=("'auto'", 'auto, cpu, cuda'),
    epochs=('0', "training epochs; 0: the preset's"),
    pairs=('0', "pairs of images in a batch; 0: the preset's"),
    lr=('0.0', "learning rate; 0: the preset's"),
    head_lr=('0.0', "learning rate of the embedding head; 0: the preset's"),
    eps=('0.0', "radius of training and attacks in 255ths: 8 means 8/255; 0: the preset's"),
    steps=('0', "inner steps of every method, COLO-TRIDE's in the preset's ratio; 0: the preset's"),
    limit=('0', 'attack at most this many queries; 0: all'),
    weights=("''", "torchvision weights, a safetensors file, or none; empty: the preset's"),
    backbone=("''", f"network in place of the preset's: {BACKBONES}"),
    backend=("'auto'", 'k-means by faiss or torch'),
    precision=("''", 'bfloat16: half precision inside the network, for GPUs; empty: float32'),
    compiled=('False', 'translate the attacked network by torch.compile'),
    executor=(
        "'inline'", 'where cells are computed: inline, local (processes) or slurm (a cluster); see runs/01_jobs.ipynb'
    ),
    out=("''", 'folder for reports and store; empty: reports/'),
    skip_unreadable=('False', 'leave damaged images out')
)
AUDIT = dict(
    model=(
        "'torchvision:resnet18'",
        'torchvision:NAME, timm:NAME, module:function of the working directory, a TorchScript file (.pt) or an exported'
        ' program (.pt2)'
    ),
    weights=(
        "''",
        'a safetensors file or a plain state dict; for torchvision the name of its weights, which are then downloaded;'
        " empty: random or the model's own"
    ),
    images=(
        "''",
        'a folder of class folders, or a csv or txt list of path,label or path,label,split with query or gallery as'
        ' split'
    ),
    queries=("''", 'a second folder or list, of queries that are not searched; empty: none'),
    size=('224', 'images are resized to size x size'),
    normalise=("''", 'imagenet or none; empty: imagenet for torchvision and timm'),
    eps=('8', 'largest change of a pixel, in 255ths'),
    steps=('16', 'gradient steps of each attack'),
    limit=('64', 'attack at most this many queries; 0: all'),
    gallery=('5000', 'search at most this many images, whole classes at random; 0: all'),
    attacks=(
        "''",
        'comma-separated: CA+, CA-, QA+, QA-, TMA, ES, LTM, GTM, GTT, LTM fixed, GTM fixed, LTM nearest; empty: all'
    ),
    seed=('0', 'of the sample, the queries and the random targets'),
    device=("'auto'", 'auto, cpu, cuda'),
    batch_size=('32', 'queries attacked together'),
    name=("''", 'what the page calls the model; empty: the last part of `model`'),
    trust=('False', 'load a file that may run code: .pt and .pt2'),
    skip_unreadable=('False', 'leave damaged images out'),
    out=("''", 'folder for reports and store; empty: reports/')
)


def changed(base:dict, **says)->dict:
    "A list with other words, or with another default and other words, for some names; None leaves a name out."
    found = dict(base)
    for name, new in says.items():
        if new is None: del found[name]
        else: found[name] = new if isinstance(new, tuple) else (base[name][0], new)
    return found


def after(base:dict, name:str, **more)->dict:
    "A list with further parameters behind one of its names."
    cut = [*base].index(name) + 1
    items = [*base.items()]
    return dict([*items[:cut], *more.items(), *items[cut:]])


TUPLES = (
    'natural_triplet, tuples_triplet, natural_contrastive, tuples_contrastive, moved_neg, moved_anc, rate_25, rate_50,'
    ' per_image, jointly'
)
EAT = (
    'pal_natural, pal_at, at_long, pal_mixup, pal_mixup_at, pal_trades, pal_alp, ensemble_at, joint_at, adp, gal,'
    ' dverge, tuples, colo_tride, eat_none, eat, eat_ensemble, eat_full, eat_all, eat_distil, eat_two, eat_five,'
    ' eat_focus, eat_class, eat_unclean, eat_narrow'
)
IN_TRAINING = 'bfloat16: half precision inside the network in training, for GPUs; empty: float32'
LISTS = {
    **dict.fromkeys(('table1', 'table2', 'table3', 'table4', 'figure3', 'figure4'), TABLE),
    'ablation': dict(study=("'lambda'", STUDIES)) | TABLE,
    'all': changed(
        TABLE,
        defenses="comma-separated names of defenses, with switches as the README shows them; empty: each table's own",
        limit="attack at most this many queries; 0: each table's own"
    ),
    'reference': changed(
        TABLE, dataset=("'fashion'", 'the set for which numbers are printed'),
        root='folder with the files of Fashion-MNIST; empty: where Debian puts them',
        preset=("'paper'", 'the protocol of the printed numbers'),
        seeds=("'0,1,2'", 'comma-separated; three are needed for a spread')
    ),
    'explore': changed(TABLE, preset='smoke, quick, small, paper'),
    'tuples': changed(
        TABLE, defenses=f'comma-separated: {TUPLES}; empty: all', profile='not used here', backend='not used here',
        precision=IN_TRAINING, compiled='not used here', attacks='not used here', executor=None
    ),
    'eat': changed(
        TABLE,
        defenses=f'comma-separated: {EAT}; empty: all; for small and medium fourteen of them, for quick nine, for smoke'
        ' three',
        profile="version of COLO-TRIDE: official or paper; empty: the preset's first",
        limit='attack random whole classes with at most this many images; 0: all, for quick 400, for small and medium'
        ' 500',
        precision=IN_TRAINING, compiled='not used here', attacks='not used here', executor=None
    ),
    'tune': changed(
        after(
            TABLE, 'defenses', candidates=('0', "settings per method, the default among them; 0: the preset's"),
            tune_epochs=('0', "epochs of the search; 0: two fifths of the preset's"),
            tune_limit=('0', 'attacked queries of the search; 0: 250'),
            draw=('0', 'seed of the held-out classes and of the random settings')
        ),
        defenses='comma-separated: act, hm, colo_tride, naive_tride, naive_sip, or module:function of your own; empty: the'
        ' five',
        seeds="comma-separated, of the confirmation; the search trains with the first; empty: the preset's",
        profile="the default COLO-TRIDE: official or paper; empty: the preset's first",
        epochs="epochs of the confirmation; 0: the preset's",
        limit='attack at most this many queries in the confirmation; 0: all', executor=None
    ),
    'cost': changed(
        TABLE, dataset='glyphs, omniglot, cub, cars, sop, mnist, fashion, or the path of a folder of class folders',
        defenses='comma-separated: natural, act, hm, colo_tride, naive_cap, naive_anp, naive_tride, naive_sip; empty:'
        ' the first four',
        weights='as in run_table1; changes no time', precision="float32 or bfloat16; empty: the preset's",
        compiled='as in run_table1; the forecast is made without',
        executor='as in run_table1; the forecast is made here'
    ),
    'scale': dict(
        images=(
            '60000', 'gallery on which the indexes are asked, at least 4,000; glyphs are drawn until there are enough'
        ),
        queries=('500', 'attacked at most'),
        preset=("'quick'", 'smoke, quick, small: of the two models that are attacked'),
        gpus=('1000', 'the most devices'), trainings=('12', 'of a table'),
        bandwidth=('25.0', 'GB/s between two devices'), latency=('10.0', 'microseconds per message'),
        speed=('0.0', 'images and inner steps per second of your GPU; 0: measured on this machine'),
        processes=('2', 'processes of this machine that share an update; 1: not measured'),
        device=TABLE['device'], out=TABLE['out']
    ),
    'data': dict(
        dataset=("'cub'", 'cub, cars, sop, inshop, grocery, mnist, fashion'),
        root=(
            "''",
            "the set's folder or the one that holds it; empty: the current folder; fashion also from Debian's package"
        ),
        size=('0', "with full: side of the cached images; 0: the set's (256 for photographs)"),
        full=('False', 'decode every image, not only look for the files')
    ),
    'errata': dict(out=("''", 'folder for reports; empty: reports/')),
    'claims': dict(out=("''", 'folder of the reports; empty: reports/')),
    'appendix_a': dict(
        dataset=("'glyphs'", 'glyphs, or the path of a folder of class folders'),
        preset=("'smoke'", 'smoke, quick, small, medium (GPU), paper: size of the network whose triplets are moved'),
        seed=('0', 'of the training and of the triplets'), out=("''", 'folder for reports; empty: reports/')
    ),
    'audit': AUDIT,
    'harden': changed(
        after(
            AUDIT, 'images',
            train_images=(
                "''",
                'other images to train on; empty: the first half of the classes of `images`, and the second half is'
                ' audited'
            ),
            defense=("'hm'", 'act, hm, colo_tride, ... with switches as the README shows them'),
            epochs=('10', 'of training'), pairs=('32', 'pairs of images per batch'),
            lr=('1e-5', 'learning rate; 1e-3 for a network with random weights'),
            weight_decay=('4e-4', 'of the optimiser'), inner_steps=('8', 'steps of the attack in each update')
        ),
        queries='stays empty: mark queries by a split in a list file'
    )
}


def cell(
    notebook:str, # key of LISTS
)->str:           # source of the cell
    "The parameters of a run notebook, a line each."
    assigned = {name: f'{name} = {default}' for name, (default, _) in LISTS[notebook].items()}
    wide = min(23, max(map(len, assigned.values())))
    return '\n'.join(f'{text:{wide}} # {LISTS[notebook][name][1]}' for name, text in assigned.items())


def write()->list[str]: # names of the notebooks that were changed
    "Put the list into the notebooks."
    changed_here = []
    for name in LISTS:
        path = NBS/f'run_{name}.ipynb'
        book = json.loads(path.read_text(encoding='utf-8'))
        mine, = (c for c in book['cells'] if 'parameters' in c['metadata'].get('tags', []))
        source = cell(name).splitlines(keepends=True)
        if mine['source'] == source: continue
        mine['source'] = source
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        changed_here.append(name)
    return changed_here


if __name__ == '__main__': print(*write() or ['all parameters cells are as the list says'], sep='\n')
