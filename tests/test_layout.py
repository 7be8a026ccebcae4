"""Memory layout changes no bit: strides, alignment, byte order, mixed dtypes, out=."""

import numpy as np
import pytest
import sizes
from judge import assert_accurate, assert_same
from sizes import qkv, random_mask

from mha_fast import attention, reference

STEPS = (-1, 0, 1)


def negative(x):
    return np.flip(np.flip(x).copy())


def step_2(x):
    apart = np.zeros((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), x.dtype)
    apart[..., 1::2, ::2] = x
    return apart[..., 1::2, ::2]


def padded_rows(x):
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def transposed(x):
    return x.swapaxes(-1, -2).copy().swapaxes(-1, -2)


def heads_after_sequence(x):
    return x.swapaxes(-2, -3).copy().swapaxes(-2, -3)


def field_of_structure(x):
    table = np.zeros(x.shape, [("pad", "u1"), ("x", x.dtype)])
    table["x"] = x
    return table["x"]


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    moved = np.ndarray(x.shape, x.dtype, buffer=raw)
    moved[...] = x
    return moved


def read_only(x):
    frozen = x.copy()
    frozen.flags.writeable = False
    return frozen


def byte_swapped(x):
    return x.astype(x.dtype.newbyteorder())


def subclass(x):
    return x.view(np.memmap)


WRITEABLE = [
    negative,
    step_2,
    padded_rows,
    transposed,
    heads_after_sequence,
    np.asfortranarray,
    field_of_structure,
    misaligned,
]
LAYOUTS = [*WRITEABLE, read_only, byte_swapped, subclass]


def name_of(function):
    return function.__name__


def small_case(isa, dtype, step):
    """q, k, v and a float mask with one row more or less than a tile."""
    seqlen_q = sizes.tile(isa, dtype) + step
    q, k, v = qkv(seqlen_q, sizes.KEY_BLOCK + step, 17, 9, kv_heads=1, dtype=dtype)
    mask = random_mask(2, 2, seqlen_q, sizes.KEY_BLOCK + step)
    return {"q": q, "k": k, "v": v, "mask": sizes.additive(mask, dtype)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("operand", ["q", "k", "v", "mask", "bool mask", "all"])
def test_layout_of_an_input_changes_no_bit(isa, dtype, layout, operand):
    if layout is byte_swapped and dtype == sizes.BFLOAT16:
        pytest.skip("ml_dtypes has no swapped bfloat16")
    for step in STEPS:
        arrays = small_case(isa, dtype, step)
        if operand == "bool mask":
            arrays["mask"] = arrays["mask"] > 0
        expected = attention(**arrays, return_lse=True)
        names = arrays if operand == "all" else [operand.split()[-1]]
        moved = arrays | {name: layout(arrays[name]) for name in names}
        for name in names:
            assert np.array_equal(moved[name], arrays[name])
        assert_same(attention(**moved, return_lse=True), expected)


@pytest.mark.parametrize("layout", WRITEABLE, ids=name_of)
def test_out_may_have_any_layout(isa, dtype, layout):
    for step in STEPS:
        arrays = small_case(isa, dtype, step)
        expected = attention(**arrays, return_lse=True)
        out = layout(np.full_like(expected.out, np.nan))
        result = attention(**arrays, out=out, return_lse=True)
        assert result.out is out
        assert_same(result, expected)


@pytest.mark.parametrize("layout", [step_2, padded_rows, field_of_structure])
def test_bytes_between_the_elements_of_out_stay(isa, layout):
    arrays = small_case(isa, np.float32, 1)
    out = layout(np.zeros_like(attention(**arrays)))
    whole = out.base
    attention(**arrays, out=out)
    out[...] = 0
    assert not whole.tobytes().strip(b"\0")


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("operand", ["q", "k", "v", "mask"])
def test_stride_zero_equals_a_copy(isa, real, operand, axis):
    for step in STEPS:
        arrays = small_case(isa, real, step)
        x = arrays[operand]
        arrays[operand] = np.broadcast_to(x.take([0], axis), x.shape)
        copied = arrays | {operand: arrays[operand].copy()}
        result = attention(**arrays, return_lse=True)
        assert_same(result, attention(**copied, return_lse=True))


def test_memory_mapped_inputs_are_read_in_place(tmp_path, isa):
    arrays = small_case(isa, np.float32, 0)
    mapped = {}
    for name, x in arrays.items():
        np.save(tmp_path / f"{name}.npy", x)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(
        tmp_path / "out.npy", "w+", np.float32, (*arrays["q"].shape[:-1], 9)
    )
    expected = attention(**arrays)
    assert_same(attention(**mapped), expected)
    attention(**mapped, out=out.view(np.ndarray))
    assert_same(np.asarray(out), expected)


def test_swapaxes_gives_the_other_layouts(real):
    q, k, v = qkv(13, 67, heads=4, kv_heads=2, dtype=real)
    bshd = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in (q, k, v)]
    assert_same(attention(*bshd, causal=True), attention(q, k, v, causal=True))


@pytest.mark.parametrize("offset", range(0, 64, 4))
def test_alignment_of_the_start_changes_no_bit(isa, offset):
    arrays = small_case(isa, np.float32, 1)
    expected = attention(**arrays)
    raw = np.zeros(expected.nbytes + 128, np.uint8)
    out = np.ndarray(expected.shape, np.float32, buffer=raw[offset:])
    for name, x in arrays.items():
        memory = np.zeros(x.nbytes + 128, np.uint8)[offset:]
        arrays[name] = np.ndarray(x.shape, x.dtype, buffer=memory)
        arrays[name][...] = x
    assert_same(attention(**arrays, out=out), expected)


@pytest.mark.parametrize("q_dtype", sizes.DTYPES, ids=str)
@pytest.mark.parametrize("k_dtype", sizes.DTYPES, ids=str)
def test_mixed_dtypes_promote_as_in_numpy(isa, dtype, q_dtype, k_dtype):
    if {sizes.BFLOAT16, np.dtype(np.float16)} <= {q_dtype, k_dtype, dtype}:
        pytest.skip("NumPy knows no promotion of float16 with bfloat16")
    q, k, v = qkv(13, 67)
    q, k, v = q.astype(q_dtype), k.astype(k_dtype), v.astype(dtype)
    result = attention(q, k, v, return_lse=True)
    assert_accurate(result, q, k, v)
    wide = [x.astype(result.lse.dtype) for x in (q, k, v)]
    assert_same(result.lse, attention(*wide, return_lse=True).lse)


def test_float16_beside_bfloat16_does_not_depend_on_the_other_options():
    q, k, v = qkv(3, 5, dtype=np.float16)
    v = v.astype(sizes.BFLOAT16)

    def outcome(function, **options):
        try:
            return str(function(q, k, v, **options).dtype)
        except TypeError:
            return "TypeError"

    plain = outcome(attention)
    assert outcome(attention, window=(None, None)) == plain
    assert outcome(reference.attention) == plain


def test_sixteen_bits_are_the_float32_result_rounded(isa, dtype):
    q, k, v = qkv(67, 201, 16, dtype=dtype)
    compute = np.promote_types(dtype, np.float32)
    wide = attention(*(x.astype(compute) for x in (q, k, v)))
    assert_same(attention(q, k, v), wide.astype(dtype))


def every_finite(storage):
    numbers = np.arange(2**16, dtype=np.uint16).view(storage)
    with np.errstate(invalid="ignore"):
        return numbers[np.isfinite(numbers.astype(np.float32))]


@pytest.mark.parametrize("storage", sizes.DTYPES[:2], ids=str)
def test_every_sixteen_bit_number_is_read_and_written_exactly(isa, storage):
    numbers = every_finite(storage)
    numbers = numbers[numbers != 0].reshape(-1, 1, 1, 1)
    one = np.ones((1, 1, 1, 1), storage)
    assert_same(attention(one, one, numbers), numbers)


@pytest.mark.parametrize("neighbours", [True, False], ids=["ties", "any"])
@pytest.mark.parametrize("storage", sizes.DTYPES[:2], ids=str)
def test_sixteen_bit_results_round_to_nearest_even(isa, storage, neighbours):
    """The mean of two numbers is exact in float32, then rounded once."""
    a = every_finite(storage)
    b = np.roll(a, 1) if neighbours else np.random.default_rng(0).permutation(a)
    with np.errstate(over="ignore"):
        mean = (a.astype(np.float32) + b.astype(np.float32)) * np.float32(0.5)
        expected = (mean + np.float32(0)).astype(storage)
    v = np.stack([a, b], axis=-1).reshape(-1, 1, 2, 1)
    out = attention(v[:1, :, :1], v[:1], v, scale=0.0)
    finite = np.isfinite(mean)
    assert_same(out.reshape(-1)[finite], expected[finite])


FAR = 2**31 + 64


def far_apart(x, axis):
    """The same values, neighbours along an axis over 2**31 bytes apart. Pages that are
    not touched are never allocated."""
    strides = list(x.strides)
    strides[axis] = FAR
    size = FAR * (x.shape[axis] - 1) + x.nbytes
    try:
        memory = np.zeros(size, np.uint8)
    except MemoryError:
        pytest.skip(f"no address space for {size} bytes")
    moved = np.ndarray(x.shape, x.dtype, memory, strides=strides)
    moved[...] = x
    return moved


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("operand", ["q", "k", "v", "mask"])
def test_strides_beyond_31_bits_are_followed(operand, axis):
    q, k, v = qkv(3, 3, 4, heads=2)
    arrays = {"q": q, "k": k, "v": v, "mask": sizes.random(2, 2, 3, 3)}
    expected = attention(**arrays)
    arrays[operand] = far_apart(arrays[operand], axis)
    assert_same(attention(**arrays), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_out_beyond_31_bits_are_followed(axis):
    q, k, v = qkv(3, 3, 4, heads=2)
    out = far_apart(np.zeros_like(q), axis)
    assert_same(attention(q, k, v, out=out), attention(q, k, v))
