/* Counts the bytes that a process holds on its heap: preloaded, it stands before the C library's allocator.

   peak_begin()  forget the peak so far; gives the bytes that are held now
   peak_bytes()  the most bytes that were held since then */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long held, most;

static void add(long bytes) {
    long now = atomic_fetch_add(&held, bytes) + bytes, seen = atomic_load(&most);
    while (now > seen && !atomic_compare_exchange_weak(&most, &seen, now)) {
    }
}

static void *counted(void *p) {
    if (p) add((long)malloc_usable_size(p));
    return p;
}

long peak_begin(void) {
    atomic_store(&most, atomic_load(&held));
    return atomic_load(&held);
}

long peak_bytes(void) { return atomic_load(&most); }

void *malloc(size_t n) { return counted(__libc_malloc(n)); }
void *calloc(size_t n, size_t m) { return counted(__libc_calloc(n, m)); }
void *memalign(size_t a, size_t n) { return counted(__libc_memalign(a, n)); }
void *aligned_alloc(size_t a, size_t n) { return counted(__libc_memalign(a, n)); }

int posix_memalign(void **to, size_t a, size_t n) {
    *to = counted(__libc_memalign(a, n));
    return *to ? 0 : ENOMEM;
}

void *realloc(void *p, size_t n) {
    long before = p ? (long)malloc_usable_size(p) : 0;
    void *made = __libc_realloc(p, n);
    if (made) add((long)malloc_usable_size(made) - before);
    else if (!n) add(-before);
    return made;
}

void free(void *p) {
    if (p) atomic_fetch_sub(&held, (long)malloc_usable_size(p));
    __libc_free(p);
}
