/*
 * What our own socket hears of a pair that has begun: about the tail, and when it is to answer.
 */
#pragma once

#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_verdicts.h"

/*
 * What a packet says about the tail is for our own socket. It gets the packet as one whose bytes
 * have come before, with the number that it expects next behind them, however many bytes have
 * passed it by since. If `again` they have come before indeed, and it answers that.
 */
inlined int give_to_our_socket(struct __sk_buff *skb, struct splice_direction *way, __u32 header,
			       __u32 bytes, int again, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u32 *word = data + TCP_AT(v6);
	__u32 known = (__u32)volatile_read(way->sent);
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	/*
	 * What our socket has sent, and no more: an edge behind that a firewall of this host takes
	 * for an acknowledgement of bytes that it has not seen (nf_conntrack_proto_tcp.c,
	 * tcp_in_window), and our socket would never hear that its bytes come.
	 */
	if (after(known, way->tail))
		known = way->tail;
	if (!again)
		put(&word[1], bpf_htonl(volatile_read(way->ours) - bytes), &sum);
	if (after(bpf_ntohl(word[2]), way->tail))
		put(&word[2], bpf_htonl(way->tail), &sum);
	put(&word[3], word[3] & ~bpf_htonl(FIN_OF_TCP | SYN_OF_TCP | RST_OF_TCP | URG_OF_TCP),
	    &sum);
	if (header > 32 && (void *)(word + 6) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD))
		clip_edges(word + 8, data_end, header - 32, known, &sum);
	else if (header > 20)
		clip_edges(word + 5, data_end, header - 20, known, &sum);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}

/*
 * Our own socket answers (RFC 5961, 3 and 4: a challenge acknowledgement): a peer without a
 * connection answers that with a reset of the right number, and a peer that has one ignores it. A
 * SYN is what our socket answers so, at any number; a mute socket takes nothing else.
 *
 * To the server our socket has connected, so there it must be a SYN-ACK: a firewall of this host
 * (nf_conntrack_proto_tcp.c, tcp_conntracks) takes a SYN of the end that was connected to for
 * invalid.
 */
inlined int challenge(struct __sk_buff *skb, struct splice_direction *way, __u32 direction,
		      const struct splice_key *from, const int v6)
{
	void *data, *data_end;
	__u32 *word, flags = direction == PF_UP ? SYN_OF_TCP : SYN_OF_TCP | ACK_OF_TCP;
	__u64 sum = 0;

	if (!has_socket(skb, from, v6))
		return DROP; /* it will be there when this is sent again */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	word = data + TCP_AT(v6);
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	way->answer = PF_ANSWER;
	put(&word[2], 0, &sum);
	put(&word[3], (word[3] & ~bpf_htonl(FLAGS_OF_TCP)) | bpf_htonl(flags), &sum);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}
