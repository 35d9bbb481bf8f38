#!/usr/bin/env python3
"""longhand beside the libraries whose checkpoints it reads and writes: transformers (Mamba, Mamba-2) and fla (GLA).

For each model, both ways:
  out   longhand writes a freshly initialised model; the library opens it with from_pretrained and computes the same logits
  in    the library writes a random model (in several shards); longhand opens it and computes the same logits
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
TOLERANCE = 1e-4  # of the largest logit, both sides in f32; the two differ in the order of sums over 24 layers
TOKENS = (2, 100)  # rows, positions: more than one chunk, and no multiple of one


def transformers_class(name):
    import transformers

    return getattr(transformers, name)


def fla_class(name):
    import fla.models

    return getattr(fla.models, name)


MODELS = {
    "mamba1-130m": dict(
        layout="hf", load=lambda: transformers_class("MambaForCausalLM"), bin=True,
        config=lambda: transformers_class("MambaConfig")(hidden_size=768, num_hidden_layers=24, vocab_size=50280, use_bias=False)),
    "mamba2-130m": dict(
        layout="hf", load=lambda: transformers_class("Mamba2ForCausalLM"), bin=True,
        config=lambda: transformers_class("Mamba2Config")(hidden_size=768, num_hidden_layers=24, vocab_size=50288, num_heads=24, head_dim=64,
                                                          n_groups=1, tie_word_embeddings=True)),
    "gla-340m": dict(
        layout="fla", load=lambda: fla_class("GLAForCausalLM"), bin=False,
        config=lambda: fla_class("GLAConfig")(hidden_size=1024, num_hidden_layers=24, num_heads=4, vocab_size=32000,
                                              tie_word_embeddings=False)),
}


class Comparison:
    def __init__(self, longhand, device, work):
        self.longhand, self.device, self.work, self.failures = longhand, device, work, 0

    def run(self, *arguments):
        command = [self.longhand, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def say(self, holds, what, figure=""):
        self.failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {what}  {figure}", flush=True)

    def our_logits(self, folder, tokens):
        where = self.work / "tokens.safetensors"
        save_file({"input_ids": tokens.to(torch.int32).cpu().contiguous()}, where)
        self.run("logits", "--model", folder, "--tokens", where, "--out", self.work / "logits.safetensors", "--device", self.device, "--dtype",
                 "f32")
        return load_file(self.work / "logits.safetensors")["logits"]

    def compare(self, what, model, folder):
        torch.manual_seed(7)
        tokens = torch.randint(0, 32000, TOKENS)
        model = model.to(self.device).float().eval()
        with torch.no_grad():
            theirs = model(input_ids=tokens.to(self.device)).logits.float().cpu()
        ours = self.our_logits(folder, tokens)
        largest = theirs.abs().max().item()
        worst = (ours - theirs).abs().max().item() / largest
        finite = bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all())
        self.say(finite and worst <= TOLERANCE, what, f"largest logit {largest:.4g}, worst difference {worst:.2e} of it")
        if finite and worst > TOLERANCE:  # whose rounding is it?
            with torch.no_grad():
                exact = model.double()(input_ids=tokens.to(self.device)).logits.cpu()
            distance = lambda logits: (logits.double() - exact).abs().max().item() / largest
            print(f"      from the library in float64: longhand {distance(ours):.2e}, the library in float32 {distance(theirs):.2e}")

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
        folder = self.work / (name + "-in")
        torch.manual_seed(11)
        model = row["load"]()(row["config"]())
        model.save_pretrained(folder, max_shard_size="200MB")
        shards = len(list(folder.glob("*.safetensors")))
        self.compare(f"{name}: the library's model in longhand, {shards} files", model, folder)

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
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(os.path.abspath(options.longhand), options.device, pathlib.Path(work))
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
