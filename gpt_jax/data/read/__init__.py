"""Files to documents: sources, remote stores, the hub, compression and formats."""
