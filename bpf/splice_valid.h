/*
 * What is looked at before a packet changes anything, or goes on: would the end that it is for
 * believe it? We stand in front of that end's own checks, and undo some of them (addresses that
 * strict reverse path filtering would refuse, timestamps), so we make the same ones first.
 *
 * RFC 9293, 3.10.7.4  sequence numbers, acknowledgements
 * RFC 5961, 3 4 5	resets, SYNs, the range of acknowledgements
 * RFC 7323, 5		timestamps (PAWS)
 * RFC 5927, 4		what routers say (ICMP) is about something that is under way
 *
 * A packet that is not believed is dropped, as that end would do, and counted by its kind.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

#define HOST_PACKET 0 /* PACKET_HOST of linux/if_packet.h */

#define LEVEL_QUERY 0 /* BPF_CSUM_LEVEL_QUERY */

/*
 * SUM_BYTES are summed up at once, so often at most: the longest packets that are no aggregates are
 * jumbo frames. Longer ones, made by hand on this host, are not known to be bad.
 */
#define SUM_STEPS 20

/* How far back a packet may be at least: no window is thought to have been smaller. */
#define LEAST_REACH 65536

/*
 * After so long without a packet a timestamp may have gone round (RFC 7323, 5.5): 36 minutes with a
 * clock of microseconds, as Linux may have one (TCP_PAWS_WRAP).
 */
#define RECENT_FOR_S (0x7fffffff / 1000000)

#define NS_PER_S 1000000000

/*
 * So many bytes may come in packets that say nothing new, beside as many as have come in others,
 * and are thought to have been lost on their way. What is more than that is counted like new ones:
 * the two ends may have agreed to speak so.
 */
#define MOST_AGAIN (1 << 20)

/* What of a segment is believed or not; numbers in those of its sender. */
struct segment {
	__u32 seq, end, ack; /* `end` is behind the FIN, too */
	__u32 tsval;
	__u8 flags, has_timestamp;
};

enum verdict {
	PF_VALID,
	PF_OLD,	    /* it says nothing new, and is for the other end to answer (a keepalive) */
	PF_INVALID, /* and up: of the kind that is left if this is taken off */
};

inlined void count_invalid(const struct splice *splice, __u32 kind)
{
	__u32 word = splice->worker * BLOCK_WORDS + INVALID_FIRST + kind;
	__u64 *count = map_lookup(MAP_COUNTERS_FD, &word);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Move a number forward, never back, also when another CPU does so at the same moment. */
inlined void advance(__u64 *number, __u32 to)
{
	__u64 seen;
	int i;

#pragma unroll
	for (i = 0; i < 2; i++) {
		seen = volatile_read(*number);
		if (!after(to, (__u32)seen))
			return;
		if (__sync_val_compare_and_swap(number, seen, (__u64)to) == seen)
			return;
	}
}

/* Whether a peer's packets may come by this interface. */
inlined int comes_by(const struct splice_direction *way, __u32 interface)
{
	return way->by[0] == interface || way->by[1] == interface || !(way->by[0] | way->by[1]);
}

/* IPv4: whether the header, of 20 bytes, is as its sender has written it. */
inlined int is_whole_header(const void *ip)
{
	const __u32 *word = ip;

	return fold((__u64)word[0] + word[1] + word[2] + word[3] + word[4]) == 0xffff;
}

/* What is known of a packet's checksum. */
enum sum {
	PF_SUM_WRONG,
	PF_SUM_PARTIAL, /* its field has the sum of the pseudo-header, and no more yet */
	PF_SUM_KNOWN,	/* it was looked at before, and only the packet says what it is */
	PF_SUM_OTHER,	/* it is right, or not made yet: the kernel has to be told of changes */
};

/*
 * A 16-bit field of a packet, at a place that the compiler knows, and which is in front; not 0: it
 * is not. In assembly, as the compiler would keep the place of `data_end` in a register, and the
 * verifier wants it to be in the instruction.
 */
inlined int read_field(struct __sk_buff *skb, const __u32 at, __u16 *field)
{
	void *data, *data_end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(data)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data)));
	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(data_end)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data_end)));
	if (data + at + 2 > data_end)
		return -1;
	*field = *(__u16 *)(data + at);
	return 0;
}

/*
 * Whether a packet's checksum is still to be made (CHECKSUM_PARTIAL): then its field stays what it
 * is when `bpf_l4_csum_replace` is told of a change. Below 0: no memory. Packets' pointers are void
 * afterwards, and the packet is what it was.
 */
inlined int is_partial(struct __sk_buff *skb, const __u32 field_at, __u16 field)
{
	__u16 changed;

	if (bpf_l4_csum_replace(skb, field_at, 0, 1, 0) || read_field(skb, field_at, &changed))
		return -1;
	if (changed == field)
		return 1;
	return bpf_skb_store_bytes(skb, field_at, &field, 2, 0) ? -1 : 0;
}

#ifdef SK_BUFF_CSUM_START
/* By its number: under its own name bcc takes bpf_probe_read, where it may not read kallsyms. */
static long (*read_kernel)(void *to, __u32 bytes,
			   const void *from) = (void *)BPF_FUNC_probe_read_kernel;
#endif

/*
 * Of a CHECKSUM_PARTIAL packet, whether the checksum will be written in front of its field.
 *
 * Where it is summed up from, and where it is written, its sender says, if that is the guest of a
 * virtual machine on this host, or has a packet socket beyond a veth (struct virtio_net_hdr:
 * csum_start, csum_offset; skb_partial_csum_set). It is done when the packet leaves
 * (skb_checksum_help, or the interface does it): behind all that is looked at here, and behind what
 * `rewrite` has changed. So the two bytes must be none of the addresses, ports, numbers and flags,
 * with which the packet would be another connection's than the one that it was believed of. Behind
 * the field is what its sender may say anyway: the urgent pointer (whose flag is taken away),
 * options, payload. No byte is received that its sender has not chosen, and a sum that begins
 * elsewhere is wrong, or its sender has made it right.
 *
 * struct __sk_buff has neither of the two numbers, so they are read from struct sk_buff. (What
 * bpf_skb_change_tail refuses to cut off says it on some kernels only: 7.3 and Debian's 6.1.192
 * cut it off.) Where programs may not read the kernel's memory (lockdown=confidentiality), this is
 * not looked at.
 */
inlined int is_summed_in_front(struct __sk_buff *skb, const __u32 field_at)
{
#ifdef SK_BUFF_CSUM_START
	__u32 zero = 0;
	__u16 *read = map_lookup(MAP_SCRATCH_FD, &zero);

	/* csum_start and csum_offset */
	if (!read || read_kernel(read, 4, (void *)skb + SK_BUFF_CSUM_START) ||
	    read_kernel(read + 2, 2, (void *)skb + SK_BUFF_NETWORK_HEADER))
		return 1; /* never */
	return (__u32)read[0] + read[1] < read[2] + field_at - ETHERNET_BYTES;
#else
	(void)skb;
	(void)field_at;
	return 0;
#endif
}

/* Whether a packet that has no checksum (UDP over IPv4) would get one written in front of it. */
inlined int is_summed_elsewhere(struct __sk_buff *skb, const __u32 field_at)
{
	int partial = is_partial(skb, field_at, 0);

	/* Of a tunnel's datagram what is inside may be PARTIAL: that is behind the field. */
	return partial < 0 || (partial && is_summed_in_front(skb, field_at));
}

/*
 * What a checksum is, and whether it is wrong as far as anybody can know.
 *
 * An aggregate has been looked at by GRO, which made it, or has none yet (TSO). CHECKSUM_PARTIAL
 * is a packet of this machine, which has none yet either: its field has the sum of the
 * pseudo-header. Nearly all others were looked at by the interface or by GRO
 * (CHECKSUM_UNNECESSARY). What is left is summed up here.
 *
 * `at` is where the summed bytes begin, `field_at` where their checksum is, `sum` what the
 * pseudo-header adds. Packets' pointers are void afterwards; one that is wrong is to be dropped.
 */
inlined enum sum judge_sum(struct __sk_buff *skb, __u32 at, const __u32 field_at, __u32 bytes,
			   __u64 sum)
{
	__u64 left = bytes;
	__u32 zero = 0;
	__u16 field;
	__be32 *piece;
	int i, partial;

	if (!skb->gso_size && bpf_csum_level(skb, LEVEL_QUERY) >= 0)
		return PF_SUM_KNOWN;
	if (read_field(skb, field_at, &field))
		return PF_SUM_WRONG; /* never: the caller has read what is in front */
	partial = is_partial(skb, field_at, field);
	if (partial < 0 || (partial && is_summed_in_front(skb, field_at)))
		return PF_SUM_WRONG;
	if (skb->gso_size)
		return PF_SUM_OTHER;
	if (partial)
		return field == fold(sum) ? PF_SUM_PARTIAL : PF_SUM_WRONG;
	piece = map_lookup(MAP_SCRATCH_FD, &zero);
	if (!piece)
		return PF_SUM_WRONG; /* never */
	for (i = 0; i < SUM_STEPS; i++) {
		if (left <= SUM_BYTES)
			break;
		if (bpf_skb_load_bytes(skb, at, piece, SUM_BYTES))
			return PF_SUM_WRONG;
		sum += (__u32)bpf_csum_diff(NULL, 0, piece, SUM_BYTES, 0);
		at += SUM_BYTES;
		left -= SUM_BYTES;
	}
	if (left > SUM_BYTES)
		return PF_SUM_OTHER;
	/* From 1 to SUM_BYTES: it is never 0, and the verifier believes it when it is written so.
	 */
	left = ((left - 1) & (SUM_BYTES - 1)) + 1;
	piece[(left - 1) / 4] = 0;
	if (bpf_skb_load_bytes(skb, at, piece, left))
		return PF_SUM_WRONG;
	sum += (__u32)bpf_csum_diff(NULL, 0, piece, ((left - 1) | 3) + 1, 0);
	return fold(sum) == 0xffff ? PF_SUM_OTHER : PF_SUM_WRONG;
}

inlined int is_corrupt(struct __sk_buff *skb, __u32 at, const __u32 field_at, __u32 bytes,
		       __u64 sum)
{
	return judge_sum(skb, at, field_at, bytes, sum) == PF_SUM_WRONG;
}

/*
 * The same of ICMP. No host leaves its checksum to be made later: it would be written over what the
 * packet quotes, of which connection it speaks.
 */
inlined int is_corrupt_error(struct __sk_buff *skb, __u32 at, const __u32 field_at, __u32 bytes,
			     __u64 sum)
{
	enum sum found = judge_sum(skb, at, field_at, bytes, sum);

	return skb->gso_size || found == PF_SUM_WRONG || found == PF_SUM_PARTIAL;
}

/* What the other end expects next of this peer, as far as it has said: in this peer's numbers. */
inlined __u32 expected_of(const struct splice_direction *way, const struct splice_direction *back)
{
	__u32 expected = (__u32)volatile_read(back->last_ack) + back->ack_delta;

	/* What came before the beginning our own socket has acknowledged; gigabytes ago, perhaps.
	 */
	if (volatile_read(back->tail_open) && before(expected, way->begin))
		return way->begin;
	return expected;
}

/* How far this peer may have got: what has been sent to it, in numbers of what it acknowledges. */
inlined __u32 sent_to(const struct splice_direction *way, const struct splice_direction *back)
{
	__u32 sent = (__u32)volatile_read(way->sent);

	return before(sent, way->tail) ? sent
				       : (__u32)volatile_read(back->last_end) + back->seq_delta;
}

/*
 * Whether a reset has the number that the other end expects next, or will when it has all that was
 * sent; or the one in front of a FIN that has come, as macOS sends it.
 */
inlined int is_exact_reset(__u32 seq, const struct splice_direction *way,
			   const struct splice_direction *back)
{
	return seq == expected_of(way, back) || seq == (__u32)volatile_read(way->last_end) ||
	       (volatile_read(way->fin) && seq == way->fin_seq - 1);
}

inlined int is_stale(const struct segment *segment, const struct splice_direction *way)
{
	/* A tick of disorder is let through, as Linux does. */
	return segment->has_timestamp && way->recent && before(segment->tsval + 1, way->recent) &&
	       (__u32)(bpf_ktime_get_ns() / NS_PER_S) - way->recent_s < RECENT_FOR_S;
}

/* An acknowledging segment, neither SYN nor RST. */
inlined int judge(const struct segment *segment, const struct splice_direction *way,
		  const struct splice_direction *back)
{
	__u32 expected = expected_of(way, back);

	/* A probe of a window of zero begins at its edge, or right in front of it. */
	if (after(segment->seq, (__u32)volatile_read(way->limit)) ||
	    before(segment->end, expected - way->reach) ||
	    (volatile_read(way->fin) && after(segment->end, way->fin_seq)))
		return PF_INVALID + PF_INVALID_SEQUENCE;
	if (after(segment->ack, sent_to(way, back)) ||
	    before(segment->ack, (__u32)volatile_read(way->last_ack) - back->reach))
		return PF_INVALID + PF_INVALID_ACKNOWLEDGEMENT;
	if (is_stale(segment, way))
		return PF_INVALID + PF_INVALID_TIMESTAMP;
	return before(segment->end, expected) ? PF_OLD : PF_VALID;
}

/* What has come of a peer's FIN is what `next` says; 1: it was not known before. */
inlined int settle_fin(struct splice_direction *way)
{
	if (!volatile_read(way->fin_due) || volatile_read(way->fin))
		return 0;
	if ((__u32)volatile_read(way->next) == way->fin_seq - 1) {
		__sync_fetch_and_add(&way->fin, 1);
		return 1;
	}
	/* Bytes have come where the end should be: that was no FIN of this peer's. */
	if (after((__u32)volatile_read(way->next), way->fin_seq - 1))
		way->fin_due = 0;
	return 0;
}

/*
 * Remember what a valid segment says of its sender's own bytes; 1: its FIN is known from now on.
 * `segment->end` is behind the FIN.
 */
inlined int take_in(const struct segment *segment, struct splice_direction *way,
		    const struct splice_direction *back)
{
	__u32 limit = (__u32)volatile_read(way->limit), expected = expected_of(way, back);
	__u32 end = segment->end - (segment->flags & FIN);

	if (segment->has_timestamp && !after(segment->seq, expected) &&
	    !before(segment->tsval, way->recent)) {
		way->recent = segment->tsval;
		way->recent_s = way->heard_s; /* which was noted a moment ago, see note_heard */
	}
	advance(&way->last_end, segment->end);
	if ((segment->flags & FIN) && !volatile_read(way->fin) &&
	    !before(end, (__u32)volatile_read(way->next))) {
		way->fin_seq = segment->end;
		way->fin_due = 1;
	}
	/* What is behind the window the other end need not take. */
	if (after(end, limit))
		end = limit;
	if (!after(segment->seq, (__u32)volatile_read(way->next)))
		advance(&way->next, end);
	return settle_fin(way);
}

/*
 * Remember what the other end has acknowledged of this peer's bytes, in this peer's numbers; 1: the
 * FIN, or the acknowledgement of it, is known from now on.
 */
inlined int take_acknowledgement(struct splice_direction *way, __u32 acked)
{
	int tell_worker = 0;

	if (volatile_read(way->fin_due) && acked == way->fin_seq) {
		advance(&way->next, acked - 1);
		tell_worker = settle_fin(way);
		if (volatile_read(way->fin) && !way->fin_acked) {
			way->fin_acked = 1;
			tell_worker = 1;
		}
		return tell_worker;
	}
	advance(&way->next, acked);
	return settle_fin(way);
}

/* Whether more has come again than can have been lost. */
inlined int has_too_much_again(const struct splice_direction *way)
{
	return volatile_read(way->again) > way->bytes + MOST_AGAIN;
}

/* What a direction has carried, as `show` says it. It never gets less. */
inlined __u64 shown_bytes(const struct splice_direction *way)
{
	return has_too_much_again(way) ? way->again - MOST_AGAIN : way->bytes;
}

/* Bytes of a peer that have come, for `show`; 1: more than before. A FIN is no byte. */
inlined int count_bytes(struct splice_direction *way)
{
	__u64 seen = volatile_read(way->bytes), counted = seen;

	counted += (__s64)(__s32)((__u32)volatile_read(way->next) - (way->begin + (__u32)seen));
	if ((__s64)(counted - seen) <= 0)
		return 0;
	/*
	 * Not added, and not stored over what another processor has counted meanwhile: both know
	 * where the bytes end, and it may be further. If it is not, the next packet counts the
	 * rest.
	 */
	__sync_val_compare_and_swap(&way->bytes, seen, counted);
	return 1;
}
