/*
 * Verdicts at an interface: a packet is left to the stack, dropped, or forwarded.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

#define NEXT -1 /* TCX_NEXT: the next program at this interface, then the stack */
#define DROP 2	/* TCX_DROP */

/* The hop limit of a forwarded packet: its sender did not count the hops up to this host. */
#define HOPS 64

/*
 * Marks of the copy of a checked packet, which is for our own socket. FOR_OUR_SOCKET is its
 * skb->mark, ALSO_FOR_OUR_SOCKET its skb->hash: other programs on this host may change marks (one
 * in front of `ingress`, or behind `egress` on `lo`; nftables). Each load has random numbers of its
 * own, which no one else knows.
 */
#ifndef FOR_OUR_SOCKET
#define FOR_OUR_SOCKET	    0x5046
#define ALSO_FOR_OUR_SOCKET 0x5048
#endif

/* bcc 0.26 declares it with three parameters; the kernel has four. */
static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/*
 * Forward a rewritten packet: returns the verdict of a redirect to `interface`, or NEXT if that is
 * 0: up the stack of this host.
 */
inlined int forward_by(__u32 interface)
{
	return interface ? redirect_neigh(interface, NULL, 0, 0) : NEXT;
}

/*
 * Set the hop limit of a packet; the caller has checked that the IP header is there. Pointers into
 * the packet are invalid afterwards.
 *
 * Returns 0; not 0: no memory, and the packet is unchanged.
 */
inlined int set_hops(struct __sk_buff *skb, __u8 hops, const int v6)
{
	struct {
		__u8 hops, protocol;
		__u16 checksum;
	} fields;
	__u64 sum;

	if (v6)
		return bpf_skb_store_bytes(skb, HOPS_OFFSET(1), &hops, 1, BPF_F_RECOMPUTE_CSUM);
	if (bpf_skb_load_bytes(skb, HOPS_OFFSET(0), &fields, 4))
		return -1;
	sum = (__u16)~fields.checksum;
	sum += (__u16)~bpf_htons((__u16)fields.hops << 8);
	sum += (__u16)bpf_htons((__u16)hops << 8);
	fields.hops = hops;
	fields.checksum = (__u16)~csum_fold(sum);
	return bpf_skb_store_bytes(skb, HOPS_OFFSET(0), &fields, 4, 0);
}

/*
 * Whether a packet is such a copy. The hash alone, which interfaces compute from addresses and
 * ports, could have this value by chance for all packets of a connection; but a packet of a peer
 * has never used up its hops.
 */
inlined int is_copy(const struct __sk_buff *skb, __u8 hops)
{
	return skb->mark == FOR_OUR_SOCKET || (!hops && skb->hash == ALSO_FOR_OUR_SOCKET);
}

/* Remove the marks of a copy. Pointers into the packet are invalid afterwards. */
inlined void unmark_copy(struct __sk_buff *skb, const int v6)
{
	skb->mark = 0;
	bpf_set_hash_invalid(skb);
	set_hops(skb, HOPS, v6);
}

/*
 * Send a copy of the packet to our own socket: the copy arrives at `ingress` again, with our marks.
 * Pointers into the packet are invalid afterwards, and the packet itself has a hop limit of 0: the
 * caller forwards it, which sets the limit.
 *
 * A packet that arrived with a hop limit of 0 is not copied. Hosts do not send such packets (RFC
 * 1122, 3.2.1.7): it is either a copy that has lost its marks, or comes from a faulty router. So
 * there is one copy of a packet, even if another program changes its marks on its way to us;
 * otherwise each arrival would make one more.
 *
 * On `lo` the copy is sent (egress) instead. A packet on `lo` carries its route from where it was
 * sent, and a copy that is put right in front of the stack has lost it. The stack would look a
 * route up, finds none from and to addresses of this host (ip_route_input_slow: a martian), and
 * drops the copy, unless the socket has cached a route (sk_rx_dst). A socket that has connected
 * caches none before anything but its handshake has arrived, and no socket has one whose host has
 * changed its routes since.
 */
inlined void copy_to_own_socket(struct __sk_buff *skb, __u8 hops, const int v6)
{
	__u32 mark = skb->mark, hash = skb->hash;

	if (!hops || set_hops(skb, 0, v6))
		return; /* the second: no memory, as if the copy was lost */
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
 * Give a translated ICMP error the addresses of this host as its receiver knows them: `from` is the
 * key of that receiver's packets. The caller has checked that the IP header is there.
 *
 * Returns what the new addresses add to the checksum of ICMPv6.
 */
inlined __u64 address_icmp_error(void *data, const struct splice_key *from, const int v6)
{
	struct ipv4 *iph = data + ETHERNET_BYTES;
	struct ipv6 *ip6h = data + ETHERNET_BYTES;
	__u64 addresses = 0;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			set_field(&ip6h->source[i], from->target[i], &addresses);
			set_field(&ip6h->target[i], from->source[i], &addresses);
		}
		ip6h->hops = HOPS;
		return addresses;
	}
	set_field(&iph->source, from->target[3], &addresses);
	set_field(&iph->target, from->source[3], &addresses);
	addresses += (__u16)~bpf_htons((__u16)iph->ttl << 8);
	addresses += (__u16)bpf_htons(HOPS << 8);
	iph->ttl = HOPS;
	iph->checksum = (__u16)~csum_fold((__u64)(__u16)~iph->checksum + csum_fold(addresses));
	return addresses;
}
