/*
 * A packet that is believed gets the addresses, numbers, timestamps and windows of the other
 * connection, and is sent on.
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
 * Timestamps and edges; what the ends have not agreed on becomes no-ops. Packets' pointers are void
 * afterwards. DROP: never, as the options are in front.
 */
inlined int rewrite_options(struct __sk_buff *skb, const struct packet *packet, void *data,
			    void *data_end, __u64 *sum, const int v6)
{
	__u32 bytes = packet->header - 20;
	int at = shift_options(data + OPTIONS_AT(v6), data_end, bytes, packet->way, packet->back,
			       sum);

	if (at < 0)
		return GO_ON;
	count_invalid(packet->splice, PF_INVALID_OPTION);
	if (blank_options(skb, OPTIONS_AT(v6) + 4 * at, bytes - 4 * at, sum))
		return DROP;
	return GO_ON;
}

/* TCP's header without its options; what that does to the checksum is added to `sum`. */
inlined void rewrite_tcp(const struct packet *packet, struct tcp *tcp, __u64 *sum)
{
	const struct splice_direction *way = packet->way, *back = packet->back;
	__u32 *word = (__u32 *)tcp, number, was, change, window, hidden;

	put(&word[0], (__u32)way->sport | (__u32)way->dport << 16, sum);
	number = packet->seq + way->seq_delta;
	/* The other end takes an acknowledgement only from within its window, tail and all. */
	if (packet->is_pure_ack && volatile_read(back->tail_open) && after(number, back->edge))
		number = back->edge;
	put(&word[1], bpf_htonl(number), sum);
	if (packet->flags & ACK)
		put(&word[2], bpf_htonl(packet->acknowledged + way->ack_delta), sum);
	/*
	 * Urgent bytes stay where they stand in the stream, as on every datapath: a reader who
	 * knows nothing of them would lose one.
	 */
	was = bpf_ntohl(word[3]);
	change = was & ~URG_OF_TCP;
	if (way->no_ecn)
		change &= ~ECN_OF_TCP;
	/* What is left of the window behind the tail. */
	window = (was & 0xffff) << (way->shift_left & 15);
	hidden = packet->acknowledged - packet->ack;
	window = hidden < window ? window - hidden : 0;
	change = (change & 0xffff0000) | window_field(window, way->shift_right);
	put(&word[3], bpf_htonl(change), sum);
	*sum += (__u16)~tcp->urgent;
	tcp->urgent = 0;
}

/* The addresses, hops and congestion marks, and IPv4's own checksum. */
inlined void rewrite_ip(const struct splice_direction *way, void *ip, const int v6)
{
	struct ipv4 *four = ip;
	struct ipv6 *six = ip;
	__u64 sum;

	give_addresses(ip, way->source, way->target, v6);
	if (v6) {
		if (way->no_ecn)
			six->version &= ~bpf_htonl(ECN_OF_V6);
		six->hops = HOPS;
		return;
	}
	sum = (__u64)(__u16)~four->checksum + way->address_sum;
	sum += (__u16)~bpf_htons((__u16)four->ttl << 8);
	sum += (__u16)bpf_htons(HOPS << 8);
	four->ttl = HOPS;
	if (way->no_ecn) {
		sum += (__u16)~bpf_htons(four->tos);
		four->tos &= ~ECN_OF_TOS;
		sum += (__u16)bpf_htons(four->tos);
	}
	four->checksum = (__u16)~fold(sum);
}

/* Sent on: up the stack of this host (NEXT), or out. */
inlined int rewrite(struct __sk_buff *skb, const struct packet *packet, const int v6)
{
	const struct splice_direction *way = packet->way;
	struct tcp *tcp;
	__u16 whole; /* all bits, or none: in PF_SUM_PARTIAL the sum is not turned, and not whole */
	/* On every path: then the verifier takes them for one, and goes on but once. */
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	if (packet->header > 20) {
		if (rewrite_options(skb, packet, data, data_end, &sum, v6) == DROP)
			return DROP;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never, likewise */
	}
	tcp = data + TCP_AT(v6);
	rewrite_tcp(packet, tcp, &sum);
	rewrite_ip(way, data + ETHERNET_BYTES, v6);
	if (packet->sum == PF_SUM_OTHER) {
		bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
		replace_pseudo(skb, TCP_AT(v6) + 16, (__u16)way->address_sum, v6);
	} else {
		/* As these would do, which takes longer than all the rest. */
		whole = packet->sum / PF_SUM_KNOWN * 0xffff;
		tcp->checksum = whole ^ fold((__u64)(tcp->checksum ^ whole) + (fold(sum) & whole) +
					     (__u16)way->address_sum);
	}
	return send_on(way->interface);
}
