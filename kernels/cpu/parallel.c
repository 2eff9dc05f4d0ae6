/* The threads sleep between the works. A child process that was forked starts its own. */
#include "parallel.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

enum { MOST_WORKERS = 255 };
/* Pieces of a work for each thread: one that is held up leaves the others more of them. */
enum { PIECES = 4 };

/* Held while a work is under way. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
/* Guards what follows. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int64_t started, wanted, active; /* workers: that there are, may join the work, and have joined it */
static uint64_t number;                 /* of the work; workers join each once */
static int is_open;

static struct {
    Range *range;
    void *work;
    int64_t blocks, piece;
    fenv_t environment; /* the caller's: whether denormals are flushed, above all */
} job;
static _Atomic int64_t next_block;

static void do_pieces(void)
{
    for (;;) {
        const int64_t first = atomic_fetch_add(&next_block, job.piece), left = job.blocks - first;
        if (left <= 0)
            return;
        job.range(job.work, first, first + (left < job.piece ? left : job.piece));
    }
}

static void *worker(void *index)
{
    uint64_t seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!is_open || seen == number || (int64_t)(intptr_t)index >= wanted)
            pthread_cond_wait(&wake, &lock);
        seen = number;
        active++;
        pthread_mutex_unlock(&lock);
        fesetenv(&job.environment);
        do_pieces();
        pthread_mutex_lock(&lock);
        if (!--active)
            pthread_cond_signal(&done);
    }
    return NULL;
}

static void forget_threads(void)
{
    pthread_mutex_init(&turn, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&done, NULL);
    started = active = 0;
    is_open = 0;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* Signals are the other threads'. */
static void start_workers(int64_t count)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    sigset_t all, before;
    pthread_t thread;
    pthread_once(&once, watch_forks);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < count && !pthread_create(&thread, NULL, worker, (void *)(intptr_t)started)) {
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void run_parallel(Range *range, void *work, int64_t blocks, int64_t threads)
{
    int64_t workers = (threads < blocks ? threads : blocks) - 1;
    if (workers > MOST_WORKERS)
        workers = MOST_WORKERS;
    if (workers < 1 || pthread_mutex_trylock(&turn)) {
        range(work, 0, blocks);
        return;
    }
    pthread_mutex_lock(&lock);
    if (started < workers)
        start_workers(workers);
    job.range = range;
    job.work = work;
    job.blocks = blocks;
    job.piece = (blocks + PIECES * (workers + 1) - 1) / (PIECES * (workers + 1));
    fegetenv(&job.environment);
    atomic_store(&next_block, 0);
    wanted = workers;
    number++;
    is_open = 1;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);

    do_pieces();

    /* Those that wake later have nothing to do. */
    pthread_mutex_lock(&lock);
    is_open = 0;
    while (active)
        pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&turn);
}
