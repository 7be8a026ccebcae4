"""show_config, and what the package says about itself."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mha_fast
from mha_fast import _core
from mha_fast.process import doctor


@pytest.fixture
def config():
    return mha_fast.show_config(mode="dicts")


def test_config_tells_the_versions(config):
    versions = config["Versions"]
    assert versions["mha_fast"] == mha_fast.__version__
    assert versions["numpy"] == np.__version__
    assert versions["compiler"]


def test_config_tells_the_instruction_sets(isa, config):
    sets = mha_fast.show_config(mode="dicts")["Instruction sets"]
    assert sets["in use"] == isa
    assert sets["usable here"].split(", ") == _core.isa_names()
    assert set(_core.isa_names()) <= set(sets["compiled in"].split(", "))


def test_config_tells_threads_and_why(config, restored_threads):
    assert config["OpenMP"]["threads"] == mha_fast.get_num_threads()
    mha_fast.set_num_threads(3)
    openmp = mha_fast.show_config(mode="dicts")["OpenMP"]
    assert openmp["threads"] == mha_fast.get_num_threads()
    assert "set_num_threads" in openmp["because of"]


def test_config_tells_the_environment(output_of):
    script = "import mha_fast; print(mha_fast.show_config('dicts')['Environment'])"
    shown = output_of(script, MHA_FAST_NUM_THREADS="3")
    assert "'MHA_FAST_NUM_THREADS': '3'" in shown


def test_printed_config_holds_every_entry_of_the_dict(capsys, config):
    assert mha_fast.show_config() is None
    printed = capsys.readouterr().out
    for section, entries in config.items():
        assert f"{section}:\n" in printed
        for name, value in entries.items():
            assert f"  {name}: {value}\n" in printed


def test_generic_isa_is_always_usable_and_last():
    assert _core.isa_names()[-1] == "generic"


def test_version_is_that_of_the_installed_distribution():
    assert importlib.metadata.version("mha_fast") == mha_fast.__version__


def test_import_loads_nothing_but_numpy(output_of):
    """The doors are for those who ask for them."""
    script = "import sys, mha_fast; print(*sys.modules)"
    others = "threadpoolctl ml_dtypes scipy torch transformers onnx onnxruntime dask jax autograd"
    assert not set(others.split()) & set(output_of(script).split())


def test_import_leaves_the_warning_and_error_state_alone(output_of):
    script = """
import warnings, numpy as np
before = np.geterr(), list(warnings.filters)
import mha_fast
print(before == (np.geterr(), list(warnings.filters)))
"""
    assert output_of(script) == "True"


def test_subnormal_numbers_survive_import_and_calls(output_of):
    script = """
import numpy as np
tiny = np.full(99, np.finfo(np.float32).smallest_subnormal)
import mha_fast
q = np.ones((8, 300, 64), np.float32)
mha_fast.attention(q, q, q, threads=2)
print((tiny * np.float32(1) == tiny).all() and (tiny + tiny > tiny).all())
"""
    assert output_of(script) == "True"


def test_the_command_line_shows_the_configuration():
    command = [sys.executable, "-P", "-m", "mha_fast", "info"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.sep).stdout
    assert "Instruction sets:" in shown
    assert _core.get_isa() in shown


def test_the_doctor_measures_every_setting_and_gives_advice(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SETTINGS", {"as it is": {}, "other": {"OMP_NUM_THREADS": "1"}})
    doctor.doctor()
    shown = capsys.readouterr().out
    assert "as it is" in shown
    assert "No setting is worth" in shown or "OMP_NUM_THREADS=1" in shown
    assert shown.count(doctor.OURS) == 2


@pytest.mark.parametrize(
    ("other", "ours", "advice"),
    [
        (1.0, 1.0, ["No setting is worth", "makes these pairs no faster"]),
        (0.5, 1.0, ["with A=1 makes these pairs 2.0 times faster", "no faster"]),
        (1.0, 0.5, ["No setting is worth", "2.0 times faster at 16, 128, 512 tokens"]),
    ],
)
def test_the_doctor_advises_what_is_faster(monkeypatch, capsys, other, ours, advice):
    def measured(variables):
        times = {"matmul": 0.5, "linear": 0.5, "attention": 0.5}
        pairs = {"matmul+attention": other if variables else 1.0, "linear+attention": ours}
        return json.dumps([times | pairs] * len(doctor.TOKENS))

    monkeypatch.setattr(doctor, "SETTINGS", {"as it is": {}, "other": {"A": "1"}})
    monkeypatch.setattr(doctor, "_measure_elsewhere", measured)
    doctor.doctor()
    shown = capsys.readouterr().out
    assert all(words in shown for words in advice), shown


def import_a_copy(run_python, folder, extension=None):
    """What `import mha_fast` says where a copy of the package shadows the installed one."""
    source = Path(mha_fast.__file__).parent
    shutil.copytree(source, folder / "mha_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    if extension is not None:
        (folder / "mha_fast" / Path(_core.__file__).name).write_bytes(extension)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    code += "sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in repr(x)]\n"
    code += "import mha_fast"
    return run_python(code).stderr


def test_a_source_tree_without_extension_says_what_helps(run_python, tmp_path):
    said = import_a_copy(run_python, tmp_path)
    assert f"{tmp_path}/mha_fast is the source of mha_fast" in said
    assert "pip install -e ." in said and "circular" not in said


def test_an_extension_that_is_broken_says_so_itself(run_python, tmp_path):
    said = import_a_copy(run_python, tmp_path, extension=b"no library")
    assert "ImportError" in said and "is the source of" not in said


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="needs Linux's list",
)
def test_usable_instruction_sets_are_those_of_the_system():
    [flags, *_] = re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    needs = {
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
        "generic": set(),
    }
    assert set(needs) == set(_core.isa_names(usable=False))
    usable = [name for name in needs if needs[name] <= set(flags.split())]
    assert _core.isa_names() == usable
