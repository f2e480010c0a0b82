"""Hosts whose training code is no library, written from their call shapes, and a toy guide."""
