/*
 * Lookup of the socket of this host that receives packets of a peer.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "splice.h"
#include "splice_packet.h"

/*
 * Fill the tuple by which the kernel looks up the socket that receives packets with these
 * addresses.
 */
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

/* Look up the socket that receives packets with these addresses. The caller releases it. */
inlined struct bpf_sock *find_socket(struct __sk_buff *skb, const struct splice_key *from,
				     __u32 family)
{
	struct bpf_sock_tuple tuple = {};

	fill_tuple(&tuple, from, family == PF_IPV6);
	if (family == PF_IPV6)
		return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), -1,
							     0);
	return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
}

/*
 * The state of the socket that receives packets with these addresses (BPF_TCP_...). 0: there is
 * none.
 */
inlined __u32 socket_state(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	struct bpf_sock *sk = find_socket(skb, from, v6 ? PF_IPV6 : PF_IPV4);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}

/*
 * Whether our own socket exists. It does not between a worker's death and the adoption of its
 * pairs. A SYN must not get to a listener then, which would begin a connection with the pair's
 * addresses.
 */
inlined int has_own_socket(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	__u32 state = socket_state(skb, from, v6);

	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT;
}
