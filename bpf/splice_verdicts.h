/*
 * What becomes of a packet at an interface: it is left to the stack, dropped, or sent on.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"

#define NEXT -1 /* TCX_NEXT: whatever else looks at packets here, then the stack */
#define DROP 2	/* TCX_DROP */

/* What is sent on begins a new life: the peer has not reckoned with the way behind us. */
#define HOPS 64

/* On the copy of a packet that is for our own socket: it has been looked at already. */
#ifndef FOR_OUR_SOCKET
#define FOR_OUR_SOCKET 0x5046 /* each load has a number of its own, which nobody can know */
#endif

/* bcc 0.26 declares it with three parameters; the kernel has four. */
static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* A rewritten packet goes on: up the stack of this host, or out. */
inlined int send_on(__u32 interface)
{
	return interface ? redirect_neigh(interface, NULL, 0, 0) : NEXT;
}
