"""A small causal language model of characters in NumPy, with the way back for training.

Every step of the forward pass returns its result and a pullback, a function from the
gradient of the result to those of its arguments. The way back calls them in the opposite
order. Shapes in the comments:

    batch, n    texts, and characters of each
    dim         width of a character's vector
    vocab       different characters
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mha_fast import KVCache, MultiHeadAttention, layer_norm_vjp, linear_vjp, rotary_tables


@dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults make 0.8 million parameters."""

    vocab: int
    context: int = 128
    dim: int = 128
    heads: int = 4
    layers: int = 4


def new_parameters(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Parameters by name: GPT-2's names for layers, torch's inside of attention."""
    rng = np.random.default_rng(seed)
    dim = config.dim

    def normal(*shape, scale=1.0):
        return rng.normal(0, scale * 0.02, shape).astype(np.float32)

    found = {"embedding": normal(config.vocab, dim), "norm.weight": np.ones(dim, np.float32)}
    into_stream = 1 / np.sqrt(2 * config.layers)  # so that the stream does not grow with depth
    for i in range(config.layers):
        found |= {
            f"{i}.norm_1.weight": np.ones(dim, np.float32),
            f"{i}.attention.in_proj_weight": normal(3 * dim, dim),
            f"{i}.attention.out_proj.weight": normal(dim, dim, scale=into_stream),
            f"{i}.norm_2.weight": np.ones(dim, np.float32),
            f"{i}.up.weight": normal(4 * dim, dim),
            f"{i}.down.weight": normal(dim, 4 * dim, scale=into_stream),
        }
    return found


class TinyLM:
    """The model: its parameters, which an optimizer changes in place."""

    def __init__(self, config: Config, parameters: dict[str, np.ndarray]):
        self.config = config
        self.parameters = parameters
        cos, sin = rotary_tables(config.context, config.dim // config.heads)
        self.rotary = {"cos": cos, "sin": sin}
        self.attentions = [
            MultiHeadAttention.from_state_dict(parameters, config.heads, f"{i}.attention.")
            for i in range(config.layers)
        ]

    def logits_vjp(self, tokens: np.ndarray) -> tuple[np.ndarray, Callable]:
        """Of (batch, n) tokens: (batch, n, vocab), and from their gradient a dict of all."""
        embedding = self.parameters["embedding"]
        x, pulls = embedding[tokens], []
        for i in range(self.config.layers):
            for part in (self.attend, self.feed_forward):
                change, pull = part(i, x)
                change += x
                x = change
                pulls.append(pull)
        normed, pull_norm = self.norm("norm", x)
        logits, pull_logits = linear_vjp(normed, embedding)

        def pullback(d_logits):
            back = pull_logits(d_logits)
            found = {"embedding": back.weight}
            d_x = pull_norm(back.x, found)
            for pull in reversed(pulls):
                change = pull(d_x, found)
                d_x = np.add(d_x, change, out=change)
            np.add.at(found["embedding"], tokens, d_x)  # the same matrix reads and writes
            return found

        return logits, pullback

    def norm(self, name: str, x: np.ndarray):
        """Layer norm without a bias."""
        y, pull = layer_norm_vjp(x, self.parameters[f"{name}.weight"])

        def pullback(d_y, found):
            d_x, found[f"{name}.weight"], _ = pull(d_y)
            return d_x

        return y, pullback

    def attend(self, i: int, x: np.ndarray):
        """What each character gathers from those before it."""
        normed, pull_norm = self.norm(f"{i}.norm_1", x)
        y, pull = self.attentions[i].vjp(normed, causal=True, rotary=self.rotary)

        def pullback(d_y, found):
            back = pull(d_y)
            found.update({f"{i}.attention.{name}": g for name, g in back.weights.items()})
            return pull_norm(back.query, found)

        return y, pullback

    def feed_forward(self, i: int, x: np.ndarray):
        """What a small network makes of each character alone: down(relu(up(x)) ** 2), with the
        square of Primer (So et al., arXiv 2109.08668)."""
        normed, pull_norm = self.norm(f"{i}.norm_2", x)
        hidden, pull_up = linear_vjp(normed, self.parameters[f"{i}.up.weight"])
        active = np.maximum(hidden, 0, out=hidden)
        y, pull_down = linear_vjp(active * active, self.parameters[f"{i}.down.weight"])

        def pullback(d_y, found):
            d_square, found[f"{i}.down.weight"], _ = pull_down(d_y)
            d_square *= active
            d_square *= 2
            d_normed, found[f"{i}.up.weight"], _ = pull_up(d_square)
            return pull_norm(d_normed, found)

        return y, pullback

    def loss_vjp(self, tokens: np.ndarray) -> tuple[float, Callable]:
        """Mean surprise about each next character of (batch, n + 1) tokens, in nats."""
        logits, pull = self.logits_vjp(tokens[:, :-1])
        targets = tokens[:, 1:, None]
        logits = logits - logits.max(axis=-1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=-1, keepdims=True)
        loss = np.log(total) - np.take_along_axis(logits, targets, axis=-1)

        def pullback():
            p[...] /= total
            np.put_along_axis(p, targets, np.take_along_axis(p, targets, -1) - 1, -1)
            return pull(p / np.float32(targets.size))

        return float(loss.mean(dtype=np.float64)), pullback

    def write(self, start: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
        """So many characters after `start`, drawn by their probability; not past the context."""
        shape = 1, self.config.heads, self.config.dim // self.config.heads
        caches = [KVCache(*shape) for _ in self.attentions]
        new, written = list(start), []
        for _ in range(min(count, self.config.context - len(start))):
            logits = self.next_logits(np.array(new), caches).astype(np.float64)
            p = np.exp((logits - logits.max()) / 0.8)
            new = [int(rng.choice(len(p), p=p / p.sum()))]
            written += new
        return written

    def next_logits(self, tokens: np.ndarray, caches: list[KVCache]) -> np.ndarray:
        """Append tokens to the caches; logits of the next one, (vocab,)."""
        x = self.parameters["embedding"][tokens]
        for i, (attention, cache) in enumerate(zip(self.attentions, caches, strict=True)):
            normed, _ = self.norm(f"{i}.norm_1", x)
            x = x + attention(normed, causal=True, rotary=self.rotary, cache=cache)
            x = x + self.feed_forward(i, x)[0]
        return linear_vjp(self.norm("norm", x[-1:])[0], self.parameters["embedding"])[0][0]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.1

    def __init__(self, parameters: dict[str, np.ndarray]):
        self.parameters = parameters
        self.means = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.squares = {name: np.zeros_like(x) for name, x in parameters.items()}

    def step(self, gradients: dict[str, np.ndarray], rate: float, number: int) -> None:
        """Change the parameters in place; steps count from 1."""
        first, second = (1 - beta**number for beta in self.BETAS)
        for name, x in self.parameters.items():
            g, mean, square = gradients[name], self.means[name], self.squares[name]
            mean += (1 - self.BETAS[0]) * (g - mean)
            square += (1 - self.BETAS[1]) * (g * g - square)
            if x.ndim > 1:  # norms keep their size
                x *= 1 - rate * self.DECAY
            x -= rate / first * mean / (np.sqrt(square / second) + self.EPS)
