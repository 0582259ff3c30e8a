/*
 * Choice of an upstream's server: the next in turn, or the one that pyforwarder/core/upstreams.py
 * draws for the client's address.
 */
#pragma once

#include "express_choice.h"
#include "maps.h"
#include "splice_packet.h"

#define ROTATED(number, bits) ((number) >> (bits) | (number) << (64 - (bits)))
/* All other words of the message are 0. */
#define WORD(n) ((n) == 0 ? first : (n) == 1 ? second : 0)
#define MIX(a, b, c, d, x, y)           \
	do {                            \
		a += b + WORD(x);       \
		d = ROTATED(d ^ a, 32); \
		c += d;                 \
		b = ROTATED(b ^ c, 24); \
		a += b + WORD(y);       \
		d = ROTATED(d ^ a, 16); \
		c += d;                 \
		b = ROTATED(b ^ c, 63); \
	} while (0)
#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
	do {                                                                        \
		MIX(v0, v4, v8, v12, s0, s1);                                       \
		MIX(v1, v5, v9, v13, s2, s3);                                       \
		MIX(v2, v6, v10, v14, s4, s5);                                      \
		MIX(v3, v7, v11, v15, s6, s7);                                      \
		MIX(v0, v5, v10, v15, s8, s9);                                      \
		MIX(v1, v6, v11, v12, s10, s11);                                    \
		MIX(v2, v7, v8, v13, s12, s13);                                     \
		MIX(v3, v4, v9, v14, s14, s15);                                     \
	} while (0)

#define IV0 0x6a09e667f3bcc908ULL
#define IV1 0xbb67ae8584caa73bULL
#define IV2 0x3c6ef372fe94f82bULL
#define IV3 0xa54ff53a5f1d36f1ULL
#define IV4 0x510e527fade682d1ULL
#define IV5 0x9b05688c2b3e6c1fULL
#define IV6 0x1f83d9abfb41bd6bULL
#define IV7 0x5be0cd19137e2179ULL

/*
 * BLAKE2b (RFC 7693) of an address of `bytes` bytes, 16 at most: a digest of 8 bytes, personalized
 * with "client", as a number in network byte order.
 */
inlined __u64 hash_client(__u64 first, __u64 second, __u32 bytes)
{
	/* Parameters: a digest of 8 bytes, no key, no tree; and the personalization. */
	const __u64 h0 = IV0 ^ 0x01010008, h6 = IV6 ^ 0x0000746e65696c63ULL;
	__u64 v0 = h0, v1 = IV1, v2 = IV2, v3 = IV3, v4 = IV4, v5 = IV5, v6 = h6, v7 = IV7;
	__u64 v8 = IV0, v9 = IV1, v10 = IV2, v11 = IV3, v12 = IV4 ^ bytes, v13 = IV5;
	__u64 v14 = ~IV6, v15 = IV7;

	ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
	ROUND(11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4);
	ROUND(7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8);
	ROUND(9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13);
	ROUND(2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9);
	ROUND(12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11);
	ROUND(13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10);
	ROUND(6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5);
	ROUND(10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0);
	ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
	return __builtin_bswap64(h0 ^ v0 ^ v8);
}

/* Map a number to 1..2^53, uniformly: the finalizer of SplitMix64 (Steele 2014). */
inlined __u64 draw(__u64 number)
{
	number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9ULL;
	number = (number ^ number >> 27) * 0x94d049bb133111ebULL;
	number ^= number >> 31;
	return (number >> 11) + 1;
}

/*
 * Shift the first 2^power bits out if they are 0; returns how many. Computed from a sign bit: a
 * branch would multiply the verifier's paths.
 */
inlined __u32 shift_out(__u64 *number, __u32 power)
{
	__u32 bits = ((*number >> (64 - (1 << power))) - 1) >> 63 << power;

	*number <<= bits;
	return bits;
}

/* The absolute binary logarithm of `number` / 2^53, in units of 2^-32. */
inlined __u64 logarithm(const struct express_logs *logs, __u64 number)
{
	__u32 zeros = 0, step;
	__u64 mantissa = number, below, above, rest;

	/* __builtin_clzll makes the compiler in bcc use all memory. */
	zeros += shift_out(&mantissa, 5);
	zeros += shift_out(&mantissa, 4);
	zeros += shift_out(&mantissa, 3);
	zeros += shift_out(&mantissa, 2);
	zeros += shift_out(&mantissa, 1);
	zeros += shift_out(&mantissa, 0);
	step = mantissa >> 55;
	barrier_var(step);
	step &= PF_EXPRESS_LOG_STEPS - 1;
	below = logs->of[step];
	above = logs->of[step + 1];
	rest = mantissa >> 23 & 0xffffffff;
	below += (__u64)(63 - zeros) << 32;
	return (53ULL << 32) - (below + ((above - logs->of[step]) * rest >> 32));
}

/*
 * The index of the chosen target. 0: userspace must choose, because there is no choice, or it is
 * not certain. Of two servers whose scores are closer than the error of the logarithms here, only
 * userspace can tell which is lower.
 */
inlined __u32 choose(__u32 number, const __u32 *client, int v6)
{
	struct express_choice *choice = map_lookup(MAP_EXPRESS_CHOICES_FD, &number);
	__u32 zero = 0, i, count, target = 0, weight;
	const struct express_logs *logs = map_lookup(MAP_EXPRESS_LOGS_FD, &zero);
	__u64 turn, hash, log, low, high, least = ~0ULL, least_high = ~0ULL, second = ~0ULL;

	if (!choice || !logs)
		return 0;
	count = choice->count;
	if (choice->kind == PF_EXPRESS_IN_TURN) {
		if (!count)
			return 0; /* never */
		turn = __sync_fetch_and_add(&choice->turn, 1) % count;
		barrier_var(turn);
		turn &= PF_EXPRESS_TURNS - 1;
		return choice->in_turn[turn];
	}
	if (choice->kind != PF_EXPRESS_BY_CLIENT)
		return 0;
	/* An IPv4-mapped address: userspace would hash the IPv4 address. No packet has one. */
	if (v6 && !(client[0] | client[1]) && client[2] == bpf_htonl(0xffff))
		return 0;
	hash = hash_client(v6 ? (__u64)client[1] << 32 | client[0] : client[3],
			   v6 ? (__u64)client[3] << 32 | client[2] : 0, v6 ? 16 : 4);
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_SERVERS; i++) {
		if (i >= READ_ONCE(choice->count))
			break;
		weight = choice->drawing[i].weight;
		log = logarithm(logs, draw(hash ^ choice->drawing[i].seed));
		high = ((log + PF_EXPRESS_LOG_ERROR) << 16) / weight + 1;
		low = log > PF_EXPRESS_LOG_ERROR ? ((log - PF_EXPRESS_LOG_ERROR) << 16) / weight
						 : 0;
		if (low < least) {
			second = least;
			least = low;
			least_high = high;
			target = choice->drawing[i].target;
		} else if (low < second) {
			second = low;
		}
	}
	return least_high < second ? target : 0;
}
