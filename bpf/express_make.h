/*
 * A packet becomes another one: other headers, and the bytes that were saved or none. So a client's
 * becomes a SYN to the server, and the server's answer the client's first bytes.
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
#define TCP_WORD(v6)	 (IP_BYTES(v6) / 4) /* where TCP's header begins among them */

/* A packet that is made out of another one; of each processor, the stack is too small. */
struct made {
	/* Headers of IP and TCP, with options. */
	__be32 old[PF_HEADERS_WORDS], new[PF_HEADERS_WORDS];
	__u32 source[4], target[4];
	__u32 seq, ack;
	__u16 sport, dport, window; /* the ports in wire order */
	__u8 flags, option_words;
	__be32 option[5];
	__u32 bytes; /* of what is saved: all of it, or 0 */
	__u32 sum;   /* what they add to a checksum */
	__u32 known; /* enum sum: of the packet's checksum */
	/* What the server's SYN-ACK says. */
	__u32 at, server_mss, server_tsval;
	__u8 has_timestamps, has_scale, scale, padding;
	__u16 urgent, more_padding;
};

/* 1..most, a power of two, in the verifier's words. The caller has looked. */
inlined __u32 at_least_one(__u32 bytes, __u32 most)
{
	bytes--;
	hide(bytes);
	bytes &= most - 1;
	return bytes + 1;
}

/* Nothing is said of the new packet; of the old one what is known of its checksum (enum sum). */
inlined struct made *to_make(__u32 known)
{
	__u32 zero = 0;
	struct made *made = map_lookup(MAP_EXPRESS_MADE_FD, &zero);

	if (!made)
		return NULL;
	/* `make` writes the headers before it reads them. */
	__builtin_memset((void *)made->source, 0,
			 sizeof(*made) - sizeof(made->old) - sizeof(made->new));
	made->known = known;
	return made;
}

inlined void to_server(struct made *made, const struct splice *splice)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		made->source[i] = splice->way[PF_UP].source[i];
		made->target[i] = splice->way[PF_UP].target[i];
	}
	made->sport = splice->way[PF_UP].sport;
	made->dport = splice->way[PF_UP].dport;
}

inlined void from_client(struct made *made, const struct splice *splice,
			 const struct express_ask *ask)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		made->source[i] = splice->way[PF_UP].from.source[i];
		made->target[i] = splice->way[PF_UP].from.target[i];
	}
	made->sport = splice->way[PF_UP].from.sport;
	made->dport = splice->way[PF_UP].from.dport;
	made->seq = ask->c0 + 1;
	made->ack = ask->k0 + 1;
}

/* So many bytes of options of the old packet, 40 at most; not 0: they are not there. */
inlined int load_options(struct __sk_buff *skb, struct made *made, __u32 bytes, const int v6)
{
	__be32 *options = made->old + TCP_WORD(v6) + 5;

	/* Who reads beyond the end reads zeros. */
	__builtin_memset(options, 0, 44);
	bytes = at_least_one(bytes, 64);
	return bpf_skb_load_bytes(skb, OPTIONS_AT(v6), options, bytes > 40 ? 40 : bytes);
}

/*
 * The packet becomes the other one, without the saved bytes, for which there is room then. Right
 * for CHECKSUM_PARTIAL, too: a sum in the packet follows by what changes. Not 0: it failed, and
 * the packet may be anything.
 */
inlined int make(struct __sk_buff *skb, struct made *made, const int v6)
{
	__be32 *old = made->old + TCP_WORD(v6), *new = made->new + TCP_WORD(v6);
	__u32 header, bytes = made->bytes, old_bytes, new_bytes;
	__u64 sum = 0, ip_sum = 0, pseudo, whole;
	__u16 old_checksum, checksum;
	int i;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, made->old, IP_BYTES(v6) + 20))
		return -1;
	old_checksum = old[4] & 0xffff; /* as it lies in memory */
	header = 20 + (made->option_words & 7) * 4;
	if (header > 40 || bytes > PF_EXPRESS_SAVED)
		return -1;
	new[0] = (__u32)made->sport | (__u32)made->dport << 16;
	new[1] = bpf_htonl(made->seq);
	new[2] = bpf_htonl(made->ack);
	new[3] = bpf_htonl(header << 26 | (__u32)made->flags << 16 | made->window);
	new[4] = bpf_htonl(made->urgent); /* and no checksum so far */
#pragma unroll
	for (i = 0; i < 5; i++)
		new[5 + i] = i < made->option_words ? made->option[i] : 0;

	new_bytes = header + bytes;
	if (v6) {
		whole = pseudo = 0;
		old_bytes = bpf_ntohl(made->old[1]) >> 16;
		made->new[0] = bpf_htonl(0x60000000);
		made->new[1] = bpf_htonl(new_bytes << 16 | PROTOCOL_TCP << 8 | HOPS);
#pragma unroll
		for (i = 0; i < 4; i++) {
			made->new[2 + i] = made->source[i];
			made->new[6 + i] = made->target[i];
			whole += (__u64)made->source[i] + made->target[i];
			pseudo += (__u64)(__u32)~made->old[2 + i] + (__u32)~made->old[6 + i];
		}
	} else {
		old_bytes = (bpf_ntohl(made->old[0]) & 0xffff) - IP_BYTES(0);
		made->new[0] = bpf_htonl(0x45000000 | (IP_BYTES(0) + new_bytes));
		made->new[1] = bpf_htonl(0x00004000); /* never in pieces */
		made->new[2] = bpf_htonl(HOPS << 24 | PROTOCOL_TCP << 16);
		made->new[3] = made->source[3];
		made->new[4] = made->target[3];
		ip_sum = (__u64)made->new[0] + made->new[1] + made->new[2] + made->new[3] +
			 made->new[4];
		made->new[2] |= (__u32)(__u16)~fold(ip_sum) << 16;
		whole = (__u64)made->new[3] + made->new[4];
		pseudo = (__u64)(__u32)~made->old[3] + (__u32)~made->old[4];
	}
	whole += bpf_htons(new_bytes & 0xffff);
	pseudo += whole + (__u16)~bpf_htons(old_bytes & 0xffff);

	/* As in `rewrite` (splice_rewrite.h). */
	if (made->known == PF_SUM_PARTIAL) {
		checksum = fold((__u64)old_checksum + fold(pseudo));
	} else {
		/* Anew: what else the old packet had in it need not be read for that. */
		whole += bpf_htons(PROTOCOL_TCP) + (__u64)made->sum;
		whole += (__u32)bpf_csum_diff(NULL, 0, new, header & 63, 0);
		checksum = ~fold(whole);
		if (made->known != PF_SUM_KNOWN) {
			/* What the kernel has to be told, so that it comes to the same. */
			sum = (__u64)(__u16)~checksum + old_checksum + (__u16)~fold(pseudo);
			checksum = old_checksum;
		}
	}
	new[4] |= checksum;
	if (bpf_skb_change_tail(skb, TCP_AT(v6) + new_bytes, 0))
		return -1;
	if (header == 40 ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 40, 0)
	    : header == 32
		    ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 32, 0)
		    : bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 20, 0))
		return -1;
	if (made->known != PF_SUM_OTHER)
		return 0;
	if (bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0))
		return -1;
	replace_pseudo(skb, TCP_AT(v6) + 16, fold(pseudo), v6);
	return 0;
}

/* Behind `make`: the bytes that were saved, as many as it has made room for. */
inlined int store_saved(struct __sk_buff *skb, struct express_ask *ask, const struct made *made,
			const int v6)
{
	return bpf_skb_store_bytes(skb, OPTIONS_AT(v6) + (made->option_words & 7) * 4, ask->bytes,
				   at_least_one(made->bytes, PF_EXPRESS_SAVED), 0);
}

/* Likewise those behind the first packet's. */
inlined int store_rest(struct __sk_buff *skb, struct express_ask *ask, const struct made *made,
		       const int v6)
{
	__u32 from = ask->segment;

	hide(from);
	from &= PF_EXPRESS_SAVED / 2 - 1;
	return bpf_skb_store_bytes(skb, OPTIONS_AT(v6) + (made->option_words & 7) * 4,
				   ask->bytes + from,
				   at_least_one(made->bytes, PF_EXPRESS_SAVED / 2), 0);
}

/* What the saved bytes add to a checksum; those behind the end, up to a whole word, are 0. */
inlined __u32 sum_of_saved(struct express_ask *ask, __u32 bytes)
{
	__u32 sum = 0, at, left, i;

	bytes = (bytes + 3) & ~3;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_SAVED / 512; i++) {
		at = i * 512;
		if (at >= bytes)
			break;
		left = bytes - at;
		hide(left);
		if (left > 512)
			left = 512;
		hide(left);
		left &= 1023 & ~3;
		if (left > 512)
			left = 512;
		sum = (__u32)bpf_csum_diff(NULL, 0, (void *)ask->bytes + at, left, sum);
	}
	return fold(sum);
}
