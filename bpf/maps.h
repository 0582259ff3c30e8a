/*
 * Every map, once. Python creates them, and passes each file descriptor as -DMAP_..._FD;
 * bcc's own map macros know no lookup in a sockhash and no 8-byte values in it.
 *
 * sockets  SOCKHASH   cookie -> socket                  written: worker         read: verdict
 * ends     HASH       cookie -> struct end              written: worker         read: verdict
 * pairs    ARRAY      slot   -> struct pair (mmapable)  written: worker, verdict read: all
 * rings    ARRAY_OF_MAPS worker -> RINGBUF of struct wakeup  written: verdict   read: worker
 */
#pragma once

#define map_pointer(fd) ((void *)bpf_pseudo_fd(1, fd))
#define map_lookup(fd, key) bpf_map_lookup_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key)
