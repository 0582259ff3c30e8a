/*
 * What a packet says, if a host would take it.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "splice.h"
#include "splice_packet.h"
#include "splice_valid.h"

/* What was read of a packet. */
struct seen {
	__u32 seq, ack, header, bytes, tsval, tsecr, window;
	__u32 sum; /* enum sum */
	__u8 flags, has_timestamp;
};

inlined __u64 sum_of_address(const __u32 *address, const int v6)
{
	if (!v6)
		return address[3];
	return (__u64)address[0] + address[1] + address[2] + address[3];
}

/* The addresses and ports of a TCP packet; not 0: it is none that is looked at. */
inlined int take_key(struct __sk_buff *skb, struct splice_key *key, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_AT(v6);

	if (data + HEADERS_BYTES(v6) > data_end)
		return -1; /* never: `ingress` has seen to it */
	if (v6 ? six->next != PROTOCOL_TCP
	       : four->version != 0x45 || four->protocol != PROTOCOL_TCP ||
			    (four->fragment & bpf_htons(0x3fff)))
		return -1;
	take_addresses(key->source, key->target, data + ETHERNET_BYTES, v6);
	key->sport = tcp->sport;
	key->dport = tcp->dport;
	return 0;
}

/*
 * Read a packet whose addresses are known; not 0: it is not whole, or not as a host would take it.
 * Pointers to it are void afterwards.
 */
inlined int look_at(struct __sk_buff *skb, const struct splice_key *key, struct seen *seen,
		    const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_AT(v6);
	__u32 *word, total, header;

	if (skb->pkt_type != HOST_PACKET || skb->vlan_present)
		return -1;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	total = v6 ? bpf_ntohs(six->payload_bytes) + IP_BYTES(1) : bpf_ntohs(four->total_bytes);
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (skb->gso_size && total != skb->len - ETHERNET_BYTES) ||
	    (!v6 && !is_whole_header(data + ETHERNET_BYTES)))
		return -1;
	seen->sum = judge_sum(skb, TCP_AT(v6), TCP_AT(v6) + 16, total - IP_BYTES(v6),
			      sum_of_address(key->source, v6) + sum_of_address(key->target, v6) +
				      bpf_htons(PROTOCOL_TCP) +
				      bpf_htons((total - IP_BYTES(v6)) & 0xffff));
	if (seen->sum == PF_SUM_WRONG)
		return -1;
	if (bpf_skb_pull_data(skb, TCP_AT(v6) + header))
		return -1;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	word = data + TCP_AT(v6);
	seen->seq = bpf_ntohl(word[1]);
	seen->ack = bpf_ntohl(word[2]);
	seen->flags = (bpf_ntohl(word[3]) >> 16) & 0xff;
	seen->window = bpf_ntohl(word[3]) & 0xffff;
	seen->header = header;
	seen->bytes = total - IP_BYTES(v6) - header;
	seen->has_timestamp = 0;
	seen->tsval = seen->tsecr = 0;
	if (header >= 32 && (void *)(word + 8) <= data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		seen->has_timestamp = 1;
		seen->tsval = bpf_ntohl(word[6]);
		seen->tsecr = bpf_ntohl(word[7]);
	}
	return 0;
}
