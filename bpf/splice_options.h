/*
 * TCP options of packets that are sent on: timestamps and selective acknowledgements are
 * translated. What else there is nobody has agreed on from end to end, and is taken out.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/* How many edges a selective acknowledgement at this place has; negative: it is something else. */
inlined int count_edges(__be32 *option, void *data_end, __u32 bytes)
{
	__u32 size;

	if ((void *)(option + 1) > data_end)
		return -1;
	size = bpf_ntohl(option[0]) - SACK_WORD;
	/* Two bytes of kind and length, and at most four blocks of two edges. */
	if (size < 2 || size > 34 || size + 2 > bytes)
		return -1;
	return (int)(size - 2) / 4;
}

/* The edges of a selective acknowledgement at a place in the header that the compiler knows. */
inlined int shift_edges(__be32 *option, void *data_end, __u32 bytes, __u32 delta, __u64 *sum)
{
	int i, edges = count_edges(option, data_end, bytes);

	if (edges < 0)
		return -1;
#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return -1;
			shift(&option[i + 1], delta, sum);
		}
	}
	return 1 + edges;
}

/*
 * The timestamp of a packet to a peer that two clocks speak to, ours and the other end's, until it
 * has the tail: none may be older than one that was sent before, or it would be thrown away (PAWS,
 * RFC 7323).
 */
inlined __u32 stamp(struct splice_direction *peer, __u32 tsval, const int ours)
{
	if (volatile_read(peer->stamped) && before(tsval, peer->stamp))
		return peer->stamp;
	if (volatile_read(peer->tail_open)) {
		peer->stamp = tsval;
		peer->stamped = 1;
	} else if (!ours && peer->stamped) {
		peer->stamped = 0; /* the other end's clock is ahead, and alone from here on */
	}
	return tsval;
}

/*
 * That of a packet of our own socket. Once the peer has the tail its clock is the other end's: a
 * stamp of ours, which may run ahead, would make the other end's look old. (What comes again must
 * not look old, either: not everybody answers that.)
 */
inlined __u32 own_stamp(struct splice_direction *peer, const struct splice_direction *other,
			__u32 tsval)
{
	if (!volatile_read(peer->tail_open) && other->recent)
		tsval = other->recent + other->tsval_delta;
	return stamp(peer, tsval, 1);
}

/*
 * The options as Linux, BSD and Windows write them once a connection stands: timestamps, edges or
 * both, each behind two no-ops. What is something else begins at the word that is returned;
 * negative: nothing is.
 */
inlined int shift_options(__be32 *option, void *data_end, __u32 bytes, struct splice_direction *way,
			  struct splice_direction *back, __u64 *sum)
{
	int took;

	if (bytes >= 12 && (void *)(option + 3) <= data_end &&
	    option[0] == bpf_htonl(TIMESTAMP_WORD)) {
		put(&option[1], bpf_htonl(stamp(back, bpf_ntohl(option[1]) + way->tsval_delta, 0)),
		    sum);
		if (option[2])
			shift(&option[2], way->tsecr_delta, sum);
		if (bytes == 12)
			return -1;
		took = shift_edges(option + 3, data_end, bytes - 12, way->ack_delta, sum);
		if (took < 0)
			return 3;
		return 12 + 4 * took < (int)bytes ? 3 + took : -1;
	}
	took = shift_edges(option, data_end, bytes, way->ack_delta, sum);
	if (took < 0)
		return 0;
	return 4 * took < (int)bytes ? took : -1;
}

/*
 * Write no-ops over options, from `at` in the packet on; not 0: it failed. Packets' pointers are
 * void afterwards. (A loop over the words would cost the verifier as much as all the rest.)
 */
inlined int blank_options(struct __sk_buff *skb, __u32 at, __u64 bytes, __u64 *sum)
{
	__u32 zero = 0;
	__be32 *scratch = map_lookup(MAP_SCRATCH_FD, &zero), *no_ops;
	int i;

	if (!scratch)
		return -1; /* never */
	no_ops = scratch + 16;
#pragma unroll
	for (i = 0; i < 16; i++)
		no_ops[i] = bpf_htonl(NO_OP_WORD);
	/* From 1 to 64, in the verifier's words; it is 4 to 40. */
	bytes = ((bytes - 1) & 63) + 1;
	if (bpf_skb_load_bytes(skb, at, scratch, bytes) ||
	    bpf_skb_store_bytes(skb, at, no_ops, bytes, 0))
		return -1;
	bytes = ((bytes - 1) | 3) + 1;
	*sum += (__u32)bpf_csum_diff(scratch, bytes, no_ops, bytes, 0);
	return 0;
}

/* What is acknowledged selectively up to `known` alone: our socket has sent nothing behind it. */
inlined void clip_edges(__be32 *option, void *data_end, __u32 bytes, __u32 known, __u64 *sum)
{
	int i, edges = count_edges(option, data_end, bytes);

#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return; /* never: the header is in front */
			/* A block that begins behind it is empty then, and ignored. */
			if (after(bpf_ntohl(option[i + 1]), known))
				put(&option[i + 1], bpf_htonl(known), sum);
		}
	}
}
