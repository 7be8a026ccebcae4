"""Sessions of onnxruntime: its nodes as calls of Python functions; included by _core.pyx.

A kernel of onnxruntime is a `Node` here: a function of mha_fast.onnx with the attributes of the
model's node. It is given arrays over the memory of onnxruntime, and asks for its outputs there. The
GIL is held for that alone: tiles run without it, on onnxruntime's own threads.
"""

cdef extern from "Python.h":
    int Py_IsInitialized() noexcept nogil
    void PyErr_SetInterrupt() noexcept

# NumPy's number of each of ONNX's element types; bfloat16 is a type of ml_dtypes.
cdef enum:
    ELEMENTS = 17
    ELEMENT_BFLOAT16 = 16
cdef int number_of_element[ELEMENTS]
number_of_element[:] = [
    -1, cnp.NPY_FLOAT32, cnp.NPY_UINT8, cnp.NPY_INT8, cnp.NPY_UINT16, cnp.NPY_INT16,
    cnp.NPY_INT32, cnp.NPY_INT64, -1, cnp.NPY_BOOL, cnp.NPY_FLOAT16, cnp.NPY_FLOAT64,
    cnp.NPY_UINT32, cnp.NPY_UINT64, -1, -1, -1]

cdef const OrtApi *ort = NULL       # since the first registration
cdef object registered = None       # operators and threads of the registration that runs
# Domains of each (operators, threads), and what they point to. Sessions may outlive their options,
# so all of it stays.
cdef dict domains = {}


cdef int check(OrtStatus *status) except -1:
    """Raise what onnxruntime complains of."""
    if status == NULL:
        return 0
    message = ort.GetErrorMessage(status).decode(errors="replace")
    ort.ReleaseStatus(status)
    raise RuntimeError(message)


cdef OrtStatus *failed(object error) noexcept:
    """An exception as onnxruntime's, which it raises again with this message."""
    message = b"mha_fast failed, and its message too"
    try:
        message = f"{type(error).__name__}: {error}".encode(errors="replace")
    except BaseException:
        pass
    return ort.CreateStatus(MHA_ORT_INVALID_ARGUMENT, message)


# ---- Registration --------------------------------------------------------------------------------


def register_onnxruntime(options, tuple operators, int threads):
    """Have these operators serve the sessions that are made with these options."""
    global registered
    registered = operators, threads
    try:
        options.register_custom_ops_library(__file__)
    finally:
        registered = None


cdef OrtStatus *add_domains(OrtSessionOptions *options, const OrtApiBase *base) noexcept with gil:
    """What onnxruntime calls meanwhile."""
    global ort
    cdef const OrtApi *api = base.GetApi(MHA_ORT_VERSION)
    if api == NULL or registered is None:
        return base.GetApi(1).CreateStatus(MHA_ORT_INVALID_ARGUMENT,
                                           b"mha_fast: use mha_fast.onnx.register(options)")
    ort = api
    try:
        operators, threads = registered
        for domain, _ in domains_of(operators, threads):
            check(ort.AddCustomOpDomain(options, <OrtCustomOpDomain *><size_t>domain))
    except BaseException as error:
        return failed(error)
    return NULL


cdef list domains_of(tuple operators, int threads):
    """(address, what it points to) of each domain."""
    cdef OrtCustomOpDomain *domain
    if (operators, threads) not in domains:
        found = []
        for name in sorted({operator.domain for operator in operators}):
            check(ort.CreateCustomOpDomain(name.encode(), &domain))
            kept = [add_served(domain, operator, element, threads)
                    for operator in operators if operator.domain == name
                    for element in operator.elements]
            found.append((<size_t>domain, kept))
        domains[operators, threads] = found
    return domains[operators, threads]


cdef object add_served(OrtCustomOpDomain *domain, operator, int element, int threads):
    """Add an operator for one element type; what must live as long as the domain."""
    cdef mha_served *served = <mha_served *>calloc(1, sizeof(mha_served))
    if served == NULL:
        raise MemoryError("no memory for an operator")
    texts = operator.name.encode(), operator.inputs.encode(), operator.outputs.encode()
    served.name, served.inputs, served.outputs = texts[0], texts[1], texts[2]
    served.required, served.element, served.threads = operator.required, element, threads
    served.operator_ = <void *>operator
    mha_serve(served)
    served.op.CreateKernelV2 = create_kernel
    served.op.KernelComputeV2 = compute_kernel
    served.op.KernelDestroy = destroy_kernel
    check(ort.CustomOpDomain_Add(domain, &served.op))
    return operator, texts


# ---- Kernels -------------------------------------------------------------------------------------


@cython.final
cdef class Node:
    """A node of a model, in one session."""
    cdef object function                # of a Call and its inputs
    cdef size_t inputs
    cdef uint64_t outputs               # a bit for each that has a name
    cdef int threads


@cython.final
@cython.freelist(8)
cdef class Call:
    """One run of a node."""
    cdef OrtKernelContext *context      # NULL once it is over
    cdef uint64_t outputs

    def wants(self, int output):
        """Does the graph name this output?"""
        return bool(self.outputs >> output & 1)

    def new(self, int output, tuple shape, dtype):
        """An array to fill, in onnxruntime's memory; None where the output has no name."""
        cdef int64_t dims[MHA_MAX_AXES]
        cdef OrtValue *value = NULL
        cdef idx i, count = len(shape)
        if self.context == NULL or count > MHA_MAX_AXES:
            raise ValueError("the call is over, or its output has too many axes")
        for i in range(count):
            dims[i] = shape[i]
        check(ort.KernelContext_GetOutput(self.context, output, dims, count, &value))
        if value == NULL:
            return None
        array = array_of(value)
        if array.dtype != dtype:
            raise TypeError(f"output {output} has dtype {array.dtype}, expected {dtype}")
        return array


cdef object array_of(OrtValue *value):
    """A tensor as an array over its memory."""
    cdef OrtTensorInfo *info
    cdef int64_t dims[MHA_MAX_AXES]
    cdef cnp.npy_intp shape[MHA_MAX_AXES]
    cdef size_t i, count = 0
    cdef int element = 0
    cdef void *data = NULL
    check(ort.GetTensorTypeAndShape(value, &info))
    try:
        check(ort.GetTensorElementType(info, &element))
        check(ort.GetDimensionsCount(info, &count))
        if count <= MHA_MAX_AXES:
            check(ort.GetDimensions(info, dims, count))
    finally:
        ort.ReleaseTensorTypeAndShapeInfo(info)
    if count > MHA_MAX_AXES:
        raise ValueError(f"a tensor has {count} axes, expected at most {MHA_MAX_AXES}")
    for i in range(count):
        shape[i] = dims[i]
    check(ort.GetTensorMutableData(value, &data))
    return cnp.PyArray_SimpleNewFromData(<int>count, shape, number_of(element), data)


cdef int number_of(int element) except -1:
    if element == ELEMENT_BFLOAT16 and number_of_element[element] < 0:
        import ml_dtypes

        number_of_element[element] = np.dtype(ml_dtypes.bfloat16).num
    if not 0 <= element < ELEMENTS or number_of_element[element] < 0:
        raise TypeError(f"a tensor has ONNX's element type {element}, expected numbers or bool")
    return number_of_element[element]


cdef object input_of(OrtKernelContext *context, size_t index):
    """An input that nobody may write to, None where there is none."""
    cdef const OrtValue *value = NULL
    cdef cnp.ndarray array
    check(ort.KernelContext_GetInput(context, index, &value))
    if value == NULL:
        return None
    array = array_of(<OrtValue *>value)
    cnp.PyArray_CLEARFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)
    return array


cdef OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                              void **kernel) noexcept with gil:
    cdef const mha_served *served = <const mha_served *>op
    try:
        node = new_node(<object>served.operator_, info, served.threads)
    except BaseException as error:
        return failed(error)
    Py_INCREF(node)
    kernel[0] = <void *>node
    return NULL


cdef Node new_node(operator, const OrtKernelInfo *info, int threads):
    cdef Node node = Node.__new__(Node)
    cdef int64_t whole = 0
    cdef float real = 0
    cdef size_t i, bytes, outputs = 0
    attributes = {}
    for name in operator.integers:
        if found(ort.KernelInfoGetAttribute_int64(info, name.encode(), &whole)):
            attributes[name] = whole
    for name in operator.reals:
        if found(ort.KernelInfoGetAttribute_float(info, name.encode(), &real)):
            attributes[name] = real
    check(ort.KernelInfo_GetInputCount(info, &node.inputs))
    check(ort.KernelInfo_GetOutputCount(info, &outputs))
    for i in range(outputs):
        bytes = 0
        check(ort.KernelInfo_GetOutputName(info, i, NULL, &bytes))
        node.outputs |= <uint64_t>(bytes > 1) << i      # an empty name ends after one byte
    node.function = operator.of_node(attributes)
    node.threads = threads or omp_get_num_procs()
    return node


cdef bint found(OrtStatus *status):
    """Is there such an attribute?"""
    if status != NULL:
        ort.ReleaseStatus(status)
    return status == NULL


cdef OrtStatus *compute_kernel(void *kernel, OrtKernelContext *context) noexcept with gil:
    cdef Node node = <Node>kernel
    cdef const mha_host *outer = mha_get_host()
    cdef mha_host host
    cdef bint interrupted = False
    host.api, host.context, host.threads = ort, context, node.threads
    mha_set_host(&host)
    try:
        while not run_node(node, context):
            interrupted = True
        if interrupted:
            PyErr_SetInterrupt()
    except BaseException as error:
        return failed(error)
    finally:
        mha_set_host(outer)
    return NULL


cdef bint run_node(Node node, OrtKernelContext *context) except -1:
    """False: Ctrl-C fell into it. onnxruntime cannot hand on a KeyboardInterrupt, so the node is
    run again, and the session to its end, as with onnxruntime's own operators."""
    cdef Call call = Call.__new__(Call)
    cdef size_t i
    call.context, call.outputs = context, node.outputs
    try:
        node.function(call, *[input_of(context, i) for i in range(node.inputs)])
    except KeyboardInterrupt:
        return False
    finally:
        call.context = NULL
    return True


cdef void destroy_kernel(void *kernel) noexcept nogil:
    if Py_IsInitialized():      # a session may outlive the interpreter
        release_node(kernel)


cdef void release_node(void *kernel) noexcept with gil:
    Py_DECREF(<object>kernel)


mha_set_registrar(add_domains)
