"""What the kernel decides by itself (`datapath: express`): which listeners, which servers."""
