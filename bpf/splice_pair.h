/*
 * A pair as its packets' programs know it: its record, our two sockets, the worker that has them.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_valid.h"

inlined void tell(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring;

	if (worker == PF_EXPRESS_NO_WORKER) {
		/* It is looked at by the clock, and says when it has ended. */
		*(volatile __u64 *)&splice->client_clock = bpf_ktime_get_ns();
		return;
	}
	ring = map_lookup(MAP_RINGS_FD, &worker);
	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/*
 * A connection begins, and its packets come by here under these addresses: that is what the keeper
 * wants to know of a pair. Behind a NAT rule of this host a socket has other ones. What comes again
 * counts where it came first: a device on top of another one sees it, too.
 */
inlined void remember_handshake(struct splice_key *key, __u32 interface, __u32 isn)
{
	struct splice_handshake *known = map_lookup(MAP_HANDSHAKES_FD, key);
	struct splice_handshake handshake = { .interface = interface, .isn = isn };

	if (!known || known->isn != isn)
		map_update(MAP_HANDSHAKES_FD, key, &handshake);
}

/* What the kernel finds the socket by that gets what comes from here. */
inlined void fill_tuple(struct bpf_sock_tuple *tuple, const struct splice_key *from, int v6)
{
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			tuple->ipv6.saddr[i] = from->source[i];
			tuple->ipv6.daddr[i] = from->target[i];
		}
		tuple->ipv6.sport = from->sport;
		tuple->ipv6.dport = from->dport;
		return;
	}
	tuple->ipv4.saddr = from->source[3];
	tuple->ipv4.daddr = from->target[3];
	tuple->ipv4.sport = from->sport;
	tuple->ipv4.dport = from->dport;
}

/* The socket that gets what comes from here; the caller releases it. */
inlined struct bpf_sock *find(struct __sk_buff *skb, const struct splice_key *from, __u32 family)
{
	struct bpf_sock_tuple tuple = {};

	fill_tuple(&tuple, from, family == PF_IPV6);
	if (family == PF_IPV6)
		return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), -1,
							     0);
	return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
}

/*
 * Whether our own socket is there: it is not between a worker's death and the adoption of its
 * pairs. A listener that would get a SYN in its place would begin a connection with the pair's
 * addresses.
 */
inlined int has_socket(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	struct bpf_sock *sk = find(skb, from, v6 ? PF_IPV6 : PF_IPV4);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT;
}

inlined void forget(struct splice *splice)
{
	struct splice_key key = splice->way[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->way[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

/* Tell userspace, through the pair's record, how many bytes a direction has carried. */
inlined void show_bytes(struct splice *splice, struct splice_direction *way, __u32 direction)
{
	__u32 slot = splice->slot;
	struct pair *pair;
	struct verdict_direction *seen;
	int is_more = count_bytes(way);

	pair = map_lookup(MAP_PAIRS_FD, &slot);
	/* The pair's record is another's once the worker has let go of this one. */
	if (!pair || pair->id != splice->id)
		return;
	seen = direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
	seen->redirected_bytes = shown_bytes(way);
	seen->redirected_packets = way->packets;
	/* As on every datapath a pair is idle as long as no byte moves, whatever else is said. */
	if (is_more)
		seen->last_ns = bpf_ktime_get_ns();
}
