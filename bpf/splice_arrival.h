/*
 * Arrival of a packet at `ingress`: read its headers, look up the pair that has its addresses, and
 * make the checks that the IP layer of a host makes before TCP gets a packet. Each step returns a
 * verdict (NEXT, DROP), or CONTINUE: the next step continues with the packet.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_handshakes.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_ports.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define CONTINUE   -3 /* no verdict yet: the next step continues with the packet */
#define ICMP_ERROR -4 /* the packet is ICMP: an error that a router or a host reports */

/*
 * Tail call: another program (express_connect.c) continues with this packet. Returns only if no
 * program is loaded there. HAS_EXPRESS differs from load to load: where it is 0, the verifier
 * removes what depends on it.
 */
inlined void tail_call_express(struct __sk_buff *skb, __u32 place)
{
	if (HAS_EXPRESS)
		tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), place);
}

/* A packet, as one step hands it to the next. Sequence numbers are those of its sender. */
struct packet {
	void *ip, *data_end; /* these and `tcp` are invalid after helpers that change the packet */
	struct tcp *tcp;
	struct splice *splice;
	struct splice_direction *from_peer; /* the direction of its sender's packets */
	struct splice_direction *to_peer;   /* the other one */
	__u32 index, direction, state;	    /* of the pair's record */
	__u32 total;			    /* bytes of the IP packet, header included */
	__u32 header;			    /* bytes of the TCP header, options included */
	__u32 bytes;			    /* bytes of payload */
	__u32 seq, ack;
	__u32 acknowledged; /* what the other end gets as `ack`, in the sender's numbers */
	__u8 flags, hops;
	__u64 verifier_zero;   /* 0, see unknown_to_verifier() */
	enum sum sum;	       /* state of its checksum */
	int is_copy;	       /* our own copy of a checked packet, for our socket */
	int is_first_fragment; /* first fragment of an IPv4 packet */
	int is_pure_ack;       /* it has neither payload nor a FIN */
};

/*
 * The same number, but the verifier no longer knows its value.
 *
 * The verifier walks the code that follows once for each value that it knows a variable may have,
 * and it walks a million instructions at most. It knows nothing about values that are read from a
 * map, and `verifier_zero` is a 0 that was read from one.
 */
#define unknown_to_verifier(number) ((number) + packet->verifier_zero)

/*
 * Read addresses, ports, flags and total length of a packet.
 *
 * Returns CONTINUE; NEXT if the packet is not TCP over IP without options; ICMP_ERROR if it is
 * ICMP.
 */
inlined int read_headers(struct __sk_buff *skb, struct packet *packet, struct splice_key *from,
			 const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *iph;
	struct ipv6 *ip6h;

	if (data + HEADERS_BYTES(v6) > data_end) {
		if (bpf_skb_pull_data(skb, HEADERS_BYTES(v6)))
			return NEXT; /* shorter than any TCP packet */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return NEXT;
	}
	iph = data + ETHERNET_BYTES;
	ip6h = data + ETHERNET_BYTES;
	if (v6) {
		if (ip6h->next == PROTOCOL_ICMPV6)
			return ICMP_ERROR;
		if (ip6h->next != PROTOCOL_TCP)
			return NEXT;
		packet->total = bpf_ntohs(ip6h->payload_bytes) + IP_BYTES(1);
	} else {
		if (iph->version != 0x45 || (iph->fragment & bpf_htons(0x1fff)))
			return NEXT; /* IP options, or a later fragment: for the stack */
		packet->is_first_fragment = !!(iph->fragment & bpf_htons(0x2000));
		if (iph->protocol == PROTOCOL_ICMP)
			return packet->is_first_fragment ? NEXT : ICMP_ERROR;
		if (iph->protocol != PROTOCOL_TCP)
			return NEXT;
		packet->total = bpf_ntohs(iph->total_bytes);
	}
	if (skb->gso_size)
		packet->total = skb->len - ETHERNET_BYTES; /* it may exceed the 16-bit field */
	packet->ip = data + ETHERNET_BYTES;
	packet->hops = v6 ? ip6h->hops : iph->ttl;
	packet->is_copy = is_copy(skb, packet->hops);
	packet->tcp = data + TCP_OFFSET(v6);
	packet->flags = packet->tcp->flags;
	read_addresses(from->source, from->target, packet->ip, v6);
	from->sport = packet->tcp->sport;
	from->dport = packet->tcp->dport;
	return CONTINUE;
}

/*
 * Look up the pair of the packet's addresses, and record the handshake if the packet is a SYN.
 *
 * Returns CONTINUE if the pair is spliced (ACTIVE, or RESET). NEXT if there is no pair, or it is
 * not spliced yet: then express is asked first by a tail call, since the packet may begin or
 * continue a connection of express. DROP if the packet is a copy for one of our sockets whose pair
 * no longer exists.
 */
inlined int find_pair(struct __sk_buff *skb, struct packet *packet, const struct splice_key *from,
		      const int v6)
{
	struct splice_flow *flow = NULL;
	struct splice *splice = NULL;
	__u32 index;

	if (may_have_flow(from->dport))
		flow = map_lookup(MAP_FLOWS_FD, (void *)from);
	if (flow) {
		index = flow->index;
		packet->direction = flow->direction;
		splice = map_lookup(MAP_SPLICES_FD, &index);
	}
	packet->state = splice ? READ_ONCE(splice->state) : PF_SPLICE_FREE;
	/* No socket expects the SYN-ACK that answers a SYN of express: it is no handshake. */
	if ((packet->flags & SYN) && packet->state != PF_SPLICE_ASKED &&
	    skb->pkt_type == HOST_PACKET)
		remember_handshake(skb, from, bpf_ntohl(packet->tcp->seq), v6);
	if (!flow) {
		if (packet->is_copy)
			return DROP;
		/* Only a packet with these flags can be the first behind a handshake. */
		if ((packet->flags & (SYN | RST | ACK)) == ACK)
			tail_call_express(skb, v6 ? PF_EXPRESS_BEGIN6 : PF_EXPRESS_BEGIN4);
		return NEXT;
	}
	if (!splice)
		return NEXT;
	packet->index = index;
	packet->splice = splice;
	packet->from_peer = packet->direction == PF_UP ? &splice->direction[PF_UP]
						       : &splice->direction[PF_DOWN];
	packet->to_peer = packet->direction == PF_UP ? &splice->direction[PF_DOWN]
						     : &splice->direction[PF_UP];
	if (packet->state != PF_SPLICE_ACTIVE &&
	    (packet->state != PF_SPLICE_RESET || packet->is_copy)) {
		if (packet->is_copy)
			return DROP;
		if (packet->state == PF_SPLICE_ASKED)
			tail_call_express(skb, v6 ? PF_EXPRESS_ASKED6 : PF_EXPRESS_ASKED4);
		return NEXT;
	}
	return CONTINUE;
}

/*
 * Make the checks of the IP layer: frame type, interface, fragment, lengths, checksums.
 *
 * Returns CONTINUE if the packet is valid so far. NEXT if the frame is not for this host: the stack
 * discards it. DROP if it is invalid, counted by the kind, or if memory is short.
 */
inlined int check_headers(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	struct splice *splice = packet->splice;
	__u32 total = packet->total, header, bytes, zero = 0;
	volatile __u64 *kept;

	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack discards it, too */
	}
	if (!may_arrive_by(packet->from_peer, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	if (packet->is_first_fragment) {
		count_invalid(splice, PF_INVALID_FRAGMENT);
		return DROP; /* without its first fragment the packet is never reassembled */
	}
	header = (__u32)(packet->tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (!v6 && !is_ipv4_header_valid(packet->ip))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	bytes = total - IP_BYTES(v6) - header;
	packet->header = header;
	packet->bytes = bytes;
	packet->seq = bpf_ntohl(packet->tcp->seq);
	packet->ack = bpf_ntohl(packet->tcp->ack);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: a lost packet, which its sender repeats */
	if (packet->is_copy)
		return CONTINUE;
	packet->sum = check_csum(skb, TCP_OFFSET(v6), TCP_OFFSET(v6) + 16, bytes + header,
				 (__u64)packet->from_peer->pseudo_sum +
					 bpf_htons((bytes + header) & 0xffff));
	if (packet->sum == PF_SUM_WRONG) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	kept = map_lookup(MAP_SCRATCH_FD, &zero);
	if (!kept)
		return DROP; /* never */
	*kept = 0;
	packet->verifier_zero = *kept;
	packet->sum = unknown_to_verifier(packet->sum);
	packet->header = unknown_to_verifier(packet->header);
	return CONTINUE;
}

/*
 * Make the whole TCP header, options included, readable in the linear part of the packet.
 *
 * Returns CONTINUE, or DROP if memory is short: a lost packet, which its sender repeats.
 */
inlined int pull_header(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;

	if (data + TCP_OFFSET(v6) + packet->header > data_end) {
		if (bpf_skb_pull_data(skb, TCP_OFFSET(v6) + packet->header))
			return DROP; /* no memory */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
	}
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	packet->tcp = data + TCP_OFFSET(v6);
	packet->data_end = data_end;
	return CONTINUE;
}
