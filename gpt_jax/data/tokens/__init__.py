"""Ids on disk: shards, prepared corpora, mirrors of remote ones, and caches."""
