"""Instruction set, threads and measurements: what the process has set, included by _core.pyx."""

cdef const mha_isa *isa = NULL
cdef bint forked = False
cdef int threads_set = 0                            # set_num_threads or its variable; 0: not set
cdef int threads_quota = 0                          # the cgroup's CPU quota; 0: none
cdef int openmp_threads = omp_get_max_threads()     # at import, before anybody limits it


cdef int default_threads() noexcept:
    """Threads of a call that does not say: ours if set, else OpenMP's, which knows OMP_NUM_THREADS,
    affinity and threadpoolctl. A limit that OpenMP was given since import holds in either case."""
    cdef int now = omp_get_max_threads()
    cdef int count = threads_set or (min(now, threads_quota) if threads_quota else now)
    return min(count, now) if now < openmp_threads else count


def get_threads():
    return default_threads()


def get_threads_set():
    return threads_set


def set_threads(int count):
    global threads_set
    threads_set = count


def set_quota(int count):
    global threads_quota
    threads_quota = count


def after_fork_in_child():
    """GNU OpenMP hangs in a forked child of a process that had a team: stay serial there."""
    global forked
    forked = True


def is_forked():
    return forked


def isa_names(bint usable=True):
    """Instruction sets that this CPU can run (or, not `usable`, all compiled in), fastest first."""
    cdef int i = 0
    names = []
    while mha_isa_at(i) != NULL:
        if not usable or mha_isa_usable(i):
            names.append(mha_isa_at(i).name.decode())
        i += 1
    return names


def get_isa():
    return isa.name.decode()


def use_isa(name):
    """Compute with this instruction set from now on; None or "" is the fastest usable one."""
    global isa
    cdef int i = 0
    names = isa_names()
    if name and name not in names:
        raise ValueError(f"MHA_FAST_ISA={name!r} is not usable here; usable: {', '.join(names)}")
    while mha_isa_at(i).name.decode() != (name or names[0]):
        i += 1
    isa = mha_isa_at(i)


def geometry():
    """Sizes that tests, plans and caches need: keys in a block, blocks in a run, and for each
    instruction set and compute dtype the rows of a tile, the numbers of a vector, and the rows up
    to which keys lie in the lanes."""
    cdef int i = 0
    cdef const mha_isa *at = mha_isa_at(0)
    sizes = {}
    while at != NULL:
        sizes[at.name.decode()] = {"float32": tile_sizes(at.f32), "float64": tile_sizes(at.f64)}
        i += 1
        at = mha_isa_at(i)
    return {"key_block": MHA_KEY_BLOCK, "run": MHA_RUN, "isas": sizes}


cdef dict tile_sizes(const mha_kernels *kernels):
    return {
        "tile": kernels.queries_in_lanes.lanes,
        "vector": kernels.queries_in_lanes.vector,
        "few": kernels.keys_in_lanes.lanes,
    }


def openmp_version():
    return MHA_OPENMP_VERSION


def exp2(cnp.ndarray x):
    """The kernel's exponential of a contiguous float32 or float64 array, for its tests."""
    cdef cnp.ndarray y = cnp.PyArray_NewCopy(x, cnp.NPY_CORDER)
    cdef const mha_kernels *kernels = isa.f64 if dtype_of(x) == MHA_F64 else isa.f32
    assert dtype_of(x) == compute_dtype(dtype_of(x))
    kernels.probe.exp2(cnp.PyArray_DATA(y), cnp.PyArray_DATA(y), y.size)
    return y


def tanh(cnp.ndarray z):
    """The kernel's tanh(x) of z = 2 log2(e) x, likewise."""
    cdef cnp.ndarray y = cnp.PyArray_NewCopy(z, cnp.NPY_CORDER)
    cdef const mha_kernels *kernels = isa.f64 if dtype_of(z) == MHA_F64 else isa.f32
    assert dtype_of(z) == compute_dtype(dtype_of(z))
    kernels.probe.tanh(cnp.PyArray_DATA(y), cnp.PyArray_DATA(y), y.size)
    return y


def threefry(counter, key):
    """The four words that dropout draws from four and four, for its tests."""
    cdef uint32_t words[4]
    cdef uint32_t keys[4]
    for i in range(4):
        words[i], keys[i] = counter[i], key[i]
    isa.f32.probe.threefry(words, keys)
    return [words[i] for i in range(4)]


def fma_chain(idx rounds):
    """Floating-point operations done by `rounds` of independent float32 FMA, for the peak."""
    cdef double flops = 0
    with nogil:
        isa.f32.probe.fma_chain(rounds, &flops)
    return flops


def read_all(cnp.ndarray x):
    """Read a contiguous float32 array once, for the bandwidth."""
    cdef idx n = x.size
    with nogil:
        isa.f32.probe.read_all(cnp.PyArray_DATA(x), n)


use_isa(os.environ.get("MHA_FAST_ISA"))
if hasattr(os, "register_at_fork"):     # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=after_fork_in_child)
