/* What we use of onnxruntime's C API, version 17, and the operators that we serve by it.
 *
 * Its table of functions is append-only, so a slot keeps its number; what stands between ours is
 * counted, not named. Functions return NULL, or a status to release.
 */
#ifndef MHA_ONNXRUNTIME_H
#define MHA_ONNXRUNTIME_H

#include <stddef.h>
#include <stdint.h>

enum { MHA_ORT_VERSION = 17, MHA_ORT_INVALID_ARGUMENT = 2 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message); /* 0 */
    void *from_1[1];
    const char *(*GetErrorMessage)(const OrtStatus *); /* 2 */
    void *from_3[23];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **); /* 26 */
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *); /* 27 */
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *);  /* 28 */
    void *from_29[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *, void **); /* 51 */
    void *from_52[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorInfo *, int *);                /* 60 */
    OrtStatus *(*GetDimensionsCount)(const OrtTensorInfo *, size_t *);               /* 61 */
    OrtStatus *(*GetDimensions)(const OrtTensorInfo *, int64_t *dims, size_t count); /* 62 */
    void *from_63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorInfo **); /* 65 */
    void *from_66[19];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *, const char *, float *);
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *, int64_t *);
    void *from_87[3];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t, const OrtValue **);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t, const int64_t *dims,
                                          size_t count, OrtValue **); /* 91 */
    void *from_92[1];
    void (*ReleaseStatus)(OrtStatus *); /* 93 */
    void *from_94[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorInfo *); /* 99 */
    void *from_100[130];
    OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *, size_t *);  /* 230 */
    OrtStatus *(*KernelInfo_GetOutputCount)(const OrtKernelInfo *, size_t *); /* 231 */
    void *from_232[1];
    OrtStatus *(*KernelInfo_GetOutputName)(const OrtKernelInfo *, size_t, char *, size_t *);
    void *from_234[40];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *, void (*)(void *, size_t),
                                            size_t total, size_t batches, void *subject); /* 274 */
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version); /* NULL: it is older */
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* An operator as version 17 knows it. NULL is allowed where the comment says what it means. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *); /* V2 */
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *kernel, OrtKernelContext *); /* V2 */
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t); /* 1: optional */
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t); /* 0: the CPU's */
    int (*GetVariadic[4])(const OrtCustomOp *);             /* never asked: nothing is variadic */
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *,
                                 void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *); /* NULL: shapes stay unknown */
    int (*GetStartVersion)(const OrtCustomOp *);                   /* NULL: from opset 1 on */
    int (*GetEndVersion)(const OrtCustomOp *);
};

/* An operator for one element type. Types of its inputs and outputs are letters: T the element
 * type, * any, 4 int32, 8 int64, f float32. */
typedef struct {
    OrtCustomOp op;
    const char *name, *inputs, *outputs;
    size_t required; /* the first inputs */
    int element;     /* ONNX's number of T */
    int threads;     /* of the session; 0: not known */
    void *operator_; /* what a kernel is created from */
} mha_served;

/* Fills in the functions of `op` that only look things up; the kernel's own are given. */
void mha_serve(mha_served *served);

/* Who answers RegisterCustomOps, onnxruntime's entry point into this library; NULL: nobody. */
typedef OrtStatus *(*mha_registrar)(OrtSessionOptions *, const OrtApiBase *);
void mha_set_registrar(mha_registrar registrar);

/* The call that the calling thread computes for onnxruntime, whose threads it may use. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    int threads;
} mha_host;
const mha_host *mha_get_host(void); /* NULL: none */
void mha_set_host(const mha_host *host);
void mha_run_hosted(const mha_host *host, void (*member)(void *, size_t), size_t members,
                    void *subject);

#endif
