/* Work in blocks, shared among a few threads. */
#pragma once
#include <stdint.h>

/* The blocks [first, last). */
typedef void Range(void *work, int64_t first, int64_t last);

/* Do the blocks [0, blocks) in at most `threads` threads, the caller's among them. Where another thread's work is under
 * way, or no thread can be started, the caller does all. */
void run_parallel(Range *range, void *work, int64_t blocks, int64_t threads);
