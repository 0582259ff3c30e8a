/*
 * A packet comes in: its headers are read, the pair is found that it bears the addresses of, and it
 * is looked at as a host would before TCP has it. Each step returns a verdict, or GO_ON.
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

#define GO_ON	 -3 /* no verdict yet: the next step has the packet */
#define AN_ERROR -4 /* a router's, or a host's: ICMP */

#ifdef MAP_EXPRESS_PROGRAMS_FD
static long (*tail_call)(void *context, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;

/* Another program goes on with this packet (express_connect.c); if there is none it returns. */
#define go_on_with_express(skb, place) tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), place)
#else
#define go_on_with_express(skb, place) ((void)(skb), (void)(place))
#endif

/* A packet, as one step hands it to the next; numbers are its sender's. */
struct packet {
	void *ip, *data_end; /* these and `tcp` are void once a helper has changed the packet */
	struct tcp *tcp;
	struct splice *splice;
	struct splice_direction *way, *back; /* of what its sender sends, and of what it gets */
	__u32 index, direction, state;	     /* of the pair */
	__u32 total;			     /* bytes of the IP packet */
	__u32 header;			     /* bytes of TCP's header */
	__u32 bytes;			     /* behind that */
	__u32 seq, ack;
	__u32 acknowledged; /* of what its sender acknowledges, as the other end is told */
	__u8 flags, hops;
	__u64 nothing;	 /* see `forgotten` */
	enum sum sum;	 /* what is known of its checksum */
	int is_copy;	 /* it has been looked at, and is for our own socket */
	int is_piece;	 /* the first of those that a router has made of a packet */
	int is_pure_ack; /* it has neither a byte nor an end */
};

/*
 * A number, of which the verifier knows nothing any more. It goes through all that follows once for
 * each number that it knows a variable to have, and takes a million instructions at most; of what
 * a map has it knows nothing, and `nothing` is a 0 from there.
 */
#define forgotten(number) ((number) + packet->nothing)

/* The addresses, flags and length. NEXT: it is none of TCP. */
inlined int read_headers(struct __sk_buff *skb, struct packet *packet, struct splice_key *from,
			 const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four;
	struct ipv6 *six;

	if (data + HEADERS_BYTES(v6) > data_end) {
		if (bpf_skb_pull_data(skb, HEADERS_BYTES(v6)))
			return NEXT; /* shorter than any TCP packet */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return NEXT;
	}
	four = data + ETHERNET_BYTES;
	six = data + ETHERNET_BYTES;
	if (v6) {
		if (six->next == PROTOCOL_ICMPV6)
			return AN_ERROR;
		if (six->next != PROTOCOL_TCP)
			return NEXT;
		packet->total = bpf_ntohs(six->payload_bytes) + IP_BYTES(1);
	} else {
		if (four->version != 0x45 || (four->fragment & bpf_htons(0x1fff)))
			return NEXT; /* a piece without a beginning the stack does not take, either
				      */
		packet->is_piece = !!(four->fragment & bpf_htons(0x2000));
		if (four->protocol == PROTOCOL_ICMP)
			return packet->is_piece ? NEXT : AN_ERROR;
		if (four->protocol != PROTOCOL_TCP)
			return NEXT;
		packet->total = bpf_ntohs(four->total_bytes);
	}
	if (skb->gso_size)
		packet->total = skb->len - ETHERNET_BYTES; /* more than the field can hold, perhaps
							    */
	packet->ip = data + ETHERNET_BYTES;
	packet->hops = v6 ? six->hops : four->ttl;
	packet->is_copy = is_copy(skb, packet->hops);
	packet->tcp = data + TCP_AT(v6);
	packet->flags = packet->tcp->flags;
	take_addresses(from->source, from->target, packet->ip, v6);
	from->sport = packet->tcp->sport;
	from->dport = packet->tcp->dport;
	return GO_ON;
}

/*
 * The pair, if it goes from end to end. NEXT: there is none; or express, whose connection it may
 * begin, has no use for it. A copy for a socket of ours that is of no pair any more is dropped.
 */
inlined int find_pair(struct __sk_buff *skb, struct packet *packet, const struct splice_key *from,
		      const int v6)
{
	struct splice_flow *flow = NULL;
	struct splice *splice = NULL;
	__u32 index;

	if (may_be_ours(from->dport))
		flow = map_lookup(MAP_FLOWS_FD, (void *)from);
	if (flow) {
		index = flow->index;
		packet->direction = flow->direction;
		splice = map_lookup(MAP_SPLICES_FD, &index);
	}
	packet->state = splice ? volatile_read(splice->state) : PF_SPLICE_FREE;
	/* The answer to a SYN that express has sent is no socket's. */
	if ((packet->flags & SYN) && packet->state != PF_SPLICE_ASKED &&
	    skb->pkt_type == HOST_PACKET)
		remember_handshake(skb, from, bpf_ntohl(packet->tcp->seq), v6);
	if (!flow) {
		if (packet->is_copy)
			return DROP;
		/* No other is behind a handshake. */
		if ((packet->flags & (SYN | RST | ACK)) == ACK)
			go_on_with_express(skb, v6 ? PF_EXPRESS_BEGIN6 : PF_EXPRESS_BEGIN4);
		return NEXT;
	}
	if (!splice)
		return NEXT;
	packet->index = index;
	packet->splice = splice;
	packet->way = packet->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	packet->back = packet->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	if (packet->state != PF_SPLICE_ACTIVE &&
	    (packet->state != PF_SPLICE_RESET || packet->is_copy)) {
		if (packet->is_copy)
			return DROP;
		if (packet->state == PF_SPLICE_ASKED)
			go_on_with_express(skb, v6 ? PF_EXPRESS_ASKED6 : PF_EXPRESS_ASKED4);
		return NEXT;
	}
	return GO_ON;
}

/* Is it what a host takes at all, and does it come from where that peer is? DROP: it is not. */
inlined int check_headers(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	struct splice *splice = packet->splice;
	__u32 total = packet->total, header, bytes, zero = 0;
	volatile __u64 *kept;

	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (!comes_by(packet->way, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	if (packet->is_piece) {
		count_invalid(splice, PF_INVALID_FRAGMENT);
		return DROP; /* with the beginning all of it is lost */
	}
	header = (__u32)(packet->tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (!v6 && !is_whole_header(packet->ip))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	bytes = total - IP_BYTES(v6) - header;
	packet->header = header;
	packet->bytes = bytes;
	packet->seq = bpf_ntohl(packet->tcp->seq);
	packet->ack = bpf_ntohl(packet->tcp->ack);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */
	if (packet->is_copy)
		return GO_ON;
	packet->sum =
		judge_sum(skb, TCP_AT(v6), TCP_AT(v6) + 16, bytes + header,
			  (__u64)packet->way->pseudo_sum + bpf_htons((bytes + header) & 0xffff));
	if (packet->sum == PF_SUM_WRONG) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	kept = map_lookup(MAP_SCRATCH_FD, &zero);
	if (!kept)
		return DROP; /* never */
	*kept = 0;
	packet->nothing = *kept;
	packet->sum = forgotten(packet->sum);
	packet->header = forgotten(packet->header);
	return GO_ON;
}

/* Have all of TCP's header in front, with its options. DROP: as if it had been lost. */
inlined int pull_header(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;

	if (data + TCP_AT(v6) + packet->header > data_end) {
		if (bpf_skb_pull_data(skb, TCP_AT(v6) + packet->header))
			return DROP; /* no memory */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
	}
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	packet->tcp = data + TCP_AT(v6);
	packet->data_end = data_end;
	return GO_ON;
}
