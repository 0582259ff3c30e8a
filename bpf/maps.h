/*
 * Every map, once. Python creates them, and passes each file descriptor as -DMAP_..._FD;
 * bcc's own map macros know no lookup in a sockhash and no 8-byte values in it.
 *
 * sockets  SOCKHASH   cookie -> socket                  written: worker         read: verdict
 * ends     HASH       cookie -> struct end              written: worker         read: verdict
 * pairs    ARRAY      slot   -> struct pair (mmapable)  written: worker, verdict read: all
 * rings    ARRAY_OF_MAPS worker -> RINGBUF of struct wakeup  written: verdict   read: worker
 *
 * For splice (splice.c), which also counts in `pairs`; its own `rings` is like the one above:
 * flows    HASH       struct splice_key -> struct splice_flow   written: keeper, splice
 * splices  ARRAY      index -> struct splice (mmapable)         written: keeper, splice
 *
 * For the view (view.c); mmapable, written through memory:
 * counters ARRAY      worker * BLOCK_WORDS + word -> __u64        written: worker      read: view
 * stats    ARRAY      line -> struct view_line                    written: supervisor  read: view
 * listeners ARRAY     line -> struct view_line                    written: supervisor  read: view
 * sums     HASH       session -> struct sums                      view alone
 * zero     ARRAY      0 -> struct sums of zeros                   written: nobody
 */
#pragma once

#define map_pointer(fd)	    ((void *)bpf_pseudo_fd(1, fd))
#define map_lookup(fd, key) bpf_map_lookup_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key)
#define map_update(fd, key, value) \
	bpf_map_update_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key, value, BPF_ANY)
#define map_delete(fd, key) bpf_map_delete_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key)
