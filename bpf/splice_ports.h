/*
 * Which local ports a pair may have. Most packets of a host belong to no pair. This table is looked
 * up first, since it costs less than a lookup in `flows` (a hash of 36 bytes, in a table that is in
 * no processor cache).
 *
 * The map is an array of one element. No packet of a pair is missed: the keeper and express mark a
 * port before they make a flow with it, and only the keeper removes its marks, of ports that no
 * record has any more. All ports are marked until a keeper has started
 * (pyforwarder/datapath/splice/our_ports.py).
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/* The entry of a local port. */
inlined struct splice_port *port_entry(__be16 port)
{
	__u32 zero = 0, number = bpf_ntohs(port);
	struct splice_ports *ports = map_lookup(MAP_OUR_PORTS_FD, &zero);

	/* The byte swap hides the bound of 16 bits from the verifier. */
	barrier_var(number);
	number &= 0xffff;
	return ports ? &ports->port[number] : NULL;
}

/* Whether there may be a flow with this local port. */
inlined int may_have_flow(__be16 port)
{
	struct splice_port *found = port_entry(port);

	return !found || found->kept || found->opened;
}

/* Mark a local port; a program does so before it makes a flow with that port. */
inlined void mark_port(__be16 port)
{
	struct splice_port *found = port_entry(port);

	/* Write only once: a line that is only read stays in the caches of all processors. */
	if (found && !found->opened)
		WRITE_ONCE(found->opened, 1);
}
