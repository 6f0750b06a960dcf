"""What several tests need: networks, snapshots, host types, models of transformers, reference implementations."""
