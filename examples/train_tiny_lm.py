"""Train a language model of characters in NumPy: five minutes on two cores, and it writes words.

    python examples/train_tiny_lm.py
    python examples/train_tiny_lm.py --text book.txt --epochs 10 --out book.safetensors

The text is Python's own documentation, which every Python carries. After each epoch the
model writes a few lines. Ctrl-C saves; started again, it goes on where it was, on the
same curve to the bit, with any number of threads.
"""

import argparse
import math
import os
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from common import UserError, run
from tiny_lm import AdamW, Config, TinyLM, new_parameters

import mha_fast

BATCH = 16  # texts a step
RATE, WARM_UP = 3e-3, 100  # steps
VALIDATION = 0.05  # the last part of the text, which is never trained on
SAMPLE = 100  # characters


class Text:
    """Characters as numbers: what the model trains on, and what it is tested with."""

    def __init__(self, text: str, context: int):
        self.characters = sorted(set(text))
        place = {character: i for i, character in enumerate(self.characters)}
        tokens = np.array([place[character] for character in text])
        cut = len(tokens) - max(int(VALIDATION * len(tokens)), context + 1)
        self.train, self.held_out = tokens[:cut], tokens[cut:]
        self.context = context
        if len(self.train) < BATCH * context:
            least = math.ceil(BATCH * context / (1 - VALIDATION))
            raise UserError(f"the text has {len(text)} characters, expected {least} at least")

    def batch(self, seed: int, step: int) -> np.ndarray:
        """The texts of a step, (BATCH, context + 1): a function of seed and step alone."""
        rng = np.random.default_rng([seed, step])
        first = rng.integers(0, len(self.train) - self.context, BATCH)
        return self.train[first[:, None] + np.arange(self.context + 1)]

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // (BATCH * self.context)

    def test_batches(self):
        """All of the held-out text in rows."""
        rows = len(self.held_out) // (self.context + 1)
        rows = self.held_out[: rows * (self.context + 1)].reshape(rows, -1)
        return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


class Training:
    """A model on its way: parameters, the optimizer's averages, losses so far."""

    def __init__(self, text: Text, config: Config, seed: int):
        self.text, self.seed = text, seed
        self.model = TinyLM(config, new_parameters(config, seed))
        self.optimizer = AdamW(self.model.parameters)
        self.losses: list[float] = []  # one a step
        self.tests: list[tuple[int, float]] = []  # after these steps

    def step(self, steps: int) -> float:
        """One step of so many in all: warm up, then cool down along a cosine."""
        number = len(self.losses) + 1
        rate = RATE * min(1, number / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * number / steps))
        loss, pullback = self.model.loss_vjp(self.text.batch(self.seed, number))
        self.optimizer.step(pullback(), rate, number)
        self.losses.append(loss)
        return loss

    def test(self) -> float:
        """The mean loss on the held-out text."""
        batches = self.text.test_batches()
        losses = [(self.model.loss_vjp(batch)[0], len(batch)) for batch in batches]
        mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
        self.tests.append((len(self.losses), mean))
        return mean

    def sample(self) -> str:
        """A few characters after a new line."""
        rng = np.random.default_rng(len(self.losses))
        start = [self.text.characters.index("\n")] if "\n" in self.text.characters else [0]
        return "".join(self.text.characters[i] for i in self.model.write(start, SAMPLE, rng))

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that going on needs."""
        parts = {
            "model": self.model.parameters,
            "mean": self.optimizer.means,
            "square": self.optimizer.squares,
        }
        found = {f"{part}.{n}": x for part, named in parts.items() for n, x in named.items()}
        tests = np.array(self.tests, np.float64).reshape(-1, 2)
        return found | {"losses": np.array(self.losses, np.float64), "tests": tests}

    def save(self, path: Path) -> None:
        """Write all of it, or leave the file as it was."""
        from safetensors.numpy import save_file

        beside = path.with_name(path.name + ".tmp")
        characters = "".join(self.text.characters)
        save_file(self.arrays(), beside, {"seed": str(self.seed), "characters": characters})
        os.replace(beside, path)

    def resume(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                known, names = file.metadata() or {}, set(file.keys())
                stored = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        own = self.arrays()
        fits = names == own.keys() and all(
            stored[n].shape == x.shape for n, x in own.items() if n not in ("losses", "tests")
        )
        if not fits or known.get("characters") != "".join(self.text.characters):
            raise UserError(f"{path} is of another model or text: choose another --out")
        if known["seed"] != str(self.seed):
            raise UserError(f"{path} was begun with --seed {known['seed']}")
        for name, x in own.items():
            if name not in ("losses", "tests"):
                x[...] = stored[name]
        self.losses = stored["losses"].tolist()
        self.tests = [(int(step), loss) for step, loss in stored["tests"]]


def train(training: Training, epochs: int, path: Path) -> None:
    """All epochs that are left, with a bar; saves after each and when it is interrupted."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    steps = epochs * training.text.steps
    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    tokens, begun, begin = BATCH * training.text.context, time.perf_counter(), len(training.losses)
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps, epoch=1, epochs=epochs, loss=math.nan, speed=0)
        try:
            while len(training.losses) < steps:
                loss = training.step(steps)
                done = len(training.losses)
                speed = (done - begin) * tokens / (time.perf_counter() - begun)
                epoch = min(epochs, 1 + done // training.text.steps)
                bar.update(task, completed=done, epoch=epoch, loss=loss, speed=speed)
                if done % training.text.steps == 0:
                    report(bar, training)
                    training.save(path)
        except KeyboardInterrupt:
            bar.stop()
            print(f"interrupted after {len(training.losses)} steps; the same command goes on")
        finally:
            training.save(path)


def report(bar, training: Training) -> None:
    """What the model has learned by now, in its own words."""
    epoch = len(training.losses) // training.text.steps
    recent = np.mean(training.losses[-training.text.steps :])
    bar.print(f"epoch {epoch}: loss {recent:.3f}, on unseen text {training.test():.3f}")
    sample = "    " + training.sample().replace("\n", "\n    ") + "\n"
    bar.print(sample, markup=False, highlight=False)


def draw(training: Training, path: Path) -> None:
    """The curve of losses as a picture."""
    from matplotlib.figure import Figure

    losses = np.array(training.losses)
    width = min(50, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=0.6)
    axes.plot(np.arange(width, len(losses) + 1), smooth, color="tab:blue", label="training")
    if training.tests:
        axes.plot(*zip(*training.tests, strict=True), "o-", color="tab:red", label="unseen text")
    axes.set(xlabel="step", ylabel="loss (nats a character)", ylim=(0.8, 3.5))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse_args(arguments=None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Train a small language model in NumPy.")
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8; default: Python's documentation")
    add("--epochs", type=int, default=7, metavar="N", help="default %(default)s")
    add("--out", type=Path, default=Path("tiny_lm.safetensors"), metavar="FILE", help="%(default)s")
    add("--seed", type=int, default=0, metavar="N")
    add("--threads", type=int, metavar="N", help="default: all cores; it changes no bit")
    args = parser.parse_args(arguments)
    if args.epochs < 1 or (args.threads is not None and args.threads < 1) or args.seed < 0:
        parser.error("--epochs and --threads must be at least 1, --seed at least 0")
    return args


def main() -> None:
    """Train, or go on."""
    args = parse_args()
    mha_fast.set_num_threads(args.threads)
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {args.text}: {error}") from None
    text = Text(text, Config(0).context)
    config = Config(len(text.characters))
    training = Training(text, config, args.seed)
    if args.out.exists():
        training.resume(args.out)
        print(f"going on with {args.out} after {len(training.losses)} steps")
    parameters = sum(x.size for x in training.model.parameters.values())
    print(f"{len(text.train):,} characters, {parameters:,} parameters, {text.steps} steps an epoch")
    train(training, args.epochs, args.out)
    if training.losses:
        picture = args.out.with_suffix(".png")
        draw(training, picture)
        print(f"{args.out}, {picture}")


if __name__ == "__main__":
    run(main)
