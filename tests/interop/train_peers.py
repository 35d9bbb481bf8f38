#!/usr/bin/env python3
"""Whole training steps of longhand and of the same models built from fla's and mamba_ssm's kernels in torch, on one GPU in one run.

  gla-340m      fla's chunk_gla, norms, SwiGLU and linear cross entropy
  mamba2-130m   mamba_ssm's SSD, norms and gated norms, fla's convolution and linear cross entropy; all of them Triton

bf16 autocast, f32 weights, clipping by norm, fused AdamW, rows of 2,048 random tokens that lie on the GPU: what `longhand bench train`
measures. Triton's autotuners see all their configurations: --tuners processes compile them side by side into Triton's cache first, for at
most --compile-seconds.

  python tests/interop/train_peers.py --longhand build/cuda/longhand --recipes tools/recipes --mamba-source ~/mamba
"""
import argparse
import os
import pathlib
import subprocess
import sys
import time
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

LENGTH, WARM_STEPS, STEPS = 2048, 4, 10
SIZES = {"gla-340m": (1024, 24, 32000), "mamba2-130m": (768, 24, 50288)}  # d_model, layers, rows of the embedding


class GlaMixer(nn.Module):
    def __init__(self, d, heads=4):
        super().__init__()
        from fla.modules.fused_norm_gate import FusedRMSNormGated

        self.heads = heads
        self.q, self.k = nn.Linear(d, d // 2, bias=False), nn.Linear(d, d // 2, bias=False)
        self.v, self.g, self.o = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.gate = nn.Sequential(nn.Linear(d, 16, bias=False), nn.Linear(16, d // 2))
        self.norm = FusedRMSNormGated(hidden_size=d // heads, eps=1e-6)

    def forward(self, x):
        from fla.ops.gla import chunk_gla

        split = lambda y: y.view(*y.shape[:2], self.heads, -1)
        o, _ = chunk_gla(split(self.q(x)), split(self.k(x)), split(self.v(x)), split(F.logsigmoid(self.gate(x)) / 16))
        return self.o(self.norm(o, split(self.g(x))).flatten(2))


class SwigluMlp(nn.Module):
    def __init__(self, d, width=2816):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, width, bias=False), nn.Linear(d, width, bias=False), nn.Linear(width, d, bias=False)

    def forward(self, x):
        from fla.modules.activations import swiglu_linear

        return swiglu_linear(self.gate(x), self.up(x), self.down.weight, None)


class Mamba2Mixer(nn.Module):
    def __init__(self, d, headdim=64, state=128):
        super().__init__()
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

        self.inner, self.state, self.headdim, self.heads = 2 * d, state, headdim, 2 * d // headdim
        self.in_proj = nn.Linear(d, 2 * self.inner + 2 * state + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.inner + 2 * state, 4).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(self.inner + 2 * state))
        self.dt_bias = nn.Parameter(torch.full((self.heads,), -4.0))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner, eps=1e-5, norm_before_gate=False, group_size=self.inner)
        self.out_proj = nn.Linear(self.inner, d, bias=False)

    def forward(self, x):
        from fla.modules.conv.causal_conv1d import causal_conv1d
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        z, xBC, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.state, self.heads], dim=-1)
        xBC, _ = causal_conv1d(xBC, self.conv_weight.to(x.dtype), self.conv_bias.to(x.dtype), activation="silu")
        u, B, C = xBC.split([self.inner, self.state, self.state], dim=-1)
        y = mamba_chunk_scan_combined(
            u.unflatten(-1, (self.heads, self.headdim)), dt, -self.A_log.float().exp(), B.unsqueeze(2), C.unsqueeze(2), 256,
            D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out_proj(self.norm(y.flatten(2), z))


class Model(nn.Module):
    def __init__(self, name):
        super().__init__()
        from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss
        from fla.modules.layernorm import RMSNorm

        d, layers, vocab = SIZES[name]
        sublayers = [Mamba2Mixer] if name.startswith("mamba2") else [GlaMixer, SwigluMlp]
        self.embedding = nn.Embedding(vocab, d)
        self.mixers = nn.ModuleList(make(d) for _ in range(layers) for make in sublayers)
        self.norms = nn.ModuleList(RMSNorm(d, eps=1e-5) for _ in range(len(self.mixers) + 1))
        self.head = nn.Linear(d, vocab, bias=False)
        self.loss = FusedLinearCrossEntropyLoss()
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        if name.startswith("mamba2"):
            self.head.weight = self.embedding.weight

    def forward(self, tokens, targets):
        residual, branch = self.embedding(tokens), None  # the stream stays f32
        for norm, mixer in zip(self.norms, self.mixers):
            if branch is None:
                normed = norm(residual)
            else:
                normed, residual = norm(branch, residual, True, True)
            branch = mixer(normed.to(torch.bfloat16))
        normed, _ = self.norms[-1](branch, residual, True, True)
        return self.loss(normed.to(torch.bfloat16).flatten(0, 1), targets.flatten(), self.head.weight.to(torch.bfloat16))


def steps_of(name, rows):
    torch.manual_seed(0)
    model = Model(name).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    data = [torch.randint(0, SIZES[name][2], (2, rows, LENGTH), device="cuda") for _ in range(4)]

    def step(i):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(*data[i % 4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return model, step


def compile_part(part, parts, names):
    """One step of every model with this process's share of each autotuner's configurations."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.run

    def run(self, *args, **kwargs):
        if not hasattr(self, "is_share"):
            self.configs = self.configs[part::parts] or self.configs[:1]
            self.is_share = True
        return original(self, *args, **kwargs)

    Autotuner.run = run
    for name in names:
        SIZES[name] = (SIZES[name][0], 2, SIZES[name][2])
        steps_of(name, 1)[1](0)
        torch.cuda.synchronize()


def peer(name, rows):
    model, step = steps_of(name, rows)
    begin = time.time()
    for i in range(WARM_STEPS):
        loss = step(i)
    torch.cuda.synchronize()
    warm = time.time() - begin
    torch.cuda.reset_peak_memory_stats()
    begin = time.time()
    for i in range(STEPS):
        loss = step(i)
    torch.cuda.synchronize()
    ms = (time.time() - begin) / STEPS * 1e3
    count = sum(p.numel() for p in model.parameters())
    print(f"{name:<14}{rows:>5} rows  peer in torch     {ms:8.1f} ms {rows * LENGTH / ms * 1e3:9.0f} tokens/s "
          f"{torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB   {count} parameters, loss {loss.item():.3f}, warm in {warm:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", help="the program whose `bench train` is run beside; without it the peers alone are timed")
    parser.add_argument("--recipes", type=pathlib.Path, default=pathlib.Path("tools/recipes"))
    parser.add_argument("--levels", nargs="+", default=["none", "light"], help="values of train.recompute")
    parser.add_argument("--mamba-source", type=pathlib.Path, help="an unpacked source of mamba_ssm (the folder that holds mamba_ssm/)")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tuners", type=int, default=8, help="processes that compile configurations before the first step; 0: none")
    parser.add_argument("--compile-seconds", type=float, default=60)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mamba_source:  # its Triton ops alone: the package's own __init__ wants the compiled extensions
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(args.mamba_source / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
    if args.part is not None:
        return compile_part(args.part, args.tuners, args.models)

    begin = time.time()
    again = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--tuners", str(args.tuners)]
    tuners = [subprocess.Popen([*again, "--part", str(part)]) for part in range(args.tuners)]
    for tuner in tuners:
        try:
            tuner.wait(max(0.1, begin + args.compile_seconds - time.time()))
        except subprocess.TimeoutExpired:
            tuner.kill()
            tuner.wait()
    failed = sum(tuner.returncode != 0 for tuner in tuners)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; compiled in {time.time() - begin:.0f} s, "
          f"{failed} of {len(tuners)} processes did not end by themselves\n", flush=True)
    for name in args.models:
        try:
            peer(name, args.rows)
        except ImportError as missing:
            print(f"{name:<14} left out: {missing}", flush=True)
        torch.cuda.empty_cache()
        for level in args.levels if args.longhand else []:
            command = [args.longhand, "bench", "train", str(args.recipes / f"{name}.toml"), "--batch", str(args.rows),
                       "--set", f"train.length={LENGTH}", "--set", f"train.recompute={level}"]
            out = subprocess.run(command, capture_output=True, text=True)
            print(out.stdout.strip().splitlines()[-1][:130] if out.returncode == 0 else out.stderr, flush=True)


if __name__ == "__main__":
    main()
