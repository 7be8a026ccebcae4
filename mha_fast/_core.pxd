"""csrc/mha.h, csrc/onnxruntime.h and csrc/openmp.h as Cython sees them."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

ctypedef Py_ssize_t idx


cdef extern from "Python.h":
    int PyErr_CheckSignals() noexcept      # the exception stays set for `carry_out` to report
    long long PyLong_AsLongLongAndOverflow(object, int *overflow) except? -1


cdef extern from "mha.h" nogil:
    enum:
        MHA_MAX_AXES
        MHA_MAX_TERMS
        MHA_KEY_BLOCK
        MHA_RUN
        MHA_PANEL
        MHA_PANEL_ROWS
        MHA_SHARE
        MHA_ROW_GROUP
        MHA_ROTARY_ROWS
        MHA_NORM_ROWS
        MHA_BOOL
        MHA_F16
        MHA_BF16
        MHA_F32
        MHA_F64
        MHA_DTYPES
    idx MHA_OPEN
    idx MHA_MAX_DIM

    ctypedef struct mha_array:
        char *data
        int dtype
        idx head_bytes
        idx row_bytes
        idx col_bytes
        const idx *batch_bytes

    ctypedef struct mha_sizes:
        int batch_axes
        const idx *batch_shape
        idx batch
        idx kv_heads
        idx group_size
        idx seqlen_q
        idx seqlen_k
        idx head_dim
        idx head_dim_v

    ctypedef struct mha_spans:
        mha_array q_offset
        mha_array kv_lengths
        idx left
        idx right

    ctypedef struct mha_scoring:
        double scale
        double softcap
        mha_array slopes
        mha_array *terms
        int num_terms

    ctypedef struct mha_weighing:
        mha_array sinks
        uint32_t threshold
        uint32_t *seed

    ctypedef struct mha_problem:
        mha_sizes n
        mha_array q
        mha_array k
        mha_array v
        mha_spans spans
        mha_scoring scoring
        mha_weighing weighing

    ctypedef struct mha_results:
        mha_array out
        mha_array lse
        mha_array sums

    enum:
        MHA_PRODUCTS
        MHA_SCORES
        MHA_WEIGHTS

    ctypedef struct mha_scores_out:
        mha_array to
        int stage
        const int64_t *rows_of
        const int64_t *heads_of
        const void *addend

    ctypedef struct mha_measures:
        void *rows
        int64_t *received
        int64_t *top_keys
        void *top_weights
        idx top

    ctypedef struct mha_gradients:
        mha_array d_out
        mha_array d_lse
        double scale
        void *q
        void *k
        void *v
        void *of_rows
        double *of_keys

    ctypedef struct mha_partial:
        mha_array o
        mha_array sums

    ctypedef struct mha_job:
        const mha_problem *problem
        mha_partial total
        mha_partial run
        bint raw
        mha_results results
        mha_scores_out scores
        mha_measures measures
        mha_gradients gradients

    ctypedef struct mha_rotation:
        mha_sizes n
        mha_array x
        mha_array out
        mha_array cos
        mha_array sin
        mha_array positions
        idx pairs
        bint interleaved

    ctypedef struct mha_norm:
        idx rows
        idx width
        double eps
        bint centred
        const void *x
        const void *weight
        const void *bias
        const void *residual
        void *summed
        void *out
        void *stats
        const void *d_out
        void *d_x
        void *sums

    ctypedef struct mha_linear:
        idx rows
        idx width
        idx outputs
        mha_array x
        mha_array out
        const char *panels
        int dtype
        const void *bias

    ctypedef struct mha_place:
        int rows

    ctypedef struct mha_state:
        void *total
        int has_total

    ctypedef struct mha_tile:
        const mha_job *job
        idx next_task
        idx first_block
        idx last_block
        int writes_scores
        mha_state state

    ctypedef struct mha_kernel:
        int lanes
        int vector
        size_t (*tile_bytes)(const mha_problem *) noexcept nogil
        size_t (*state_bytes)(const mha_problem *) noexcept nogil
        mha_tile *(*begin)(const mha_job *, idx task) noexcept nogil
        int (*scores_block)(mha_tile *, idx block) noexcept nogil
        void (*softmax_block)(mha_tile *) noexcept nogil
        void (*weighted_sum_block)(mha_tile *) noexcept nogil
        void (*save)(mha_tile *, void *record) noexcept nogil
        void (*merge)(mha_tile *, const void *record) noexcept nogil
        void (*finish)(mha_tile *) noexcept nogil
        void (*write_scores)(mha_tile *) noexcept nogil
        void (*measure)(mha_tile *) noexcept nogil

    ctypedef struct mha_pull:
        mha_tile *(*begin)(const mha_job *, idx task, idx share) noexcept nogil
        void (*block)(mha_tile *) noexcept nogil
        void (*finish)(mha_tile *, bint first) noexcept nogil
        void (*begin_group)(mha_tile *, idx share) noexcept nogil
        void (*end_group)(mha_tile *, idx share, bint first) noexcept nogil

    ctypedef struct mha_probe:
        void (*exp2)(const void *x, void *y, idx n) noexcept nogil
        double (*fma_chain)(idx rounds, double *flops) noexcept nogil
        double (*read_all)(const void *x, idx n) noexcept nogil
        void (*tanh)(const void *z, void *y, idx n) noexcept nogil
        void (*threefry)(uint32_t *words, const uint32_t *key) noexcept nogil

    ctypedef struct mha_kernels:
        const mha_kernel *queries_in_lanes
        const mha_kernel *keys_in_lanes
        const mha_pull *pull
        const mha_probe *probe
        int (*rotate)(const mha_rotation *, idx task) noexcept nogil
        int (*norm)(const mha_norm *, idx task) noexcept nogil
        int (*linear)(const mha_linear *, idx task) noexcept nogil

    ctypedef struct mha_isa:
        const char *name
        const mha_kernels *f32
        const mha_kernels *f64

    int64_t mha_fetch_add(int64_t *count, int64_t step)
    const mha_isa *mha_isa_at(int i)
    int mha_isa_usable(int i)
    idx mha_tile_count(const mha_problem *problem, int lanes)
    mha_place mha_place_of(const mha_problem *problem, idx task, int lanes)


cdef extern from "openmp.h" nogil:
    const char *MHA_COMPILER
    int MHA_OPENMP_VERSION
    int omp_get_max_threads()
    int omp_get_thread_num()
    int omp_in_parallel()
    int omp_get_num_procs()
    double omp_get_wtime()
    bint MHA_GNU_OPENMP
    void mha_yield()


cdef extern from "onnxruntime.h" nogil:
    enum:
        MHA_ORT_VERSION
        MHA_ORT_INVALID_ARGUMENT

    ctypedef struct OrtStatus
    ctypedef struct OrtValue
    ctypedef struct OrtTensorInfo
    ctypedef struct OrtKernelInfo
    ctypedef struct OrtKernelContext
    ctypedef struct OrtSessionOptions
    ctypedef struct OrtCustomOpDomain

    ctypedef struct OrtApi:
        OrtStatus *(*CreateStatus)(int code, const char *message)
        const char *(*GetErrorMessage)(const OrtStatus *)
        OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **)
        OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *)
        OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *)
        OrtStatus *(*GetTensorMutableData)(OrtValue *, void **)
        OrtStatus *(*GetTensorElementType)(const OrtTensorInfo *, int *)
        OrtStatus *(*GetDimensionsCount)(const OrtTensorInfo *, size_t *)
        OrtStatus *(*GetDimensions)(const OrtTensorInfo *, int64_t *dims, size_t count)
        OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorInfo **)
        OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *, const char *, float *)
        OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *, int64_t *)
        OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t, const OrtValue **)
        OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t, const int64_t *dims,
                                              size_t count, OrtValue **)
        void (*ReleaseStatus)(OrtStatus *)
        void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorInfo *)
        OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *, size_t *)
        OrtStatus *(*KernelInfo_GetOutputCount)(const OrtKernelInfo *, size_t *)
        OrtStatus *(*KernelInfo_GetOutputName)(const OrtKernelInfo *, size_t, char *, size_t *)

    ctypedef struct OrtApiBase:
        const OrtApi *(*GetApi)(uint32_t version)

    ctypedef struct OrtCustomOp:
        void (*KernelDestroy)(void *kernel) noexcept
        OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *,
                                     void **kernel) noexcept
        OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *) noexcept

    ctypedef struct mha_served:
        OrtCustomOp op
        const char *name
        const char *inputs
        const char *outputs
        size_t required
        int element
        int threads
        void *operator_

    ctypedef OrtStatus *(*mha_registrar)(OrtSessionOptions *, const OrtApiBase *) noexcept

    ctypedef struct mha_host:
        const OrtApi *api
        OrtKernelContext *context
        int threads

    void mha_serve(mha_served *served)
    void mha_set_registrar(mha_registrar registrar)
    const mha_host *mha_get_host()
    void mha_set_host(const mha_host *host)
    void mha_run_hosted(const mha_host *host, void (*member)(void *, size_t) noexcept,
                        size_t members, void *subject)
