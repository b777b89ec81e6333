"Generators, fingerprints, checks and progress."
import dataclasses, json, math, platform, subprocess, sys, typing

import pytest
import torch

from robust_dml import core


@dataclasses.dataclass(frozen=True)
class Attack:
    name:str
    eps:float
    steps:tuple = (1, 2)


def test_fingerprint_is_the_hash_of_canonical_json():
    assert core.fingerprint({'b': [1, .5], 'a': None}) == core.fingerprint({'a': None, 'b': (1, .5)})
    assert core.fingerprint(Attack('CA+', .1)) == core.fingerprint(dict(name='CA+', eps=.1, steps=[1, 2]))
    assert core.fingerprint([Attack('CA+', .1)]) != core.fingerprint([Attack('CA+', .2)])
    value = {'x': {'z': 1, 'y': [True, 'é', 1e-9]}}
    assert core.fingerprint(json.loads(json.dumps(value))) == core.fingerprint(value)


@pytest.mark.parametrize('change', [{'steps': 8.}, {'steps': '8'}, {'steps': 9}, {'extra': None}, {'eps': .1 + 2**-55}])
def test_every_change_changes_the_fingerprint(change):
    base = {'eps': .1, 'steps': 8}
    assert core.fingerprint(base | change) != core.fingerprint(base)


@pytest.mark.parametrize(
    'value, kind',
    [
        (math.nan, ValueError), ([math.inf], ValueError), ({1, 2}, TypeError), (torch.ones(1), TypeError),
        (Attack, TypeError)
    ],
)
def test_fingerprint_refuses(value, kind):
    with pytest.raises(kind, match='a fingerprint takes'): core.fingerprint({'v': value})


def test_generator_is_the_same_in_another_process():
    code = (
        "import torch; from robust_dml.core import generator; print(torch.rand(4, generator=generator(3, 'GTM',"
        " 17)).tolist())"
    )
    other = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True,
        env={'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': '1'}
    ).stdout
    assert json.loads(other) == torch.rand(4, generator=core.generator(3, 'GTM', 17)).tolist()


def test_generators_of_different_keys_differ():
    keys = (
        [(0, 'LTM', '7'), (7, 'LTM'), (0, 'LTM7')]
        + [(s, n, k) for s in range(5) for n in ('LTM', 'GTM', '') for k in range(100)]
        + [(s, k) for s in range(5) for k in range(5)]
    )
    draws = {tuple(torch.randint(1000, (6,), generator=core.generator(*k)).tolist()) for k in keys}
    assert len(draws) == len(keys)


def test_generator_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    torch.rand(5, generator=core.generator(0, 'x'))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('key', [1.5, True, None, (1, 2)])
def test_generator_refuses_other_keys(key):
    with pytest.raises(TypeError, match='strings and integers'): core.generator(0, key)


@pytest.mark.parametrize(
    'x, kind, message',
    [
        (
            torch.rand(2, 1, 4, 4) * 2 - 1, ValueError,
            r'images must lie in \[0, 1\] \(normalisation belongs inside the model\), found range \[-'
        ),
        (torch.full((1, 1, 2, 2), 1.001), ValueError, r'found range \[1.001, 1.001\]'),
        (torch.full((1, 1, 2, 2), -1e-6), ValueError, 'found range'),
        (torch.tensor([0.0, math.nan]).view(1, 1, 1, 2), ValueError, '1 NaN or infinite of 2'),
        (torch.tensor([0.0, math.inf]).view(1, 1, 1, 2), ValueError, 'NaN or infinite'),
        (torch.rand(4, 4), ValueError, r'\(B, C, H, W\), found \(4, 4\)'),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, 'found torch.uint8'),
        ([[0.0]], TypeError, 'found list'),
    ],
)
def test_check_images_refuses(x, kind, message):
    with pytest.raises(kind, match=message): core.check_images(x)


def test_check_images_channels_and_types():
    x = torch.rand(2, 3, 4, 4)
    assert core.check_images(x, channels=3) is x
    for dtype in (torch.float64, torch.float16, torch.bfloat16): core.check_images(x.to(dtype))
    core.check_images(x.requires_grad_())
    with pytest.raises(ValueError, match='must have 1 channels, found 3'): core.check_images(x, channels=1)


@pytest.mark.parametrize('value', [-.001, 1.001, math.nan, math.inf])
def test_check_between_refuses(value):
    with pytest.raises(ValueError, match=r'margin must lie in \[0, 1\], found'):
        core.check_between('margin', value, 0, 1)


def test_check_between_accepts_the_ends_and_hints_at_pixel_units():
    assert [core.check_between('eps', v, 0, 1) for v in (0, .5, 1)] == [0, .5, 1]
    with pytest.raises(ValueError, match='8/255 is 0.031'): core.check_between('eps', 8, 0, 1)
    with pytest.raises(ValueError) as err: core.check_between('eps', -1, 0, 1)
    assert '255' not in str(err.value)
    with pytest.raises(TypeError, match='must be a number'): core.check_between('eps', '8/255', 0, 1)


def test_need_names_the_pip_package(monkeypatch):
    for package, pip in (('sklearn', 'scikit-learn'), ('faiss', 'faiss-cpu')):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f'the backend needs {package}; install it with: pip install {pip}'):
            core.need(package, 'the backend')


def test_need_keeps_the_error_of_a_broken_package(tmp_path, monkeypatch):
    (tmp_path/'half_installed_xyz.py').write_text('import missing_dependency_xyz')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_dependency_xyz"): core.need('half_installed_xyz', 'a test')


def test_progress_writes_lines_to_a_log(capsys):
    with core.progress(desc='epoch', total=4, initial=1) as bar: bar.update(3)
    log = capsys.readouterr().err
    assert (
        '\r' not in log
        and log.endswith('\n')
        and '4/4' in log.splitlines()[-1]
        and log.splitlines()[-1].startswith('epoch')
    )
    assert list(core.progress(range(2), desc='quiet', show=False)) == [0, 1]
    assert capsys.readouterr().err == ''


def clock(step=1.):
    "Seconds that pass only when they are read."
    now = iter(range(10**6))
    return lambda: step*next(now)


def test_stopwatch_adds_laps_by_name():
    watch = core.Stopwatch(seconds={'update': 5.}, clock=clock(.5))
    for _ in range(3):
        with watch('update'): pass
    with watch('outer'):
        with watch('inner'): pass
    assert watch.seconds == {'update': 6.5, 'outer': 1.5, 'inner': .5}  # the outer one holds two more readings
    assert json.loads(json.dumps(watch.seconds)) == watch.seconds
    earlier = {'a': 1.}
    with core.Stopwatch(seconds=earlier)('a'): pass
    assert earlier == {'a': 1.}


def test_stopwatch_leaves_out_what_failed():
    watch = core.Stopwatch(clock=clock())
    with pytest.raises(KeyboardInterrupt):
        with watch('update'): raise KeyboardInterrupt
    assert watch.seconds == {}


def test_stopwatch_waits_for_the_gpu(monkeypatch):
    "The device is waited for before either reading; a CPU is not."
    events, tick = [], clock()
    def read(): events.append('clock'); return tick()
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append(str(device)))
    with core.Stopwatch('cuda:1', clock=read)('update'): events.append('work')
    assert events == ['cuda:1', 'clock', 'work', 'cuda:1', 'clock']
    events.clear()
    with core.Stopwatch('cpu', clock=read)('update'): pass
    assert events == ['clock', 'clock']


def test_stopwatch_counts_the_wait_and_not_the_work():
    tick = clock()
    def slow():
        for k in range(3): tick(); yield k  # one second to make
    watch = core.Stopwatch(clock=tick)
    for _ in watch.each('data', slow()): [tick() for _ in range(100)]  # a hundred to use
    assert watch.seconds == {'data': 3*2. + 1.}


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_kept_memory_spares_page_faults_and_gives_back():
    pytest.importorskip('resource')
    code = '''if True:
        import resource, torch
        from robust_dml.core import kept_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10): torch.ones(2**24)   # 64 MiB
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        def inside():
            with kept_memory():
                faults()
                return faults()
        first = faults()
        try:
            with kept_memory(): raise KeyError
        except KeyError: pass
        print(first, inside(), faults())
    '''
    before, inside, after = map(
        int, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert inside < before/10 and after > inside


# registries and a user's own
def _soft(): return 1


def test_a_name_is_taken_once(tmp_path):
    shelf = core.Registry('defense')
    assert shelf.add('soft', 'first', _soft) == shelf.add('soft', 'first', _soft) == shelf['soft']
    with pytest.raises(ValueError, match="each defense must have a name of its own, found 'soft' for .*; choose"):
        shelf.add('soft', 'second', core.meant)
    assert shelf.items() == [('soft', 'first')]


def test_an_unknown_name_is_told_which_was_meant():
    shelf = core.Registry('attack')
    for name in ('swap', 'flee'): shelf.add(name, name, _soft)
    with pytest.raises(ValueError, match="^attack must be one of swap, flee, .* found 'swop'; did you mean 'swap'[?]$"):
        shelf['swop']
    assert 'swop' not in shelf and 'swap' in shelf and [*shelf] == ['swap', 'flee']


def test_a_folder_adds_its_modules(tmp_path, monkeypatch):
    "The modules of a folder are imported when a name is asked for; one that fails leaves the registry unloaded."
    import robust_dml.triplets as folder
    text = 'from robust_dml.core import SHELF\ndef soft(): ...\nSHELF.add("soft", "a record", soft)\n'
    monkeypatch.setattr(folder, '__path__', [str(tmp_path)])
    monkeypatch.setattr(core, 'SHELF', shelf := core.Registry('defense', 'triplets'), raising=False)
    (tmp_path/'new_defense.py').write_text('1/0')
    with pytest.raises(ZeroDivisionError): shelf.names()
    (tmp_path/'new_defense.py').write_text(text + '#'*9)
    assert shelf.names() == ('soft',)
    monkeypatch.delitem(sys.modules, 'robust_dml.triplets.new_defense')


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "Writes a module of a user into the working directory."
    monkeypatch.chdir(tmp_path)
    made = []
    def write(text, name='user_lab'):
        (tmp_path/f'{name}.py').write_text(text)
        made.append(name)
    yield write
    for name in made: sys.modules.pop(name, None)


def test_a_users_function_runs_as_its_file_is_now(lab):
    sources = set()
    for k in range(3):
        lab(f'import json\nHELP = {k}\ndef soft(): return HELP\n')
        found = core.refer('user_lab:soft')
        sources.add(found.source)
        assert found.value() == k and core.refer('user_lab:soft') == found
    assert len(sources) == 3


def test_a_module_imported_before_it_changed_is_run_again(lab):
    lab('def soft(): return 1\n')
    with core._here(): import user_lab
    lab('def soft(): return 2\n')
    assert core.refer('user_lab:soft').value() == 2 and user_lab.soft() == 2


@pytest.mark.parametrize(
    'text, named, kind, message',
    [
        ('', 'no_lab_xyz:soft', ValueError, 'expected a module no_lab_xyz, found none in .*; start where'),
        ('import gone_xyz', 'user_lab:soft', ValueError, 'user_lab must be importable, found that it needs gone_xyz'),
        ('1/0', 'user_lab:soft', ValueError, 'user_lab must be importable, found ZeroDivisionError: division by'),
        ('def (', 'user_lab:soft', ValueError, 'user_lab must be importable, found SyntaxError'),
        ('raise SystemExit', 'user_lab:soft', ValueError, 'user_lab must be importable, found SystemExit'),
        ('def soft(): ...', 'user_lab:sofd', ValueError, "must have sofd, found no such name; did you mean 'soft'"),
        ('soft = 3', 'user_lab:soft', TypeError, 'user_lab:soft must be a function, found int'),
        ('', 'user lab:soft', ValueError, "expected module:function, found 'user lab:soft'; write mylab:soft"),
        ('', 'user_lab', ValueError, 'expected module:function'), ('', ':soft', ValueError, 'expected module:function'),
    ],
)
def test_a_users_module_that_does_not_do(lab, text, named, kind, message):
    lab(text)
    with pytest.raises(kind, match=message) as error: core.refer(named)
    assert '\n' not in str(error.value)


def test_the_source_of_a_package_is_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (('__init__', ''), ('soft', 'from .help import soft'), ('help', 'def soft(): return 1')):
        (tmp_path/'user_package').mkdir(exist_ok=True)
        (tmp_path/'user_package'/f'{name}.py').write_text(text)
    found = core.refer('user_package.soft:soft')
    assert found.value() == 1
    (tmp_path/'user_package'/'help.py').write_text('def soft(): return 2')
    with pytest.raises(ValueError, match='its package changed since it was imported; start Python anew'):
        core.refer('user_package.soft:soft')
    for name in ('', '.soft', '.help'): sys.modules.pop(f'user_package{name}')


def test_options_are_read_by_their_types():
    kind = typing.Literal['a']
    def method(*, eps:float, miner:str, steps:int=3, top:float|None=None, on:bool=True, kind:kind='a'): ...
    kinds = core.option_types(method)
    for name, text, value in (
        ('eps', '1', 1.0), ('eps', '.5', .5), ('miner', '1', '1'), ('steps', '4', 4), ('top', 'null', None),
        ('top', '2', 2.0), ('on', 'false', False), ('kind', 'b', 'b')
    ):
        found = core.read_option(name, text, kinds[name])
        assert found == value and type(found) is type(value), name
    for name, text, words in (
        ('eps', 'many', "eps must be a number, found 'many'"), ('eps', '.x', "eps must be a number, found '0.x'"),
        ('steps', '2.5', 'steps must be a whole number, found 2.5'),
        ('on', '1', 'on must be true or false, found 1'), ('top', 'true', 'top must be a number or null, found True'),
        ('eps', '[1]', 'eps must be a number, found')
    ):
        with pytest.raises((TypeError, ValueError), match=words): core.read_option(name, text, kinds[name])


@pytest.mark.parametrize('name', ['name', 'out', 'images', 'model'])
@pytest.mark.parametrize('value', [1.1, 7])
def test_a_name_that_papermill_read_as_a_number_is_refused_with_the_way_out(name, value):
    "papermill makes 1.1 of 1.10 and 7 of 007; what was typed is lost."
    with pytest.raises(ValueError, match=f'must be text, found the number {value}.*write -r {name} TEXT'):
        core.typed(name, value, '')
    assert core.typed(name, ' 007 ', '') == '007' and core.typed('seeds', 0, '') == '0'
