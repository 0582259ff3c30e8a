/*
 * Rewriting of a valid packet: it gets the addresses, sequence numbers, timestamps and window of
 * the other connection, and is forwarded.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "splice.h"
#include "splice_arrival.h"
#include "splice_options.h"
#include "splice_packet.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

/*
 * Translate timestamps and SACK; overwrite all other options by no-ops. Pointers into the packet
 * are invalid afterwards.
 *
 * Returns CONTINUE; DROP (never: the options are in the linear part).
 */
inlined int rewrite_options(struct __sk_buff *skb, const struct packet *packet, void *data,
			    void *data_end, __u64 *sum, const int v6)
{
	__u32 bytes = packet->header - 20;
	int at = translate_options(data + OPTIONS_OFFSET(v6), data_end, bytes, packet->from_peer,
				   packet->to_peer, sum);

	if (at < 0)
		return CONTINUE;
	count_invalid(packet->splice, PF_INVALID_OPTION);
	if (overwrite_options(skb, OPTIONS_OFFSET(v6) + 4 * at, bytes - 4 * at, sum))
		return DROP;
	return CONTINUE;
}

/* Rewrite the TCP header without its options; the change of the checksum is added to `sum`. */
inlined void rewrite_tcp(const struct packet *packet, struct tcp *tcp, __u64 *sum)
{
	const struct splice_direction *from_peer = packet->from_peer, *to_peer = packet->to_peer;
	__u32 *word = (__u32 *)tcp, number, was, change, window, hidden;

	set_field(&word[0], (__u32)from_peer->sport | (__u32)from_peer->dport << 16, sum);
	number = packet->seq + from_peer->seq_delta;
	/*
	 * The other end accepts an acknowledgement only at a number within its window, of which the
	 * tail may take a part.
	 */
	if (packet->is_pure_ack && READ_ONCE(to_peer->tail_open) &&
	    after(number, to_peer->window_edge))
		number = to_peer->window_edge;
	set_field(&word[1], bpf_htonl(number), sum);
	if (packet->flags & ACK)
		set_field(&word[2], bpf_htonl(packet->acknowledged + from_peer->ack_delta), sum);
	/*
	 * Urgent data stay in line, as on every datapath: the URG flag and the pointer are removed,
	 * since a reader without support for them would lose a byte.
	 */
	was = bpf_ntohl(word[3]);
	change = was & ~URG_OF_TCP;
	if (from_peer->no_ecn)
		change &= ~ECN_OF_TCP;
	/* The part of the window that the tail does not take. */
	window = (was & 0xffff) << (from_peer->peer_scale & 15);
	hidden = packet->acknowledged - packet->ack;
	window = hidden < window ? window - hidden : 0;
	change = (change & 0xffff0000) | window_field(window, from_peer->other_scale);
	set_field(&word[3], bpf_htonl(change), sum);
	*sum += (__u16)~tcp->urgent;
	tcp->urgent = 0;
}

/* Rewrite addresses, hop limit and ECN bits, and the checksum of the IPv4 header. */
inlined void rewrite_ip(const struct splice_direction *from_peer, void *ip, const int v6)
{
	struct ipv4 *iph = ip;
	struct ipv6 *ip6h = ip;
	__u64 sum;

	write_addresses(ip, from_peer->source, from_peer->target, v6);
	if (v6) {
		if (from_peer->no_ecn)
			ip6h->version &= ~bpf_htonl(ECN_OF_V6);
		ip6h->hops = HOPS;
		return;
	}
	sum = (__u64)(__u16)~iph->checksum + from_peer->address_sum;
	sum += (__u16)~bpf_htons((__u16)iph->ttl << 8);
	sum += (__u16)bpf_htons(HOPS << 8);
	iph->ttl = HOPS;
	if (from_peer->no_ecn) {
		sum += (__u16)~bpf_htons(iph->tos);
		iph->tos &= ~ECN_OF_TOS;
		sum += (__u16)bpf_htons(iph->tos);
	}
	iph->checksum = (__u16)~csum_fold(sum);
}

/*
 * Rewrite the packet and forward it. Returns NEXT (up the stack of this host, if both ends are on
 * `lo`), the verdict of the redirect, or DROP.
 */
inlined int rewrite(struct __sk_buff *skb, const struct packet *packet, const int v6)
{
	const struct splice_direction *from_peer = packet->from_peer;
	struct tcp *tcp;
	__u16 whole; /* 0xffff; 0 for PF_SUM_PARTIAL: a sum not inverted, not complete */
	/*
	 * Loaded on every path: then the verifier sees the paths as equal, and walks the rest only
	 * once.
	 */
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	if (packet->header > 20) {
		if (rewrite_options(skb, packet, data, data_end, &sum, v6) == DROP)
			return DROP;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never, likewise */
	}
	tcp = data + TCP_OFFSET(v6);
	rewrite_tcp(packet, tcp, &sum);
	rewrite_ip(from_peer, data + ETHERNET_BYTES, v6);
	if (packet->sum == PF_SUM_OTHER) {
		bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0);
		replace_pseudo_csum(skb, TCP_OFFSET(v6) + 16, (__u16)from_peer->address_sum, v6);
	} else {
		/*
		 * The same that the two helpers would do, which would take longer than all the
		 * rest.
		 */
		whole = packet->sum / PF_SUM_KNOWN * 0xffff;
		tcp->checksum =
			whole ^ csum_fold((__u64)(tcp->checksum ^ whole) +
					  (csum_fold(sum) & whole) + (__u16)from_peer->address_sum);
	}
	return forward_by(from_peer->interface);
}
