// SPDX-License-Identifier: MIT
/*
 * The modes of load.c for UDP.
 *
 * One server's socket, and a client's for each session.  Nobody tells a sender of datagrams how
 * many may be under way: the generator, which has both ends, lets no more be than a socket's
 * default buffer takes of any size, so that what is measured is a rate and not a loss.  What is
 * lost all the same is counted.
 */
#pragma once

#define WINDOW	       64   /* datagrams under way, of all sessions */
#define BATCH	       16   /* what one system call sends or receives */
#define MOST_DATAGRAM  1500 /* bytes */
#define TRY_AGAIN_MS   200  /* a datagram of a new session may be lost */
#define LOST_AFTER_MS  20   /* nothing has come for so long: what is under way is lost */
#define PACES_PER_S    1000
#define SERVER_BUFFERS (8 << 20)

static int *datagram_clients;
static int datagram_server = -1, wake_sender = -1;
static atomic_uint_fast64_t datagrams_sent, datagrams_received, datagrams_lost;
static atomic_bool sender_waits;

static void take_datagram_places(void)
{
	struct sockaddr_in at = address_of(opt.server_ip, 1, opt.server_port, 0);
	int server_ns_fd = open_namespace(opt.server_ns), room = SERVER_BUFFERS;

	client_ns_fd = open_namespace(opt.client_ns);
	enter_namespace(server_ns_fd);
	datagram_server = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (datagram_server < 0)
		die_errno("socket");
	if (setsockopt(datagram_server, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)))
		die_errno("SO_RCVBUFFORCE");
	/* Not any address: an answer must come from the one that was asked. */
	if (bind(datagram_server, (struct sockaddr *)&at, sizeof(at)))
		die_errno("the server's port");
	enter_namespace(client_ns_fd);
}

static bool is_readable(int fd, int timeout_ms)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };

	return poll(&poll_fd, 1, timeout_ms) > 0;
}

/* One datagram there and back, tried again until it comes. */
static void prove_session(int fd, int number)
{
	char sent[MOST_DATAGRAM] = { 0 }, got[MOST_DATAGRAM];
	uint64_t until_ns = now_ns() + PATIENCE_S * NS_PER_S;
	struct sockaddr_in source;
	socklen_t size;

	snprintf(sent, sizeof(sent), "pfb %011d %llu", number, (unsigned long long)until_ns);
	while (now_ns() < until_ns) {
		if (send(fd, sent, MESSAGE_BYTES, 0) < 0 && errno != ECONNREFUSED)
			die_errno("send");
		while (is_readable(datagram_server, TRY_AGAIN_MS)) {
			size = sizeof(source);
			if (recvfrom(datagram_server, got, sizeof(got), 0,
				     (struct sockaddr *)&source, &size) != MESSAGE_BYTES ||
			    memcmp(sent, got, MESSAGE_BYTES))
				continue; /* an earlier one, which was late */
			sendto(datagram_server, got, MESSAGE_BYTES, 0, (struct sockaddr *)&source,
			       size);
			while (is_readable(fd, TRY_AGAIN_MS))
				if (recv(fd, got, sizeof(got), 0) == MESSAGE_BYTES &&
				    !memcmp(sent, got, MESSAGE_BYTES))
					return;
			break;
		}
	}
	die("session %d of %d: no datagram comes back", number, opt.pairs);
}

/*
 * Each proven by round trips.  With `waits` they go on talking, one after the other, until the
 * caller has seen that all of them are where they stay: a forwarder may take its time for that.
 */
static void make_sessions(void)
{
	struct sockaddr_in to = address_of(opt.to_ip, 1, opt.to_port, 0);

	datagram_clients = reserve((size_t)opt.pairs, sizeof(*datagram_clients));
	for (int i = 0; i < opt.pairs; i++) {
		struct sockaddr_in source =
			address_of(opt.source_ip, opt.source_count, 0, (uint64_t)i);
		int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			die_errno("socket");
		if (opt.source_ip && bind(fd, (struct sockaddr *)&source, sizeof(source)))
			die_errno("a client's source address");
		if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
			die_errno("connect");
		datagram_clients[i] = fd;
		for (int trip = 0; trip < opt.trips; trip++)
			prove_session(fd, i);
	}
	if (!opt.waits)
		return;
	printf("{\"sessions\": %d}\n", opt.pairs);
	fflush(stdout);
	for (int i = 0; !is_readable(STDIN_FILENO, 0); i = (i + 1) % opt.pairs)
		prove_session(datagram_clients[i], i);
	wait_for_caller();
	for (int i = 0; i < opt.pairs; i++)
		prove_session(datagram_clients[i], i);
	printf("{\"settled\": %d}\n", opt.pairs);
	fflush(stdout);
}

/* ---- mode udp_rtt: one datagram back and forth ---------------------------------------------- */

static void *echo_datagrams(void *unused)
{
	char message[MOST_DATAGRAM];
	struct sockaddr_in source;

	(void)unused;
	stay_on_cpu(opt.server_cpu);
	for (;;) {
		socklen_t size = sizeof(source);
		ssize_t got = recvfrom(datagram_server, message, sizeof(message), 0,
				       (struct sockaddr *)&source, &size);

		if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
			if (atomic_load(&stop))
				return NULL;
			continue;
		}
		if (got < 0)
			die_errno("the server's socket");
		if (sendto(datagram_server, message, (size_t)got, 0, (struct sockaddr *)&source,
			   size) < 0)
			die_errno("the server's answer");
	}
}

static void run_udp_rtt(void)
{
	struct samples samples = { 0 };
	char message[MOST_DATAGRAM] = "ping";
	struct timeval look = { .tv_usec = LOST_AFTER_MS * 1000 };
	uint64_t from_ns, until_ns, begin, end;
	pthread_t server;
	int fd;

	take_datagram_places();
	make_sessions();
	fd = datagram_clients[0];
	set_patience(fd);
	/* It looks whether this is over: an empty datagram would not pass every forwarder. */
	if (setsockopt(datagram_server, SOL_SOCKET, SO_RCVTIMEO, &look, sizeof(look)))
		die_errno("setsockopt");
	server = start(echo_datagrams, NULL);
	stay_on_cpu(opt.client_cpu);
	from_ns = now_ns() + (uint64_t)(opt.warm_up_s * NS_PER_S);
	until_ns = from_ns + (uint64_t)(opt.seconds * NS_PER_S);
	for (begin = now_ns(); begin < until_ns; begin = end) {
		if (send(fd, message, (size_t)opt.datagram_bytes, 0) < 0)
			die_errno("send");
		if (recv(fd, message, sizeof(message), 0) != opt.datagram_bytes)
			die("a datagram did not come back");
		end = now_ns();
		if (begin >= from_ns)
			add_sample(&samples, end - begin);
	}
	atomic_store(&stop, true);
	pthread_join(server, NULL);
	printf("{\"trips_per_s\": %.1f, ", (double)samples.count / opt.seconds);
	print_samples(&samples, "");
	printf("}\n");
}

/* ---- mode udp_rate: datagrams from clients to the server, as fast as they go or paced ---------
 */

static uint64_t under_way(void)
{
	return atomic_load(&datagrams_sent) - atomic_load(&datagrams_lost) -
	       atomic_load(&datagrams_received);
}

/* Until there is room for a batch, or what is under way is lost. */
static void wait_for_room(void)
{
	uint64_t before, count;

	while (under_way() > WINDOW - BATCH && !atomic_load(&stop)) {
		before = atomic_load(&datagrams_received);
		atomic_store(&sender_waits, true);
		if (under_way() <= WINDOW - BATCH)
			break;
		if (is_readable(wake_sender, LOST_AFTER_MS)) {
			if (read(wake_sender, &count, sizeof(count)) < 0)
				die_errno("eventfd");
		} else if (atomic_load(&datagrams_received) == before) {
			atomic_fetch_add(&datagrams_lost, under_way());
		}
	}
}

static void send_batch(int fd, unsigned count)
{
	static char data[MOST_DATAGRAM];
	struct iovec part = { .iov_base = data, .iov_len = (size_t)opt.datagram_bytes };
	struct mmsghdr messages[BATCH];

	for (unsigned i = 0; i < count; i++)
		messages[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = &part, .msg_iovlen = 1 } };
	for (unsigned done = 0; done < count;) {
		int sent = sendmmsg(fd, messages + done, count - done, 0);

		if (sent < 0)
			die_errno("send");
		atomic_fetch_add(&datagrams_sent, (uint64_t)sent);
		done += (unsigned)sent;
	}
}

static void *send_datagrams(void *unused)
{
	double per_turn = opt.datagrams_per_s / PACES_PER_S, due = 0;
	uint64_t turn_ns = now_ns();

	(void)unused;
	for (unsigned turn = 0; !atomic_load(&stop);) {
		if (opt.datagrams_per_s <= 0) {
			wait_for_room();
			send_batch(datagram_clients[turn++ % (unsigned)opt.pairs], BATCH);
			continue;
		}
		due += per_turn;
		while (due >= 1) {
			unsigned count = due < BATCH ? (unsigned)due : BATCH;

			send_batch(datagram_clients[turn++ % (unsigned)opt.pairs], count);
			due -= count;
		}
		turn_ns += NS_PER_S / PACES_PER_S;
		sleep_until_ns(turn_ns);
	}
	return NULL;
}

static void *receive_datagrams(void *unused)
{
	static char data[BATCH][MOST_DATAGRAM];
	struct iovec parts[BATCH];
	struct mmsghdr messages[BATCH];
	uint64_t one = 1;

	(void)unused;
	for (unsigned i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ .iov_base = data[i], .iov_len = MOST_DATAGRAM };
		messages[i] =
			(struct mmsghdr){ .msg_hdr = { .msg_iov = &parts[i], .msg_iovlen = 1 } };
	}
	while (!atomic_load(&stop)) {
		int got;

		if (!is_readable(datagram_server, LOST_AFTER_MS))
			continue;
		got = recvmmsg(datagram_server, messages, BATCH, MSG_DONTWAIT, NULL);
		if (got < 0 && errno != EAGAIN)
			die_errno("the server's socket");
		for (int i = 0; i < got; i++)
			if (messages[i].msg_len != (unsigned)opt.datagram_bytes)
				die("a datagram of %u bytes instead of %d", messages[i].msg_len,
				    opt.datagram_bytes);
		if (got > 0)
			atomic_fetch_add(&datagrams_received, (uint64_t)got);
		if (atomic_load(&sender_waits) && under_way() <= WINDOW / 2) {
			atomic_store(&sender_waits, false);
			if (write(wake_sender, &one, sizeof(one)) < 0)
				die_errno("eventfd");
		}
	}
	return NULL;
}

static void run_udp_rate(void)
{
	uint64_t sent, received, begin_ns, end_ns, left = 0;
	double seconds, idle_per_s = 0, quiet = 0, quiet_after;
	pthread_t sender, receiver;

	take_datagram_places();
	make_sessions();
	wake_sender = eventfd(0, EFD_CLOEXEC);
	if (wake_sender < 0)
		die_errno("eventfd");
	if (opt.soak_file) {
		open_soakers();
		sleep_s(0.05);
		idle_per_s = calibrate(&quiet);
	}
	receiver = start(receive_datagrams, NULL);
	sender = start(send_datagrams, NULL);
	sleep_s(opt.warm_up_s);
	begin_ns = now_ns();
	sent = atomic_load(&datagrams_sent);
	received = atomic_load(&datagrams_received);
	if (opt.soak_file)
		left = soaked();
	sleep_s(opt.seconds);
	end_ns = now_ns();
	sent = atomic_load(&datagrams_sent) - sent;
	received = atomic_load(&datagrams_received) - received;
	if (opt.soak_file)
		left = soaked() - left;
	atomic_store(&stop, true);
	pthread_join(sender, NULL);
	pthread_join(receiver, NULL);
	if (!received)
		die("nothing arrived in the window");
	if (opt.soak_file) {
		idle_per_s = (idle_per_s + calibrate(&quiet_after)) / 2;
		if (quiet_after < quiet)
			quiet = quiet_after;
	}
	seconds = (double)(end_ns - begin_ns) / NS_PER_S;
	printf("{\"datagrams\": %llu, \"seconds\": %.6f, \"datagrams_per_s\": %.1f, \"sent\": %llu"
	       ", \"in_all\": %llu",
	       (unsigned long long)received, seconds, (double)received / seconds,
	       (unsigned long long)sent, (unsigned long long)atomic_load(&datagrams_received));
	if (opt.soak_file)
		printf(", \"quiet\": %.4f, \"cpu_s\": %.6f", quiet,
		       (double)soakers * seconds * (1 - (double)left / (idle_per_s * seconds)));
	printf("}\n");
}
