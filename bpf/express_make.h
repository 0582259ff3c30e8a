/*
 * Building a packet out of another one: new headers, with the saved bytes or without. So a client's
 * packet becomes a SYN to the server, and the server's answer becomes the packet with the client's
 * first bytes.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define PF_HEADERS_WORDS (10 + 16)
#define TCP_WORD(v6)	 (IP_BYTES(v6) / 4) /* the word at which the TCP header begins */

/* A packet that is built out of another one. One per processor: the BPF stack is too small. */
struct new_packet {
	/* IP and TCP headers, with options. */
	__be32 old[PF_HEADERS_WORDS], new[PF_HEADERS_WORDS];
	__u32 source[4], target[4];
	__u32 seq, ack;
	__u16 sport, dport, window; /* the ports in wire order */
	__u8 flags, option_words;
	__be32 option[5];
	__u32 bytes;	  /* how many of the saved bytes it gets, or 0 */
	__u32 sum;	  /* checksum of these bytes */
	__u32 csum_state; /* enum sum: state of the old packet's checksum */
	/* Options of the server's SYN-ACK. */
	__u32 at, server_mss, server_tsval;
	__u8 has_timestamps, has_scale, scale, padding;
	__u16 urgent, more_padding;
};

_Static_assert(sizeof(struct new_packet) == PF_EXPRESS_NEW_PACKET_BYTES, "the map's value");

/*
 * Bound `bytes` to 1..most for the verifier; `most` is a power of two. The caller has checked it.
 */
inlined __u32 bound_from_one(__u32 bytes, __u32 most)
{
	bytes--;
	barrier_var(bytes);
	bytes &= most - 1;
	return bytes + 1;
}

/*
 * Start building a packet: all fields are 0, but for the state of the old packet's checksum (enum
 * sum).
 */
inlined struct new_packet *new_packet(__u32 csum_state)
{
	__u32 zero = 0;
	struct new_packet *packet = map_lookup(MAP_EXPRESS_MADE_FD, &zero);

	if (!packet)
		return NULL;
	/* `build_packet` writes the headers before it reads them. */
	__builtin_memset((void *)packet->source, 0,
			 sizeof(*packet) - sizeof(packet->old) - sizeof(packet->new));
	packet->csum_state = csum_state;
	return packet;
}

/* Give the new packet our addresses and ports of the connection to the server. */
inlined void address_to_server(struct new_packet *packet, const struct splice *splice)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		packet->source[i] = splice->direction[PF_UP].source[i];
		packet->target[i] = splice->direction[PF_UP].target[i];
	}
	packet->sport = splice->direction[PF_UP].sport;
	packet->dport = splice->direction[PF_UP].dport;
}

/* Give the new packet the client's addresses, ports and numbers, as of its first packet. */
inlined void address_from_client(struct new_packet *packet, const struct splice *splice,
				 const struct express_ask *ask)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		packet->source[i] = splice->direction[PF_UP].from.source[i];
		packet->target[i] = splice->direction[PF_UP].from.target[i];
	}
	packet->sport = splice->direction[PF_UP].from.sport;
	packet->dport = splice->direction[PF_UP].from.dport;
	packet->seq = ask->client_isn + 1;
	packet->ack = ask->kernel_isn + 1;
}

/*
 * Load `bytes` bytes of options of the old packet, 40 at most. Returns 0; not 0: the packet is too
 * short.
 */
inlined int load_options(struct __sk_buff *skb, struct new_packet *packet, __u32 bytes,
			 const int v6)
{
	__be32 *options = packet->old + TCP_WORD(v6) + 5;

	/* Reads beyond the end get zeros. */
	__builtin_memset(options, 0, 44);
	bytes = bound_from_one(bytes, 64);
	return bpf_skb_load_bytes(skb, OPTIONS_OFFSET(v6), options, bytes > 40 ? 40 : bytes);
}

/*
 * Replace the headers of the packet by the new ones, and make room for the saved bytes. The
 * checksum is right for CHECKSUM_PARTIAL, too: such a sum is adjusted by what changes.
 *
 * Returns 0; not 0: it failed, and the caller drops the packet, which may be half changed.
 */
inlined int build_packet(struct __sk_buff *skb, struct new_packet *packet, const int v6)
{
	__be32 *old = packet->old + TCP_WORD(v6), *new = packet->new + TCP_WORD(v6);
	__u32 header, bytes = packet->bytes, old_bytes, new_bytes;
	__u64 sum = 0, ip_sum = 0, pseudo, whole;
	__u16 old_checksum, checksum;
	int i;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, packet->old, IP_BYTES(v6) + 20))
		return -1;
	old_checksum = old[4] & 0xffff; /* in memory order */
	header = 20 + (packet->option_words & 7) * 4;
	if (header > 40 || bytes > PF_EXPRESS_SAVED)
		return -1;
	new[0] = (__u32)packet->sport | (__u32)packet->dport << 16;
	new[1] = bpf_htonl(packet->seq);
	new[2] = bpf_htonl(packet->ack);
	new[3] = bpf_htonl(header << 26 | (__u32)packet->flags << 16 | packet->window);
	new[4] = bpf_htonl(packet->urgent); /* the checksum is added below */
#pragma unroll
	for (i = 0; i < 5; i++)
		new[5 + i] = i < packet->option_words ? packet->option[i] : 0;

	new_bytes = header + bytes;
	if (v6) {
		whole = pseudo = 0;
		old_bytes = bpf_ntohl(packet->old[1]) >> 16;
		packet->new[0] = bpf_htonl(0x60000000);
		packet->new[1] = bpf_htonl(new_bytes << 16 | PROTOCOL_TCP << 8 | HOPS);
#pragma unroll
		for (i = 0; i < 4; i++) {
			packet->new[2 + i] = packet->source[i];
			packet->new[6 + i] = packet->target[i];
			whole += (__u64)packet->source[i] + packet->target[i];
			pseudo += (__u64)(__u32)~packet->old[2 + i] + (__u32)~packet->old[6 + i];
		}
	} else {
		old_bytes = (bpf_ntohl(packet->old[0]) & 0xffff) - IP_BYTES(0);
		packet->new[0] = bpf_htonl(0x45000000 | (IP_BYTES(0) + new_bytes));
		packet->new[1] = bpf_htonl(0x00004000); /* don't fragment */
		packet->new[2] = bpf_htonl(HOPS << 24 | PROTOCOL_TCP << 16);
		packet->new[3] = packet->source[3];
		packet->new[4] = packet->target[3];
		ip_sum = (__u64)packet->new[0] + packet->new[1] + packet->new[2] + packet->new[3] +
			 packet->new[4];
		packet->new[2] |= (__u32)(__u16)~csum_fold(ip_sum) << 16;
		whole = (__u64)packet->new[3] + packet->new[4];
		pseudo = (__u64)(__u32)~packet->old[3] + (__u32)~packet->old[4];
	}
	whole += bpf_htons(new_bytes & 0xffff);
	pseudo += whole + (__u16)~bpf_htons(old_bytes & 0xffff);

	/* The checksum, as in rewrite() (splice_rewrite.h). */
	if (packet->csum_state == PF_SUM_PARTIAL) {
		checksum = csum_fold((__u64)old_checksum + csum_fold(pseudo));
	} else {
		/* Computed from scratch: the old payload need not be read for that. */
		whole += bpf_htons(PROTOCOL_TCP) + (__u64)packet->sum;
		whole += (__u32)bpf_csum_diff(NULL, 0, new, header & 63, 0);
		checksum = ~csum_fold(whole);
		if (packet->csum_state != PF_SUM_KNOWN) {
			/*
			 * The change that the kernel's helpers must apply to get the same result.
			 */
			sum = (__u64)(__u16)~checksum + old_checksum + (__u16)~csum_fold(pseudo);
			checksum = old_checksum;
		}
	}
	new[4] |= checksum;
	if (bpf_skb_change_tail(skb, TCP_OFFSET(v6) + new_bytes, 0))
		return -1;
	if (header == 40
		    ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, packet->new, IP_BYTES(v6) + 40, 0)
	    : header == 32
		    ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, packet->new, IP_BYTES(v6) + 32, 0)
		    : bpf_skb_store_bytes(skb, ETHERNET_BYTES, packet->new, IP_BYTES(v6) + 20, 0))
		return -1;
	if (packet->csum_state != PF_SUM_OTHER)
		return 0;
	if (bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0))
		return -1;
	replace_pseudo_csum(skb, TCP_OFFSET(v6) + 16, csum_fold(pseudo), v6);
	return 0;
}

/* After `build_packet`: store the saved bytes for which it has made room. */
inlined int store_saved(struct __sk_buff *skb, __u32 place, const struct new_packet *packet,
			const int v6)
{
	__u8 *saved = map_lookup(MAP_EXPRESS_SAVED_FD, &place);

	if (!saved)
		return -1; /* never */
	return bpf_skb_store_bytes(skb, OPTIONS_OFFSET(v6) + (packet->option_words & 7) * 4, saved,
				   bound_from_one(packet->bytes, PF_EXPRESS_SAVED), 0);
}

/* Likewise the saved bytes behind those of the first packet. */
inlined int store_rest(struct __sk_buff *skb, struct express_ask *ask, __u32 place,
		       const struct new_packet *packet, const int v6)
{
	__u8 *saved = map_lookup(MAP_EXPRESS_SAVED_FD, &place);
	__u32 from = ask->first_segment_bytes;

	if (!saved)
		return -1; /* never */
	barrier_var(from);
	from &= PF_EXPRESS_SAVED / 2 - 1;
	return bpf_skb_store_bytes(skb, OPTIONS_OFFSET(v6) + (packet->option_words & 7) * 4,
				   saved + from,
				   bound_from_one(packet->bytes, PF_EXPRESS_SAVED / 2), 0);
}

/*
 * The checksum of the first `bytes` saved bytes; up to a whole word, the bytes behind them are 0.
 */
inlined __u32 csum_saved(__u8 *saved, __u32 bytes)
{
	__u32 sum = 0, at, left, i;

	bytes = (bytes + 3) & ~3;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_SAVED / 512; i++) {
		at = i * 512;
		if (at >= bytes)
			break;
		left = bytes - at;
		barrier_var(left);
		if (left > 512)
			left = 512;
		barrier_var(left);
		left &= 1023 & ~3;
		if (left > 512)
			left = 512;
		sum = (__u32)bpf_csum_diff(NULL, 0, (void *)saved + at, left, sum);
	}
	return csum_fold(sum);
}
