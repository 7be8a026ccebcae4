/* The entry point of onnxruntime into this library, and the host whose threads a call may use. */
#include "onnxruntime.h"

#include <string.h>

#define SLOT(name, number)                                                                         \
    _Static_assert(offsetof(OrtApi, name) == (number) * sizeof(void *), "slot of " #name)
SLOT(CreateStatus, 0);
SLOT(GetErrorMessage, 2);
SLOT(AddCustomOpDomain, 28);
SLOT(GetTensorMutableData, 51);
SLOT(GetDimensions, 62);
SLOT(GetTensorTypeAndShape, 65);
SLOT(KernelInfoGetAttribute_float, 85);
SLOT(KernelInfoGetAttribute_int64, 86);
SLOT(KernelContext_GetInput, 90);
SLOT(KernelContext_GetOutput, 91);
SLOT(ReleaseStatus, 93);
SLOT(ReleaseTensorTypeAndShapeInfo, 99);
SLOT(KernelInfo_GetOutputCount, 231);
SLOT(KernelInfo_GetOutputName, 233);
SLOT(KernelContext_ParallelFor, 274);

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#define THREAD_LOCAL __declspec(thread)
#else
#define EXPORT __attribute__((visibility("default")))
#define THREAD_LOCAL _Thread_local
#endif

/* ---- What an operator says of itself ----------------------------------------------------------
 */

enum { UNDEFINED = 0, FLOAT = 1, INT32 = 6, INT64 = 7 }; /* ONNX's numbers of element types */

static const mha_served *of(const OrtCustomOp *op) { return (const mha_served *)op; }

static int type_of(const mha_served *served, char letter)
{
    switch (letter) {
    case 'T':
        return served->element;
    case '4':
        return INT32;
    case '8':
        return INT64;
    case 'f':
        return FLOAT;
    default:
        return UNDEFINED;
    }
}

static const char *name(const OrtCustomOp *op) { return of(op)->name; }

static const char *provider(const OrtCustomOp *op)
{
    (void)op;
    return "CPUExecutionProvider";
}

static int input_type(const OrtCustomOp *op, size_t i)
{
    return type_of(of(op), of(op)->inputs[i]);
}

static size_t inputs(const OrtCustomOp *op) { return strlen(of(op)->inputs); }

static int output_type(const OrtCustomOp *op, size_t i)
{
    return type_of(of(op), of(op)->outputs[i]);
}

static size_t outputs(const OrtCustomOp *op) { return strlen(of(op)->outputs); }

static int input_is_optional(const OrtCustomOp *op, size_t i) { return i >= of(op)->required; }

static int output_is_optional(const OrtCustomOp *op, size_t i)
{
    (void)op;
    return i > 0;
}

static int memory(const OrtCustomOp *op, size_t i)
{
    (void)op, (void)i;
    return 0;
}

static int nothing(const OrtCustomOp *op)
{
    (void)op;
    return 0;
}

void mha_serve(mha_served *served)
{
    OrtCustomOp *op = &served->op;
    op->version = MHA_ORT_VERSION;
    op->GetName = name;
    op->GetExecutionProviderType = provider;
    op->GetInputType = input_type;
    op->GetInputTypeCount = inputs;
    op->GetOutputType = output_type;
    op->GetOutputTypeCount = outputs;
    op->GetInputCharacteristic = input_is_optional;
    op->GetOutputCharacteristic = output_is_optional;
    op->GetInputMemoryType = memory;
    for (int i = 0; i < 4; i++)
        op->GetVariadic[i] = nothing;
}

/* ---- The entry point --------------------------------------------------------------------------
 */

static mha_registrar registrar; /* set once, when Python imports us */

void mha_set_registrar(mha_registrar given) { registrar = given; }

EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    if (registrar)
        return registrar(options, base);
    return base->GetApi(1)->CreateStatus(
        MHA_ORT_INVALID_ARGUMENT, "mha_fast: call mha_fast.onnx.register(options) from Python");
}

/* ---- The host ---------------------------------------------------------------------------------
 */

static THREAD_LOCAL const mha_host *here;

const mha_host *mha_get_host(void) { return here; }

void mha_set_host(const mha_host *host) { here = host; }

void mha_run_hosted(const mha_host *host, void (*member)(void *, size_t), size_t members,
                    void *subject)
{
    OrtStatus *status =
        host->api->KernelContext_ParallelFor(host->context, member, members, 0, subject);
    if (status)
        host->api->ReleaseStatus(status);
}
