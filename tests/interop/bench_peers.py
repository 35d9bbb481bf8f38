#!/usr/bin/env python3
"""longhand's ops and those of fla, mamba_ssm and torch, timed on one GPU in one run, at the shapes of longhand's benches.

  gla                 fla's chunk_gla (log gates ready; longhand's bench starts from logits)
  ssd                 mamba_ssm's mamba_chunk_scan_combined (softplus, bias and D inside, as in longhand)
  selective_scan      mamba_ssm's selective_scan_fn, where its compiled extension is installed; otherwise a line says that it was left out
  cross_entropy       fla's fused_linear_cross_entropy_loss
  add_rmsnorm         mamba_ssm's rms_norm_fn with a residual in f32
  causal_conv1d_silu  fla's causal_conv1d (Triton)
  adamw               torch's clip_grad_norm_ and fused AdamW

Triton alone is needed: an unpacked source of mamba_ssm is enough (--mamba-source), and the wheel fla-core. Times are medians of CUDA events
over several input sets, so that caches do not help; bf16 activations, gradients of every input. longhand's are those of
`longhand bench ops`.

Triton's autotuners choose from all their configurations, on the first shape of an op. What takes long is compiling these: --tuners
processes do it side by side into Triton's cache, launching nothing. What they have not compiled after --compile-seconds is left out of
the choice, and every op's line says how many of how many it chose from. Each configuration is timed for 10 ms (Triton's default is 100).
--prepare FILE ends there and writes down what was chosen; --prepared FILE times with that. In between the GPU and Triton's cache must be
the same.

  python tests/interop/bench_peers.py --longhand build/cuda/longhand --mamba-source ~/mamba
"""
import argparse
import csv
import ctypes
import io
import json
import math
import multiprocessing
import pathlib
import queue
import signal
import statistics
import subprocess
import sys
import time
import traceback
import types

CHUNK_SIZE = 256  # mamba_ssm's default for Mamba-2
ATTEMPTS = 20
INPUT_SETS = 3

processes = multiprocessing.get_context("spawn")

SSD_H, SSD_P, SSD_N = 24, 64, 128
GLA_H, GLA_DK, GLA_DV = 4, 128, 256
SCAN_D, SCAN_N = 1536, 16


def random(*shape, scale=1.0, mean=0.0, dtype=None):
    import torch

    return (torch.randn(*shape, device="cuda") * scale + mean).to(dtype or torch.bfloat16).requires_grad_()


def ssd_case(batch, tokens):
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def make():
        x, dt = random(batch, tokens, SSD_H, SSD_P), random(batch, tokens, SSD_H, mean=-4)
        A = -torch.exp(random(SSD_H, scale=0.5, mean=1, dtype=torch.float32)).detach()
        B, C = random(batch, tokens, 1, SSD_N), random(batch, tokens, 1, SSD_N)
        return x, dt, A.requires_grad_(), B, C, random(SSD_H, dtype=torch.float32), random(SSD_H, scale=0.5, dtype=torch.float32)

    def run(x, dt, A, B, C, D, bias):
        return mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK_SIZE, D=D, dt_bias=bias, dt_softplus=True)

    return make, run


def gla_case(batch, tokens):
    import torch.nn.functional as F
    from fla.ops.gla import chunk_gla

    def make():
        q, k = random(batch, tokens, GLA_H, GLA_DK), random(batch, tokens, GLA_H, GLA_DK)
        gate = (F.logsigmoid(random(batch, tokens, GLA_H, GLA_DK)) / 16).detach().requires_grad_()
        return q, k, random(batch, tokens, GLA_H, GLA_DV), gate

    return make, lambda q, k, v, gate: chunk_gla(q, k, v, gate)[0]


def scan_case(batch, tokens):
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_cuda

    if selective_scan_cuda is None:
        raise ImportError("mamba_ssm's compiled extension selective_scan_cuda is not installed")

    def make():
        u, dt, z = (random(batch, SCAN_D, tokens, mean=mean) for mean in (0, -4, 0))
        A = -torch.exp(random(SCAN_D, SCAN_N, dtype=torch.float32)).detach()
        B, C = random(batch, SCAN_N, tokens), random(batch, SCAN_N, tokens)
        return u, dt, A.requires_grad_(), B, C, random(SCAN_D, dtype=torch.float32), z, random(SCAN_D, dtype=torch.float32)

    return make, lambda u, dt, A, B, C, D, z, bias: selective_scan_fn(u, dt, A, B, C, D, z, bias, True)


def cross_entropy_case(rows, width, vocab):
    import torch
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    targets = torch.randint(vocab, (rows,), device="cuda")

    def run(x, weight):
        loss = fused_linear_cross_entropy_loss(x, targets, weight)
        return loss[0] if isinstance(loss, tuple) else loss

    return lambda: (random(rows, width), random(vocab, width, scale=0.02)), run


def add_rmsnorm_case(rows, width):
    import torch
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    def run(x, residual, weight):
        return rms_norm_fn(x, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=1e-5)

    return lambda: (random(rows, width), random(rows, width, dtype=torch.float32), random(width, dtype=torch.float32)), run


def conv_case(batch, tokens, channels, width):
    from fla.modules.conv.causal_conv1d import causal_conv1d

    def run(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu")[0]

    return lambda: (random(batch, tokens, channels), random(channels, width, scale=0.5), random(channels)), run


def adamw_case(total):
    import torch

    shapes = [(50280, 768)] + 24 * [(3352, 768), (768, 1536), (1792, 4), (1792,), (1536,), (768,)]
    shapes.append((total - sum(torch.Size(shape).numel() for shape in shapes),))
    parameters = [random(*shape, dtype=torch.float32) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.1, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return None, step


def sequence_cases(op, peer, case, label):
    shapes = ((8, 2048, 2048), (32, 2048, 512), (1, 65536, 4096))
    return [(op, f"B{b} T{t} {label}", peer, case, (b, t), (b, short), b == 8) for b, t, short in shapes]


# op and shape as `longhand bench ops` names them, whose op the peer is, what makes it, its sizes, smaller ones for which the same is
# compiled, whether autotuners choose on this shape (the others take what was chosen)
CASES = [
    *sequence_cases("gla", "fla", gla_case, f"H{GLA_H} Dk{GLA_DK} Dv{GLA_DV}"),
    *sequence_cases("ssd", "mamba_ssm", ssd_case, f"H{SSD_H} P{SSD_P} N{SSD_N}"),
    *sequence_cases("selective_scan", "mamba_ssm", scan_case, f"D{SCAN_D} N{SCAN_N}"),
    ("cross_entropy", "32768 x 768 -> 50280", "fla", cross_entropy_case, (32768, 768, 50280), (32768, 768, 50280), True),
    ("add_rmsnorm", "65536 x 768", "mamba_ssm", add_rmsnorm_case, (65536, 768), (6400, 768), True),
    ("add_rmsnorm", "65536 x 2048", "mamba_ssm", add_rmsnorm_case, (65536, 2048), (6400, 2048), True),
    ("causal_conv1d_silu", "B32 T2048 C1536 W4", "fla", conv_case, (32, 2048, 1536, 4), (32, 256, 1536, 4), True),
    ("adamw", "134M parameters", "torch", adamw_case, (134_000_000,), (134_000_000,), True),
]
OPS = list(dict.fromkeys(case[0] for case in CASES))


def forward_backward(run, inputs, grads):
    import torch

    for leaf in inputs:
        leaf.grad = None
    outputs = run(*inputs)
    torch.autograd.backward(outputs, grads)


def random_grads(outputs):
    import torch

    many = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(torch.randn_like(output.detach()) if output.dim() > 0 else torch.ones_like(output.detach()) for output in many)


def median_ms(work):
    import torch

    for i in range(INPUT_SETS):
        work(i)
    times = []
    for i in range(ATTEMPTS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work(i % INPUT_SETS)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(case, sizes):
    """{direction: ms}, as longhand names directions."""
    import torch

    make, run = case(*sizes)
    if make is None:
        return {"step": median_ms(lambda i: run())}
    sets = [make() for _ in range(INPUT_SETS)]
    grads = random_grads(run(*sets[0]))

    def forward(i):
        with torch.no_grad():
            run(*sets[i])

    return {"fwd": median_ms(forward), "fwd+bwd": median_ms(lambda i: forward_backward(run, sets[i], grads))}


def use_mamba_source(folder):
    if folder:  # its Triton ops alone: the package's own __init__ wants the compiled extensions
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(folder / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package


def named(tuner, config):
    return tuner.base_fn.__name__, str(config)


def distance_from_usual(config):
    """The usual: 4 warps, 3 stages, tiles of 64 x 64. What is near it is compiled first."""
    tile = math.prod(size for name, size in config.kwargs.items() if name.startswith("B"))
    return abs(math.log2(config.num_warps / 4)) + abs(config.num_stages - 3) / 2 + abs(math.log2(tile / 4096)) / 2


class Collecting:
    """Notes what autotuned kernels are called with, launches none of them, and compiles configurations afterwards."""

    def __init__(self):
        from triton.runtime.autotuner import Autotuner

        self.calls, self.stand_ins = {}, {}  # calls by what is compiled for them

        def collect(tuner, *args, **kwargs):
            tuner.nargs = dict(zip(tuner.arg_names, args))
            configs = sorted(tuner.prune_configs(kwargs), key=distance_from_usual)
            tuner.best_config = configs[0]  # mamba_ssm sizes its sums by it
            args, kwargs = [self.without_memory(v) for v in args], {k: self.without_memory(v) for k, v in kwargs.items() if k != "grid"}
            for rank, config in enumerate(configs):
                self.calls.setdefault((*named(tuner, config), str(args), str(kwargs)), (rank, tuner, args, kwargs, config))

        Autotuner.run = collect

    def without_memory(self, value):
        """A tensor of one element in place of a larger one: only its type, and that it is aligned, matters to a compiler."""
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        return self.stand_ins.setdefault(value.dtype, torch.empty(1, dtype=value.dtype, device="cuda"))

    def run(self, cases, part):
        for op, shape, peer, case, _, sizes, _ in cases:
            if peer == "torch":  # nothing to compile
                continue
            try:
                make, run = case(*sizes)
                inputs = make()
                forward_backward(run, inputs, random_grads(run(*inputs)))
            except ImportError:
                pass  # the main process says so
            except Exception:
                if part == 0:
                    print(f"compiling {op} {shape}: {traceback.format_exc(limit=-2)}", flush=True)

    def take(self):
        """What was noted, the first of each kernel before the second of any: when time is short, all kernels have some."""
        calls, self.calls = sorted(self.calls.values(), key=lambda call: call[0]), {}
        return [call[1:] for call in calls]


def compile_calls(calls, part, parts, stop, compiled):
    """Every parts-th of the calls. What does not compile or needs more shared memory than there is is not reported."""
    import torch

    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for tuner, args, kwargs, config in calls[part::parts]:
        if stop.is_set():
            break
        try:
            kernel = tuner.fn.run(*args, **{**kwargs, "grid": (1,), "warmup": True}, **config.all_kwargs())
            if kernel.metadata.shared <= room:
                compiled.put(named(tuner, config))
        except Exception as error:
            if part == 0:
                print(f"compiling {named(tuner, config)}: {error!r}", flush=True)


def compile_share(part, parts, mamba_source, ops, compiled, chosen, stop):
    """A compiling process: its share of all configurations of the cases that tune, then of the chosen ones for the others."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes when the main process goes
    use_mamba_source(mamba_source)
    collecting = Collecting()
    collecting.run([c for c in CASES if c[0] in ops and c[6]], part)
    tuning = collecting.take()
    collecting.run([c for c in CASES if c[0] in ops and not c[6]], part)
    following = collecting.take()
    compile_calls(tuning, part, parts, stop, compiled)
    compiled.put(None)
    wanted = chosen.get()
    compile_calls([call for call in following if named(call[0], call[3]) in wanted], part, parts, processes.Event(), compiled)
    compiled.put(None)


class Tuning:
    """What this process's autotuners may choose from, and what they have chosen."""

    def __init__(self, allowed):
        import triton.testing
        from triton.runtime.autotuner import Autotuner

        self.chosen, self.left_out, self.known = set(), set(), set()
        run, prune = Autotuner.run, Autotuner.prune_configs

        def tuned_run(tuner, *args, **kwargs):
            tuner._do_bench = lambda call, quantiles: triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)
            result = run(tuner, *args, **kwargs)
            self.chosen.add(named(tuner, tuner.best_config))
            return result

        def pruned(tuner, kwargs):
            configs = prune(tuner, kwargs)
            ready = [c for c in configs if allowed is None or named(tuner, c) in allowed]
            self.known.update(named(tuner, c) for c in configs)
            self.left_out.update(named(tuner, c) for c in configs if ready and c not in ready)
            return ready or sorted(configs, key=distance_from_usual)[:4]

        Autotuner.run, Autotuner.prune_configs = tuned_run, pruned


def collect(compiled, parts, seconds):
    """Names of what was compiled, until every process has said that it is through, or the time is over."""
    names, through, deadline = set(), 0, time.time() + seconds
    while through < parts:
        try:
            name = compiled.get(timeout=max(0.01, deadline - time.time()))
        except queue.Empty:
            return names, through
        if name is None:
            through += 1
        else:
            names.add(name)
    return names, through


def longhand_times(source, ops):
    """{(op, shape, direction): ms} from a program, or from a table that it wrote"""
    tables = []
    if source.suffix == ".csv":
        tables.append(source.read_text())
    else:
        for choice in [[]] if ops == OPS else [["--op", op] for op in ops]:
            command = [source.resolve(), "bench", "ops", "--device", "cuda", "--csv", *choice]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode != 0:
                print(f"{' '.join(map(str, command))} failed: {answer.stderr.strip()}")
            tables.append(answer.stdout)
    rows = [row for table in tables for row in csv.DictReader(io.StringIO(table))]
    return {(row["op"], row["shape"], row["direction"]): float(row["ms"]) for row in rows}


def time_case(case):
    """{direction: ms} of the peer, and why there is none."""
    try:
        return measure(case[3], case[4]), ""
    except ImportError as missing:
        return {}, f"left out: {missing}"
    except Exception:
        return {}, f"failed: {traceback.format_exc(limit=-3)}"


def choose(cases, tuning):
    """Runs the cases once, so that autotuners choose; {op: "12 of 30 configurations"}."""
    remarks = {}
    for op, shape, peer, make_case, sizes, _, first in cases:
        before = len(tuning.known), len(tuning.left_out)
        try:
            make, run = make_case(*sizes)
            if first and make is not None:
                inputs = make()
                forward_backward(run, inputs, random_grads(run(*inputs)))
        except ImportError:
            continue  # said when it is timed
        except Exception:
            print(f"choosing for {op} {shape}: {traceback.format_exc(limit=-3)}", flush=True)
        known, left_out = len(tuning.known) - before[0], len(tuning.left_out) - before[1]
        if known > 0:
            remarks[op] = f"{known - left_out} of {known} configurations"
    return remarks


def print_case(case, remark, own):
    op, shape, peer = case[:3]
    theirs, problem = time_case(case)
    for direction in ("step",) if "step" in theirs else ("fwd", "fwd+bwd"):
        ours = own.get((op, shape, direction))
        text = [f"{value:.3f}" if value else "" for value in (ours, theirs.get(direction))]
        ratio = f"{theirs[direction] / ours:.2f}x" if ours and direction in theirs else ""
        print(f"{op:<20}{shape:<28}{direction:<9}{text[0]:>10}  {peer:<11}{text[1]:>9}{ratio:>9}  {problem or remark}", flush=True)
        remark = problem = ""


def prepare(args, cases):
    """Compiles side by side and lets autotuners choose; {op: how many there were to choose from}."""
    begin = time.time()
    compiled, stop = processes.Queue(), processes.Event()
    inboxes = [processes.Queue() for _ in range(args.tuners)]
    tuners = [processes.Process(target=compile_share, daemon=True,
                                args=(part, args.tuners, args.mamba_source, args.ops, compiled, inboxes[part], stop))
              for part in range(args.tuners)]
    for tuner in tuners:
        tuner.start()
    allowed, through = None, 0
    if tuners:
        allowed, through = collect(compiled, args.tuners, args.compile_seconds)
        stop.set()
        print(f"{len(allowed)} configurations compiled in {time.time() - begin:.0f} s, {through} of {args.tuners} processes through",
              flush=True)
    tuning = Tuning(allowed)
    remarks = choose(cases, tuning)
    print(f"chosen after {time.time() - begin:.0f} s", flush=True)
    if args.prepare:
        args.prepare.write_text(json.dumps({"chosen": sorted(tuning.chosen), "chosen from": remarks}))
    for inbox in inboxes:
        inbox.put(set(tuning.chosen))
    if tuners:
        collect(compiled, 2 * args.tuners - through, 25)  # who was not through says so twice
    for tuner in tuners:
        tuner.terminate()
    print(f"compiled for all shapes after {time.time() - begin:.0f} s", flush=True)
    return remarks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", type=pathlib.Path,
                        help="the program whose `bench ops` is run beside, or the table of `bench ops --csv`; else the peers alone")
    parser.add_argument("--mamba-source", type=pathlib.Path, help="an unpacked source of mamba_ssm (the folder that holds mamba_ssm/)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--tuners", type=int, default=16, help="processes that compile configurations before the first timing; 0: none")
    parser.add_argument("--compile-seconds", type=float, default=120, help="how long they may take for the first shapes")
    parser.add_argument("--prepare", type=pathlib.Path, metavar="FILE", help="choose configurations, write them down, time nothing")
    parser.add_argument("--prepared", type=pathlib.Path, metavar="FILE", help="take the configurations that --prepare wrote down")
    args = parser.parse_args()
    use_mamba_source(args.mamba_source)
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    cases = [case for case in CASES if case[0] in args.ops]
    if args.prepared:
        notes = json.loads(args.prepared.read_text())
        Tuning({tuple(name) for name in notes["chosen"]})
        remarks = notes["chosen from"]
    else:
        remarks = prepare(args, cases)
        if args.prepare:
            return
    own = longhand_times(args.longhand, args.ops) if args.longhand else {}
    print(f"{'op':<20}{'shape':<28}{'':<9}{'longhand':>10}  {'peer':<11}{'ms':>9}{'faster':>9}  chosen from", flush=True)
    for case in cases:
        print_case(case, remarks.get(case[0], ""), own)


if __name__ == "__main__":
    main()
