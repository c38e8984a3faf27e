"""Programs that measure xccl and show what came out. Run them in the root of the repository."""
