"""The benchmarks run, refuse wrong results and count right. Nothing here asserts a speed."""

import json
import subprocess
import sys
from pathlib import Path

import backward
import layer
import linear
import modes
import numpy as np
import packed
import pairs
import pytest
import report
import scaling
import systems
from backward import Backward
from cases import Case

FOLDER = Path(modes.__file__).parent
QUICK = ["--rounds", "1", "--seconds", "0.001", "--systems", "mha_fast", "numpy"]
SMALL = {  # one of each mode, small enough for a test
    "table": ("tiny_h1_s16", "decode_transposed"),
    "backward": ("backward_paper512_s64",),
    "linear": ("linear_d512_out_r64",),
    "packed": ("packed_float32_r1",),
    "layer": ("layer_d512_b1_s64",),
    "pairs": ("pair_s16",),
    "scaling": ("bert_b8_s128",),
}
KINDS = {
    "plain": (Case("c", 1, 2, 1, 5, 7, 8, causal=True), systems),
    "weights": (Case("c", 2, 2, 2, 5, 7, 8, weights=True), systems),
    "transposed": (Case("c", 1, 2, 2, 5, 7, 8, layout="transposed"), systems),
    "float16": (Case("c", 1, 2, 2, 5, 7, 8, dtype="float16"), systems),
    "bfloat16": (Case("c", 1, 2, 2, 5, 7, 8, dtype="bfloat16"), systems),
    "options": (Case("c", 2, 4, 2, 5, 7, 8, options=("softcap", "alibi", "sinks")), systems),
    "backward": (Backward("b", 2, 4, 2, 5, 7, 8, options=("alibi", "sinks")), backward),
    "causal backward": (Backward("b", 1, 4, 2, 5, 7, 8, causal=True), backward),
    "linear": (linear.Linear("l", 3, 8, 5), linear),
    "packed": (packed.Packed("p", 3, 8, 5), packed),
    "layer": (layer.Layer("l", 2, 5, 8, 2), layer),
    "causal layer": (layer.Layer("l", 2, 5, 8, 2, causal=True), layer),
}


def bench(*arguments):
    """Run the script; return what it prints."""
    command = [sys.executable, FOLDER / "bench.py", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, error = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: it ends the processes that it stopped
            raise
    assert process.returncode == 0, error
    return out


def result_of(kind, system):
    """A case, its inputs, and a function that gives a result fit for its check."""
    case, task = KINDS[kind]
    inputs = case.make_inputs()
    player = task.SYSTEMS[system](1)
    return case, inputs, player.canonical(player.prepare(case, inputs)(), case)


def test_every_case_of_every_mode_is_listed():
    shown = bench("--all", "--heads", "x.png", "--lengths", "x.png", "--list").split()
    for mode in modes.MODES.values():
        assert {case.name for case in mode.cases()} <= set(shown)


def test_names_are_unique_among_cases():
    names = [case.name for m in modes.MODES.values() for case in m.cases() if m.name != "scaling"]
    assert len(names) == len(set(names))


def test_a_run_of_each_mode_is_right_stored_and_shown_again(tmp_path):
    stored = tmp_path / "all.json"
    chosen = [name for names in SMALL.values() for name in names]
    shown = bench("--all", *QUICK, "--json", stored, "--cases", *chosen)
    results = json.loads(stored.read_text())["results"]
    expected = {(mode, name) for mode, names in SMALL.items() for name in names}
    expected.add(("table", "bert_b8_s128"))
    assert {(r["sweep"], r["case"]) for r in results} == expected
    for result in results:
        for name, entry in result["systems"].items():
            assert entry["status"] == "ok", f"{result['case']}, {name}: {entry}"
    assert bench("--load", stored) == shown
    headings = [line for line in bench("--load", stored, "--markdown").splitlines() if "#" in line]
    assert headings == [f"### {modes.MODES[name].title}" for name in SMALL]


@pytest.mark.parametrize("system", ["mha_fast", "numpy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_result_passes_its_check(kind, system, restored_threads):
    case, inputs, output = result_of(kind, system)
    case.check(inputs, output)


@pytest.mark.parametrize("name", pairs.SYSTEMS)
def test_parts_and_pairs_pass_their_check(name, restored_threads):
    case = pairs.pair_sizes()[0]
    inputs, player = case.make_inputs(), pairs.SYSTEMS[name](1)
    output = player.canonical(player.prepare(case, inputs)(), case)
    case.check(inputs, output)
    output[player.holds[-1]][0] *= 2
    with pytest.raises(ValueError, match="wrong result"):
        case.check(inputs, output)


@pytest.mark.parametrize("kind", KINDS)
def test_canary_a_wrong_number_in_any_array_is_refused(kind):
    case, inputs, output = result_of(kind, "numpy")
    for array in output if isinstance(output, tuple) else [output]:
        right = array[-1].copy()
        for wrong in (array[-1] * 2, np.nan):
            array[-1] = wrong
            with pytest.raises(ValueError, match="wrong result"):
                case.check(inputs, output)
            array[-1] = right
    case.check(inputs, output)


def test_transposed_keys_and_values_are_views_with_the_same_numbers():
    dense, views = (
        Case("c", 1, 2, 2, 5, 7, 8, layout=layout).make_inputs()
        for layout in ("heads_first", "transposed")
    )
    for name in "kv":
        assert np.array_equal(dense[name], views[name])
        assert views[name].strides[-2] == views[name].itemsize
        assert views[name].swapaxes(-1, -2).flags.c_contiguous


def test_the_check_of_gradients_knows_dropout_and_the_forward_pass(restored_threads):
    case = Backward("b", 2, 4, 2, 5, 9, 8, options=("dropout",))
    inputs = case.make_inputs()
    for name in ("mha_fast", backward.FORWARD):
        player = backward.SYSTEMS[name](1)
        output = player.canonical(player.prepare(case, inputs)(), case)
        case.check(inputs, output)
        with pytest.raises(ValueError, match="wrong result"):
            case.check({**inputs, "seed": inputs["seed"] + 1}, output)


def test_a_sample_of_gradients_has_rows_of_every_head_and_the_first_and_last_keys():
    case = Backward("b", 2, 8, 8, 70, 90, 4)
    inputs, player = case.make_inputs(), backward.SYSTEMS["numpy"](1)
    output = player.prepare(case, inputs)()
    for array, at in ((output[0], (0, 5)), (output[1], (1, 7, 89)), (output[2], (0, 0, 0))):
        right = array[at].copy()
        array[at] *= 1.01
        with pytest.raises(ValueError, match="wrong result"):
            case.check(inputs, output)
        array[at] = right
    case.check(inputs, output)


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_a_layer_are_those_of_its_parts(causal):
    n, d = 6, 16
    products = linear.Linear("l", n, d, 3 * d).flops() + linear.Linear("l", n, d, d).flops()
    attention = Case("c", 1, 2, 2, n, n, d // 2, causal=causal).flops()
    assert layer.Layer("l", 3, n, d, 2, causal).flops() == 3 * (products + attention)


def test_thread_counts_are_powers_of_two_and_all():
    names = [scaling.label(count) for count in range(1, 9)]
    for threads, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        assert list(scaling.members(names, threads).values()) == expected


def test_scaling_is_held_against_the_peak_of_as_many_threads():
    result = {
        "case": "c",
        "unit": "flops",
        "flops": 1e9,
        "peaks_by_system": {"1 thread": [4.0, 5.0], "2 threads": [8.0]},
        "systems": {"1 thread": {"best": 0.4}, "2 threads": {"best": 0.25}},
    }
    header, rows = scaling.table([result])
    assert header == ["case", "1 thread", "share", "2 threads", "share", "speed-up"]
    assert rows == [["c", "400 ms", "50 %", "250 ms", "50 %", "1.60x"]]


def test_a_pair_is_held_against_the_sum_of_its_parts():
    times = {"matmul": 1e-3, "attention": 3e-3, "matmul+attention": 5e-3, "linear": 2e-3}
    entries = {name: {"best": time, "median": 2 * time} for name, time in times.items()}
    _, rows = pairs.table([{"case": "c", "systems": entries}])
    assert rows[0][2:] == ["1 ms", "3 ms", "5 ms", "1.25x", "10 ms", "1.25x"]
    assert rows[1][2:] == ["2 ms", "3 ms", "-", "-", "-", "-"]


def test_a_backward_pass_is_held_against_the_share_of_the_forward_pass():
    case, forward = (kind("c", 1, 2, 1, 5, 7, 8, causal=True) for kind in (Backward, Case))
    assert case.flops() == 2.5 * forward.flops()
    times = {"mha_fast": 5e-3, backward.FORWARD: 1.5e-3, "torch": 1e-2}
    systems = {name: {"status": "ok", "best": time, "median": time} for name, time in times.items()}
    result = {"case": "c", "unit": "flops", "flops": 1e9, "peak": 400.0, "systems": systems}
    header, rows = backward.table([result])
    assert header[4:] == ["share", "forward", "/ its share", "torch"]
    assert rows[0][4:] == ["50 %", "1.5 ms", "0.75", "2.00x  25 %"]
    del systems[backward.FORWARD]
    assert backward.table([result])[1][0][5:7] == ["-", "-"]


def test_files_are_compared_case_by_case_within_a_mode():
    def stored(table, heads):
        return {
            "results": [
                {"sweep": sweep, "case": "c", "unit": "latency", "systems": {"numpy": {"best": t}}}
                for sweep, t in (("table", table), ("heads", heads))
            ]
        }

    _, rows = report.compare(stored(1.0, 2.0), stored(3.0, 2.0), "numpy")
    assert [row[3] for row in rows] == ["3.000", "1.000"]
