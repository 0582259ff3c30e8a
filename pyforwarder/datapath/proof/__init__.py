"""What a datapath must show on this host before it is used."""
