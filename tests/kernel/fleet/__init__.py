"""Many machines with one etcd; one of them dies."""
