/*
 * Initial numbers of a connection to a server: the sequence number after RFC 6528, 3, timestamps
 * after RFC 7323, 5.4. Both are the sum of a clock and a keyed hash of the two addresses and ports.
 * So a server cannot infer what another server gets; and for the same addresses and ports both only
 * increase: a server whose last connection from this port has ended accepts the next one.
 */
#pragma once

#include "splice.h"
#include "splice_packet.h"

#define NS_PER_MS 1000000

/* Each load has its own key (connecting.py). */
#ifndef SECRET_0
#define SECRET_0 0x31
#define SECRET_1 0x32
#define SECRET_2 0x33
#define SECRET_3 0x34
#endif

struct sip {
	__u64 v0, v1, v2, v3;
};

#define rotate_left(number, bits) ((number) << (bits) | (number) >> (64 - (bits)))

/* One SipRound. */
inlined void sip_round(struct sip *sip)
{
	sip->v0 += sip->v1;
	sip->v1 = rotate_left(sip->v1, 13) ^ sip->v0;
	sip->v0 = rotate_left(sip->v0, 32);
	sip->v2 += sip->v3;
	sip->v3 = rotate_left(sip->v3, 16) ^ sip->v2;
	sip->v0 += sip->v3;
	sip->v3 = rotate_left(sip->v3, 21) ^ sip->v0;
	sip->v2 += sip->v1;
	sip->v1 = rotate_left(sip->v1, 17) ^ sip->v2;
	sip->v2 = rotate_left(sip->v2, 32);
}

/* Absorb a word of the input: two rounds, as in SipHash-2-4. */
inlined void sip_absorb(struct sip *sip, __u64 word)
{
	sip->v3 ^= word;
	sip_round(sip);
	sip_round(sip);
	sip->v0 ^= word;
}

/*
 * SipHash-2-4 (Aumasson, Bernstein, 2012) of the addresses and ports of our packets to a server, in
 * wire order.
 */
inlined __u64 siphash_addresses(const __u32 *source, const __u32 *target, __u16 sport, __u16 dport)
{
	__u64 low = (__u64)SECRET_1 << 32 | SECRET_0, high = (__u64)SECRET_3 << 32 | SECRET_2;
	struct sip sip = {
		.v0 = low ^ 0x736f6d6570736575ULL,
		.v1 = high ^ 0x646f72616e646f6dULL,
		.v2 = low ^ 0x6c7967656e657261ULL,
		.v3 = high ^ 0x7465646279746573ULL,
	};

	sip_absorb(&sip, (__u64)source[1] << 32 | source[0]);
	sip_absorb(&sip, (__u64)source[3] << 32 | source[2]);
	sip_absorb(&sip, (__u64)target[1] << 32 | target[0]);
	sip_absorb(&sip, (__u64)target[3] << 32 | target[2]);
	/* 36 bytes of input: the last word has the length in its top byte. */
	sip_absorb(&sip, 36ULL << 56 | (__u32)dport << 16 | sport);
	sip.v2 ^= 0xff;
	sip_round(&sip);
	sip_round(&sip);
	sip_round(&sip);
	sip_round(&sip);
	return sip.v0 ^ sip.v1 ^ sip.v2 ^ sip.v3;
}
