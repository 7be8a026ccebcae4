"""Models of transformers with our attention and with "sdpa", which take turns call by call.

    python benchmarks/doors_transformers.py [--cases prefill512,decode4096] [--rounds 9]

Weights are random: they cost the same time as any. Needs transformers.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

import mha_fast.transformers

OURS = mha_fast.transformers.register()
LLAMA = LlamaConfig(
    num_hidden_layers=10, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=1000, max_position_embeddings=16384,
)  # fmt: skip
BERT = BertConfig(num_hidden_layers=6, vocab_size=1000)
PADDED = 8  # one token of so many is padding


def twins(model):
    """The same model with each attention."""
    both = {}
    for name in ("sdpa", OURS):
        both[name] = copy.deepcopy(model).eval()
        both[name].set_attn_implementation(name)
    return both


def padded(batch, length, side):
    """Tokens, and where they are: each text but the first, or the only one, is shorter."""
    there = torch.ones(batch, length, dtype=torch.long)
    for i, row in enumerate(there):
        missing = (i + (batch == 1)) * length // (PADDED * batch)
        row[slice(missing) if side == "left" else slice(length - missing, None)] = 0
    return {"input_ids": torch.randint(1000, (batch, length)), "attention_mask": there}


def prefill(length, side=None):
    """By system, what reads so many tokens."""
    inputs = {"input_ids": torch.randint(1000, (1, length))} if side is None else None
    inputs = inputs or padded(1, length, side)
    models = twins(LlamaForCausalLM(LLAMA))
    return {
        n: lambda m=m: m(**inputs, use_cache=False, logits_to_keep=1) for n, m in models.items()
    }


def bert():
    """Texts of different lengths."""
    inputs = padded(8, 512, "right")
    return {n: lambda m=m: m(**inputs) for n, m in twins(BertModel(BERT)).items()}


def decode(length):
    """One more token, with each cache: each system has its own, which grows."""
    models, prompt = twins(LlamaForCausalLM(LLAMA)), torch.randint(1000, (1, length))
    caches = {"DynamicCache": lambda c: DynamicCache(config=c), "ours": mha_fast.transformers.cache}
    systems = {}
    for name, model in models.items():
        for kind, make in caches.items():
            cache = make(LLAMA)
            model(prompt, cache=cache, logits_to_keep=1)
            systems[f"{name}, cache {kind}"] = lambda m=model, c=cache: m(prompt[:, :1], cache=c)
    return systems


CASES = {
    "prefill512": lambda: prefill(512),
    "prefill2048": lambda: prefill(2048),
    "prefill2048pad": lambda: prefill(2048, "left"),
    "prefill8192pad": lambda: prefill(8192, "left"),
    "decode4096": lambda: decode(4096),
    "bert8x512pad": bert,
}
CALLS = {"decode4096": 8, "prefill8192pad": 0.35}  # as many rounds as others


def measure(systems, rounds):
    """Seconds of every call, by system; the order turns, so that nobody is always second."""
    times = {name: [] for name in systems}
    for call in systems.values():
        call()
    names = list(systems)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            systems[name]()
            times[name].append(time.perf_counter() - start)
    return times


def processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{processor()}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print("| case | system | best | median | sdpa takes so many times as long: best, median |")
    print("| --- | --- | ---: | ---: | ---: |")
    for case in arguments.cases.split(","):
        torch.manual_seed(0)
        with torch.no_grad():
            rounds = max(3, round(arguments.rounds * CALLS.get(case, 1)))
            times = measure(CASES[case](), rounds)
        first = next(iter(times.values()))
        for name, found in times.items():
            best, median = min(found), statistics.median(found)
            ratios = min(first) / best, statistics.median(first) / median
            print(f"| {case} | {name} | {1e3 * best:.1f} ms | {1e3 * median:.1f} ms | "
                  f"{ratios[0]:.2f}x, {ratios[1]:.2f}x |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
