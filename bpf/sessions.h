/*
 * What the programs for UDP sessions (splice_udp.h) and their keeper share. Data only;
 * pyforwarder/datapath/splice/session_abi.py mirrors it.
 *
 * The maps with these records outlive the daemon: a change of one of them needs a new
 * PF_SESSION_VERSION, too, so that the next daemon does not take the old ones for its own.
 */
#pragma once

#include "splice.h"

#define PF_SESSION_VERSION 2

enum pf_session_state {
	PF_SESSION_FREE = 0,
	PF_SESSION_PREPARED, /* the keeper is at it; the programs do nothing */
	PF_SESSION_ACTIVE,   /* datagrams are sent on, in each direction once it is `latched` */
};

/* `armed` of a pair's record: the worker has waited long enough for a quiet moment. */
#define PF_SESSION_NOW 2

/* What is done to datagrams of one sender: PF_UP of the client, PF_DOWN of the server. */
struct session_direction {
	struct splice_key from;
	__u32 source[4], target[4]; /* the new addresses, as in a key */
	__u16 sport, dport;
	__u32 interface;   /* where they go; 0: they came by `lo`, and are for this host */
	__u32 by;	   /* where they must come from; 0: anywhere */
	__u32 address_sum; /* what the new addresses add to a checksum */
	__u32 pseudo_sum;  /* of the old ones and the protocol's number */
	__u32 latched;	   /* not 0: they are sent on; until then they are for our socket */
	__u32 has_left;	   /* not 0: one that our socket sent on has left with the new addresses */
	__u64 passed;	   /* datagrams that went to our socket before it was latched */
	__u64 last_ns;	   /* of the sender's last datagram; a second old at most */
	__u64 bytes, packets; /* sent on */
};

struct session {
	struct session_direction way[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;			 /* of the session, as of a pair */
	__u32 state;			 /* enum pf_session_state */
	__u32 worker;
	__u32 slot;	 /* into the map `pairs`, where they are counted, too */
	__u32 last_slot; /* before it had none, in the table that is pinned */
	__u32 family;	 /* 4 or 6 */
	__u32 mark;	 /* while it is prepared: SO_PRIORITY of the sockets that must get it */
	__u32 owner;	 /* uid of our socket, by which rules may choose a route */
	__u32 group;	 /* and its gid */
	__u64 began_ns;	 /* its silence counts from here at the earliest */
	__u64 idle_ns;	 /* after so long without a datagram of either sender it is over */
	__u64 reserved;	 /* no cache line is of two sessions */
};
