"""The sockmap datapath: a verdict program redirects what arrives at one socket to the other."""
