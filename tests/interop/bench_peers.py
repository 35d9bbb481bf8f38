#!/usr/bin/env python3
"""longhand's ops and those of fla, mamba_ssm, causal_conv1d and torch, timed on one GPU in one run, at the shapes of longhand's benches.

  gla                 fla's chunk_gla (log gates ready; longhand's bench starts from logits)
  ssd                 mamba_ssm's mamba_chunk_scan_combined (softplus, bias and D inside, as in longhand)
  selective_scan      mamba_ssm's selective_scan_fn, where its compiled extension is installed; otherwise a line says that it was left out
  cross_entropy       fla's fused_linear_cross_entropy_loss
  add_rmsnorm         mamba_ssm's rms_norm_fn with a residual in f32
  causal_conv1d_silu  causal_conv1d's kernels where installed, and fla's in Triton
  adamw               torch's clip_grad_norm_ and fused AdamW

An unpacked source of mamba_ssm is enough (--mamba-source), and the wheel fla-core. Times are medians of CUDA events over several input
sets, so that caches do not help; bf16 activations, gradients of every input. longhand's are those of `longhand bench ops`. How Triton's
kernels are compiled beforehand and what their autotuners choose from: peers.py.

  TRITON_CACHE_DIR=cache python tests/interop/bench_peers.py --mamba-source ~/mamba --compile-only     (no GPU needed)
  TRITON_CACHE_DIR=cache python tests/interop/bench_peers.py --mamba-source ~/mamba --longhand build/cuda/longhand
"""
import argparse
import csv
import io
import pathlib
import statistics
import subprocess
import traceback
import warnings

import peers

CHUNK_SIZE = 256  # mamba_ssm's default for Mamba-2
ATTEMPTS = 20
INPUT_SETS = 3

SSD_H, SSD_P, SSD_N = 24, 64, 128
GLA_H, GLA_DK, GLA_DV = 4, 128, 256
SCAN_D, SCAN_N = 1536, 16


def random(*shape, scale=1.0, mean=0.0, dtype=None):
    import torch

    return (torch.randn(*shape) * scale + mean).to(dtype or torch.bfloat16).requires_grad_()


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

    targets = torch.randint(vocab, (rows,))

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

    return lambda: conv_inputs(batch, tokens, channels, width), run


def compiled_conv_case(batch, tokens, channels, width):
    from causal_conv1d import causal_conv1d_fn

    def run(x, weight, bias):  # channels last, as Mamba-2 calls it
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return lambda: conv_inputs(batch, tokens, channels, width), run


def conv_inputs(batch, tokens, channels, width):
    return random(batch, tokens, channels), random(channels, width, scale=0.5), random(channels)


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
    return [(op, f"B{b} T{t} {label}", peer, case, (b, t)) for b, t in ((32, 2048), (8, 2048), (1, 65536))]


# op and shape as `longhand bench ops` names them, whose op the peer is, what makes it, its sizes
CASES = [
    *sequence_cases("selective_scan", "mamba_ssm", scan_case, f"D{SCAN_D} N{SCAN_N}"),
    ("cross_entropy", "32768 x 768 -> 50280", "fla", cross_entropy_case, (32768, 768, 50280)),
    ("add_rmsnorm", "65536 x 768", "mamba_ssm", add_rmsnorm_case, (65536, 768)),
    ("add_rmsnorm", "65536 x 2048", "mamba_ssm", add_rmsnorm_case, (65536, 2048)),
    ("causal_conv1d_silu", "B32 T2048 C1536 W4", "causal_conv1d", compiled_conv_case, (32, 2048, 1536, 4)),
    ("causal_conv1d_silu", "B32 T2048 C1536 W4", "fla", conv_case, (32, 2048, 1536, 4)),
    ("adamw", "134M parameters", "torch", adamw_case, (134_000_000,)),
    *sequence_cases("ssd", "mamba_ssm", ssd_case, f"H{SSD_H} P{SSD_P} N{SSD_N}"),
    *sequence_cases("gla", "fla", gla_case, f"H{GLA_H} Dk{GLA_DK} Dv{GLA_DV}"),
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


def print_case(case, own, tuning):
    op, shape, peer = case[:3]
    tuning.forget()
    theirs, remark = time_case(case)
    remark = remark or tuning.taken()
    for direction in ("step",) if "step" in theirs else ("fwd", "fwd+bwd"):
        ours = own.get((op, shape, direction))
        text = [f"{value:.3f}" if value else "" for value in (ours, theirs.get(direction))]
        ratio = f"{theirs[direction] / ours:.2f}x" if ours and direction in theirs else ""
        print(f"{op:<20}{shape:<28}{direction:<9}{text[0]:>10}  {peer:<14}{text[1]:>9}{ratio:>9}  {remark}", flush=True)
        remark = ""


def compile_cases(cases, args):
    compiling = peers.Compiling()
    for op, shape, peer, case, sizes in cases:
        if peer in ("torch", "causal_conv1d") or op == "selective_scan":
            continue  # no Triton
        try:
            make, run = case(*sizes)
            inputs = make()
            forward_backward(run, inputs, random_grads(run(*inputs)))
        except Exception:
            print(f"{op} {shape}: {traceback.format_exc(limit=-4)}", flush=True)
    compiling.compile(*args.part, args.few, args.compile_seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", type=pathlib.Path,
                        help="the program whose `bench ops` is run beside, or the table of `bench ops --csv`; else the peers alone")
    parser.add_argument("--mamba-source", type=pathlib.Path, help="an unpacked source of mamba_ssm (the folder that holds mamba_ssm/)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    peers.add_compile_options(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    peers.use_mamba_source(args.mamba_source)
    cases = [case for case in CASES if case[0] in args.ops]
    if args.compile_only:
        return compile_cases(cases, args)

    import torch

    tuning = peers.Tuning()
    torch.set_default_device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    own = longhand_times(args.longhand, args.ops) if args.longhand else {}
    print(f"{'op':<20}{'shape':<28}{'':<9}{'longhand':>10}  {'peer':<14}{'ms':>9}{'faster':>9}  chosen from", flush=True)
    for case in cases:
        print_case(case, own, tuning)
    tuning.print_chosen()


if __name__ == "__main__":
    main()
