/*
 * Which ports of ours a pair may have. Most packets of a host are of no pair: this is looked at
 * first, as it costs less than to look for a flow (a hash of 36 bytes, in a table that is in no
 * cache).
 *
 * The map is an array of one element. Nothing is missed: who makes a flow marks its port before
 * that, and only the keeper takes its marks back, of ports that no record has any more. All are
 * marked until a keeper has begun (pyforwarder/datapath/splice/our_ports.py).
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

inlined struct splice_port *port_of(__be16 port)
{
	__u32 zero = 0, number = bpf_ntohs(port);
	struct splice_ports *ports = map_lookup(MAP_OUR_PORTS_FD, &zero);

	/* It swaps the bytes, and then the verifier knows no bound. */
	hide(number);
	number &= 0xffff;
	return ports ? &ports->port[number] : NULL;
}

/* Whether there may be a flow with this port of ours. */
inlined int may_be_ours(__be16 port)
{
	struct splice_port *found = port_of(port);

	return !found || found->kept || found->opened;
}

/* Before a flow with this port of ours is made by a program. */
inlined void mark_port(__be16 port)
{
	struct splice_port *found = port_of(port);

	/* Once: what is only read stays in the caches of all processors. */
	if (found && !found->opened)
		*(volatile __u8 *)&found->opened = 1;
}
