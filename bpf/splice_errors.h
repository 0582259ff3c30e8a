/*
 * ICMP errors about packets that we have sent in a peer's name, and packets that are longer than
 * the MTU of the next interface.
 */
#pragma once

#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

/*
 * Translate an ICMP error about a packet that we have sent in a peer's name, and send it to that
 * peer, with the packet that the peer knows quoted. Otherwise a connection would hang when the path
 * becomes narrower.
 *
 * Returns NEXT if it is no error about a spliced pair, or is about our own socket's bytes: the
 * stack handles it. DROP if it is invalid, counted by the kind. Else the verdict of the redirect.
 */
inlined int translate_icmp_error(struct __sk_buff *skb, const int v6)
{
	const int quoted_offset = TCP_OFFSET(v6) + 8, ports_offset = quoted_offset + IP_BYTES(v6);
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *from_peer, *to_peer;
	struct ipv4 *iph;
	struct ipv6 *ip6h;
	struct icmp *icmp;
	__be32 *ports;
	__u32 index, seq, bytes;
	__u64 sum = 0, addresses;

	if (bpf_skb_pull_data(skb, ports_offset + 8))
		return NEXT; /* too short to quote a TCP packet */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_offset + 8 > data_end)
		return NEXT;
	icmp = data + TCP_OFFSET(v6);
	if (v6 ? icmp->type < 1 || icmp->type > 3 : icmp->type != 3 && icmp->type != 11)
		return NEXT; /* no error, or one that TCP ignores */
	iph = data + quoted_offset;
	ip6h = data + quoted_offset;
	if (v6 ? ip6h->next != PROTOCOL_TCP : iph->version != 0x45 || iph->protocol != PROTOCOL_TCP)
		return NEXT;
	/* The addresses that a packet from the receiver of our packet would have. */
	read_addresses(key.target, key.source, data + quoted_offset, v6);
	ports = data + ports_offset;
	key.sport = *((__u16 *)ports + 1);
	key.dport = *(__u16 *)ports;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice || READ_ONCE(splice->state) != PF_SPLICE_ACTIVE)
		return NEXT;
	/* `to_peer` is the direction in which the quoted packet went: undo its translation. */
	from_peer =
		flow->direction == PF_UP ? &splice->direction[PF_UP] : &splice->direction[PF_DOWN];
	to_peer =
		flow->direction == PF_UP ? &splice->direction[PF_DOWN] : &splice->direction[PF_UP];
	seq = bpf_ntohl(ports[1]);
	if (READ_ONCE(from_peer->tail_open) && before(seq, from_peer->tail_end))
		return NEXT; /* our own socket has sent the quoted bytes: the error is for it */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack discards it, too */
	}
	if (!may_arrive_by(from_peer, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	ip6h = data + ETHERNET_BYTES;
	iph = data + ETHERNET_BYTES;
	bytes = v6 ? bpf_ntohs(ip6h->payload_bytes) : bpf_ntohs(iph->total_bytes) - IP_BYTES(0);
	if (bytes + TCP_OFFSET(v6) > skb->len || (!v6 && !is_ipv4_header_valid(iph))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	/* The quoted number must be of bytes that are not acknowledged yet (RFC 5927). */
	if (before(seq, (__u32)READ_ONCE(from_peer->last_ack)) ||
	    after(seq, sent_end(from_peer, to_peer))) {
		count_invalid(splice, PF_INVALID_ERROR);
		return DROP;
	}
	sum = v6 ? icmpv6_pseudo_sum(ip6h) + bpf_htons(bytes & 0xffff) : 0;
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: a lost packet */
	if (has_bad_icmp_csum(skb, TCP_OFFSET(v6), TCP_OFFSET(v6) + 2, bytes, sum)) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	sum = 0;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_offset + 8 > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	ports = data + ports_offset;
	iph = data + quoted_offset;

	set_field(&ports[0], (__u32)to_peer->from.sport | (__u32)to_peer->from.dport << 16, &sum);
	add_to_field(&ports[1], -to_peer->seq_delta, &sum);
	/*
	 * The addresses of the quoted packet. In IPv4 the checksum of the quoted header changes by
	 * the opposite amount, so that the checksum of the ICMP message stays the same.
	 */
	write_addresses(data + quoted_offset, to_peer->from.source, to_peer->from.target, v6);
	if (v6)
		sum += (__u16)~to_peer->address_sum;
	else
		iph->checksum = (__u16)~csum_fold((__u64)(__u16)~iph->checksum +
						  (__u16)~to_peer->address_sum);
	addresses = address_icmp_error(data, &to_peer->from, v6);
	bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 2, 0, csum_fold(sum), 0);
	if (v6)
		replace_pseudo_csum(skb, TCP_OFFSET(v6) + 2, csum_fold(addresses), v6);
	return forward_by(from_peer->interface);
}

/*
 * Whether a packet is longer than the MTU of the interface that it is redirected to. If so, its
 * number and the MTU are stored in the record, and the worker is notified once: the keeper reports
 * it to the sender (ICMP). The caller drops the packet.
 *
 * Returns 1 if it is too long.
 */
inlined int exceeds_mtu(struct __sk_buff *skb, struct splice *splice, __u32 index,
			struct splice_direction *from_peer, __u32 seq, __u32 header, __u32 total,
			const int v6)
{
	__u32 mtu = 0, bytes = skb->gso_size ? skb->gso_size + IP_BYTES(v6) + header : total;

	if (!from_peer->interface)
		return 0;
	/*
	 * For an aggregate the return value is about the whole, so it is ignored: only the MTU
	 * that the helper writes is used.
	 */
	bpf_check_mtu(skb, from_peer->interface, &mtu, 0, 0);
	if (!mtu || bytes <= mtu)
		return 0;
	from_peer->narrow_seq = seq;
	if (!READ_ONCE(from_peer->narrow_mtu)) {
		WRITE_ONCE(from_peer->narrow_mtu, mtu);
		notify_worker(splice, index);
	}
	return 1;
}
