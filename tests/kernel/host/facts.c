/*
 * The simplest redirector there can be, for tests of what the kernel does with it: no limit, no
 * counting of hands, and what happens to a packet without bytes is the test's choice.
 */
#include <uapi/linux/bpf.h>

#include "maps.h"

#define PASS_EMPTY     0
#define DROP_EMPTY     1
#define REDIRECT_EMPTY 2

/* Key: the source's cookie. */
struct route {
	__u64 target; /* cookie */
	__u64 empty;  /* what becomes of packets without bytes */
};

struct seen {
	__u64 packets;
	__u64 bytes;
};

int facts(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct route *route = map_lookup(MAP_ROUTES_FD, &cookie);
	__u32 zero = 0;
	struct seen *seen = map_lookup(MAP_SEEN_FD, &zero);
	__u64 target;

	if (!seen || !route)
		return SK_PASS;
	__sync_fetch_and_add(&seen->packets, 1);
	__sync_fetch_and_add(&seen->bytes, skb->len);
	if (!skb->len && route->empty == PASS_EMPTY)
		return SK_PASS;
	if (!skb->len && route->empty == DROP_EMPTY)
		return SK_DROP;
	target = route->target;
	return bpf_sk_redirect_hash(skb, map_pointer(MAP_SOCKETS_FD), &target, 0);
}
