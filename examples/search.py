"""Search sentences by meaning, with MiniLM in NumPy and mha_fast's attention.

    python examples/search.py "a pet at home"
    python examples/search.py "late delivery" --file mails.txt --top 3
    python examples/search.py                      # asks for one query after another

Query and sentences become vectors; the score is their cosine. The file has one sentence
on each line.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import minilm
import numpy as np
from common import UserError, run

SENTENCES = """\
The kitten fell asleep on a warm radiator.
Our dog barks whenever the postman comes.
Swallows return to the barn every April.
The violinist tuned her instrument before the concert.
A brass band played in the park on Sunday.
He learned to play chess from his grandmother.
The goalkeeper saved two penalties in the final.
She ran her first marathon in under four hours.
Snow closed the mountain pass for three days.
Heavy rain flooded the cellars along the river.
The drought has ruined the wheat harvest.
The train to Lisbon leaves at a quarter past six.
My flight was cancelled, and nobody told us why.
Please turn left at the bridge and follow the canal.
The bakery sells out of bread before nine.
Stir the onions until they are golden.
This soup needs salt and a little lemon.
The central bank raised interest rates again.
He lost his savings when the company went bankrupt.
The rent has doubled in five years.
The doctor prescribed antibiotics for the infection.
Washing your hands stops many diseases from spreading.
She broke her wrist falling off a ladder.
The telescope found water vapour on a distant planet.
Light takes eight minutes to travel from the sun to us.
The program crashes when the file is empty.
I forgot my password and cannot log in.
The new law makes it harder to register as a voter.
The senator resigned after the scandal.
Archaeologists uncovered a Roman mosaic under the car park.
Children under six enter the museum free of charge.
They got married in a small village by the sea.
"""


class Index:
    """Sentences with their vectors."""

    def __init__(self, model: minilm.MiniLM, sentences: Sequence[str]):
        self.model = model
        self.sentences = sentences
        self.vectors = model.embed(sentences)  # (sentences, 384)

    def search(self, query: str, top: int) -> list[tuple[float, str]]:
        """The `top` nearest sentences with their scores, the best first."""
        scores = self.vectors @ self.model.embed([query])[0]
        best = np.argsort(-scores, kind="stable")[:top]
        return [(float(scores[i]), self.sentences[i]) for i in best]


def read_sentences(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that hold more than white space."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise UserError(f"{path} holds no sentences")
    return sentences


def checked(query: str) -> str:
    """The query itself; bytes that are no UTF-8 arrive as surrogates."""
    try:
        query.encode()
    except UnicodeEncodeError:
        raise UserError("the query is not UTF-8 text") from None
    return query.strip()


def ask() -> str:
    """The next query that is typed; an empty one ends the program."""
    try:
        return checked(input("search> "))
    except EOFError:
        return ""


def show(index: Index, query: str, top: int) -> None:
    """Print the nearest sentences, and how long it took."""
    start = time.perf_counter()
    found = index.search(query, top)
    milliseconds = 1e3 * (time.perf_counter() - start)
    for score, sentence in found:
        print(f"{score:6.3f}  {textwrap.shorten(sentence, 92, placeholder=' ...')}")
    print(f"        of {len(index.sentences)} sentences, in {milliseconds:.1f} ms\n")


def parse_args() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Search sentences by their meaning.")
    parser.add_argument("query", nargs="?", help="without it you are asked for one")
    parser.add_argument("--file", type=Path, metavar="FILE", help="text, a sentence on each line")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="default %(default)s")
    args = parser.parse_args()
    if args.top < 1:
        raise UserError(f"--top is {args.top}, expected at least 1")
    if args.query is None and not sys.stdin.isatty():
        raise UserError("no query, and no terminal to ask for one")
    if args.query is not None and not checked(args.query):
        raise UserError("the query is empty")
    return args


def main() -> None:
    """Encode the sentences, then answer one query or many."""
    args = parse_args()
    sentences = read_sentences(args.file) if args.file else SENTENCES.splitlines()
    model = minilm.load()
    print(f"Encoding {len(sentences)} sentences ... ", end="", flush=True)
    start = time.perf_counter()
    index = Index(model, sentences)
    print(f"{time.perf_counter() - start:.2f} s\n")
    if args.query is not None:
        show(index, args.query, args.top)
        return
    while query := ask():
        show(index, query, args.top)


if __name__ == "__main__":
    run(main)
