"""The training example: its gradients, its curve to the bit, and what it saves."""

import sys
from pathlib import Path

import numpy as np
import pytest
from judge import assert_near
from test_layer_gradients import assert_slope

import mha_fast
from mha_fast import reference

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("safetensors")

tiny_lm = pytest.importorskip("tiny_lm")
train_tiny_lm = pytest.importorskip("train_tiny_lm")

WORDS = "the cat sat on the mat. a dog ate the bone of the cat. " * 60
CONFIG = {"context": 16, "dim": 16, "heads": 2, "layers": 2}


def training(seed=0):
    text = train_tiny_lm.Text(WORDS, CONFIG["context"])
    config = tiny_lm.Config(len(text.characters), **CONFIG)
    return train_tiny_lm.Training(text, config, seed)


def curve(steps=30, run=None):
    run = run or training()
    return [run.step(100) for _ in range(steps)]


def test_gradients_of_the_model_are_its_slopes():
    config = tiny_lm.Config(11, **CONFIG)
    parameters = {
        name: 5 * x.astype(np.float64) for name, x in tiny_lm.new_parameters(config, 0).items()
    }
    model = tiny_lm.TinyLM(config, parameters)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 9))
    _, pullback = model.loss_vjp(tokens)
    found = pullback()
    assert found.keys() == parameters.keys()
    for name, x in parameters.items():
        assert_slope(lambda: model.loss_vjp(tokens)[0], x, found[name], name)


def test_model_learns_what_comes_next():
    losses = curve(100)
    assert losses[-1] < 0.8 * losses[0]


def test_curve_is_the_same_for_any_number_of_threads(restored_threads):
    mha_fast.set_num_threads(1)
    alone = curve()
    mha_fast.set_num_threads(2)
    assert curve() == alone


def test_curve_is_that_of_the_reference_to_rounding(monkeypatch):
    ours = curve()
    monkeypatch.setattr("mha_fast.model.layer_gradients.attention_vjp", reference.attention_vjp)
    theirs = curve()
    assert ours != theirs
    assert_near(np.float32(ours), np.float32(theirs), size=2**10)  # what a step does adds up


def test_writing_is_what_the_whole_text_would_have_been():
    """Token by token through caches: the logits of the forward pass."""
    run = training()
    curve(20, run)
    tokens = run.text.train[:16]
    whole, _ = run.model.logits_vjp(tokens[None])
    shape = 1, CONFIG["heads"], CONFIG["dim"] // CONFIG["heads"]
    caches = [mha_fast.KVCache(*shape) for _ in run.model.attentions]
    for i, token in enumerate(tokens):
        logits = run.model.next_logits(np.array([token]), caches)
        assert np.array_equal(logits, whole[0, i])
    assert len(run.sample()) == CONFIG["context"] - 1


def test_interrupted_training_goes_on_along_the_same_curve(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    path, whole = tmp_path / "run.safetensors", training()
    steps = whole.text.steps
    expected = [whole.step(2 * steps) for _ in range(2 * steps)]
    step, run = train_tiny_lm.Training.step, training()

    def interrupted(self, steps):
        if len(self.losses) == 7 and self is run:
            raise KeyboardInterrupt
        return step(self, steps)

    monkeypatch.setattr(train_tiny_lm.Training, "step", interrupted)
    train_tiny_lm.train(run, 2, path)
    assert "interrupted after 7 steps" in capsys.readouterr().out
    again = training()
    again.resume(path)
    assert again.losses == expected[:7]
    train_tiny_lm.train(again, 2, path)
    assert again.losses == expected
    for name, x in whole.model.parameters.items():
        assert np.array_equal(x, again.model.parameters[name])
    assert [x.name for x in tmp_path.iterdir()] == ["run.safetensors"]
    assert len(again.tests) == 2


def test_curve_is_drawn_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run = training()
    curve(60, run)
    run.test()
    train_tiny_lm.draw(run, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_user_can_cure_is_said(tmp_path):
    from common import UserError

    path, run = tmp_path / "run.safetensors", training()
    run.save(path)
    with pytest.raises(UserError, match="begun with --seed 0"):
        training(seed=1).resume(path)
    with pytest.raises(UserError, match="the text has 5 characters, expected 270 at least"):
        train_tiny_lm.Text("words", 16)
    other = train_tiny_lm.Text(WORDS.replace("cat", "cow"), 16)
    config = tiny_lm.Config(len(other.characters), **CONFIG)
    with pytest.raises(UserError, match="of another model or text"):
        train_tiny_lm.Training(other, config, 0).resume(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        run.resume(path)


def test_canary_another_thread_of_steps_has_another_curve():
    assert curve(5, training(seed=1)) != curve(5)
