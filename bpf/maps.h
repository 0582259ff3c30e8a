/*
 * Every map, once. Python creates them, and puts each file descriptor in place of MAP_..._FD, since
 * bcc's own map macros know no lookup in a sockhash and no 8-byte values in it.
 *
 * Each worker has these for itself, for its copy of the verdict program; no other worker can reach
 * them:
 * sockets  SOCKHASH   cookie -> socket                  written: worker         read: verdict
 * owners   HASH       cookie -> struct socket_owner     written: worker         read: verdict
 * ring     RINGBUF of struct wakeup                     written: verdict        read: worker
 *
 * For all workers:
 * pairs    ARRAY      slot   -> struct pair (mmapable)  written: worker, verdict read: all
 *
 * For splice (splice.c), which also counts in `pairs`:
 * rings    ARRAY_OF_MAPS worker -> RINGBUF of struct splice_event  written: splice  read: worker
 * flows    HASH       struct splice_key -> struct splice_flow   written: keeper, splice
 * splices  ARRAY      index -> struct splice (mmapable)         written: keeper, splice
 * handshakes ARRAY    number -> struct splice_handshakes        written: splice
 * our_ports ARRAY     0 -> struct splice_ports (mmapable)        written: keeper, express
 * session_flows HASH struct splice_key -> struct splice_flow    written: keeper
 * sessions ARRAY      index -> struct session (mmapable)        written: keeper, splice
 *
 * For express (express_rules.h, express_connect.c); their names begin with express_:
 * tables    ARRAY      number -> struct express_table              written: keeper
 * names     LPM_TRIE   struct express_name_key -> bits             written: keeper
 * networks  LPM_TRIE   struct express_network_key -> bits          written: keeper
 * grammar   ARRAY      0 -> struct express_grammar                 written: keeper
 * programs  PROG_ARRAY PF_EXPRESS_BEGIN4... -> program             written: keeper
 * listeners HASH       express_listener_key -> express_listener    written: keeper
 * targets   ARRAY      number -> struct express_target             written: keeper, express
 * choices   ARRAY      number -> struct express_choice             written: supervisor, express
 * logs      ARRAY      0 -> struct express_logs                    written: supervisor
 * outcomes  ARRAY      target -> struct express_outcome (mmapable) written: express
 * asks      ARRAY      place -> struct express_ask (mmapable)      written: express, keeper
 * saved     ARRAY      place -> PF_EXPRESS_SAVED bytes (mmapable)   written: express
 * places    QUEUE      places that are free                        written: keeper, express
 * counts    ARRAY      PF_COUNT_... -> __u64                       written: express
 * ends      HASH       struct express_end_key -> express_ends      written: keeper, express
 * round     ARRAY      0 -> struct express_round (mmapable)        written: keeper, express
 * scratch, made, asking  PERCPU_ARRAY                              express alone
 *
 * The maps of type PERCPU_ARRAY (splice has a scratch of its own, too) require that programs on
 * packets do not preempt each other on a processor: kernels with PREEMPT_RT are refused.
 *
 * For the view (view.c); mmapable, written through memory:
 * counters ARRAY      worker * BLOCK_WORDS + word -> __u64        written: worker      read: view
 * stats    ARRAY      line -> struct view_line                    written: supervisor  read: view
 * listeners ARRAY     line -> struct view_line                    written: supervisor  read: view
 * all_owners ARRAY_OF_MAPS worker -> its `owners`                 never written
 * sums     HASH       session -> struct sums                      view alone
 * zero     ARRAY      0 -> struct sums of zeros                   never written
 */
#pragma once

#define map_pointer(fd)	    ((void *)bpf_pseudo_fd(1, fd))
#define map_lookup(fd, key) bpf_map_lookup_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key)
#define map_update(fd, key, value) \
	bpf_map_update_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key, value, BPF_ANY)
#define map_delete(fd, key) bpf_map_delete_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key)
