"""One suite for every datapath."""
