/*
 * Records and numbers that the programs for UDP sessions (splice_udp.h) share with their keeper.
 * Data only; pyforwarder/datapath/splice/session_abi.py mirrors it.
 *
 * The maps with these records outlive the daemon: a changed record needs a new PF_SESSION_VERSION,
 * so that the next daemon does not read the old records as its own.
 */
#pragma once

#include "splice.h"

#define PF_SESSION_VERSION 2

enum pf_session_state {
	PF_SESSION_FREE = 0,
	PF_SESSION_PREPARED, /* the keeper is writing it; datagrams pass to the stack */
	PF_SESSION_ACTIVE,   /* datagrams are forwarded, in each direction once it is `latched` */
};

/* `armed` of a pair's record: the worker has waited long enough for an empty queue. */
#define PF_SESSION_NOW 2

/* How datagrams of one sender are rewritten: PF_UP of the client, PF_DOWN of the server. */
struct session_direction {
	struct splice_key from;
	__u32 source[4], target[4]; /* the addresses that datagrams get, as in a key */
	__u16 sport, dport;
	__u32 interface; /* by which they leave; 0: both ends are on `lo`, they go up the stack */
	__u32 from_interface; /* by which they must arrive; 0: by any */
	__u32 address_sum;    /* what the changed addresses add to a checksum */
	__u32 pseudo_sum;     /* sum of the old addresses and the protocol number */
	__u32 latched;	      /* not 0: they are forwarded; until then they pass to our socket */
	__u32 has_left;	      /* not 0: a datagram of our socket has left with these addresses */
	__u64 passed;  /* datagrams that passed to our socket before the direction was latched */
	__u64 last_ns; /* time of the sender's last datagram; up to a second old */
	__u64 bytes, packets; /* forwarded */
};

struct session {
	struct session_direction direction[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;			       /* of the session, as of a pair */
	__u32 state;			       /* enum pf_session_state */
	__u32 worker;
	__u32 slot;	 /* in the map `pairs`, where datagrams are counted, too */
	__u32 last_slot; /* the last one that it had, in the pinned pair table */
	__u32 family;	 /* 4 or 6 */
	__u32 mark; /* while PREPARED: SO_PRIORITY of the sockets that must receive its datagrams */
	__u32 owner;	/* uid of our sockets: rules may choose their route by that */
	__u32 group;	/* and their gid */
	__u64 began_ns; /* idle time counts from here at the earliest */
	__u64 idle_ns;	/* after so long without a datagram of either sender the session is over */
	__u64 reserved; /* so that no two sessions share a cache line */
};
