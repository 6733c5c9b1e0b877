"""The folders of saved steps: what each holds, its checksums, and which one is loaded."""
