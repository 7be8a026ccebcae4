"""Which product atom comes from which reactant atom: one attention head knows.

    python examples/reactions.py "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1"

RXNMapper is an ALBERT of 12 layers with 8 heads, trained to fill gaps in chemical
reactions that are written as text (SMILES). Nobody told it about atoms, yet one head
learned to look from each atom of the product to the atom that it was before: Schwaller
et al., "Extraction of organic chemistry grammar from unsupervised learning of chemical
reactions", doi 10.1126/sciadv.abe4166.
"""

import argparse
import re
from typing import NamedTuple

import numpy as np
import torch_file
from bert import Encoder, read, read_embeddings, read_layer
from common import UserError, find, run

from mha_fast import linear

REQUIREMENT = "rxnmapper==0.4.3"
LAYERS, HEADS = 12, 8
PREFIX = "albert.encoder.albert_layer_groups.0.albert_layers.0"
NAMES = (  # ALBERT's, in the order of `read_layer`
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.dense",
    "attention.LayerNorm",
    "ffn",
    "ffn_output",
    "full_layer_layer_norm",
)
LAYER, HEAD = 10, 5  # the ones that map atoms, counted from 0
WEAK = 0.1  # below it the head has found nothing
SAMPLE = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"

# An atom in brackets, a halogen of two letters, a ring number of two digits, the arrow;
# all other symbols of SMILES are single characters.
TOKEN = re.compile(r"\[[^][]*\]|Br|Cl|%\d\d|>>|.", re.DOTALL)
# An atom is bare and of the organic subset (lower case: aromatic), or stands in brackets
# after its isotope number.
ATOM = re.compile(r"(?:\[\d*)?([A-Z][a-z]?|as|se|si|te|[bcnops])")


class Atom(NamedTuple):
    """An atom of a reaction."""

    token: int  # its place in the text
    symbol: str
    element: str


class Link(NamedTuple):
    """Where the head looks from one product atom."""

    product: Atom
    reactant: Atom
    weight: float  # the attention weight
    share: float  # of the weight on all reactant atoms of the product atom's element


class RXNMapper:
    """The vocabulary, the embeddings and the encoder."""

    def __init__(self, vocabulary: list[str], tensors):
        self.numbers = {token: number for number, token in enumerate(vocabulary)}
        self.embeddings = read_embeddings(tensors, "albert.embeddings")
        self.widen = read(tensors, "albert.encoder.embedding_hidden_mapping_in")
        layer = read_layer(tensors, PREFIX, NAMES)
        self.encoder = Encoder([layer] * LAYERS, HEADS)

    def look(self, reaction: str) -> tuple[list[str], np.ndarray]:
        """The tokens of a reaction, and where each head looks: (layers, heads, n, n)."""
        tokens = ["[CLS]", *tokenize(reaction), "[SEP]"]
        unknown = [token for token in tokens if token not in self.numbers]
        if unknown:
            raise UserError(f"the model knows no {unknown[0]!r} in SMILES")
        longest = len(self.embeddings.positions)
        if len(tokens) > longest:
            raise UserError(f"the reaction has {len(tokens)} tokens, expected at most {longest}")
        x = self.embeddings(np.array([[self.numbers[token] for token in tokens]]))
        lengths = np.array([len(tokens)])
        _, weights = self.encoder(linear(x, *self.widen), lengths, return_weights=True)
        return tokens, weights[:, 0]

    def map_atoms(self, reaction: str) -> list[Link]:
        """The strongest link of each product atom to a reactant atom of its element.

        A product atom of an element that no reactant has is left out.
        """
        tokens, weights = self.look(reaction)
        arrow = tokens.index(">>")
        atoms = find_atoms(tokens)
        links = []
        for product in (atom for atom in atoms if atom.token > arrow):
            row = weights[LAYER, HEAD, product.token]
            alike = [x for x in atoms if x.token < arrow and x.element == product.element]
            if alike:
                best = max(alike, key=lambda atom: row[atom.token])
                weight, total = row[best.token], sum(row[x.token] for x in alike)
                links.append(Link(product, best, float(weight), float(weight / total)))
        return links


def load() -> RXNMapper:
    """The model, read from the installed package."""
    vocabulary = find(REQUIREMENT, "vocab.txt").read_text(encoding="utf-8").split("\n")
    return RXNMapper(vocabulary, torch_file.load(find(REQUIREMENT, "pytorch_model.bin")))


def tokenize(reaction: str) -> list[str]:
    """The symbols of a reaction in SMILES, with one arrow between two sides."""
    tokens = TOKEN.findall(reaction)
    if tokens.count(">>") != 1 or ">>" in (tokens[0], tokens[-1]):
        raise UserError(f"{reaction!r} is no reaction, expected reactants>>products in SMILES")
    return tokens


def find_atoms(tokens: list[str]) -> list[Atom]:
    """All atoms of a reaction, between the two tokens that enclose it."""
    matches = ((place, ATOM.match(tokens[place])) for place in range(1, len(tokens) - 1))
    return [Atom(place, tokens[place], match[1].title()) for place, match in matches if match]


def show(reaction: str, links: list[Link]) -> None:
    """Print the map as a table; places count characters of the text from 0."""
    print(f"\n{reaction}\n")
    print("product atom   reactant atom   weight   share")
    starts = np.cumsum([0, *map(len, tokenize(reaction))])
    sources = [x.reactant for x in links]
    for link in links:
        product, reactant = (
            f"{atom.symbol:>6} at {starts[atom.token - 1]:<4}"
            for atom in (link.product, link.reactant)
        )
        notes = "  weak" * (link.weight < WEAK) + "  shared" * (sources.count(link.reactant) > 1)
        print(f"{product}  {reactant} {link.weight:8.2f}{link.share:8.2f}{notes}")


def main() -> None:
    """Map the sample reaction, or those of the command line."""
    parser = argparse.ArgumentParser(description="Map product atoms to reactant atoms.")
    parser.add_argument("reactions", nargs="*", default=[SAMPLE], metavar="REACTION")
    reactions = parser.parse_args().reactions
    model = load()
    maps = [model.map_atoms(reaction) for reaction in reactions]
    print(f"Head {HEAD} of layer {LAYER} looks from product atoms to reactant atoms:")
    for reaction, links in zip(reactions, maps, strict=True):
        show(reaction, links)


if __name__ == "__main__":
    run(main)
