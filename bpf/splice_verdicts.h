/*
 * What becomes of a packet at an interface: it is left to the stack, dropped, or sent on.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

#define NEXT -1 /* TCX_NEXT: the next program at this interface, then the stack */
#define DROP 2	/* TCX_DROP */

/* What is sent on begins a new life: the peer has not reckoned with the way behind us. */
#define HOPS 64

/*
 * On the copy of a packet that is for our own socket: it has been looked at already. Its mark is
 * that number, and its hash the other one, as others on this host may change marks (a program in
 * front of `ingress`, or behind `egress` on `lo`; nftables). Each load has numbers of its own,
 * which nobody can know.
 */
#ifndef FOR_OUR_SOCKET
#define FOR_OUR_SOCKET	    0x5046
#define ALSO_FOR_OUR_SOCKET 0x5048
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
 * How many hops a packet may still make; the caller has looked that the IP header is there. Not 0:
 * no memory, and it is what it was. Packets' pointers are void afterwards.
 */
inlined int set_hops(struct __sk_buff *skb, __u8 hops, const int v6)
{
	struct {
		__u8 hops, protocol;
		__u16 checksum;
	} four;
	__u64 sum;

	if (v6)
		return bpf_skb_store_bytes(skb, HOPS_AT(1), &hops, 1, BPF_F_RECOMPUTE_CSUM);
	if (bpf_skb_load_bytes(skb, HOPS_AT(0), &four, 4))
		return -1;
	sum = (__u16)~four.checksum;
	sum += (__u16)~bpf_htons((__u16)four.hops << 8);
	sum += (__u16)bpf_htons((__u16)hops << 8);
	four.hops = hops;
	four.checksum = (__u16)~fold(sum);
	return bpf_skb_store_bytes(skb, HOPS_AT(0), &four, 4, 0);
}

/*
 * Whether it is such a copy. The hash alone, which interfaces make of addresses and ports, could be
 * that by chance, for all packets of a connection; but none of these has made all its hops.
 */
inlined int is_copy(const struct __sk_buff *skb, __u8 hops)
{
	return skb->mark == FOR_OUR_SOCKET || (!hops && skb->hash == ALSO_FOR_OUR_SOCKET);
}

/* A copy is a packet as any other from here on. Packets' pointers are void afterwards. */
inlined void unmark_copy(struct __sk_buff *skb, const int v6)
{
	skb->mark = 0;
	bpf_set_hash_invalid(skb);
	set_hops(skb, HOPS, v6);
}

/*
 * A copy for our own socket: it comes in again, with our marks. Packets' pointers are void
 * afterwards, and the packet has no hops left: the caller, which sends it on, sees to that.
 *
 * Of a packet without hops there is none. A host sends no such packet (RFC 1122, 3.2.1.7): it is a
 * copy whose marks somebody has taken away, or a router's that cannot count. So there is one copy
 * of a packet, also if its marks change on its way to us; else there would be one more each time
 * that it comes.
 *
 * On `lo` it is sent once more. A packet has its route with it there, from where it was sent, and a
 * copy that is put right in front of the stack has lost that. The stack would look for one, but
 * from and to addresses of this host it finds none (ip_route_input_slow: a martian), and drops the
 * copy; unless its socket remembers a route (sk_rx_dst). One that has connected does not before
 * anything but its handshake has come, and none does whose host has had its routes changed since.
 */
inlined void copy_to_our_socket(struct __sk_buff *skb, __u8 hops, const int v6)
{
	__u32 mark = skb->mark, hash = skb->hash;

	if (!hops || set_hops(skb, 0, v6))
		return; /* the second: no memory, as if the copy had been lost */
	skb->mark = FOR_OUR_SOCKET;
	bpf_set_hash(skb, ALSO_FOR_OUR_SOCKET);
	bpf_clone_redirect(skb, skb->ifindex, skb->ifindex == LOOPBACK ? 0 : BPF_F_INGRESS);
	skb->mark = mark;
	if (hash)
		bpf_set_hash(skb, hash);
	else
		bpf_set_hash_invalid(skb);
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
