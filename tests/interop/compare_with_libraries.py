#!/usr/bin/env python3
"""longhand beside the libraries whose checkpoints it reads and writes: transformers (Mamba, Mamba-2) and fla (GLA).

For each model, both ways:
  out   longhand writes a freshly initialised model; the library opens it with from_pretrained and computes the same logits
  in    the library writes a random model (in several shards); longhand opens it and computes the same logits. The embedding is drawn with
        mamba_ssm's standard deviation, 0.02. transformers' own default, 0.1, gives random models so ill-conditioned that its float32 is
        4e-4 from its float64; that model is compared in float64, and the distances of float32 are shown
and for the Mamba models the state-spaces folder that `longhand convert` makes: torch.load opens its pytorch_model.bin with
weights_only=True, every tensor has the bits of the original, and the head shares the embedding's storage.

Needs torch, transformers, safetensors, and fla for GLA. Exit code 0 only when every comparison holds.

  python tests/interop/compare_with_libraries.py --longhand build/cuda/longhand --device cuda
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # f32 products of fla's kernels in f32, not TF32
import torch
from safetensors.torch import load_file, save_file

RECIPES = pathlib.Path(__file__).resolve().parents[2] / "tools" / "recipes"
TOLERANCE = 1e-4  # of the largest logit; the two sides differ in the order of sums over 24 layers
TOLERANCE_BF16 = 2e-2  # of the largest logit; where rounding the weights alone moves the library's f32 by over half of it, twice that
INIT_STD = 0.02  # of the library's random embedding, as mamba_ssm draws it


def transformers_class(name):
    import transformers

    return getattr(transformers, name)


def fla_class(name):
    import fla.models

    return getattr(fla.models, name)


MODELS = {
    "mamba1-130m": dict(
        layout="hf", load=lambda: transformers_class("MambaForCausalLM"), bin=True,
        float64=True, config=lambda **more: transformers_class("MambaConfig")(hidden_size=768, num_hidden_layers=24, vocab_size=50280, use_bias=False, **more)),
    "mamba2-130m": dict(
        layout="hf", load=lambda: transformers_class("Mamba2ForCausalLM"), bin=True,
        float64=True, config=lambda **more: transformers_class("Mamba2Config")(hidden_size=768, num_hidden_layers=24, vocab_size=50288, num_heads=24, head_dim=64,
                                                          n_groups=1, tie_word_embeddings=True, **more)),
    "gla-340m": dict(
        layout="fla", load=lambda: fla_class("GLAForCausalLM"), bin=False,
        float64=False, config=lambda **more: fla_class("GLAConfig")(hidden_size=1024, num_hidden_layers=24, num_heads=4, vocab_size=32000,
                                              tie_word_embeddings=False, **more)),
}


def distance(logits, exact):
    """The worst difference, relative to the largest logit."""
    return ((logits.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


class Comparison:
    def __init__(self, longhand, device, work, tokens):
        self.longhand, self.device, self.work, self.tokens, self.failures = longhand, device, work, tokens, 0

    def run(self, *arguments):
        command = [self.longhand, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def say(self, holds, what, figure=""):
        self.failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {what}  {figure}", flush=True)

    def our_logits(self, folder, tokens, device=None, dtype="f32"):
        where = self.work / "tokens.safetensors"
        save_file({"input_ids": tokens.to(torch.int32).cpu().contiguous()}, where)
        self.run("logits", "--model", folder, "--tokens", where, "--out", self.work / "logits.safetensors", "--device", device or self.device,
                 "--dtype", dtype)
        return load_file(self.work / "logits.safetensors")["logits"]

    def compare(self, what, model, folder):
        """In float32 on both sides."""
        torch.manual_seed(7)
        tokens = torch.randint(0, 32000, self.tokens)
        model = model.to(self.device).float().eval()
        with torch.no_grad():
            theirs = model(input_ids=tokens.to(self.device)).logits.float().cpu()
        ours = self.our_logits(folder, tokens)
        self.judge(what, ours, theirs, TOLERANCE)
        if self.device != "cpu":
            with torch.no_grad():
                natural = distance(model.bfloat16().float()(input_ids=tokens.to(self.device)).logits.cpu(), theirs)
            self.judge(f"{what}: longhand's bf16 against its f32 (the library's f32 with bf16 weights: {natural:.2e})",
                       self.our_logits(folder, tokens, dtype="bf16"), ours, max(TOLERANCE_BF16, 2 * natural))
        exact = self.our_logits(folder, tokens, "cpu", "f64")
        print(f"      from longhand in float64 on the CPU: the library {distance(theirs, exact):.2e}, longhand on {self.device} {distance(ours, exact):.2e}, "
              f"on the CPU {distance(self.our_logits(folder, tokens, 'cpu'), exact):.2e}", flush=True)

    def judge(self, what, ours, theirs, tolerance):
        largest, worst = theirs.abs().max().item(), distance(ours, theirs)
        finite = bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all())
        self.say(finite and worst <= tolerance, what, f"largest logit {largest:.4g}, worst difference {worst:.2e} of it")

    def compare_in_float64(self, what, model, folder):
        """Nearly without rounding (transformers forms norms and decays in float32 whatever the model's type); longhand on the CPU."""
        torch.manual_seed(7)
        tokens = torch.randint(0, 32000, self.tokens)
        with torch.no_grad():
            model = model.to(self.device).float().eval()
            rounded = model(input_ids=tokens.to(self.device)).logits.cpu()
            exact = model.double()(input_ids=tokens.to(self.device)).logits.cpu()
        self.judge(what, self.our_logits(folder, tokens, "cpu", "f64"), exact, TOLERANCE)
        print(f"      from the library in float64: the library {distance(rounded, exact):.2e}, longhand on {self.device} "
              f"{distance(self.our_logits(folder, tokens), exact):.2e}, on the CPU {distance(self.our_logits(folder, tokens, 'cpu'), exact):.2e}", flush=True)

    def longhand_to_library(self, name, row):
        folder = self.work / (name + "-out")
        self.run("init", RECIPES / (name + ".toml"), "--out", folder, "--to", row["layout"], "--seed", 3)
        # tie_word_embeddings is given because transformers 5 asks fla's classes for it in a form that they do not have.
        extra = {"tie_word_embeddings": False} if row["layout"] == "fla" else {}
        model, info = row["load"]().from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **extra)
        clean = not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.say(clean, f"{name}: from_pretrained finds every tensor and no other", "" if clean else str(info))
        self.compare(f"{name}: longhand's model in the library", model, folder)
        return folder

    def library_to_longhand(self, name, row):
        def written(folder, **more):
            torch.manual_seed(11)
            model = row["load"]()(row["config"](**more))
            if isinstance(getattr(model, "_tied_weights_keys", None), list):  # fla's form of before transformers 5, which save_pretrained refuses
                model._tied_weights_keys = None
            model.save_pretrained(folder, max_shard_size="200MB")
            return model, f"{len(list(folder.glob('*.safetensors')))} files"

        folder = self.work / (name + "-in")
        model, files = written(folder, initializer_range=INIT_STD)
        self.compare(f"{name}: the library's model in longhand, {files}", model, folder)
        if row["float64"]:
            folder = self.work / (name + "-in-default")
            model, files = written(folder)
            self.compare_in_float64(f"{name}: the library's default model in longhand, float64, {files}", model, folder)

    def state_spaces(self, name, hf_folder):
        folder = self.work / (name + "-state-spaces")
        self.run("convert", "--model", hf_folder, "--to", "state-spaces", "--out", folder)
        stored = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
        original = load_file(hf_folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        renamed = {key.replace("backbone.embedding.", "backbone.embeddings."): value for key, value in stored.items()}
        head = renamed.pop("lm_head.weight")
        same = renamed.keys() == original.keys() and all(torch.equal(renamed[key], original[key]) for key in original)
        self.say(same, f"{name}: torch.load of the state-spaces folder gives the same bits", f"{len(stored)} tensors, d_model {config['d_model']}")
        tied = head.data_ptr() == stored["backbone.embedding.weight"].data_ptr()
        self.say(tied, f"{name}: the head and the embedding are one storage")
        back = self.work / (name + "-back")
        self.run("convert", "--model", folder, "--to", "hf", "--out", back)
        again = load_file(back / "model.safetensors")
        self.say(again.keys() == original.keys() and all(torch.equal(again[key], original[key]) for key in original),
                 f"{name}: and back to transformers' layout")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longhand", required=True, help="the program")
    parser.add_argument("--device", default="cuda", help="of both sides: cpu or cuda")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--positions", type=int, default=100, help="of each row; fla takes other kernels up to 64, which compile in seconds")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(os.path.abspath(options.longhand), options.device, pathlib.Path(work), (2, options.positions))
        for name in options.models:
            row = MODELS[name]
            try:
                folder = comparison.longhand_to_library(name, row)
                comparison.library_to_longhand(name, row)
                if row["bin"]:
                    comparison.state_spaces(name, folder)
            except Exception as problem:  # one model's trouble does not hide the others
                comparison.say(False, f"{name}: {type(problem).__name__}", str(problem))
    print(f"{comparison.failures} comparisons failed")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
