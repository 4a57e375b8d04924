"""Comparing methods: which runs a comparison needs, their results, tables, pages and plots."""
