"""Threads that share out the tasks of a call; included by _core.pyx.

They share nothing but the counter of tasks, so they cannot change a bit.
"""

# Work is counted in floating-point operations; reading a byte of K or V from memory takes a
# thread about as long as two of them.
cdef double WORK_PER_BYTE = 2
# Work per thread below which waking it costs more than it gives. A region whose threads still
# wait from the call before starts within 1 us, 100,000 operations at 100 GFLOP/s: ten times that.
# Threads that sleep need some 50 us.
cdef double WORK_PER_HOT_THREAD = 1e6
cdef double WORK_PER_COLD_THREAD = 8e6
# Seconds since the last call within which nothing else can have needed the cores.
cdef double HOT = 30e-6
# Work between two looks at Ctrl-C: about 20 ms on one thread.
cdef double WORK_PER_SIGNAL_CHECK = 2e9

ctypedef bint (*task_function)(void *subject, idx task) noexcept nogil    # False: no memory

cdef struct Team:
    task_function task
    void *subject           # what tasks are about
    idx tasks
    double work             # of all tasks together
    int threads, claimed
    bint hot                # still awake from the call before
    bint beside_torch       # in the process, whose threads are those of the same OpenMP
    const mha_host *host    # whose threads they are; NULL: OpenMP's
    # What threads write stands a cache line apart from what they read all the time.
    char apart[64]
    int64_t next_task
    int64_t out_of_memory   # how many threads were
    int64_t interrupted


cdef double call_end = 0            # when the last call that was worth two threads ended


cdef Team assemble(task_function task, void *subject, double work, int limit) noexcept:
    """As many threads as are worth waking, at most `limit`; 0: what the process has set."""
    cdef Team team
    memset(&team, 0, sizeof(team))
    team.task, team.subject, team.work, team.threads = task, subject, work, 1
    if work >= 2 * WORK_PER_HOT_THREAD:
        team.host = mha_get_host()
        team.hot = team.host != NULL or omp_get_wtime() - call_end < HOT
        team.beside_torch = "torch" in sys.modules
        limit = limit or (default_threads() if team.host == NULL else team.host.threads)
        team.threads = 1 if forked or omp_in_parallel() else threads_for(work, team.hot, limit)
        if team.host == NULL:
            team.threads = team.claimed = claim(team.threads)
    return team


cdef int threads_for(double work, bint hot, int limit) noexcept nogil:
    """Threads that are worth waking."""
    cdef double most = work / (WORK_PER_HOT_THREAD if hot else WORK_PER_COLD_THREAD)
    return max(1, min(limit, <int>min(most, 1e6)))


cdef void work_together(Team *team) noexcept nogil:
    """All tasks, on no more threads than there are tasks."""
    cdef int member, threads = <int>min(team.threads, team.tasks), members
    team.next_task = 0
    if threads <= 1:
        work_off(team)
        return
    if team.host != NULL:
        mha_run_hosted(team.host, hosted_member, threads, team)
        work_off(team)      # what is left if the host failed
        return
    members = members_of(threads, team.hot or team.beside_torch)
    for member in prange(members, schedule="static", chunksize=1, num_threads=members):
        if member < threads:
            work_off(team)


cdef void hosted_member(void *team, size_t member) noexcept nogil:
    work_off(<Team *>team)


cdef void work_off(Team *team) noexcept nogil:
    """Tasks, one after another, until none is left: what each member of the team does."""
    cdef idx task, interval = <idx>(1 + WORK_PER_SIGNAL_CHECK * team.tasks / (team.work + 1))
    while True:
        task = mha_fetch_add(&team.next_task, 1)
        if task >= team.tasks:
            return
        if not team.task(team.subject, task):
            stop(team, &team.out_of_memory)
        # To OpenMP all threads of a host are number 0, and none of them is to wait for the GIL.
        if team.host == NULL and omp_get_thread_num() == 0 and task % interval == 0:
            if pending_signal():
                stop(team, &team.interrupted)


cdef void stop(Team *team, int64_t *reason) noexcept nogil:
    """Leave no task to begin. Threads may stop at once, for different reasons."""
    mha_fetch_add(reason, 1)
    mha_fetch_add(&team.next_task, team.tasks)


cdef bint has_stopped(const Team *team) noexcept nogil:
    return team.out_of_memory or team.interrupted


cdef int pending_signal() noexcept with gil:
    return PyErr_CheckSignals()


cdef int members_of(int threads, bint may_spin) noexcept nogil:
    """Members of the team. After a region GNU OpenMP's threads spin for 300,000 rounds, about 5 ms,
    on cores that NumPy's BLAS may want next; where there are more of them than CPUs, for 100
    rounds. So a call between other work takes one more, who does nothing. Not beside torch: its
    calls want these very threads next, and would first have to change their number."""
    return threads + (MHA_GNU_OPENMP and not may_spin and threads == omp_get_num_procs())


cdef void dismiss(const Team *team) noexcept:
    global call_end
    if team.claimed:
        release(team.claimed)
        call_end = omp_get_wtime()


cdef int report(const Team *team) except -1:
    """Raise what stopped the team."""
    if team.interrupted or team.out_of_memory and PyErr_CheckSignals():
        return -1
    if team.out_of_memory:
        raise MemoryError("no memory for the scratch space of a thread")
    return 0


# ---- Calls of several Python threads ------------------------------------------------------------


cdef int64_t threads_claimed = 0    # by the large calls that run now


cdef int claim(int threads) noexcept nogil:
    """What the calls of other Python threads leave: two full teams on the same cores take longer
    than one after the other."""
    cdef int64_t others = mha_fetch_add(&threads_claimed, threads)
    cdef int free_cpus = <int>max(1, omp_get_num_procs() - others)
    cdef int given = threads if others == 0 else min(threads, free_cpus)
    mha_fetch_add(&threads_claimed, given - threads)
    return given


cdef void release(int threads) noexcept nogil:
    mha_fetch_add(&threads_claimed, -threads)


def claim_threads(int threads):
    """Claim them, or give them back where negative, as a large call does, for its tests."""
    if threads < 0:
        release(-threads)
        return threads
    return claim(threads)
