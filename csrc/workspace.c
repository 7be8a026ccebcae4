/* Scratch memory of the calling thread: grown when needed, reused by every later tile. */
#include "mha.h"

#include <stdlib.h>

typedef struct {
    void *memory, *aligned;
    size_t bytes;
} workspace;

#if defined(_WIN32)
#include <windows.h>
static DWORD key = FLS_OUT_OF_INDEXES;
static INIT_ONCE once = INIT_ONCE_STATIC_INIT;

static void WINAPI release(void *w)
{
    if (w)
        free(((workspace *)w)->memory);
    free(w);
}

static BOOL CALLBACK create_key(PINIT_ONCE o, void *a, void **b)
{
    (void)o, (void)a, (void)b;
    key = FlsAlloc(release);
    return TRUE;
}

static workspace *get(void)
{
    InitOnceExecuteOnce(&once, create_key, NULL, NULL);
    return FlsGetValue(key);
}

static int set(workspace *w) { return FlsSetValue(key, w); }
#else
#include <pthread.h>
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int have_key;

static void release(void *w)
{
    free(((workspace *)w)->memory);
    free(w);
}

static void create_key(void) { have_key = pthread_key_create(&key, release) == 0; }

static workspace *get(void)
{
    pthread_once(&once, create_key);
    return have_key ? pthread_getspecific(key) : NULL;
}

static int set(workspace *w) { return have_key && pthread_setspecific(key, w) == 0; }
#endif

void *mha_workspace(size_t bytes)
{
    enum { ALIGNMENT = 64 };
    workspace *w = get();
    if (!w) {
        w = calloc(1, sizeof *w);
        if (!w || !set(w)) {
            free(w);
            return NULL;
        }
    }
    if (w->bytes < bytes) {
        free(w->memory);
        w->bytes = 0;
        w->memory = malloc(bytes + ALIGNMENT);
        if (!w->memory)
            return NULL;
        w->aligned = (char *)w->memory + (ALIGNMENT - (uintptr_t)w->memory % ALIGNMENT);
        w->bytes = bytes;
    }
    return w->aligned;
}
