/*
 * Packets that find no way: what routers say of ours (ICMP), and those that are too long for us.
 */
#pragma once

#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

/*
 * A router cannot pass on what we sent in a peer's name: say so to that peer, about the packet that
 * it knows. Without this, a connection whose path became narrower would hang.
 */
inlined int translate_error(struct __sk_buff *skb, const int v6)
{
	const int about_at = TCP_AT(v6) + 8, ports_at = about_at + IP_BYTES(v6);
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct ipv4 *four;
	struct ipv6 *six;
	struct icmp *icmp;
	__be32 *ports;
	__u32 index, seq, bytes;
	__u64 sum = 0, addresses;

	if (bpf_skb_pull_data(skb, ports_at + 8))
		return NEXT; /* not an error about a TCP packet: too short */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end)
		return NEXT;
	icmp = data + TCP_AT(v6);
	if (v6 ? icmp->type < 1 || icmp->type > 3 : icmp->type != 3 && icmp->type != 11)
		return NEXT; /* no error, or one without a meaning for TCP */
	four = data + about_at;
	six = data + about_at;
	if (v6 ? six->next != PROTOCOL_TCP
	       : four->version != 0x45 || four->protocol != PROTOCOL_TCP)
		return NEXT;
	/* As it would come from the peer that our packet was for. */
	take_addresses(key.target, key.source, data + about_at, v6);
	ports = data + ports_at;
	key.sport = *((__u16 *)ports + 1);
	key.dport = *(__u16 *)ports;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice || volatile_read(splice->state) != PF_SPLICE_ACTIVE)
		return NEXT;
	/* `back` translates what the sender sends: undo that. */
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = flow->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	seq = bpf_ntohl(ports[1]);
	if (volatile_read(way->tail_open) && before(seq, way->tail))
		return NEXT; /* our own socket has sent that, and sees to it */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (!comes_by(way, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	six = data + ETHERNET_BYTES;
	four = data + ETHERNET_BYTES;
	bytes = v6 ? bpf_ntohs(six->payload_bytes) : bpf_ntohs(four->total_bytes) - IP_BYTES(0);
	if (bytes + TCP_AT(v6) > skb->len || (!v6 && !is_whole_header(four))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	/* It can be only about what is under way (RFC 5927). */
	if (before(seq, (__u32)volatile_read(way->last_ack)) || after(seq, sent_to(way, back))) {
		count_invalid(splice, PF_INVALID_ERROR);
		return DROP;
	}
	sum = v6 ? pseudo_sum(six) + bpf_htons(bytes & 0xffff) : 0;
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */
	if (is_corrupt_error(skb, TCP_AT(v6), TCP_AT(v6) + 2, bytes, sum)) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	sum = 0;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end)
		return DROP; /* never: it was there a moment ago */
	ports = data + ports_at;
	four = data + about_at;

	put(&ports[0], (__u32)back->from.sport | (__u32)back->from.dport << 16, &sum);
	shift(&ports[1], -back->seq_delta, &sum);
	/*
	 * The addresses inside: with IPv4 they and the checksum beside them make up for each other.
	 */
	give_addresses(data + about_at, back->from.source, back->from.target, v6);
	if (v6)
		sum += (__u16)~back->address_sum;
	else
		four->checksum =
			(__u16)~fold((__u64)(__u16)~four->checksum + (__u16)~back->address_sum);
	addresses = answer_from_us(data, &back->from, v6);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 2, 0, fold(sum), 0);
	if (v6)
		replace_pseudo(skb, TCP_AT(v6) + 2, fold(addresses), v6);
	return send_on(way->interface);
}

/* A packet that is longer than what the interface in front of it takes is lost, and reported. */
inlined int is_too_long(struct __sk_buff *skb, struct splice *splice, __u32 index,
			struct splice_direction *way, __u32 seq, __u32 header, __u32 total,
			const int v6)
{
	__u32 mtu = 0, bytes = skb->gso_size ? skb->gso_size + IP_BYTES(v6) + header : total;

	if (!way->interface)
		return 0;
	/* What it answers is of the whole of an aggregate; what it writes is what is asked for. */
	bpf_check_mtu(skb, way->interface, &mtu, 0, 0);
	if (!mtu || bytes <= mtu)
		return 0;
	way->narrow_seq = seq;
	if (!volatile_read(way->narrow_mtu)) {
		*(volatile __u32 *)&way->narrow_mtu = mtu;
		tell(splice, index);
	}
	return 1;
}
