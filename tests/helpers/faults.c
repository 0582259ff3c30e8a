/*
 * A bad network: packets are lost, come twice, or come late. Linked before everything else to the
 * ingress of an interface (tcx or clsact), by helpers/faults.py.
 *
 * A packet comes late by going to the end of its processor's queue (netif_rx) some more times: all
 * that waits there passes it.
 */
#include <uapi/linux/bpf.h>

#include "maps.h"

#define NEXT -1 /* TCX_NEXT */
#define DROP 2	/* TCX_DROP */

#define ETHERNET_BYTES 14
#define TCP	       6
#define JUDGED	       0x6a750000 /* in `mark`: with how many rounds are still to go */

enum action {
	PASS,
	LOSE,
	DUPLICATE,
	DELAY,
	MARK
};

struct faults {
	__u64 seed;
	/* Of 65,536 packets that match so many are lost, doubled, delayed, marked (ECN: CE). */
	__u32 lose, duplicate, delay, mark;
	__u32 rounds;
	/* Only packets with one of these TCP flags (0: all) and at least so many bytes of data. */
	__u32 flags;
	__u32 least_bytes;
	/* Which address they are from, its last 4 bytes (0: any). */
	__u32 source;
	/* Only packets that somebody on this host has marked: copies that it has made. */
	__u32 marked, padding;
	__u64 matched, lost, duplicated, delayed;
};

static inline __attribute__((always_inline)) __u64 mix(__u64 x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static inline __attribute__((always_inline)) int matches(struct __sk_buff *skb,
							 struct faults *faults)
{
	__u8 version, protocol, offset, flags;
	__u32 tcp_at, source;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &version, 1))
		return 0;
	tcp_at = version >> 4 == 4 ? 20 : 40;
	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES + (tcp_at == 20 ? 9 : 6), &protocol, 1) ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + (tcp_at == 20 ? 12 : 20), &source, 4) ||
	    protocol != TCP)
		return 0;
	tcp_at += ETHERNET_BYTES;
	if (bpf_skb_load_bytes(skb, tcp_at + 12, &offset, 1) ||
	    bpf_skb_load_bytes(skb, tcp_at + 13, &flags, 1))
		return 0;
	if (faults->flags && !(flags & faults->flags))
		return 0;
	if (faults->source && faults->source != source)
		return 0;
	if (faults->marked && !skb->mark)
		return 0;
	return skb->len >= tcp_at + (offset >> 4) * 4 + faults->least_bytes;
}

int judge(struct __sk_buff *skb)
{
	struct faults *faults;
	__u32 zero = 0, number, *exact, action = PASS;
	__u64 drawn, count;

	if ((skb->mark & 0xffff0000) == JUDGED) {
		if (skb->mark & 0xffff) {
			skb->mark--;
			return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
		}
		skb->mark = 0;
		return NEXT;
	}
	faults = map_lookup(MAP_FAULTS_FD, &zero);
	if (!faults || !matches(skb, faults))
		return NEXT;
	count = __sync_fetch_and_add(&faults->matched, 1) + 1;
	number = count;
	exact = map_lookup(MAP_EXACT_FD, &number);
	if (exact) {
		action = *exact;
	} else {
		drawn = mix(faults->seed ^ mix(count));
		if ((drawn & 0xffff) < faults->lose)
			action = LOSE;
		else if ((drawn >> 16 & 0xffff) < faults->duplicate)
			action = DUPLICATE;
		else if ((drawn >> 32 & 0xffff) < faults->delay)
			action = DELAY;
		else if ((drawn >> 48 & 0xffff) < faults->mark)
			action = MARK;
	}
	if (action == MARK)
		bpf_skb_ecn_set_ce(skb); /* if it is of a connection that knows what that is */
	if (action == LOSE) {
		__sync_fetch_and_add(&faults->lost, 1);
		return DROP;
	}
	if (action == DUPLICATE) {
		__sync_fetch_and_add(&faults->duplicated, 1);
		skb->mark = JUDGED;
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
		skb->mark = 0;
	}
	if (action == DELAY) {
		__sync_fetch_and_add(&faults->delayed, 1);
		skb->mark = JUDGED | (faults->rounds & 0xffff);
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	return NEXT;
}
