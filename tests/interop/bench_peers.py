#!/usr/bin/env python3
"""longhand's ops and those of fla, mamba_ssm and their like, timed on one GPU in one run, at the shapes of longhand's benches.

  GLA              fla's chunk_gla (log gates ready; longhand's bench starts from logits)
  SSD              mamba_ssm's mamba_chunk_scan_combined (softplus, bias and D inside, as in longhand); Triton only, so an unpacked source
                   of mamba_ssm is enough: --mamba-source
  selective scan   mamba_ssm's selective_scan_fn, where its compiled extension is installed; otherwise a line says that it was left out

Times are medians of CUDA events over several input sets, so that caches do not help; bf16 activations, gradients of every input. Triton's
autotuners see all their configurations: --tuners processes compile them side by side into Triton's cache first.

  python tests/interop/bench_peers.py --longhand build/cuda/longhand --mamba-source ~/mamba
"""
import argparse
import csv
import io
import pathlib
import statistics
import subprocess
import sys
import time
import types

import torch
import torch.nn.functional as F

CHUNK_SIZE = 256  # mamba_ssm's default for Mamba-2
ATTEMPTS = 20
INPUT_SETS = 3

SHAPES = [(8, 2048), (32, 2048), (1, 65536)]  # B, T
SSD_H, SSD_P, SSD_N = 24, 64, 128
GLA_H, GLA_DK, GLA_DV = 4, 128, 256
SCAN_D, SCAN_N = 1536, 16


def random(*shape, scale=1.0, mean=0.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * scale + mean).to(dtype).requires_grad_()


def ssd_case(batch, tokens):
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
    from fla.ops.gla import chunk_gla

    def make():
        q, k = random(batch, tokens, GLA_H, GLA_DK), random(batch, tokens, GLA_H, GLA_DK)
        gate = (F.logsigmoid(random(batch, tokens, GLA_H, GLA_DK)) / 16).detach().requires_grad_()
        return q, k, random(batch, tokens, GLA_H, GLA_DV), gate

    return make, lambda q, k, v, gate: chunk_gla(q, k, v, gate)[0]


def scan_case(batch, tokens):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_cuda

    if selective_scan_cuda is None:
        raise ImportError("mamba_ssm's compiled extension selective_scan_cuda is not installed")

    def make():
        u, dt, z = (random(batch, SCAN_D, tokens, mean=mean) for mean in (0, -4, 0))
        A = -torch.exp(random(SCAN_D, SCAN_N, dtype=torch.float32)).detach()
        B, C = random(batch, SCAN_N, tokens), random(batch, SCAN_N, tokens)
        return u, dt, A.requires_grad_(), B, C, random(SCAN_D, dtype=torch.float32), z, random(SCAN_D, dtype=torch.float32)

    return make, lambda u, dt, A, B, C, D, z, bias: selective_scan_fn(u, dt, A, B, C, D, z, bias, True)


OPS = {"ssd": ("mamba_ssm", ssd_case), "gla": ("fla", gla_case), "selective_scan": ("mamba_ssm", scan_case)}


def forward(run, inputs):
    with torch.no_grad():
        run(*inputs)


def forward_backward(run, inputs, grad):
    for leaf in inputs:
        leaf.grad = None
    run(*inputs).backward(grad)


def median_ms(work):
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


def measure(case, batch, tokens):
    make, run = case(batch, tokens)
    sets = [make() for _ in range(INPUT_SETS)]
    grad = torch.randn_like(run(*sets[0]).detach())
    return median_ms(lambda i: forward(run, sets[i])), median_ms(lambda i: forward_backward(run, sets[i], grad))


def compile_part(part, parts, ops):
    """Runs every op once with this process's share of each autotuner's configurations."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.run

    def run(self, *args, **kwargs):
        if not hasattr(self, "is_share"):
            self.configs = self.configs[part::parts] or self.configs[:1]
            self.is_share = True
        return original(self, *args, **kwargs)

    Autotuner.run = run
    for op in ops:
        try:
            make, work = OPS[op][1](1, 2048)
            inputs = make()
            forward_backward(work, inputs, torch.ones_like(work(*inputs).detach()))
            torch.cuda.synchronize()
        except ImportError:
            pass  # the main process says so


def longhand_times(binary, op):
    command = [binary, "bench", "ops", "--op", op, "--device", "cuda", "--csv"]
    rows = csv.DictReader(io.StringIO(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {tuple(row["shape"].split()[:2]): (float(row["forward_ms"]), float(row["forward_backward_ms"])) for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", help="the program whose `bench ops` is run beside; without it the peers alone are timed")
    parser.add_argument("--mamba-source", type=pathlib.Path, help="an unpacked source of mamba_ssm (the folder that holds mamba_ssm/)")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--tuners", type=int, default=8, help="processes that compile configurations before the first timing; 0: none")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mamba_source:  # its Triton ops alone: the package's own __init__ wants the compiled extensions
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(args.mamba_source / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
    if args.part is not None:
        return compile_part(args.part, args.tuners, args.ops)

    begin = time.time()
    again = [sys.executable, __file__, *sys.argv[1:], "--tuners", str(args.tuners)]
    tuners = [subprocess.Popen([*again, "--part", str(part)]) for part in range(args.tuners)]
    if any([tuner.wait() for tuner in tuners]):
        print("a compiling process failed (see above); what it was to compile is compiled below")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; configurations compiled in {time.time() - begin:.0f} s\n")

    print("milliseconds; the last two columns are peer / longhand")
    print(f"{'op':<16}{'shape':<14}{'peer':<12}{'peer fwd':>10}{'fwd+bwd':>10}{'longhand fwd':>14}{'fwd+bwd':>10}{'fwd':>8}{'fwd+bwd':>8}")
    for op in args.ops:
        peer, case = OPS[op]
        ours = longhand_times(args.longhand, op) if args.longhand else {}
        for batch, tokens in SHAPES:
            line = f"{op:<16}{f'B{batch} T{tokens}':<14}{peer:<12}"
            theirs, own = None, ours.get((f"B{batch}", f"T{tokens}"))
            try:
                theirs = measure(case, batch, tokens)
            except ImportError as missing:
                line += f"left out: {missing}"
            if theirs:
                line += f"{theirs[0]:>10.3f}{theirs[1]:>10.3f}"
            if own:
                line += f"{own[0]:>14.3f}{own[1]:>10.3f}"
            if theirs and own:
                line += f"{theirs[0] / own[0]:>7.2f}x{theirs[1] / own[1]:>7.2f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
