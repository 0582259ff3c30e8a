/*
 * What becomes of a packet at an interface: it is left to the stack, dropped, or sent on.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

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

/*
 * An error (ICMP) that is passed on comes from us, as far as the sender knows that `from` is the
 * key of; the caller has looked that the IP header is there. What the addresses add to the checksum
 * of ICMPv6.
 */
inlined __u64 answer_from_us(void *data, const struct splice_key *from, const int v6)
{
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	__u64 addresses = 0;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			put(&six->source[i], from->target[i], &addresses);
			put(&six->target[i], from->source[i], &addresses);
		}
		six->hops = HOPS;
		return addresses;
	}
	put(&four->source, from->target[3], &addresses);
	put(&four->target, from->source[3], &addresses);
	addresses += (__u16)~bpf_htons((__u16)four->ttl << 8);
	addresses += (__u16)bpf_htons(HOPS << 8);
	four->ttl = HOPS;
	four->checksum = (__u16)~fold((__u64)(__u16)~four->checksum + fold(addresses));
	return addresses;
}
