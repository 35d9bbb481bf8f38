#!/usr/bin/env python3
"""Whole training steps of longhand and of the libraries people use, on one GPU in one run.

  mamba2-*, mamba1-*   mamba_ssm's MambaLMHeadModel: its layers as they are, with their memory-saving path and causal_conv1d's kernels,
                       norms fused with the residual in f32
  gla-*                fla's GLAForCausalLM: chunk_gla, fused norms, gates and SwiGLU

The loss of all is fla's fused linear cross entropy, which the libraries' users can have and which needs the least memory. Gradients are
clipped by norm, AdamW is torch's fused one. A peer is run in two ways: under torch.autocast with f32 weights, which is what longhand trains
("autocast"), and with weights, gradients and moments in bf16 ("bf16 weights"), which is less than longhand does. Rows of 2,048 random
tokens lie on the GPU, as those of `longhand bench train`. Kernels: see peers.py; on a machine without a GPU
  TRITON_CACHE_DIR=cache python tests/interop/train_peers.py --mamba-source ~/mamba --compile-only
and with the same folder on one with a GPU
  TRITON_CACHE_DIR=cache python tests/interop/train_peers.py --mamba-source ~/mamba --longhand build/cuda/longhand
"""
import argparse
import pathlib
import subprocess
import time
import traceback
import warnings

import peers

LENGTH, WARM_STEPS, STEPS = 2048, 3, 8

# d_model, layers, vocabulary, rows of a step; memory in GiB that longhand's recomputation is planned for (its targets), 0: not planned, and
# the parts of a step then
MODELS = {
    "mamba2-130m": (768, 24, 50288, (16,), 15, 1),
    "gla-340m": (1024, 24, 32000, (16,), 19.5, 2),
    "mamba2-370m": (1024, 48, 50288, (8,), 16, 1),
    "mamba1-130m": (768, 24, 50288, (16,), 15, 1),
    "mamba2-45m": (512, 12, 50288, (16, 2), 0, 1),
    "mamba1-45m": (512, 12, 50288, (16,), 0, 1),
}
WAYS = {"autocast": "f32 weights, autocast", "bf16": "bf16 weights and moments"}


def mamba_model(name, layers):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    d, _, vocab, *_ = MODELS[name]
    layer = "Mamba2" if name.startswith("mamba2") else "Mamba1"
    model = MambaLMHeadModel(MambaConfig(d_model=d, n_layer=layers, vocab_size=vocab, ssm_cfg={"layer": layer}, rms_norm=True,
                                         residual_in_fp32=True, fused_add_norm=True, tie_embeddings=True))
    return model, model.backbone, model.lm_head


def gla_model(name, layers):
    import fla.models.gla as gla

    d, _, vocab, *_ = MODELS[name]
    model = gla.GLAForCausalLM(gla.GLAConfig(hidden_size=d, num_hidden_layers=layers, num_heads=4, vocab_size=vocab,
                                             tie_word_embeddings=False, use_cache=False))
    return model, lambda tokens: model.model(tokens, use_cache=False)[0], model.lm_head


def peer_step(name, way, layers, rows):
    """The model and a function that makes one step of it"""
    import torch
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    torch.manual_seed(0)
    with torch.device("cuda" if torch.get_default_device().type != "meta" else "meta"):
        model, hidden_states, head = (gla_model if name.startswith("gla") else mamba_model)(name, layers)
        data = [torch.randint(0, MODELS[name][2], (2, rows, LENGTH)) for _ in range(3)]
    model = model.to(torch.bfloat16) if way == "bf16" else model.float()
    model.train()
    loss_of = FusedLinearCrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step(i):
        tokens, targets = data[i % len(data)]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=way == "autocast"):
            hidden = hidden_states(tokens).to(torch.bfloat16)
            loss = loss_of(hidden, targets, head.weight.to(torch.bfloat16))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return model, step


def runs(args):
    return [(name, rows, way) for way in args.ways for name in args.models for rows in MODELS[name][3]]


def compile_models(args):
    import torch

    compiling = peers.Compiling()
    try:
        import mamba_ssm.ops.triton.ssd_combined as ssd

        ssd.causal_conv1d_fwd_function = lambda x, *rest: torch.empty_like(x)  # no Triton
        ssd.causal_conv1d_bwd_function = lambda x, weight, bias, dout, a, b, c, dx, *rest: (dx, weight, bias, None)
    except ImportError:
        pass
    for name, rows, way in runs(args):
        if name.startswith("mamba1"):
            continue  # its norms are those of Mamba-2, the rest of it is no Triton
        try:
            model, step = peer_step(name, way, 2, rows)
            with peers.autocast_on_meta(), without_optimizer():
                step(0)
        except Exception:
            print(f"{name} {way}: {traceback.format_exc(limit=-6)}", flush=True)
    compiling.compile(*args.part, args.few, args.compile_seconds)


def without_optimizer():
    """torch's own kernels need a GPU, and no compiling"""
    import unittest.mock
    import torch

    return unittest.mock.patch.multiple(torch.optim.AdamW, step=lambda self: None)


def time_peer(name, rows, way, tuning):
    import torch

    begin = time.time()
    model, step = peer_step(name, way, MODELS[name][1], rows)
    first = step(0).item()
    for i in range(1, WARM_STEPS):
        step(i)
    torch.cuda.synchronize()
    warm = time.time() - begin
    torch.cuda.reset_peak_memory_stats()
    begin = time.time()
    for i in range(STEPS):
        loss = step(i)
    torch.cuda.synchronize()
    ms = (time.time() - begin) / STEPS * 1e3
    count = sum(p.numel() for p in model.parameters())
    print(f"{name:<13}{rows:>3} rows  {WAYS[way]:<26}{ms:8.1f} ms {rows * LENGTH / ms * 1e3:9.0f} tokens/s "
          f"{torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB   {count} parameters, loss {first:.2f} to {loss.item():.2f}, "
          f"{tuning.taken() or 'nothing new to choose'}, warm in {warm:.0f} s", flush=True)


def time_longhand(args, name, rows):
    gib, parts = MODELS[name][4:]
    plans = [["train.grad_accumulation=1", "train.recompute=none"],
             [f"train.grad_accumulation={parts}", "train.recompute=auto", f"train.memory_gib={gib}"]]
    for plan in plans if gib else plans[:1]:
        command = [args.longhand.resolve(), "bench", "train", args.recipes / f"{name}.toml", "--steps", str(STEPS)]
        for setting in (f"train.length={LENGTH}", f"train.batch_size={rows}", *plan):
            command += ["--set", setting]
        out = subprocess.run(command, capture_output=True, text=True)
        print("longhand  " + (out.stdout.strip().splitlines()[-1] if out.returncode == 0 else out.stderr.strip()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", type=pathlib.Path, help="the program whose `bench train` is run beside; else the peers alone")
    parser.add_argument("--recipes", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2] / "tools" / "recipes")
    parser.add_argument("--mamba-source", type=pathlib.Path, help="an unpacked source of mamba_ssm (the folder that holds mamba_ssm/)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    peers.add_compile_options(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    peers.use_mamba_source(args.mamba_source)
    if args.compile_only:
        return compile_models(args)

    import torch

    tuning = peers.Tuning()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name, rows in ((n, r) for n in args.models for r in MODELS[n][3]) if args.longhand else []:
        time_longhand(args, name, rows)
    for name, rows, way in runs(args):
        try:
            time_peer(name, rows, way, tuning)
        except Exception:
            print(f"{name} {way}: {traceback.format_exc(limit=-4)}", flush=True)
        torch.cuda.empty_cache()
    tuning.print_chosen()


if __name__ == "__main__":
    main()
