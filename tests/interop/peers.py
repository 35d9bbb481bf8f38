"""What bench_peers.py and train_peers.py share: where the peers' kernels come from, and which of their configurations are tried.

fla's and mamba_ssm's Triton kernels choose among configurations (tile sizes, warps, stages) by timing each at the first call. Compiling
them all takes minutes before anything can be measured. It needs no GPU, though: with --compile-only, a script runs its models and ops on
torch's meta device, which has shapes and no memory, notes every kernel that would be launched, and compiles them for sm_90 into
TRITON_CACHE_DIR, on several machines or in several processes if --part says so. Beside them lie lists of what was compiled,
configurations-*.txt. On a GPU machine with that folder at the same path and the same torch, Triton and peers, autotuners choose from
these lists alone, and the script says how many configurations of how many that were.
"""
import contextlib
import math
import os
import pathlib
import sys
import time
import types
import zlib

SM_90 = dict(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, max_shared_mem=232448, total_memory=150_000_000_000)


def use_mamba_source(folder):
    """Opens mamba_ssm without its own __init__, which wants kernels that are not measured here."""
    if folder:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(folder / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package


def add_compile_options(parser):
    parser.add_argument("--compile-only", action="store_true", help="compile what would be launched into TRITON_CACHE_DIR; needs no GPU")
    parser.add_argument("--few", type=int, default=0, help="... at most so many configurations of each kernel, the usual ones; 0: all")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="... the I-th of N shares, from 0")
    parser.add_argument("--compile-seconds", type=float, default=1e9, help="... and begin nothing after that")


def fix_triton_key():
    """Triton's cache knows a kernel by the bits of all of Triton's own files; a release's name will do, wherever it was installed."""
    import triton
    import triton.compiler.compiler as compiler
    import triton.runtime.autotuner as autotuner
    import triton.runtime.cache as cache

    for module in (cache, compiler, autotuner):
        module.triton_key = lambda: f"triton {triton.__version__}"


def named(tuner, config, args, kwargs):
    """A configuration of a kernel for arguments of certain types"""
    tensors = [str(v.dtype)[6:] for v in (*args, *kwargs.values()) if hasattr(v, "dtype")]
    return f"{tuner.base_fn.__name__} {config} {' '.join(tensors)}"


def distance_from_usual(config):
    """The usual: 4 warps, 3 stages, tiles of 64 x 64."""
    tile = math.prod(size for name, size in config.kwargs.items() if name.startswith("B"))
    return abs(math.log2(config.num_warps / 4)) + abs(config.num_stages - 3) / 2 + abs(math.log2(tile / 4096)) / 2


class Tuning:
    """On a GPU: autotuners choose among what was compiled beforehand, each configuration timed for 10 ms (Triton's default is 100)."""

    def __init__(self, few=2):
        import triton.testing
        from triton.runtime.autotuner import Autotuner

        fix_triton_key()
        lists = pathlib.Path(os.environ.get("TRITON_CACHE_DIR", "/nowhere")).glob("configurations-*.txt")
        compiled = {line for path in lists for line in path.read_text().splitlines()}
        self.tried, self.known, self.chosen = {}, {}, {}  # by kernel
        self.tuners = set()
        run, prune = Autotuner.run, Autotuner.prune_configs

        def tuned_run(tuner, *args, **kwargs):
            tuner._do_bench = lambda call, quantiles: triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)
            tuner.cache_results = False
            self.tuners.add(tuner)
            result = run(tuner, *args, **kwargs)
            if len(tuner.configs) > 1:
                self.chosen[tuner.base_fn.__name__] = str(tuner.best_config)
            return result

        def pruned(tuner, kwargs):
            configs = prune(tuner, kwargs)
            args = tuner.nargs.values()
            ready = [c for c in configs if named(tuner, c, args, kwargs) in compiled] or sorted(configs, key=distance_from_usual)[:few]
            self.known[tuner.base_fn.__name__], self.tried[tuner.base_fn.__name__] = len(configs), len(ready)
            return ready

        Autotuner.run, Autotuner.prune_configs = tuned_run, pruned

    def forget(self):
        """Autotuners choose anew; of themselves they look at few sizes, and keep what was best for the first batch."""
        for tuner in self.tuners:
            tuner.cache.clear()

    def taken(self):
        """Since the last call: "12 of 30 configurations of 4 kernels"."""
        text = f"{sum(self.tried.values())} of {sum(self.known.values())} configurations of {len(self.known)} kernels" if self.known else ""
        self.tried, self.known = {}, {}
        return text

    def print_chosen(self):
        print("chosen: " + "; ".join(f"{kernel} {config}" for kernel, config in sorted(self.chosen.items())))


class Argument:
    """A tensor as a compiler sees it: its type, and whether it is aligned."""

    def __init__(self, tensor):
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        return self.offset

    def ptr_range(self):
        return 1 << 40


class Compiling:
    """Without a GPU: kernels are noted instead of launched, and compiled for sm_90 afterwards."""

    def __init__(self):
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        class Driver:
            utils = types.SimpleNamespace(get_device_properties=lambda index=0: {
                "max_shared_mem": SM_90["max_shared_mem"], "multiprocessor_count": SM_90["multi_processor_count"], "warpSize": 32})
            get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device=None: 0)
            get_active_torch_device = staticmethod(lambda: torch.device("meta"))
            get_device_interface = staticmethod(lambda: torch.cuda)

        fix_triton_key()
        triton.runtime.driver.set_active(Driver())
        self.stand_in_for_cuda(torch)
        self.calls = {}  # what to compile: (rank among a kernel's configurations, what to run, its arguments, name, share)
        self.run_kernel = JITFunction.run

        def note_kernel(kernel, *args, grid=None, warmup=False, **kwargs):
            self.note(kernel.__name__, 0, kernel, args, kwargs, None)

        def note_configurations(tuner, *args, grid=None, warmup=False, **kwargs):
            tuner.nargs = dict(zip(tuner.arg_names, args))
            configs = sorted(tuner.prune_configs(kwargs), key=distance_from_usual)
            tuner.best_config = configs[0]  # mamba_ssm sizes its sums by it
            for rank, config in enumerate(configs):
                name = named(tuner, config, args, kwargs)
                self.note(name, rank, tuner.fn, args, {**kwargs, **config.all_kwargs()}, name if len(configs) > 1 else None)

        JITFunction.run, Autotuner.run = note_kernel, note_configurations

    def note(self, key, rank, what, args, kwargs, name):
        def seen(value):
            return (value.dtype, Argument(value).offset % 16) if hasattr(value, "dtype") else value

        key = str((key, list(map(seen, args)), {k: seen(v) for k, v in kwargs.items()}))
        self.calls.setdefault(key, (rank, what, args, kwargs, name, zlib.crc32((name or key).encode())))

    @staticmethod
    def stand_in_for_cuda(torch):
        for name, value in dict(is_available=True, is_bf16_supported=True, get_device_name=SM_90["name"], current_device=0, device_count=1,
                                get_device_capability=(9, 0), get_device_properties=types.SimpleNamespace(**SM_90), synchronize=None,
                                empty_cache=None, reset_peak_memory_stats=None, max_memory_allocated=0).items():
            setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        torch.cuda.device = lambda *args: contextlib.nullcontext()
        torch.Tensor.item = lambda tensor: 1 << 15  # fla's loss asks how many rows count
        torch.Tensor.__bool__ = lambda tensor: False  # and whether the gradient of the loss is another number than 1
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args: self.to("meta")
        torch.set_default_device("meta")
        for name in ("causal_conv1d_cuda", "selective_scan_cuda"):  # no Triton: nothing to compile, but to import
            sys.modules.setdefault(name, types.ModuleType(name))

    def compile(self, part, parts, few, seconds):
        """One of the parts of what was noted, the first configuration of each kernel before the second of any; few: at most so many."""
        from triton.runtime.jit import JITFunction

        def argument(value):
            return Argument(value) if hasattr(value, "dtype") else value

        def compile_kernel(kernel, *args, grid=None, warmup=True, **kwargs):
            return self.run_kernel(kernel, *map(argument, args), grid=(1,), warmup=True, **{k: argument(v) for k, v in kwargs.items()})

        JITFunction.run = compile_kernel
        begin, done, skipped, failed = time.time(), 0, 0, {}
        calls = sorted((call[:5] for call in self.calls.values() if call[5] % parts == part), key=lambda call: call[0])
        with open(pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / f"configurations-{part}-of-{parts}.txt", "a") as listed:
            for rank, what, args, kwargs, name in calls:
                if (few and rank >= few) or time.time() > begin + seconds:
                    skipped += 1
                    continue
                try:
                    compiled = what.run(*args, grid=(1,), warmup=True, **kwargs)
                    done += 1
                    if name and compiled.metadata.shared <= SM_90["max_shared_mem"]:
                        print(name, file=listed, flush=True)
                except Exception as error:  # what an autotuner on a GPU would skip, too
                    failed[name or str(what)] = repr(error)[:200]
        print(f"part {part} of {parts}: {len(calls)} of {len(self.calls)} kernels and configurations, {done} compiled in "
              f"{time.time() - begin:.0f} s, {skipped} left out, {len(failed)} failed", flush=True)
        for name, error in failed.items():
            print(f"  {name}: {error}", flush=True)


def autocast_on_meta():
    """What torch.autocast("cuda", torch.bfloat16) does to the operators used here, for tensors without memory, which it leaves alone."""
    import torch
    from torch.overrides import TorchFunctionMode

    F = torch.nn.functional
    products = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm, torch.einsum}
    narrow = products | {F.linear, F.conv1d}
    wide = {F.softplus, torch.exp, torch.Tensor.exp, torch.sum, torch.Tensor.sum}

    class Autocast(TorchFunctionMode):
        def __torch_function__(self, func, kinds, args=(), kwargs=None):
            dtype = torch.bfloat16 if func in narrow else torch.float32 if func in wide else None
            if dtype and torch.is_autocast_enabled("cuda"):
                cast = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                args, kwargs = [cast(v) for v in args], {k: cast(v) for k, v in (kwargs or {}).items()}
            return func(*args, **(kwargs or {}))

    return Autocast()
