"""Byte streams to an agent: a process on this host, or one on another host over SSH."""
