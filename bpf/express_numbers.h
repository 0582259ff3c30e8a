/*
 * With which numbers a connection to a server begins: RFC 6528, 3 for the first sequence number,
 * RFC 7323, 5.4 for timestamps. Both are a clock, and what nobody knows who has not the secret: of
 * the two addresses and the two ports. So a server knows nothing of what another one is told, and
 * of the same four both rise: a server whose last connection from this port is over takes the next.
 */
#pragma once

#include "splice.h"
#include "splice_packet.h"

#define NS_PER_MS 1000000

/* Each load has its own (connecting.py). */
#ifndef SECRET_0
#define SECRET_0 0x31
#define SECRET_1 0x32
#define SECRET_2 0x33
#define SECRET_3 0x34
#endif

struct sip {
	__u64 v0, v1, v2, v3;
};

#define rotated(number, bits) ((number) << (bits) | (number) >> (64 - (bits)))

inlined void sip_round(struct sip *sip)
{
	sip->v0 += sip->v1;
	sip->v1 = rotated(sip->v1, 13) ^ sip->v0;
	sip->v0 = rotated(sip->v0, 32);
	sip->v2 += sip->v3;
	sip->v3 = rotated(sip->v3, 16) ^ sip->v2;
	sip->v0 += sip->v3;
	sip->v3 = rotated(sip->v3, 21) ^ sip->v0;
	sip->v2 += sip->v1;
	sip->v1 = rotated(sip->v1, 17) ^ sip->v2;
	sip->v2 = rotated(sip->v2, 32);
}

inlined void sip_take(struct sip *sip, __u64 word)
{
	sip->v3 ^= word;
	sip_round(sip);
	sip_round(sip);
	sip->v0 ^= word;
}

/*
 * SipHash-2-4 (Aumasson, Bernstein, 2012) of addresses and ports as they are in wire order: of our
 * packets to a server.
 */
inlined __u64 keyed(const __u32 *source, const __u32 *target, __u16 sport, __u16 dport)
{
	__u64 low = (__u64)SECRET_1 << 32 | SECRET_0, high = (__u64)SECRET_3 << 32 | SECRET_2;
	struct sip sip = {
		.v0 = low ^ 0x736f6d6570736575ULL,
		.v1 = high ^ 0x646f72616e646f6dULL,
		.v2 = low ^ 0x6c7967656e657261ULL,
		.v3 = high ^ 0x7465646279746573ULL,
	};

	sip_take(&sip, (__u64)source[1] << 32 | source[0]);
	sip_take(&sip, (__u64)source[3] << 32 | source[2]);
	sip_take(&sip, (__u64)target[1] << 32 | target[0]);
	sip_take(&sip, (__u64)target[3] << 32 | target[2]);
	/* 36 bytes: the last word has their number on top. */
	sip_take(&sip, 36ULL << 56 | (__u32)dport << 16 | sport);
	sip.v2 ^= 0xff;
	sip_round(&sip);
	sip_round(&sip);
	sip_round(&sip);
	sip_round(&sip);
	return sip.v0 ^ sip.v1 ^ sip.v2 ^ sip.v3;
}
